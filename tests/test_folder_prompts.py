"""``fgaif prompts``: a folder of images becomes prompts files that a run reads."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from cluster.cli.main import main
from fgaif.data.folder import write_folder_prompts
from fgaif.data.prompts import load_prompts
from fgaif.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images in two folders, a copy, a broken one, a hidden one and a text."""
    root = tmp_path / "my photos"
    (root / "trips" / ".thumbs").mkdir(parents=True)
    for index in range(20):
        place = root if index % 2 else root / "trips"
        Image.new("RGB", (8, 8), (index, 0, 0)).save(place / f"{index}.PNG")
    shutil.copy(root / "1.PNG", root / "trips" / "copy.png")
    (root / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(root / "trips" / ".thumbs" / "t.png")
    (root / "notes.txt").write_text("not an image")
    return root


def test_every_distinct_image_is_in_one_of_the_two_files(folder: Path, tmp_path: Path) -> None:
    made = write_folder_prompts(folder, tmp_path / "data", held_out=0.25, texts=("A?", "B?"))
    assert list(made.rows.values()) == [15, 5]
    assert made.repeats == 1
    assert [one.row for one in made.skipped] == ["broken.jpg"]
    train, held = (load_prompts(str(file), root=folder).prompts for file in made.rows)
    hashes = [prompt.image.sha256 for prompt in (*train, *held)]
    assert len(set(hashes)) == 20
    assert [prompt.text for prompt in train[:3]] == ["A?", "B?", "A?"]


def test_what_is_held_out_depends_on_content_and_seed_alone(folder: Path, tmp_path: Path) -> None:
    def held(name: str, seed: int = 0) -> set[str]:
        made = write_folder_prompts(folder, tmp_path / name, seed=seed)
        file = list(made.rows)[1]
        return {json.loads(line)["id"] for line in file.read_text().splitlines()}

    first = held("a")
    (folder / "3.PNG").rename(folder / "a new name.png")
    assert held("b") == first
    assert held("c", seed=1) != first


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: [p.unlink() for p in root.rglob("*.PNG")], "1 usable images among 2 files"),
        (lambda root: (root / "../data").mkdir() or (root / "../data/train.jsonl").touch(),
         "exists; name another folder with --out"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(folder: Path, make, said: str) -> None:  # type: ignore[no-untyped-def]
    make(folder)
    with pytest.raises(DataError, match=said):
        write_folder_prompts(folder, folder.parent / "data")


def test_the_command_says_the_keys_to_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "argv", ["fgaif", "prompts", "my photos"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code in (0, None)
    assert "wrote my_data/train.jsonl: 18 prompts" in printed.out
    assert "data.held_out=my_data/held_out.jsonl 'data.image_root=my photos'" in printed.out
    assert "broken.jpg" in printed.err
    assert "1 images are there twice" in printed.err
