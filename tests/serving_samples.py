"""Tiny reward models on disk, images as requests carry them, and a backend without Ray."""

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import byte_level_tokenizer

from actors.scorer import ScoringActor
from fgaif.config import Config, LoraConfig, RewardShapeConfig
from fgaif.data.images import load_image
from fgaif.feedback.facts import SceneFacts
from fgaif.lvlm.model import load_lvlm
from fgaif.reward.checkpoint import RewardCard, checkpoint_digest, save_reward_model
from fgaif.reward.model import new_reward_model, trainable_state
from fgaif.serving.api_errors import invalid
from fgaif.serving.schema import (
    CardOut,
    ModelOut,
    ModelsResponse,
    ReloadResponse,
)
from fgaif.serving.scoring import (
    Refused,
    Sampled,
    SampleInput,
    ScoreInput,
    ScoreOutput,
    TextScorer,
)
from fgaif.types import DEFAULT_KINDS, FloatArray, ImageRef, Response, Segment

TEXT = (
    "The image features a dog sitting on a couch, and there is a small red star above it, next to "
    "a green moon. A man in a white shirt is standing on the left side of the street. It is day."
)


def write_rewards(
    checkpoint: Path, folder: Path, seed: int = 0, shape: RewardShapeConfig | None = None
) -> Path:
    """Write random reward models of all kinds, no two alike, that were never trained."""
    for index, kind in enumerate(DEFAULT_KINDS):
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
            shape=shape,
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

    async def score(self, item: ScoreInput) -> ScoreOutput:
        (answer,) = self.actor.score([item])
        if isinstance(answer, Refused):
            raise answer.error()
        return answer

    async def generate(self, item: SampleInput) -> Sampled:
        return sampled(f"{item.prompt} {item.image.sha256[:4]}")

    async def models(self) -> ModelsResponse:
        return ModelsResponse(models=[self.actor.info()])

    async def reload(self, version: str | None) -> ReloadResponse:
        now = self.actor.probe()
        if version not in (None, now):
            raise invalid(f"the folder holds version {now}", "version")
        return ReloadResponse(previous=now, version=now, replicas=1)

    async def probe(self) -> str:
        return self.actor.probe()


class StubScorer:
    """Probabilities made of the number of tokens; real in everything that is read before."""

    max_length = 512

    def check_image(self, image: ImageRef) -> None:
        load_image(image)

    def length(self, response: Response, segments: Sequence[Segment]) -> int:
        return len(response.token_ids) + len(segments)

    def probs(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        rows = []
        for pieces in segments:
            tokens = np.array([[piece.token_end - piece.token_start] for piece in pieces])
            hallu = np.broadcast_to(
                1 / (1 + tokens.reshape(-1, 1)), (len(pieces), len(DEFAULT_KINDS))
            )
            rows.append(np.stack([0 * hallu, 1 - hallu, hallu], axis=-1).astype(np.float32))
        return rows


def text_scorer(scorer: StubScorer, shape: RewardShapeConfig | None = None) -> TextScorer:
    return TextScorer(
        scorer,
        byte_level_tokenizer(),
        version="stub",
        min_words=5,
        extractor=SceneFacts(),
        shape=shape or RewardShapeConfig(),
        kinds=DEFAULT_KINDS,
    )


@cache
def _tokenizer() -> Any:
    return byte_level_tokenizer()


def sampled(text: str) -> Sampled:
    """An answer as a policy with the byte-level tokenizer would have sampled it."""
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sampled(text=text, token_ids=(*ids, tokenizer.eos_token_id), finish="stop")


class StubBackend:
    """A backend without a model; ``delay`` seconds long. ``answers`` are sampled in turn."""

    def __init__(
        self,
        delay: float = 0.0,
        shape: RewardShapeConfig | None = None,
        scorer: StubScorer | None = None,
    ) -> None:
        self.delay = delay
        self.version = "stub"
        self.answers: list[str] = [TEXT]
        self.asked: list[SampleInput] = []
        self._scorer = text_scorer(scorer or StubScorer(), shape)

    async def score(self, item: ScoreInput) -> ScoreOutput:
        await asyncio.sleep(self.delay)
        (answer,) = self._scorer.score([item])
        if isinstance(answer, Refused):
            raise answer.error()
        return answer

    async def generate(self, item: SampleInput) -> Sampled:
        self.asked.append(item)
        return sampled(self.answers[(len(self.asked) - 1) % len(self.answers)])

    async def models(self) -> ModelsResponse:
        card = CardOut(
            head="linear", min_words=5, backbone_digest="", input_digest="", noise=None, metrics={}
        )
        model = ModelOut(
            name="stub",
            version=self.version,
            kinds=list(DEFAULT_KINDS),
            backbone="none",
            placement="shared",
            loaded_at="2026-01-01T00:00:00+00:00",
            cards=dict.fromkeys(DEFAULT_KINDS, card),
        )
        return ModelsResponse(models=[model])

    async def reload(self, version: str | None) -> ReloadResponse:
        return ReloadResponse(previous=self.version, version=version or "stub", replicas=1)

    async def probe(self) -> str:
        return self.version


@dataclass(frozen=True)
class Answer:
    """What an application sent back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: Any,
    path: str,
    *,
    method: str = "POST",
    chunks: Sequence[bytes] = (b"",),
    headers: dict[str, str] | None = None,
    read: list[bytes] | None = None,
) -> Answer:
    """Call an application by ASGI alone; ``read`` collects the chunks that it took."""
    sent: list[Any] = []
    left = list(chunks)

    async def receive() -> Any:
        if not left:
            await asyncio.sleep(3600)
        chunk = left.pop(0)
        if read is not None:
            read.append(chunk)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    start, *rest = sent
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return Answer(start["status"], found, b"".join(part.get("body", b"") for part in rest))
