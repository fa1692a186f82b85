"""The PPO loop. It talks to roles through protocols, so it imports no Ray and runs with fakes.

    prompts -> rollout -> segments -> rewards, reference, learner log-probs -> batch
                  ^                                                              |
                  +------- sync of version v+1 <------ learner, values <---------+

Order is the contract: nothing is sampled between an update and the sync that follows it, and the
next step starts only after every replica has confirmed the new version.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.ledger import stage_digest
from cluster.roles import Roles
from cluster.weight_sync import SyncReport, sync
from fgaif.checkpoint import latest_checkpoint, read_state, write_checkpoint
from fgaif.config import Config
from fgaif.data.order import batch_indexes, draw, request_seed
from fgaif.errors import ConfigError
from fgaif.pending import gather
from fgaif.ppo.batch import make_batch
from fgaif.ppo.kl import KlState, update_kl
from fgaif.ppo.metrics import rollout_metrics
from fgaif.reward.dense import RewardCenters, dense_rewards
from fgaif.types import GenerationRequest, Prompt, Response, Segment, StepReport

Segmenter = Callable[[Response], tuple[Segment, ...]]
FindMalformed = Callable[[Response, Sequence[Segment]], Collection[int]]
"""Indexes of segments that are not well-formed, where that can be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoData:
    """What the loop reads: prompts to answer, and questions whose answers must not drift."""

    prompts: Sequence[Prompt]
    anchors: Sequence[Prompt]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """Everything of the driver that a checkpoint holds; the actors write their own parts."""

    step: int
    kl: KlState
    centers: RewardCenters


class PpoDriver:
    """Runs PPO steps over the roles and keeps checkpoints."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        data: PpoData,
        segmenter: Segmenter,
        find_malformed: FindMalformed,
    ) -> None:
        self._config = config
        self._roles = roles
        self._data = data
        self._segmenter = segmenter
        self._find_malformed = find_malformed
        self._root = config.run_dir / "policy"
        self._state = LoopState(
            step=0, kl=KlState.from_config(config.ppo.kl), centers=RewardCenters.empty()
        )
        self._seconds: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self._state.step

    def run(self) -> Iterator[StepReport]:
        """Yield a report after each step until ``ppo.steps`` are done; resume if configured."""
        self._resume()
        first = self._requests(self._state.step)[:1]
        self._sync(self._roles.rollouts.generate(first).result(), self._state.step)
        while self._state.step < self._config.ppo.steps:
            report = self._step()
            done = self._state.step
            if done % self._config.ppo.checkpoint_every == 0 or done == self._config.ppo.steps:
                self._checkpoint()
            yield report

    def _step(self) -> StepReport:
        config, roles, state = self._config.ppo, self._roles, self._state
        self._seconds = {}
        with self._timed("total"):
            with self._timed("rollout"):
                responses = roles.rollouts.generate(self._requests(state.step)).result()
                segments = [self._segmenter(response) for response in responses]
                malformed = [
                    self._find_malformed(r, s) for r, s in zip(responses, segments, strict=True)
                ]
            with self._timed("score"):
                scores, evaluations, old_logprobs = gather(
                    roles.rewards.score(responses, segments),
                    roles.reference.evaluate(responses),
                    roles.learner.logprobs(responses),
                )
            rewards = dense_rewards(
                responses, segments, scores, malformed, config.shape, state.centers
            )
            batch = make_batch(
                responses, old_logprobs, evaluations, rewards.tokens,
                kl_coef=state.kl.coef, gamma=config.gamma, lam=config.lam,
            )  # fmt: skip
            with self._timed("update"):
                update = roles.learner.update(batch, self._anchors(state.step))
                value_report = roles.reference.update_values(batch).result()
                policy_report = update.result()
            version = state.step + 1
            with self._timed("sync"):
                sync_report = self._sync(responses[:1], version)
        metrics = rollout_metrics(batch, segments, scores, rewards, state.kl.coef)
        self._state = LoopState(
            step=version,
            kl=update_kl(state.kl, metrics["kl/response"], len(responses), config.kl),
            centers=rewards.centers,
        )
        return StepReport(
            step=version,
            version=version,
            metrics=metrics
            | policy_report.metrics
            | value_report.metrics
            | sync_report.metrics()
            | self._timings(float(batch.mask.sum())),
        )

    def _requests(self, step: int) -> list[GenerationRequest]:
        config, prompts = self._config, self._data.prompts
        batch = batch_indexes(len(prompts), config.ppo.rollout_batch, step, config.seed)
        return [
            GenerationRequest(
                prompt=prompts[index],
                sample=step,
                seed=request_seed(config.seed, step, position, prompts[index].id),
                temperature=config.policy.temperature,
                max_new_tokens=config.policy.max_new_tokens,
            )
            for position, index in enumerate(batch)
        ]

    def _anchors(self, step: int) -> list[Prompt]:
        """Questions for every minibatch of the step, in order."""
        config, anchors = self._config.ppo, self._data.anchors
        if not anchors:
            return []
        minibatches = config.epochs * -(-config.rollout_batch // config.minibatch)
        size = config.anchor.batch_size * minibatches
        chosen = draw(range(len(anchors)), size, self._config.seed, step)
        return [anchors[index] for index in chosen]

    def _sync(self, probe: Sequence[Response], version: int) -> SyncReport:
        return sync(
            self._roles.learner,
            self._roles.rollouts,
            probe,
            version=version,
            tolerance=self._config.ppo.probe_tolerance,
        )

    def _checkpoint(self) -> None:
        """Write learner, value model and loop state as one directory, or nothing."""
        step = self._state.step

        def write(folder: Path) -> None:
            learner = self._roles.learner.save(folder / "learner")
            self._roles.reference.save(folder / "reference").result()
            learner.result()
            self._roles.learner.save_adapter(folder / "adapter").result()

        state = {
            "step": step,
            "kl": asdict(self._state.kl),
            "centers": self._state.centers.to_json(),
            "config": stage_digest(self._config, "train"),
            "data": self._data.digest,
        }
        write_checkpoint(
            self._root / "checkpoints",
            f"step_{step:06d}",
            write,
            keep=self._config.ppo.keep_checkpoints,
            state=state,
        )

    def _resume(self) -> None:
        """Continue from ``ppo.resume``; refuse another configuration or other data."""
        wanted = self._config.ppo.resume
        if wanted is None:
            return
        root = self._root / "checkpoints"
        path = latest_checkpoint(root) if wanted == "latest" else Path(wanted)
        if path is None:
            return
        state = read_state(path)
        expected = {"config": stage_digest(self._config, "train"), "data": self._data.digest}
        for key, now in expected.items():
            if state[key] != now:
                raise ConfigError(
                    f"ppo.resume = {wanted!r}: {path} was made with {key} {state[key]} but this "
                    f"run has {now}; restore the {key} it was made with, or start a new run"
                )
        learner = self._roles.learner.restore(path / "learner")
        self._roles.reference.restore(path / "reference").result()
        learner.result()
        self._state = LoopState(
            step=state["step"],
            kl=KlState(**state["kl"]),
            centers=RewardCenters.from_json(state["centers"]),
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - start

    def _timings(self, tokens: float) -> dict[str, float]:
        seconds = {f"seconds/{stage}": value for stage, value in self._seconds.items()}
        return seconds | {"tokens_per_second": tokens / self._seconds["total"]}
