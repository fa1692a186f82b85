"""In-process vLLM engines shared by test modules, and prompts about the tests' photographs."""

from functools import cache
from pathlib import Path

import numpy as np

from actors.judge import JudgeActor
from actors.rollout import RolloutActor
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.types import GenerationRequest, Prompt, Response


def engine_config(temperature: float = 1.0) -> Config:
    """Small engine in float32."""
    return parse_config(
        {
            "policy": {"temperature": temperature},
            "cluster": {"engine": {"max_num_seqs": 16, "kv_cache_mib": 16}},
        }
    )


@cache
def rollout_actor(model_dir: Path) -> RolloutActor:
    """One engine per checkpoint and test session; leave version 0 loaded.

    All stay alive: an engine that is collected takes the process-wide groups of the others along.
    """
    return RolloutActor(model_dir, engine_config())


@cache
def judge_actor(model_dir: Path, max_model_len: int) -> JudgeActor:
    """The same for a verifier."""
    engine = {"max_num_seqs": 64, "max_model_len": max_model_len, "kv_cache_mib": 32}
    return JudgeActor(model_dir, parse_config({"cluster": {"engine": engine}}))


class DirectChat:
    """The judge asked in this thread: vLLM's CPU kernels insist on the one they were set up in."""

    name = "own"

    def __init__(self, judge: JudgeActor) -> None:
        self._judge = judge

    async def ask(self, request: ChatRequest) -> Reply:
        """One at a time."""
        (reply,) = self._judge.answer([request])
        assert reply is not None
        return reply


def photo_prompts(photos: Path, text: str = "Describe this image in detail.") -> list[Prompt]:
    """One prompt per photograph."""
    paths = sorted(path for path in photos.iterdir() if path.suffix in {".jpg", ".png"})
    return [Prompt(id=path.stem, image=image_ref(path), text=text) for path in paths]


def requests(
    prompts: list[Prompt], *, tokens: int = 24, **settings: float
) -> list[GenerationRequest]:
    """One seeded request per prompt."""
    return [
        GenerationRequest(prompt=prompt, seed=seed, max_new_tokens=tokens, **settings)
        for seed, prompt in enumerate(prompts)
    ]


def response_to(prompt: Prompt, ids: list[int]) -> Response:
    """A response with given ids, as if sampled."""
    return Response(
        prompt=prompt,
        sample=0,
        text="",
        token_ids=np.array(ids),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        finish="length",
        policy_version=0,
    )
