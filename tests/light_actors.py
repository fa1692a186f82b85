"""The actors' stand-ins for tests of a whole cluster: no models, exact integers, quick to start.

The policy is one integer below 2**61 that every response of every update moves, by a sum that no
order changes; log-probs, values, scores and tokens follow from the integers. A response lost,
answered twice, or sampled with other weights gives another policy.

``FOLDER/hold`` holds the id of a node whose rollout actors stop in the middle of ``generate`` until
the file is gone; they leave ``FOLDER/held/PID`` there. ``FOLDER/until`` holds the number of updates
that the learner makes before it waits for a larger one; ``FOLDER/pace`` the seconds per token, 1 ms
without. ``FOLDER/lives`` gets a file per actor.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.progress import advance
from cluster.roles import Roles, SyncCheck
from fgaif.config import Config
from fgaif.pending import Ready
from fgaif.types import (
    Evaluation,
    FloatArray,
    GenerationRequest,
    LoadedWeights,
    Prompt,
    Response,
    Segment,
    SegmentScores,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)

SECONDS_PER_TOKEN = 0.001
_TRAINING_TOKENS = 4  # evaluating or training on so many tokens takes as long as sampling one
_PRIME = 2**61 - 1
_VOCABULARY = 26


def segments(response: Response) -> tuple[Segment, ...]:
    """Halves of a response; its last token is EOS and has no letter."""
    letters = len(response.text)
    spans = ((0, letters // 2), (letters // 2, letters))
    return tuple(
        Segment(index=index, char_start=start, char_end=end, token_start=start, token_end=end)
        for index, (start, end) in enumerate(spans)
    )


class _Light:
    """What the stand-ins share: they note when they were born and first ready to work."""

    def __init__(self, config: Config, role: str) -> None:
        self._folder = config.run_dir
        self._life = config.run_dir / "lives" / f"{role}-{os.getpid()}.json"
        connected = ray.is_initialized()
        self._node = ray.get_runtime_context().get_node_id() if connected else "here"
        self._facts: dict[str, float | str | int] = {
            "role": role, "pid": os.getpid(), "node": self._node, "born": time.time(),
        }  # fmt: skip
        self._note()

    def ready(self) -> None:
        """Note the first time that this actor has what it needs for its work."""
        if "ready" not in self._facts:
            self._facts["ready"] = time.time()
            self._note()

    def work(self, responses: Sequence[Response]) -> None:
        """Take the time that evaluating or training on the responses takes."""
        pace = self._pace() / _TRAINING_TOKENS
        for response in responses:
            time.sleep(pace * len(response.token_ids))
            advance(len(response.token_ids))

    def _pace(self) -> float:
        path = self._folder / "pace"
        return float(path.read_text()) if path.exists() else SECONDS_PER_TOKEN

    def _note(self) -> None:
        self._life.parent.mkdir(parents=True, exist_ok=True)
        part = self._life.with_suffix(".part")
        part.write_text(json.dumps(self._facts))
        part.replace(self._life)


class LightRollout(_Light):
    """Stands in for the vLLM engine."""

    def __init__(self, model_dir: Path, config: Config) -> None:
        super().__init__(config, "rollout")
        self._version = 0
        self._policy = 0

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        self.ready()
        self._wait_while_held()
        return [self._sample(request) for request in requests]

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        return [0.5] * len(prompts)

    def load_weights(
        self, manifest: WeightsManifest, probe: Sequence[Response] = ()
    ) -> LoadedWeights:
        octets = manifest.tensors["policy.lora_A"].astype(np.uint8).tobytes()
        assert hashlib.sha256(octets).hexdigest() == manifest.digest
        self._policy = int.from_bytes(octets, "little")
        self._version = manifest.version
        self.ready()
        scores = tuple(_logprobs(response.token_ids, self._policy) for response in probe)
        return LoadedWeights(version=self._version, logprobs=scores)

    def version(self) -> int:
        return self._version

    def _sample(self, request: GenerationRequest) -> Response:
        rng = np.random.default_rng([request.seed, self._policy])
        length = int(rng.integers(request.max_new_tokens // 2, request.max_new_tokens + 1))
        tokens = rng.integers(0, _VOCABULARY, length)
        pace = self._pace()
        for _ in tokens:
            time.sleep(pace)
            advance()
        return Response(
            prompt=request.prompt,
            sample=request.sample,
            text="".join(chr(ord("a") + token) for token in tokens[:-1]),
            token_ids=tokens,
            rollout_logprobs=_logprobs(tokens, self._policy),
            finish="stop",
            policy_version=self._version,
        )

    def _wait_while_held(self) -> None:
        hold = self._folder / "hold"
        if hold.exists() and hold.read_text() == self._node:
            (self._folder / "held").mkdir(exist_ok=True)
            (self._folder / "held" / str(os.getpid())).touch()
            while hold.exists():
                time.sleep(0.02)


class LightReward(_Light):
    """Stands in for the reward model of a kind."""

    def __init__(self, reward_dir: Path, config: Config) -> None:
        super().__init__(config, reward_dir.name)
        self._kind = _number(reward_dir.name.encode())

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        self.ready()
        found = []
        for response, parts in pairs:
            raw = [
                _uniform(response.token_ids[part.token_start : part.token_end], self._kind)
                for part in parts
            ]
            rows = np.array([[row.sum(), row[::2].sum(), 1.0] for row in raw], np.float32)
            found.append(rows / rows.sum(axis=1, keepdims=True))
            self.work([response])
        return found


class LightReference(_Light):
    """Stands in for the reference and value actor."""

    def __init__(self, config: Config, rewards: Path) -> None:
        super().__init__(config, "reference")
        self._value = 1
        self._critic = config.ppo.has_critic

    def evaluate(self, responses: Sequence[Response]) -> list[Evaluation]:
        self.ready()
        self.work(responses)
        return [
            Evaluation(
                reference_logprobs=_logprobs(response.token_ids, 0),
                values=_uniform(response.token_ids, self._value) if self._critic else None,
            )
            for response in responses
        ]

    def update_values(self, batch: TrainBatch) -> UpdateReport:
        self.ready()
        self.work(batch.responses)
        assert batch.returns is not None
        self._value = _moved(self._value, batch, batch.returns)
        return UpdateReport(metrics={"value/state": float(self._value % 2**50)})

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "value.json").write_text(json.dumps(self._value))

    def restore(self, path: Path) -> None:
        self._value = json.loads((path / "value.json").read_text())


class LightLearner(_Light):
    """Stands in for a DeepSpeed rank; all ranks hold the same integer.

    ``FOLDER/trained/NUMBER.json`` lists the responses of every update with their versions; an
    update that is made again writes the same file again.
    """

    def __init__(self, config: Config, rank: int, world_size: int, *_: object) -> None:
        super().__init__(config, "learner")
        self._rank = rank
        self._policy = 0
        self._updates = 0

    def logprobs(self, responses: Sequence[Response]) -> list[FloatArray]:
        self.ready()
        self.work(responses)
        return [_logprobs(response.token_ids, self._policy) for response in responses]

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> UpdateReport:
        self.ready()
        self._wait_for_leave()
        self.work(batch.responses)
        weights = np.zeros_like(batch.mask) if batch.weights is None else batch.weights
        self._policy = _moved(self._policy, batch, batch.advantages, weights)
        self._updates += 1
        if self._rank == 0:
            self._write_down(batch)
        return UpdateReport(metrics={"policy/state": float(self._policy % 2**50)})

    def publish(self, version: int) -> WeightsManifest:
        octets = self._policy.to_bytes(8, "little")
        numbers = np.frombuffer(octets, np.uint8).astype(np.float32)
        return WeightsManifest(
            version=version,
            digest=hashlib.sha256(octets).hexdigest(),
            scaling=1.0,
            tensors={"policy.lora_A": numbers},
        )

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        state = {"policy": self._policy, "updates": self._updates}
        (path / f"rank{self._rank}.json").write_text(json.dumps(state))

    def restore(self, path: Path) -> None:
        state = json.loads((path / f"rank{self._rank}.json").read_text())
        self._policy, self._updates = state["policy"], state["updates"]

    def save_adapter(self, path: Path) -> None:
        if self._rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            (path / "policy.json").write_text(json.dumps(self._policy))

    def _wait_for_leave(self) -> None:
        until = self._folder / "until"
        while until.exists() and int(until.read_text()) <= self._updates:
            time.sleep(0.02)

    def _write_down(self, batch: TrainBatch) -> None:
        folder = self._folder / "trained"
        folder.mkdir(exist_ok=True)
        rows = [[response.id, response.policy_version] for response in batch.responses]
        (folder / f"{self._updates}.json").write_text(json.dumps(rows))


class LightShared:
    """Stands in for a process of several roles."""

    def __init__(
        self, config: Config, roles: Sequence[str], rewards: Path, rank: int, world: int, *_: object
    ) -> None:
        self._roles: dict[str, Any] = {
            "learner": LightLearner(config, rank, world),
            "reference": LightReference(config, rewards),
            "reward": _LightKinds([LightReward(rewards / k, config) for k in config.kind_names]),
        }

    def call(self, role: str, method: str, *arguments: Any) -> Any:
        return getattr(self._roles[role], method)(*arguments)


class _LightKinds:
    """The reward models of all kinds as one."""

    def __init__(self, kinds: Sequence[LightReward]) -> None:
        self._kinds = kinds

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        rows = zip(*(kind.score_pairs(pairs) for kind in self._kinds), strict=True)
        return [np.stack(kinds, axis=1) for kinds in rows]


def _moved(state: int, batch: TrainBatch, *per_token: FloatArray) -> int:
    """Next state: it takes every bit of every response, in any order."""
    total = sum(
        _number(
            response.id.encode(),
            response.policy_version.to_bytes(8, "little"),
            response.token_ids.tobytes(),
            response.rollout_logprobs.tobytes(),
            *(array[row, : len(response.token_ids)].tobytes() for array in per_token),
        )
        for row, response in enumerate(batch.responses)
    )
    return (state * 1_000_003 + total) % _PRIME


def _number(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"|".join(parts)).digest()[:8], "little") % _PRIME


def _uniform(tokens: "np.ndarray", state: int) -> FloatArray:
    """A number in [0, 1) with 10 bits per token, from the token, its place and the state."""
    mixed = tokens.astype(np.uint64) + np.arange(len(tokens), dtype=np.uint64) * np.uint64(977)
    mixed = (mixed ^ np.uint64(state)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)) % np.uint64(1024)).astype(np.float32) / np.float32(1024)


def _logprobs(tokens: "np.ndarray", policy: int) -> FloatArray:
    return np.float32(-1.0) - _uniform(tokens, policy)


class Here:
    """All roles in this process, one actor of each: what a run without a cluster gives."""

    def __init__(self, config: Config) -> None:
        rewards = config.run_dir / "rewards"
        self._rollout = LightRollout(rewards, config)
        self._rewards = [LightReward(rewards / kind, config) for kind in config.kind_names]
        self._reference = LightReference(config, rewards)
        self._learner = LightLearner(config, 0, 1)
        self._manifests: dict[int, WeightsManifest] = {}

    def roles(self) -> Roles:
        """The object in all four parts; saving and restoring go to both that learn."""
        return Roles(
            rollouts=self,  # type: ignore[arg-type]
            rewards=self,
            reference=_Called(self._reference),  # type: ignore[arg-type]
            learner=_Called(self._learner),  # type: ignore[arg-type]
        )

    def generate(
        self, requests: Sequence[GenerationRequest], *, version: int | None = None
    ) -> Ready[list[Response]]:
        if version is not None:
            self._rollout.load_weights(self._manifests[version])
        return Ready(self._rollout.generate(requests))

    def load_weights(self, manifest: WeightsManifest, probe: object) -> Ready[list[SyncCheck]]:
        self._manifests[manifest.version] = manifest
        self._rollout.load_weights(manifest)
        return Ready([SyncCheck(arrived=1.0)])

    def score(
        self, responses: Sequence[Response], parts: Sequence[Sequence[Segment]]
    ) -> Ready[list[SegmentScores]]:
        pairs = list(zip(responses, parts, strict=True))
        kinds = [reward.score_pairs(pairs) for reward in self._rewards]
        return Ready(
            [SegmentScores(probs=np.stack(rows, axis=1)) for rows in zip(*kinds, strict=True)]
        )


class _Called:
    """An actor of this process whose methods answer like remote ones."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Ready[Any]]:
        return lambda *arguments: Ready(getattr(self._actor, name)(*arguments))

    def set_restore_point(self, path: Path) -> None:
        """Nothing is replayed here."""
