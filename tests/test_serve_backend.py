"""Calls of the scoring deployments: a batch each, or a request each, and who gets which answer."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.serve.handle import DeploymentHandle
from serving_samples import png

from cluster.serving.backend import ServeBackend
from cluster.serving.deployments import GeneratorReplica
from fgaif.config import RewardShapeConfig, load_config
from fgaif.data.images import image_bytes
from fgaif.errors import DataError
from fgaif.serving.api_errors import ApiError
from fgaif.serving.scoring import Refused, Sampled, SampleInput, ScoreInput, ScoreOutput
from fgaif.types import GenerationRequest, Response

IMAGE = image_bytes(png(), "test")


class Scorer:
    """A deployment that answers after a while, and refuses the text "bad"."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.score = SimpleNamespace(remote=self._remote)

    def _remote(self, items: Sequence[ScoreInput]) -> asyncio.Task[list[Any]]:
        texts = [item.texts[0] for item in items]
        self.calls.append(texts)

        async def answer() -> list[Any]:
            await asyncio.sleep(0.02)
            return [
                Refused(field="text", message="no")
                if text == "bad"
                else ScoreOutput(texts=(), version=text, shape=RewardShapeConfig())
                for text in texts
            ]

        return asyncio.create_task(answer())


def ask(scorer: Scorer, texts: Sequence[str], overrides: Sequence[str]) -> list[Any]:
    """Versions, here the texts, or errors of requests that come at the same time."""

    async def work() -> list[Any]:
        config = load_config(None, overrides).serve
        backend = ServeBackend([cast(DeploymentHandle, scorer)], None, config)
        items = [
            ScoreInput(image=IMAGE, prompt="Describe this image in detail.", texts=(text,))
            for text in texts
        ]
        answers = await asyncio.gather(
            *(backend.score(item) for item in items), return_exceptions=True
        )
        return [a.version if isinstance(a, ScoreOutput) else a for a in answers]

    return asyncio.run(work())


def test_a_call_carries_a_batch_and_each_request_gets_its_own_answer() -> None:
    scorer, texts = Scorer(), [f"text {index}" for index in range(10)]
    assert ask(scorer, texts, ["serve.batch.size=4"]) == texts
    assert scorer.calls == [texts[:4], texts[4:8], texts[8:]]


@pytest.mark.parametrize("overrides", [["serve.batch.size=1"], ["serve.replicas={min: 1, max: 2}"]])
def test_without_batching_and_with_autoscaling_each_request_is_a_call(
    overrides: list[str],
) -> None:
    scorer, texts = Scorer(), [f"text {index}" for index in range(10)]
    assert ask(scorer, texts, overrides) == texts
    assert scorer.calls == [[text] for text in texts]


def test_a_refused_request_does_not_fail_the_others_of_its_batch() -> None:
    answers = ask(Scorer(), ["a", "bad", "b"], [])
    assert (answers[0], answers[2]) == ("a", "b")
    assert isinstance(answers[1], ApiError)
    assert (answers[1].status, answers[1].field) == (422, "text")


def test_a_call_that_takes_too_long_ends_and_makes_room() -> None:
    scorer = Scorer()
    answers = ask(scorer, ["a", "b", "c"], ["serve.timeout_s=0.01", "serve.batch.size=2"])
    assert [type(answer) for answer in answers] == [TimeoutError] * 3
    assert scorer.calls == [["a", "b"], ["c"]]


class Policy:
    """What a generating replica has for an engine; prompts of "long" do not fit."""

    def __init__(self, model: Path, config: object) -> None:
        self.loaded: list[object] = []

    def load_weights(self, manifest: object) -> None:
        self.loaded.append(manifest)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        if any(request.prompt.text == "long" for request in requests):
            raise DataError("does not fit")
        return [
            Response(
                prompt=request.prompt,
                sample=0,
                text=f"{request.prompt.text} {request.temperature:g} {request.seed}",
                token_ids=np.array([*request.prefix, 7, 2]),
                rollout_logprobs=np.zeros(len(request.prefix) + 2, np.float32),
                finish="stop",
                policy_version=0,
            )
            for request in requests
        ]


def test_a_generating_replica_goes_on_from_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.rollout.RolloutActor", Policy)
    monkeypatch.setattr("fgaif.lvlm.weights.manifest_from_adapter", lambda path, version: path)
    replica = GeneratorReplica(Path("model"), load_config(None), Path("adapter"))
    assert cast(Policy, replica._actor).loaded == [Path("adapter")]

    def item(prompt: str, *prefix: int) -> SampleInput:
        return SampleInput(
            image=IMAGE, prompt=prompt, temperature=1.0, max_new_tokens=9, seed=3, prefix=prefix
        )

    async def work() -> list[Any]:
        async def remote(asked: SampleInput) -> Any:
            batched = cast(Any, GeneratorReplica.generate).__wrapped__  # Serve makes the batches
            return (await batched(replica, [asked]))[0]

        handle = SimpleNamespace(
            generate=SimpleNamespace(remote=lambda asked: asyncio.create_task(remote(asked)))
        )
        scorer = cast(DeploymentHandle, Scorer())
        config = load_config(None).serve
        backend = ServeBackend([scorer], cast(DeploymentHandle, handle), config)
        calls = [backend.generate(item(*one)) for one in (("a",), ("b", 4, 5), ("long",))]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        alone = ServeBackend([scorer], None, config).generate(item("a"))
        return [*answers, *await asyncio.gather(alone, return_exceptions=True)]

    first, second, third, none = asyncio.run(work())
    assert first == Sampled(text="a 1 3", token_ids=(7, 2), finish="stop")
    assert second == Sampled(text="b 1 3", token_ids=(4, 5, 7, 2), finish="stop")
    assert isinstance(third, ApiError)
    assert (third.status, third.field) == (422, "prompt")
    assert "no policy is served" in str(none)
