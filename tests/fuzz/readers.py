"""Everything that reads a stranger's file, each with a small whole file to damage."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from fgaif.config import load_config
from fgaif.data.coco import read_coco
from fgaif.data.images import check_image, load_image
from fgaif.data.prompts import load_prompts
from fgaif.eval.answers import read_answers, read_captions
from fgaif.eval.benchmarks.mmhal import read_items
from fgaif.eval.rows import read_rows
from fgaif.eval.vocabulary import coco_vocabulary
from fgaif.feedback.store import label_store, response_store
from fgaif.lvlm.checkpoint_files import check_safetensors, read_json, read_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads the file at a path. ``seed`` is whole, and must be read without an error."""

    name: str
    file: str
    seed: bytes
    read: Callable[[Path], Any]


def image(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small picture with an edge in it."""
    pixels = (np.indices((12, 16)).sum(axis=0) * 9 % 251).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "L").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet() -> bytes:
    table = pa.table({"image": ["a.png", "a.png"], "prompt": ["What?", "Why?"], "id": ["1", "2"]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010F] = "A camera"
    return tags


def look(path: Path) -> None:
    load_image(check_image(path))


def prompts(path: Path) -> None:
    (path.parent / "a.png").write_bytes(image("PNG"))
    load_prompts(str(path))


RESPONSE = {
    "prompt": {"id": "p", "image": {"path": "a.png", "sha256": "0" * 64}, "text": "What?"},
    "sample": 0,
    "text": "A dog.",
    "token_ids": [5, 6, 2],
    "rollout_logprobs": [-0.1, -0.2, -0.3],
    "finish": "stop",
    "policy_version": 0,
}
SEGMENT = {"index": 0, "char_start": 0, "char_end": 6, "token_start": 0, "token_end": 2}
FACT = {"kind": "object", "text": "There is a dog.", "segment": 0, "requires": []}
LABELED = {
    "response": RESPONSE,
    "segments": [SEGMENT],
    "facts": [FACT],
    "verdicts": {"There is a dog.": {"answer": "yes", "p_yes": 0.9, "problem": "", "votes": []}},
    "labels": [[1, 0, 0]],
    "provenance": {},
}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"image_id": 1, "category_id": 1}],
}
MMHAL = [
    {
        "image_id": "1", "image_src": "http://a.example/1.jpg", "question": "What?",
        "question_type": "attribute", "question_topic": "x", "gt_answer": "A dog.",
        "image_content": ["dog"], "model_answer": "A cat.",
    }
]  # fmt: skip
CONFIG = b"""name: mine
data: {train: prompts.jsonl, feedback_prompts: 10}
policy:
  lora: &lora {r: 4, alpha: 8}
reward:
  lora: *lora
  epochs: 1.5
ppo: {lr: 3.0e-5, steps: 7, shape: {values: hard}}
"""
TENSORS = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}


READERS = (
    Reader(name="JPEG", file="a.jpg", seed=image("JPEG", exif=exif()), read=look),
    Reader(name="PNG", file="a.png", seed=image("PNG", "P", exif=exif()), read=look),
    Reader(name="WebP", file="a.webp", seed=image("WEBP", exif=exif()), read=look),
    Reader(name="TIFF", file="a.tif", seed=image("TIFF", "F"), read=look),
    Reader(name="GIF", file="a.gif", seed=image("GIF", "P"), read=look),
    Reader(name="BMP", file="a.bmp", seed=image("BMP"), read=look),
    Reader(
        name="prompts (JSONL)", file="p.jsonl", read=prompts,
        seed=lines({"image": "a.png", "prompt": "What?"}, {"image": "a.png", "prompt": "Why?"}),
    ),
    Reader(name="prompts (Parquet)", file="p.parquet", seed=parquet(), read=prompts),
    Reader(name="configuration", file="c.yaml", seed=CONFIG, read=load_config),
    Reader(name="COCO annotations", file="c.json", seed=json.dumps(COCO).encode(), read=read_coco),
    Reader(
        name="responses", file="r.jsonl", seed=lines(RESPONSE, RESPONSE | {"sample": 1}),
        read=lambda path: list(response_store(path)),
    ),
    Reader(
        name="labels", file="l.jsonl", seed=lines(LABELED, LABELED),
        read=lambda path: list(label_store(path)),
    ),
    Reader(
        name="rows of a benchmark", file="q.jsonl", read=read_rows,
        seed=lines({"question_id": 1, "text": "What?"}, {"question_id": 2, "text": "Why?"}),
    ),
    Reader(
        name="answers of a benchmark", file="a.jsonl", read=read_answers,
        seed=lines({"question_id": 1, "text": "Yes."}, {"question_id": 2, "text": "No."}),
    ),
    Reader(
        name="captions", file="a.jsonl", read=read_captions,
        seed=lines({"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}),
    ),
    Reader(name="MMHal-Bench", file="m.json", seed=json.dumps(MMHAL).encode(), read=read_items),
    Reader(
        name="synonyms", file="s.txt", seed=b"dog, puppy\ncat, kitten\n", read=coco_vocabulary
    ),
    Reader(
        name="config.json of a checkpoint", file="config.json", read=read_json,
        seed=json.dumps({"model_type": "llava", "vision_config": {"image_size": 32}}).encode(),
    ),
    Reader(
        name="safetensors, header", file="m.safetensors", seed=save(TENSORS), read=check_safetensors
    ),
    Reader(
        name="safetensors, tensors", file="m.safetensors", seed=save(TENSORS), read=read_tensors
    ),
)  # fmt: skip
"""A file and what reads it."""
