"""Tiny reward models on disk, images as requests carry them, and a backend without Ray."""

import base64
import io
from pathlib import Path

import torch
from PIL import Image

from actors.scorer import ScoringActor
from fgaif.config import Config, LoraConfig
from fgaif.data.images import ImageBytes
from fgaif.lvlm.model import load_lvlm
from fgaif.reward.checkpoint import RewardCard, checkpoint_digest, save_reward_model
from fgaif.reward.model import new_reward_model, trainable_state
from fgaif.serving.errors import invalid
from fgaif.serving.schema import (
    GenerateRequest,
    GenerateResponse,
    ModelsResponse,
    ReloadResponse,
)
from fgaif.serving.scoring import Refused, ScoredItem, ScoreItem
from fgaif.types import KINDS

TEXT = (
    "The image features a dog sitting on a couch, and there is a small red star above it, next to "
    "a green moon. A man in a white shirt is standing on the left side of the street. It is day."
)


def write_rewards(checkpoint: Path, folder: Path, seed: int = 0) -> Path:
    """Write random reward models of all kinds, no two alike, that were never trained."""
    for index, kind in enumerate(KINDS):
        backbone = load_lvlm(checkpoint, dtype="float32")
        model = new_reward_model(backbone, LoraConfig(r=4, alpha=8), "linear", seed + index)
        generator = torch.Generator().manual_seed(100 * seed + index)
        state = {
            name: torch.randn(tensor.shape, generator=generator) * 0.5
            for name, tensor in trainable_state(model).items()
        }
        card = RewardCard(
            kind=kind,
            head="linear",
            backbone=str(checkpoint),
            backbone_digest=checkpoint_digest(checkpoint),
            tokenizer_digest="",
            min_words=5,
            input_digest=f"{seed}",
            metrics={"f1_hallu": 0.5},
        )
        save_reward_model(folder / kind, model, state, card)
    return folder


def png(shade: int = 40, size: int = 28) -> bytes:
    """A small plain image as a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 255 - shade, 90)).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


class LocalBackend:
    """The scoring actor itself as a backend."""

    def __init__(self, rewards: Path, config: Config) -> None:
        self.actor = ScoringActor(rewards, config)

    async def score(self, item: ScoreItem) -> ScoredItem:
        (answer,) = self.actor.score([item])
        if isinstance(answer, Refused):
            raise invalid(answer.message, answer.field)
        return answer

    async def generate(self, image: ImageBytes, request: GenerateRequest) -> GenerateResponse:
        return GenerateResponse(text=f"{request.prompt} {image.sha256[:4]}", finish="stop")

    async def models(self) -> ModelsResponse:
        return ModelsResponse(models=[self.actor.info()])

    async def reload(self, version: str | None) -> ReloadResponse:
        now = self.actor.probe()
        if version not in (None, now):
            raise invalid(f"the folder holds version {now}", "version")
        return ReloadResponse(previous=now, version=now, replicas=1)

    async def probe(self) -> str:
        return self.actor.probe()
