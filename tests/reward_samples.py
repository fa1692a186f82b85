"""Small labelled responses for the tests of the reward models, and an engine without DeepSpeed."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fgaif.config import Config, LoraConfig, parse_config
from fgaif.data.images import image_ref
from fgaif.lvlm.model import load_lvlm, load_processor
from fgaif.reward.checkpoint import RewardCard, checkpoint_digest, save_reward_model
from fgaif.reward.model import RewardModel, new_reward_model, trainable_state
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


def noisy_model(checkpoint: Path, kind: Kind, head: str = "linear") -> RewardModel:
    """A reward model whose adapter does something: B is random instead of zero."""
    backbone = load_lvlm(checkpoint, dtype="float32")
    model = new_reward_model(backbone, LoraConfig(r=4, alpha=8), head, DEFAULT_KINDS.index(kind))
    generator = torch.Generator().manual_seed(DEFAULT_KINDS.index(kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def card_of(checkpoint: Path, kind: Kind, head: str = "linear") -> RewardCard:
    return RewardCard(
        kind=kind,
        head=head,
        backbone=str(checkpoint),
        backbone_digest=checkpoint_digest(checkpoint),
        tokenizer_digest="t",
        min_words=5,
        input_digest="i",
        metrics={"f1_hallu": 0.5},
    )


def save_noisy(checkpoint: Path, folder: Path) -> Path:
    """Save a noisy reward model of each kind into ``folder``, the relation's with an MLP head."""
    for kind in DEFAULT_KINDS:
        head = "mlp" if kind == "relation" else "linear"
        model = noisy_model(checkpoint, kind, head)
        state = trainable_state(model)
        save_reward_model(folder / kind, model, state, card_of(checkpoint, kind, head))
    return folder
