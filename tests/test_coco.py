"""COCO annotation files, and prompts from them."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fgaif.config import parse_config
from fgaif.data.coco import CocoImage, read_coco
from fgaif.data.prompts import load_prompts
from fgaif.data.sources import open_source, split_prompts
from fgaif.errors import DataError

IMAGES = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": 8} for n in (9, 4, 7)]
INSTANCES = {
    "info": {"year": 2014},
    "images": IMAGES,
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog", "supercategory": "x"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 18, "segmentation": [[1, 2]], "bbox": [0, 0, 1, 1]},
        {"id": 2, "image_id": 4, "category_id": 1, "segmentation": {"counts": [3], "size": [1, 1]}},
        {"id": 3, "image_id": 9, "category_id": 1},
        {"id": 4, "image_id": 9, "category_id": 18},
    ],
}
CAPTIONS = {
    "images": IMAGES,
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "A dog and a man.\n"},
        {"id": 2, "image_id": 9, "caption": "A man walks."},
    ],
}


def write(path: Path, tree: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO folder of one split: three images listed, one of them missing."""
    write(tmp_path / "annotations/instances_train2014.json", INSTANCES)
    write(tmp_path / "annotations/captions_train2014.json", CAPTIONS)
    (tmp_path / "train2014").mkdir()
    for number in (4, 9):
        picture = Image.new("RGB", (8, 8), (20 * number, 0, 0))
        picture.save(tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg")
    return tmp_path


def test_instances_and_captions_join_by_image_in_annotation_order(coco: Path) -> None:
    files = [coco / f"annotations/{kind}_train2014.json" for kind in ("instances", "captions")]
    images = read_coco(*files)
    assert list(images) == [4, 7, 9]
    assert images[9] == CocoImage(
        id=9,
        file_name="COCO_train2014_000000000009.jpg",
        objects=("dog", "person", "dog"),
        captions=("A dog and a man.", "A man walks."),
    )
    assert images[4].objects == ("person",)
    assert images[7] == CocoImage(id=7, file_name="COCO_train2014_000000000007.jpg")
    assert read_coco(files[0])[9].captions == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list `images`"),
        ({"images": [{"id": 1}]}, r"images\[0\]\.file_name: missing; expected str"),
        ({"images": [{"id": "1", "file_name": "a"}]}, r"images\[0\]\.id: '1'; expected int"),
        ({"annotations": {}}, "no list `annotations`"),
        ({"annotations": [3]}, r"annotations\[0\] = 3"),
        ({"annotations": [{"image_id": 5, "caption": "a"}]}, r"annotations\[0\]\.image_id = 5"),
        ({"annotations": [{"image_id": 9, "caption": None}]}, r"annotations\[0\]\.caption: None"),
        ({"annotations": [{"image_id": 9}]}, r"annotations\[0\]\.category_id: missing"),
        (
            {"annotations": [{"image_id": 9, "category_id": 2}]},
            r"annotations\[0\]\.category_id = 2: not in `categories`",
        ),
        ({"categories": [{"id": 1}]}, r"categories\[0\]\.name: missing"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "broken.json", INSTANCES | change)
    with pytest.raises(DataError, match=rf"broken\.json: {message}"):
        read_coco(file)


def test_files_that_are_no_coco_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.json: no list `images`"):
        read_coco(write(tmp_path / "list.json", [1]))
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"half\.json: not valid JSON"):
        read_coco(tmp_path / "half.json")
    with pytest.raises(DataError, match=r"gone\.json: No such file"):
        read_coco(tmp_path / "gone.json")


def test_files_of_other_images_do_not_join(coco: Path) -> None:
    other = write(coco / "x.json", {"images": [{"id": 9, "file_name": "other.jpg"}]})
    with pytest.raises(DataError, match=r"'other\.jpg', but image 9 is 'COCO_train2014_0+9\.jpg'"):
        read_coco(coco / "annotations/captions_train2014.json", other)


def test_outlines_are_not_kept_in_memory(tmp_path: Path) -> None:
    """2,000 outlines of 500 numbers: 6 MB of text, which as Python floats would be 32 MB."""
    outline = [[round(0.25 + n, 2) for n in range(500)]]
    rows = [{"image_id": 9, "category_id": 1, "segmentation": outline}] * 2000
    file = write(tmp_path / "big.json", INSTANCES | {"annotations": rows})
    tracemalloc.start()
    assert len(read_coco(file)[9].objects) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * file.stat().st_size


def test_a_folder_gives_one_prompt_per_image_and_counts_missing_ones(coco: Path) -> None:
    loaded = load_prompts(f"coco:{coco}")
    assert [prompt.id for prompt in loaded.prompts] == [
        "COCO_train2014_000000000004",
        "COCO_train2014_000000000009",
    ]
    assert {prompt.text for prompt in loaded.prompts} == {"Describe this image in detail."}
    assert "skipped 1 of 3 rows" in loaded.warning()
    assert "captions_train2014.json:image 7" in loaded.warning()
    by_file = load_prompts(f"coco:{coco}/annotations/instances_train2014.json")
    assert by_file.prompts == loaded.prompts


def test_images_are_found_by_layout_and_by_root(coco: Path, tmp_path: Path) -> None:
    expected = load_prompts(f"coco:{coco}").digest
    (coco / "images").mkdir()
    (coco / "train2014").rename(coco / "images/train2014")
    assert load_prompts(f"coco:{coco}").digest == expected
    elsewhere = coco / "elsewhere"
    (coco / "images/train2014").rename(elsewhere)
    with pytest.raises(DataError, match="skipped 3 of 3"):
        load_prompts(f"coco:{coco}")
    assert load_prompts(f"coco:{coco}", root=elsewhere).digest == expected


def test_several_splits_are_ambiguous_and_listed(coco: Path) -> None:
    write(coco / "annotations/instances_val2014.json", INSTANCES)
    with pytest.raises(DataError, match=r"2 splits.*captions_train2014\.json, .*_val2014\.json"):
        load_prompts(f"coco:{coco}")
    with pytest.raises(DataError, match=r"no annotations/captions_\*\.json"):
        load_prompts(f"coco:{coco / 'train2014'}")
    with pytest.raises(DataError, match="no such file or folder"):
        load_prompts(f"coco:{coco / 'gone'}")


def test_a_file_name_cannot_leave_the_image_folder(coco: Path) -> None:
    Image.new("RGB", (8, 8)).save(coco / "secret.png")
    (coco / "train2014/link.png").symlink_to(coco / "secret.png")
    names = ["../secret.png", str(coco / "secret.png"), "link.png"]
    rows = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    rows += [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}]
    write(coco / "annotations/captions_train2014.json", {"images": rows})
    with pytest.raises(DataError, match="'secret' was used at"):
        load_prompts(f"coco:{coco}")
    write(coco / "annotations/captions_train2014.json", {"images": rows[1:]})
    loaded = load_prompts(f"coco:{coco}")
    assert [prompt.id for prompt in loaded.prompts] == ["COCO_train2014_000000000009"]
    assert all("lies outside" in item.reason for item in loaded.skipped)
    assert len(loaded.skipped) == 2


def test_images_are_drawn_by_the_datas_seed_whatever_the_runs_seed(tmp_path: Path) -> None:
    """40 images: 10 for feedback, 20 for PPO, disjoint; fewer images are the first of more."""
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(40)]
    write(tmp_path / "annotations/captions_toy.json", {"images": images})
    for n in range(40):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")

    def drawn(limit: int, **keys: object) -> list[str]:
        config = parse_config({"data": {"train": f"coco:{tmp_path}"}, **keys})
        source = open_source(config.data.train, config, limit)
        return [prompt.id for prompt in source.prompts.prompts]

    thirty = drawn(30)
    assert len(set(thirty)) == 30
    assert thirty == drawn(30, seed=5)
    assert thirty[:10] == drawn(10)
    assert thirty != [str(n) for n in range(30)]
    assert thirty != drawn(30, data={"train": f"coco:{tmp_path}", "seed": 1})
    config = parse_config(
        {"data": {"train": f"coco:{tmp_path}", "feedback_prompts": 10, "ppo_prompts": 20}}
    )
    feedback, ppo = split_prompts(open_source(config.data.train, config, 30), config)
    assert (len(feedback), len(ppo)) == (10, 20)
    assert not {p.id for p in feedback} & {p.id for p in ppo}
