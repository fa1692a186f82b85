import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fgaif.config import parse_config
from fgaif.data.prompts import PromptSet, load_prompts
from fgaif.data.sources import open_source
from fgaif.errors import DataError

ROWS = [
    {"id": "x", "image": "red.png", "prompt": "What is it?"},
    {"id": "y", "image": "blue.png", "prompt": "Describe it."},
    {"id": "z", "image": "red.png", "prompt": "And now?"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def jsonl(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    return str(path)


def parquet(folder: Path, rows: list[dict[str, object]]) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def what(loaded: PromptSet) -> list[tuple[str, str, str]]:
    return [(p.id, Path(p.image.path).name, p.text) for p in loaded.prompts]


def test_jsonl_and_parquet_give_the_same_prompts(folder: Path) -> None:
    first = load_prompts(jsonl(folder, *ROWS))
    second = load_prompts(parquet(folder, ROWS))
    assert what(first) == what(second) == [(r["id"], r["image"], r["prompt"]) for r in ROWS]
    assert first.digest == second.digest
    assert first.prompts[0].image == first.prompts[2].image
    assert first.warning() == ""


def test_digest_covers_ids_texts_and_pixels_but_not_the_place(folder: Path) -> None:
    digest = load_prompts(jsonl(folder, *ROWS)).digest
    moved = folder / "moved"
    moved.mkdir()
    for name in ("red.png", "blue.png"):
        (moved / name).write_bytes((folder / name).read_bytes())
    assert load_prompts(jsonl(moved, *ROWS)).digest == digest
    assert load_prompts(jsonl(moved, *ROWS[:2])).digest != digest
    Image.new("RGB", (4, 4), "green").save(moved / "red.png")
    assert load_prompts(jsonl(moved, *ROWS)).digest != digest


def test_ids_default_to_the_row_and_images_may_be_a_list_of_one(folder: Path) -> None:
    source = jsonl(folder, {"images": ["red.png"], "prompt": "A"}, "", {**ROWS[1], "id": 7})
    assert what(load_prompts(source)) == [
        ("rows-1", "red.png", "A"),
        ("7", "blue.png", "Describe it."),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": ', r"rows\.jsonl:2: not valid JSON"),
        ('{"image": "\udcff"}', r"rows\.jsonl:2: not valid JSON"),
        ("[" * 100_000, r"rows\.jsonl:2: not valid JSON"),
        ('["red.png"]', r"rows\.jsonl:2: .* must be an object"),
        ({"picture": "red.png", "prompt": "A"}, r"rows\.jsonl:2: no column `image`, only picture"),
        ({"image": "red.png", "text": "A"}, r"rows\.jsonl:2: no column `prompt`, only image, text"),
        ({"image": 40468, "prompt": "A"}, r"rows\.jsonl:2: column `image`: 40468"),
        ({"images": ["a", "b"], "prompt": "A"}, r"rows\.jsonl:2: .*`image`"),
        ({"image": "red.png", "prompt": " "}, r"rows\.jsonl:2: column `prompt`: ' '"),
        ({"image": "red.png", "prompt": None}, r"rows\.jsonl:2: column `prompt`: None"),
        ({"image": "red.png", "prompt": "A", "id": ["x"]}, r"rows\.jsonl:2: column `id`"),
        ({**ROWS[1], "id": "x"}, r"rows\.jsonl:2: column `id`: 'x' was used at .*rows\.jsonl:1"),
    ],
)
def test_a_bad_row_is_named_with_its_column(folder: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(jsonl(folder, ROWS[0], row))


def test_bad_parquet_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.parquet:1: column `image`: \{'bytes'"):
        load_prompts(parquet(folder, [{"image": {"bytes": b"abc"}, "prompt": "A"}]))
    path = folder / "broken.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet: not a whole Parquet file"):
        load_prompts(str(path))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: No such file"):
        load_prompts(str(folder / name))


def test_other_files_and_splits_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        load_prompts(str(folder / "rows.csv"))
    with pytest.raises(DataError, match="known: train, val, test"):
        load_prompts("scenes:tset", limit=1, cache=folder)


def test_missing_and_broken_images_are_skipped_and_counted(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    bad = [{"image": name, "prompt": "A"} for name in ("gone.png", "broken.png", "gone.png")]
    loaded = load_prompts(jsonl(folder, ROWS[0], *bad, ROWS[1]))
    assert [prompt.id for prompt in loaded.prompts] == ["x", "y"]
    assert [item.row.rpartition(":")[2] for item in loaded.skipped] == ["2", "3", "4"]
    text = loaded.warning(examples=2)
    assert "skipped 3 of 5 rows" in text
    assert "rows.jsonl:2: image" in text
    assert "no such file" in text
    assert "broken.png: cannot be decoded" in text
    assert text.endswith("and 1 more")


def test_no_usable_row_is_an_error_with_the_reasons(folder: Path) -> None:
    with pytest.raises(DataError, match=r"skipped 1 of 1 rows\n.*gone\.png: no such file"):
        load_prompts(jsonl(folder, {"image": "gone.png", "prompt": "A"}))
    with pytest.raises(DataError, match="no rows"):
        load_prompts(jsonl(folder))


def test_limit_counts_usable_prompts_and_leaves_later_rows_alone(folder: Path) -> None:
    source = jsonl(folder, {"image": "gone.png", "prompt": "A"}, *ROWS, {**ROWS[0], "id": "late"})
    loaded = load_prompts(source, limit=3)
    assert [prompt.id for prompt in loaded.prompts] == ["x", "y", "z"]
    assert len(loaded.skipped) == 1


def test_seed_shuffles_the_same_way_each_time(folder: Path) -> None:
    rows = [{"image": "red.png", "prompt": "A", "id": str(number)} for number in range(30)]
    orders = [
        [p.id for p in load_prompts(jsonl(folder, *rows), seed=seed).prompts] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0], key=int) == [row["id"] for row in rows]


def test_a_file_s_prompts_are_drawn_by_the_datas_seed_if_wanted(folder: Path) -> None:
    rows = [{"image": "red.png", "prompt": str(number), "id": str(number)} for number in range(50)]
    source = jsonl(folder, *rows)

    def drawn(limit: int, **data: object) -> list[str]:
        config = parse_config({"dir": str(folder), "data": {"train": source, **data}})
        return [prompt.id for prompt in open_source(source, config, limit).prompts.prompts]

    assert drawn(5) == list("01234")
    shuffled = drawn(20, shuffle=True, seed=3)
    assert shuffled == drawn(20, shuffle=True, seed=3) != drawn(20, shuffle=True, seed=4)
    assert drawn(5, shuffle=True, seed=3) == shuffled[:5] != list("01234")


def test_images_are_confined_to_the_root_or_the_folder_of_the_file(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(folder / "red.png")
    for outside in (str(folder / "red.png"), "../red.png", "link.png"):
        source = jsonl(inner, {"image": outside, "prompt": "A"})
        for root in (None, inner):
            with pytest.raises(DataError, match="lies outside"):
                load_prompts(source, root=root)
    assert len(load_prompts(jsonl(inner, ROWS[0]), root=folder).prompts) == 1
    inside = jsonl(inner, {"image": str(folder / "red.png"), "prompt": "A"})
    assert len(load_prompts(inside, root=folder).prompts) == 1


def test_scenes_are_written_and_then_read_like_any_files(tmp_path: Path) -> None:
    loaded = load_prompts("scenes:val", limit=3, cache=tmp_path)
    assert [prompt.id for prompt in loaded.prompts] == [f"val-{n:06d}" for n in range(3)]
    assert all(Path(prompt.image.path).is_relative_to(tmp_path) for prompt in loaded.prompts)
    assert load_prompts("scenes:val", limit=3, cache=tmp_path).digest == loaded.digest
    assert load_prompts("scenes:test", limit=3, cache=tmp_path).digest != loaded.digest


def test_answers_are_read_and_change_the_digest(folder: Path) -> None:
    plain = load_prompts(jsonl(folder, *ROWS))
    asked = load_prompts(jsonl(folder, {**ROWS[0], "answer": " yes "}, {**ROWS[1], "answer": None}))
    assert [prompt.answer for prompt in asked.prompts] == ["yes", ""]
    assert PromptSet(source="", prompts=plain.prompts[1:2]).digest == (
        PromptSet(source="", prompts=asked.prompts[1:2]).digest
    )
    assert PromptSet(source="", prompts=plain.prompts[:1]).digest != (
        PromptSet(source="", prompts=asked.prompts[:1]).digest
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*answer"):
        load_prompts(jsonl(folder, {**ROWS[0], "answer": 5}))
