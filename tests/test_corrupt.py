"""Corrupted images: the same twice, stronger with strength, resumable, bad files counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgaif.data.images import image_ref
from fgaif.errors import ConfigError, DataError
from fgaif.eval.corrupt import (
    KINDS,
    Corruption,
    corrupt_folder,
    corrupt_image,
    corrupted_ref,
    fog,
    plasma,
)


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    return Image.open(photos / "astronaut.jpg").convert("RGB").resize((96, 64))


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_image_and_seed_give_the_same_bytes(kind: str, photo: Image.Image) -> None:
    corruption = Corruption(kind=kind, strength=3)  # type: ignore[arg-type]
    first = corrupt_image(photo, corruption, "a").tobytes()
    assert corrupt_image(photo, corruption, "a").tobytes() == first
    other = corrupt_image(photo, Corruption(kind=kind, strength=3, seed=1), "a")  # type: ignore[arg-type]
    assert (other.tobytes() == first) == (kind == "blur")  # nothing random in it


@pytest.mark.parametrize("kind", KINDS)
def test_strength_grows(kind: str, photo: Image.Image) -> None:
    """Fog is drawn anew each time, so its mean over images is what grows."""
    levels = [
        np.mean(
            [
                distance(photo, corrupt_image(photo, Corruption(kind=kind, strength=s), str(key)))  # type: ignore[arg-type]
                for key in range(8)
            ]
        )
        for s in range(1, 6)
    ]
    assert levels[0] > 1
    assert levels == sorted(levels)


def test_fog_follows_its_formula() -> None:
    """Grey 0.5 under thickness 1.5: between (0.5 + 0) / 4 and (0.5 + 1.5) / 4."""
    hazy = fog(np.full((40, 50, 3), 0.5), 1.5, 2.0, np.random.default_rng(0))
    assert hazy.min() >= 0.125
    assert hazy.max() <= 0.5
    assert hazy.std() > 0.02
    assert (hazy[..., 0] == hazy[..., 2]).all()


def test_plasma_spans_its_range_and_is_rougher_with_less_decay() -> None:
    def roughness(decay: float) -> float:
        drawn = [plasma(64, decay, np.random.default_rng(i)) for i in range(10)]
        assert all((p.min(), p.max()) == (0.0, 1.0) for p in drawn)
        return float(np.mean([np.abs(np.diff(p, axis=0)).mean() / p.std() for p in drawn]))

    assert roughness(1.4) > 1.5 * roughness(2.0)


def test_noise_has_the_stated_deviation() -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = corrupt_image(grey, Corruption(kind="noise", strength=1), "x")
    assert np.asarray(noisy).std() == pytest.approx(0.08 * 255, rel=0.03)


def test_a_folder_keeps_names_counts_bad_files_and_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(source / "a.png")
    Image.new("RGB", (40, 30), "blue").save(source / "deep" / "b.JPG", format="JPEG")
    (source / "broken.png").write_bytes(b"no image")
    (source / "notes.txt").write_text("left alone")
    corruption = Corruption(kind="fog", strength=2)

    first = corrupt_folder(source, out, corruption)
    assert (first.made, first.kept, len(first.skipped)) == (2, 0, 1)
    assert first.skipped[0].row == "broken.png"
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "a.png", "corrupted.jsonl", "deep/b.JPG",
    ]  # fmt: skip
    content = (out / "a.png").read_bytes()

    (out / "deep" / "b.JPG").unlink()  # as if stopped before it
    again = corrupt_folder(source, out, corruption)
    assert (again.made, again.kept) == (1, 1)
    other = corrupt_folder(source, out, Corruption(kind="fog", strength=4))
    assert (other.made, other.kept) == (2, 0)
    assert (out / "a.png").read_bytes() != content


def test_a_cut_manifest_is_not_trusted(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.new("RGB", (40, 30), "red").save(source / "a.png")
    corruption = Corruption(kind="blur", strength=1)
    corrupt_folder(source, out, corruption)
    lines = (out / "corrupted.jsonl").read_text()
    assert json.loads(lines)["image"] == "a.png"
    (out / "corrupted.jsonl").write_text(lines[:20])
    assert corrupt_folder(source, out, corruption).made == 1


def test_a_copy_is_kept_by_content(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    ref = image_ref(tmp_path / "a.png")
    corruption = Corruption.parse("noise:2", seed=5)
    copy = corrupted_ref(ref, corruption, tmp_path / "cache")
    assert Path(copy.path) == tmp_path / "cache" / "noise-2-5" / f"{ref.sha256}.png"
    assert copy.sha256 != ref.sha256
    stamp = Path(copy.path).stat().st_mtime_ns
    assert corrupted_ref(ref, corruption, tmp_path / "cache") == copy
    assert Path(copy.path).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("text", ["fog", "fog:", "fog:9", "rain:3", "fog:x", ":3"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Corruption.parse(text)


def test_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for images, out in ((tmp_path / "no", tmp_path / "x"), (tmp_path, tmp_path)):
        with pytest.raises(DataError, match="existing folder"):
            corrupt_folder(images, out, Corruption(kind="fog", strength=1))
    with pytest.raises(DataError, match="no images"):
        corrupt_folder(tmp_path, tmp_path / "x", Corruption(kind="fog", strength=1))
