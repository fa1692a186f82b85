"""Fakes of the PPO roles that record the order of events; for tests of ordering and failure."""

import errno
import json
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.roles import Probe, Roles, SyncCheck
from cluster.weight_sync import check_load
from fgaif.errors import ActorError
from fgaif.pending import Ready, Then
from fgaif.types import (
    Evaluation,
    FloatArray,
    GenerationRequest,
    ImageRef,
    LoadedWeights,
    Prompt,
    Response,
    Segment,
    SegmentScores,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)


def prompts(count: int) -> list[Prompt]:
    """Prompts p0, p1, ... about images that nobody opens."""
    return [
        Prompt(id=f"p{i}", image=ImageRef(path=f"{i}.png", sha256=f"{i:064x}"), text="Describe.")
        for i in range(count)
    ]


def response(prompt: Prompt, sample: int = 0, tokens: int = 4, version: int = 0) -> Response:
    """A response of ``tokens`` ids that stopped."""
    return Response(
        prompt=prompt,
        sample=sample,
        text="a b, c d",
        token_ids=np.arange(tokens, dtype=np.int64) + 5,
        rollout_logprobs=np.full(tokens, -1.0, np.float32),
        finish="stop",
        policy_version=version,
    )


def two_segments(_: Response) -> tuple[Segment, ...]:
    """Tokens 0-1 and token 2 of a four-token response; the last is EOS."""
    return (
        Segment(index=0, char_start=0, char_end=5, token_start=0, token_end=2),
        Segment(index=1, char_start=5, char_end=8, token_start=2, token_end=3),
    )


class World:
    """All four roles in one object. ``parameter`` moves with each update and is the policy; the
    disk is full for so many attempts to save as ``full`` says; ``interrupted`` names the work in
    which a signal comes, once or ``twice`` in a row."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seeds: list[list[int]] = []
        self.anchor_counts: list[int] = []
        self.parameter = 0.0
        self.value_updates = 0
        self.engine_version = 0
        self.engine_parameter = 0.0
        self.stale = False
        self.poison: set[str] = set()
        self.poison_ids: set[str] = set()
        self.critic = True
        self.broken = ""
        self.interrupted: tuple[str, int] | None = None
        self.twice = False
        self.full = 0
        self.batch_sizes: list[int] = []

    def roles(self) -> Roles:
        """The object in all four parts."""
        return Roles(rollouts=self, rewards=self, reference=self, learner=self)  # type: ignore[arg-type]

    def generate(
        self, requests: Sequence[GenerationRequest], version: int | None = None
    ) -> Then[list[Response | None]]:
        wanted = self.engine_version if version is None else version
        self.events.append(f"generate v{wanted}")
        self.seeds.append([request.seed for request in requests])
        return Then(lambda: [self._answer(request, wanted) for request in requests])

    def _answer(self, request: GenerationRequest, version: int) -> Response | None:
        self._maybe_break("generate")
        if request.prompt.id in self.poison:
            return None
        if f"{request.prompt.id}#{request.sample}" in self.poison_ids:
            return None
        return response(request.prompt, request.sample, version=version)

    def _maybe_break(self, what: str) -> None:
        if self.interrupted is not None and self.interrupted[0] == what:
            number, self.interrupted = self.interrupted[1], None
            for _ in range(1 + self.twice):
                signal.raise_signal(number)
        if self.broken == what:
            raise ActorError("rollout-0 died for good")

    def p_yes(self, asked: Sequence[Prompt]) -> Ready[list[float]]:
        return Ready([0.5] * len(asked))

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Ready[list[SyncCheck]]:
        self.events.append(f"load v{manifest.version}")
        if not self.stale:
            self.engine_version = manifest.version
            self.engine_parameter = float(manifest.tensors["w"][0])
        self.events.append("probe")
        loaded = LoadedWeights(
            version=self.engine_version,
            logprobs=tuple(np.full(4, self.engine_parameter, np.float32) for _ in probe.responses),
        )
        return Ready([check_load("rollout-0", manifest.version, loaded, probe)])

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Ready[list[SegmentScores]]:
        self._maybe_break("score")
        self.events.append("score")
        probs = np.tile(np.array([0.0, 0.75, 0.25], np.float32), (2, 3, 1))
        return Ready([SegmentScores(probs=probs) for _ in responses])

    def evaluate(self, responses: Sequence[Response]) -> Ready[list[Evaluation]]:
        self.events.append("evaluate")
        zeros = np.zeros(4, np.float32)
        values = zeros if self.critic else None
        return Ready([Evaluation(reference_logprobs=zeros, values=values) for _ in responses])

    def update_values(self, batch: TrainBatch) -> Ready[UpdateReport]:
        self.events.append("update values")
        self.value_updates += 1
        return Ready(UpdateReport(metrics={"value/loss": 0.0}))

    def logprobs(self, responses: Sequence[Response]) -> Ready[list[FloatArray]]:
        self.events.append("learner logprobs")
        return Ready([np.full(4, self.parameter, np.float32) for _ in responses])

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Ready[UpdateReport]:
        self._maybe_break("update")
        self.events.append("update policy")
        self.batch_sizes.append(len(batch.responses))
        self.anchor_counts.append(len(anchors))
        self.parameter -= float(batch.task_rewards.sum()) * 1e-3 + 1e-3 * len(self.seeds[-1])
        return Ready(UpdateReport(metrics={"policy/loss": self.parameter}))

    def publish(self, version: int) -> Ready[WeightsManifest]:
        self.events.append(f"publish v{version}")
        tensors = {"w": np.array([self.parameter], np.float32)}
        return Ready(WeightsManifest(version=version, digest="", scaling=1.0, tensors=tensors))

    def save(self, path: Path) -> Ready[None]:
        if self.full:
            self.full -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        path.mkdir(parents=True)
        state = {"parameter": self.parameter, "values": self.value_updates}
        (path / "state.json").write_text(json.dumps(state))
        return Ready(None)

    def restore(self, path: Path) -> Ready[None]:
        state = json.loads((path / "state.json").read_text())
        self.parameter, self.value_updates = state["parameter"], state["values"]
        return Ready(None)

    def set_restore_point(self, path: Path) -> None:
        assert (path / "state.json").is_file()

    def save_adapter(self, path: Path) -> Ready[None]:
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text("{}")
        return Ready(None)
