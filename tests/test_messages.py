"""Rows of messages, as TRL, verl and Qwen have them, are questions; what is not is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fgaif.data.prompts import load_prompts
from fgaif.errors import DataError

TEXT = {"type": "text", "text": "What is it?"}


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def load(folder: Path, *rows: Any) -> list[tuple[str, str]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(str(file))
    assert not found.skipped, found.warning()
    return [(Path(prompt.image.path).name, prompt.text) for prompt in found.prompts]


def test_one_question_in_every_form(folder: Path) -> None:
    rows = [
        {"image": "a.png", "prompt": "What is it?"},
        {"images": ["a.png"], "prompt": user({"type": "image"}, TEXT)},
        {"images": [{"image": "a.png"}], "prompt": said("<image>What is it?")},
        {"image": "a.png", "messages": said("<image>\nWhat is it?")},
        {"messages": user({"type": "image", "image": f"file://{folder}/a.png"}, TEXT)},
        {"messages": user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT)},
    ]  # fmt: skip
    assert load(folder, *rows) == [("a.png", "What is it?")] * len(rows)


def test_parquet_rows_of_messages_are_read(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"images": ["a.png"], "prompt": user({"type": "image"}, TEXT)}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (prompt,) = load_prompts(str(folder / "rows.parquet")).prompts
    assert prompt.text == "What is it?"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"video": "a.mp4", "prompt": "What?"}, "column `video`: videos are not supported"),
        ({"messages": user({"type": "video", "video": "a.mp4"}, TEXT)}, "videos are not supported"),
        ({"images": ["a.png", "b.png"], "prompt": user(TEXT)}, "2 images; one per prompt"),
        ({"messages": user(TEXT)}, "0 images; one per prompt"),
        ({"messages": [{"role": "system", "content": "Be kind."}, *user(TEXT)]},
         "messages of system, user; one of the user is supported"),
        ({"messages": [*user(TEXT), {"role": "assistant", "content": "A."}]}, "user, assistant"),
        ({"messages": []}, "messages of none"),
        ({"messages": ["What?"]}, "expected messages with `role` and `content`"),
        ({"messages": user({"type": "audio"})}, "expected parts of type `text` or `image`"),
        ({"messages": [{"role": "user", "content": 3}]}, "expected a text or a list of parts"),
        ({"images": [3], "prompt": user(TEXT)}, "expected the path of an image"),
    ],
)  # fmt: skip
def test_what_is_no_question_about_an_image_is_refused_by_row_and_column(
    folder: Path, row: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words) as refused:
        load(folder, row)
    assert "rows.jsonl:1: column `" in str(refused.value)
