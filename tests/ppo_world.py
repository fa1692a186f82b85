"""Small PPO inputs on real image files, shared by the tests of learner and reference."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.logprobs import response_logprobs
from fgaif.ppo.batch import make_batch
from fgaif.types import Evaluation, FloatArray, Prompt, Response, TrainBatch

VOCABULARY = 260  # ids below are text in the tiny tokenizer, above its special tokens


def tiny_config(model: Path, run_dir: Path, **ppo: Any) -> Config:
    """Config on a tiny checkpoint: LoRA r 4, two optimiser steps of four responses per epoch."""
    defaults: dict[str, Any] = {
        "steps": 10, "rollout_batch": 8, "minibatch": 4, "micro_batch": 3, "epochs": 2, "lr": 1e-2,
        "value_lr": 1e-2, "value_lora": {"r": 4, "alpha": 4.0}, "zero_stage": 2,
    }  # fmt: skip
    return parse_config(
        {
            "dir": str(run_dir),
            "policy": {"model": str(model), "lora": {"r": 4, "alpha": 8.0}, "temperature": 0.7},
            "ppo": defaults | ppo,
        }
    )


def make_responses(folder: Path, count: int, seed: int = 0) -> list[Response]:
    """Random token ids of 3 to 9 tokens over ``count // 2`` small random images."""
    rng = np.random.default_rng(seed)
    responses = []
    for index in range(count):
        path = folder / f"{index // 2}.png"
        if not path.exists():
            pixels = rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        length = int(rng.integers(3, 10))
        responses.append(
            Response(
                prompt=Prompt(id=path.stem, image=image_ref(path), text="Describe this image."),
                sample=index % 2,
                text="",
                token_ids=rng.integers(5, VOCABULARY, length),
                rollout_logprobs=np.zeros(length, np.float32),
                finish="stop",
                policy_version=0,
            )
        )
    return responses


@torch.no_grad()
def hf_logprobs(
    model: nn.Module, path: Path, responses: Sequence[Response], *, temperature: float = 1.0
) -> Tensor:
    """Log-probs (B, T) of a loaded model, zero at padding, without actors and engines."""
    encoder = load_encoder(path)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    batch = encoder.encode(responses, base.get_input_embeddings().weight)
    features = FeatureCache(model, encoder)([response.prompt.image for response in responses])
    return response_logprobs(model, batch, temperature=temperature, features=features)


def make_train_batch(
    responses: Sequence[Response], old_logprobs: Sequence[FloatArray], seed: int = 0
) -> TrainBatch:
    """Random rewards and values; the reference is the old policy."""
    rng = np.random.default_rng(seed)
    rewards = [rng.normal(size=len(old)).astype(np.float32) for old in old_logprobs]
    values = [rng.normal(size=len(old)).astype(np.float32) for old in old_logprobs]
    return make_batch(
        responses,
        old_logprobs,
        [
            Evaluation(reference_logprobs=old, values=value)
            for old, value in zip(old_logprobs, values, strict=True)
        ],
        rewards,
        kl_coef=0.1,
        gamma=1.0,
        lam=0.95,
    )


def questions(responses: Sequence[Response]) -> list[Prompt]:
    """Yes/no questions about the responses' images."""
    words = ("dog", "red cat")
    return [
        Prompt(id=f"q{i}", image=response.prompt.image, text=f"Is there a {words[i % 2]}?")
        for i, response in enumerate(responses)
    ]


def with_attention_dropout(model: Path, folder: Path) -> Path:
    """The checkpoint as one whose base drops attention weights in training."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["text_config"]["attention_dropout"] = 0.5
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder
