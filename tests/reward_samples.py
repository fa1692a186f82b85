"""Small labelled responses for the tests of the reward models, and an engine without DeepSpeed."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.lvlm.model import load_processor
from fgaif.types import (
    DEFAULT_KINDS,
    ImageRef,
    Kind,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    SegmentClass,
)

# Every kind is judged by words of its own, so that a blind and random backbone can learn it.
WORDS: dict[Kind, dict[str, SegmentClass]] = {
    "object": {"a dog ": SegmentClass.OK, "the couch ": SegmentClass.HALLU},
    "attribute": {"small ": SegmentClass.OK, "red ": SegmentClass.HALLU},
    "relation": {"above": SegmentClass.OK, "left": SegmentClass.HALLU},
}


def images(folder: Path, count: int) -> list[ImageRef]:
    """Write ``count`` plain images of different colours."""
    refs = []
    for index in range(count):
        file = folder / f"{index}.png"
        Image.new("RGB", (28, 28), (index * 37 % 256, index * 91 % 256, 40)).save(file)
        refs.append(image_ref(file))
    return refs


def response(
    checkpoint: Path, image: ImageRef, pieces: Sequence[str], *, index: int = 0, ends: bool = True
) -> tuple[Response, tuple[Segment, ...]]:
    """A response made of ``pieces``, tokenised piece by piece, and its segments."""
    return _response(_tokenizer(checkpoint), image, pieces, index=index, ends=ends)


def labelled(checkpoint: Path, pictures: Sequence[ImageRef], count: int) -> list[LabeledResponse]:
    """``count`` responses of 1 to 4 segments whose words say their labels."""
    rng = np.random.default_rng(0)
    tokenizer = _tokenizer(checkpoint)
    rows = []
    for index in range(count):
        pieces, labels = [], []
        for _ in range(rng.integers(1, 5)):
            chosen = [rng.choice(["", *WORDS[kind]]) for kind in DEFAULT_KINDS]
            pieces.append("".join(chosen) + ". ")
            labels.append(
                [
                    WORDS[k].get(w, SegmentClass.NONE)
                    for k, w in zip(DEFAULT_KINDS, chosen, strict=True)
                ]
            )
        answer, segments = _response(
            tokenizer, pictures[index % len(pictures)], pieces, index=index
        )
        rows.append(
            LabeledResponse(
                response=answer,
                kinds=DEFAULT_KINDS,
                segments=segments,
                facts=(),
                verdicts={},
                labels=np.array(labels, dtype=np.int64),
            )
        )
    return rows


def settings(checkpoint: Path, **reward: object) -> Config:
    """A configuration whose policy and reward backbone are ``checkpoint``."""
    chosen = {"lr": 1e-2, "batch_size": 16, "micro_batch": 8, "epochs": 4, "evals": 4} | reward
    return parse_config(
        {
            "policy": {"model": str(checkpoint)},
            "reward": {"lora": {"r": 4, "alpha": 8}, **chosen},
        }
    )


@cache
def _tokenizer(checkpoint: Path) -> Any:
    return load_processor(checkpoint).tokenizer


def _response(
    tokenizer: Any, image: ImageRef, pieces: Sequence[str], *, index: int, ends: bool = True
) -> tuple[Response, tuple[Segment, ...]]:
    ids: list[int] = []
    text, segments = "", []
    for number, piece in enumerate(pieces):
        start = len(ids)
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        segments.append(
            Segment(
                index=number,
                char_start=len(text),
                char_end=len(text) + len(piece),
                token_start=start,
                token_end=len(ids),
            )
        )
        text += piece
    ids += [tokenizer.eos_token_id] * ends
    answer = Response(
        prompt=Prompt(id=str(index), image=image, text="Describe this image in detail."),
        sample=0,
        text=text,
        token_ids=np.array(ids, dtype=np.int64),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        finish="stop" if ends else "length",
        policy_version=0,
    )
    return answer, tuple(segments)
