"""The PPO loop. It talks to roles through protocols, so it imports no Ray and runs with fakes.

    prompts -> rollout -> segments -> rewards, reference, learner log-probs -> batch
                  ^                                                              |
                  +------- sync of version v+1 <------ learner, values <---------+

Order is the contract. On policy (``ppo.async_depth`` 0) nothing is sampled between an update and
the sync that follows it, and the next step starts only after every engine has confirmed the new
version. With depth d the batch of step s is sampled, with the version of step s - d, while earlier
ones are trained on; which version that is never depends on who was faster, so that asynchronous
runs can be repeated and resumed exactly too.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.roles import Roles
from cluster.weight_sync import PROBE_RESPONSES, SyncReport, sync
from fgaif.checkpoint import latest_checkpoint, read_state, resume_point, write_checkpoint
from fgaif.config import Config
from fgaif.data.order import batch_indexes, draw, request_seed, sample_numbers
from fgaif.errors import ActorError, CheckpointError, ConfigError, DivergedError, FgaifError
from fgaif.feedback.store import response_store
from fgaif.interrupts import held_back
from fgaif.kinds import check_kinds
from fgaif.pending import Pending, Ready, gather
from fgaif.ppo.batch import make_batch
from fgaif.ppo.importance import drop_alone, drop_stale, off_policy_metrics
from fgaif.ppo.kl import KlState, update_kl
from fgaif.ppo.metrics import rollout_metrics
from fgaif.ppo.rollout_dump import keep_rollouts
from fgaif.ppo.timing import StepTimer
from fgaif.reward.dense import DenseRewards, RewardCenters, dense_rewards
from fgaif.types import (
    Evaluation,
    FloatArray,
    GenerationRequest,
    Json,
    Prompt,
    Response,
    Segment,
    SegmentScores,
    StepReport,
    TrainBatch,
)

log = logging.getLogger(__name__)

Segmenter = Callable[[Response], tuple[Segment, ...]]
FindMalformed = Callable[[Response, Sequence[Segment]], Collection[int]]
"""Indexes of segments that are not well-formed, where that can be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoData:
    """What the loop reads: prompts to answer, and questions whose answers must not drift.

    ``settings`` are the values that make the training what it is; checkpoints carry them, and
    ``check_resumable`` is given the state of one, with its path, before the loop goes on from it:
    it raises ConfigError where the two do not go together.
    """

    prompts: Sequence[Prompt]
    anchors: Sequence[Prompt]
    digest: str
    settings: Json
    check_resumable: Callable[[Json, Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """Everything of the driver that a checkpoint holds; the actors write their own parts."""

    step: int
    kl: KlState
    centers: RewardCenters


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What the roles say of a step's B responses, in order.

    ``segments`` and the indexes of ``malformed`` ones, ``scores`` of the reward models, and
    ``evaluations`` (reference log-probs and values) and the learner's ``logprobs`` (T,) per token.
    """

    segments: Sequence[tuple[Segment, ...]]
    malformed: Sequence[Collection[int]]
    scores: Sequence[SegmentScores]
    evaluations: Sequence[Evaluation]
    logprobs: Sequence[FloatArray]


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
        self._checkpoints = self._root / "checkpoints"
        self._kept: tuple[int, Path | None] = 0, None
        self._state = LoopState(
            step=0,
            kl=KlState.from_config(config.ppo.kl),
            centers=RewardCenters.empty(config.kind_names),
        )
        self._ahead: dict[int, Pending[list[Response | None]]] = {}
        self._syncing: Pending[SyncReport] | None = None
        self._updating = False
        self._timer = StepTimer()

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self._state.step

    def run(self) -> Iterator[StepReport]:
        """Yield a report after each step until ``ppo.steps`` are done; resume if configured.

        Raises:
            FgaifError: what stopped the run, and which step is kept as a checkpoint: the last
                finished one where the learner is whole and the disk takes it.
            KeyboardInterrupt: Ctrl-C or SIGTERM; what is kept is logged.
        """
        self._resume()
        try:
            self._sync(self._first_responses(), self._state.step)
            while self._state.step < self._config.ppo.steps:
                yield from self._whole_step()
        except KeyboardInterrupt:
            self._keep_step()
            step, path = self._kept
            kept = f"step {step} is kept in {path}" if path else "no step is kept yet"
            log.warning("interrupted: %s", kept)
            raise

    def _whole_step(self) -> Iterator[StepReport]:
        """A step with its sync and checkpoint; from the update on an interruption waits."""
        config = self._config.ppo
        with ExitStack() as learning:
            try:
                report, probe = self._step(learning)
            except FgaifError as error:
                raise self._stopped(error) from error
            try:
                report = self._synced(report, probe)
                done = self._state.step
                if done % config.checkpoint_every == 0 or done == config.steps:
                    self._checkpoint()
            except FgaifError as error:
                yield report  # the step is trained and can be kept, and so are its figures
                raise self._stopped(error) from error
            yield report

    def _first_responses(self) -> list[Response]:
        """The probe of the first sync: responses to the first prompts that get any."""
        requests = self._requests(self._state.step)
        for start in range(0, len(requests), PROBE_RESPONSES):
            part = requests[start : start + PROBE_RESPONSES]
            if found := _answered(self._roles.rollouts.generate(part).result()):
                return found
        raise ActorError("every prompt of the first batch was set aside because it kills engines")

    def _step(self, learning: ExitStack) -> tuple[StepReport, list[Response]]:
        """Sample, score and train; returns the report and the probe of the sync that is due.

        Before the update ``learning`` begins to hold back interruptions.
        """
        config, state = self._config.ppo, self._state
        self._timer = timer = StepTimer()
        with timer("rollout"):
            responses, lost = self._sample()
        with timer("score"):
            scored = self._score(responses)
        rewards = dense_rewards(
            responses, scored.segments, scored.scores, scored.malformed, config.shape, state.centers
        )
        batch = make_batch(
            responses, scored.logprobs, scored.evaluations, rewards.tokens,
            kl_coef=state.kl.coef, gamma=config.gamma, lam=config.lam,
            tis_cap=config.tis_cap if config.async_depth else None,
            estimator=config.estimator, own_rewards=rewards.own,
            token_penalty=config.token_penalty, kl_in_loss=config.kl.placement == "loss",
        )  # fmt: skip
        self._keep_rollouts(batch, scored, rewards)
        timer.tokens = float(batch.mask.sum())
        learning.enter_context(held_back(f"step {state.step + 1}, which is being learnt from,"))
        with timer("update"):
            trained = self._train(batch)
        metrics = rollout_metrics(batch, scored.segments, scored.scores, rewards, state.kl.coef)
        self._state = LoopState(
            step=state.step + 1,
            kl=update_kl(state.kl, metrics["kl/response"], len(responses), config.kl),
            centers=rewards.centers,
        )
        self._updating = False
        off_policy = off_policy_metrics(batch, step=state.step, tis_cap=config.tis_cap)
        metrics |= lost | off_policy | trained | timer.metrics()
        report = StepReport(step=state.step + 1, version=state.step + 1, metrics=metrics)
        return report, responses[:PROBE_RESPONSES]

    def _score(self, responses: list[Response]) -> Scored:
        """Ask all roles about the responses at the same time."""
        references = self._roles.reference.evaluate(responses)
        own = self._roles.learner.logprobs(responses)
        # Segments are found while these work; only the reward models need them.
        segments = [self._segmenter(response) for response in responses]
        scoring = self._roles.rewards.score(responses, segments)
        malformed = [self._find_malformed(r, s) for r, s in zip(responses, segments, strict=True)]
        scores, evaluations, logprobs = gather(scoring, references, own)
        return Scored(
            segments=segments,
            malformed=malformed,
            scores=scores,
            evaluations=evaluations,
            logprobs=logprobs,
        )

    def _keep_rollouts(self, batch: TrainBatch, scored: Scored, rewards: DenseRewards) -> None:
        """Write the step's rollouts to a file where they are wanted (``tracking.rollouts``)."""
        state = self._state
        keep_rollouts(
            self._root / "rollouts", self._config, step=state.step + 1,
            kl_coef=state.kl.coef, centers=state.centers, batch=batch, segments=scored.segments,
            scores=scored.scores, rewards=rewards, malformed=scored.malformed,
        )  # fmt: skip

    def _train(self, batch: TrainBatch) -> dict[str, float]:
        """Update policy and value model, if there is one, at the same time; their metrics."""
        self._updating = True
        del self._ahead[self._state.step]
        update = self._roles.learner.update(batch, self._anchors(self._state.step))
        if not self._config.ppo.has_critic:
            return update.result().metrics
        value_report = self._roles.reference.update_values(batch).result()
        return update.result().metrics | value_report.metrics

    def _synced(self, report: StepReport, probe: Sequence[Response]) -> StepReport:
        """Bring the step's version to the engines; the report with what that showed and took."""
        with self._timer("sync"):
            sync_report = self._sync(probe, report.version)
        metrics = report.metrics | sync_report.metrics() | self._timer.metrics()
        return replace(report, metrics=metrics)

    def _sample(self) -> tuple[list[Response], dict[str, float]]:
        """Take this step's responses, after asking for those of the steps ahead.

        Every step's are sampled with the version that is newest when they are asked for. Returns
        them with the numbers of those that are missing.
        """
        config, now = self._config.ppo, self._state.step
        for step in range(now, min(now + config.async_depth + 1, config.steps)):
            if step not in self._ahead:
                requests = self._requests(step)
                self._ahead[step] = self._roles.rollouts.generate(requests, version=now)
        sampled = self._ahead[now].result()
        responses = _answered(sampled)
        fresh, stale = drop_stale(responses, now, config.max_staleness)
        if not fresh:
            raise ActorError(
                f"PPO step {now + 1}: none of {len(sampled)} responses can be used ({stale} too "
                f"old, {len(sampled) - len(responses)} set aside because they kill engines)"
            )
        lost = {"set_aside": len(sampled) - len(responses), "stale": stale}
        usable = [responses[i] for i in fresh]
        if config.compares_samples:
            usable, lost["alone"] = drop_alone(usable)
            if not usable:
                raise ActorError(
                    f"PPO step {now + 1}: every response lost the others to its prompt "
                    f"({lost['set_aside']} of {len(sampled)} were set aside because they kill "
                    "engines), so there is nothing to compare; raise ppo.samples_per_prompt"
                )
        return usable, {f"rollout/{k}": float(v) for k, v in lost.items()}

    def _requests(self, step: int) -> list[GenerationRequest]:
        config, size = self._config, self._config.ppo.samples_per_prompt
        count = config.ppo.rollout_batch // size
        batch = batch_indexes(len(self._data.prompts), count, step, config.seed)
        prompts = [self._data.prompts[index] for index in batch for _ in range(size)]
        samples = sample_numbers([prompt.id for prompt in prompts], step, size)
        return [
            GenerationRequest(
                prompt=prompt,
                sample=sample,
                seed=request_seed(config.seed, step, position, prompt.id),
                temperature=config.policy.temperature,
                max_new_tokens=config.policy.max_new_tokens,
            )
            for position, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
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
        """Bring a version to the engines; those that sample ahead are not waited for.

        In asynchronous mode the report is that of the sync before, which must have succeeded.
        """
        last = self._syncing if self._ahead else None
        self._syncing = sync(
            self._roles.learner,
            self._roles.reference,
            self._roles.rollouts,
            probe,
            version=version,
        )
        return (last or self._syncing).result()

    def _keep_step(self) -> None:
        """Write a checkpoint of the last finished step, if the learner still stands there."""
        step = self._state.step
        if self._updating or step <= self._kept[0]:
            return
        try:
            # Where the engines are what failed, a resumed run samples these batches itself.
            last = step + self._config.ppo.async_depth
            kept = {n: sampling for n, sampling in self._ahead.items() if n < last}
            self._ahead = {n: sampling for n, sampling in kept.items() if _came(sampling)}
            self._checkpoint()
        except FgaifError as failure:
            log.warning("step %d could not be kept: %s", step, failure)

    def _stopped(self, error: FgaifError) -> FgaifError:
        """Keep the last finished step; say what is kept."""
        self._keep_step()
        step, path = self._kept
        if path is None:
            return type(error)(f"{error}\nNo step is kept yet in {self._checkpoints}")
        if isinstance(error, DivergedError):  # the same steps would follow
            return DivergedError(f"{error}\nStep {step} is kept in {path}")
        how = "latest" if _is_latest(path, self._checkpoints) else path
        return type(error)(f"{error}\nStep {step} is kept in {path}: go on with ppo.resume={how}")

    def _checkpoint(self) -> None:
        """Write learner, value model and loop state as one directory, or nothing."""
        step, critic = self._state.step, self._config.ppo.has_critic

        def write(folder: Path) -> None:
            learner = self._roles.learner.save(folder / "learner")
            if critic:
                self._roles.reference.save(folder / "reference").result()
            learner.result()
            self._roles.learner.save_adapter(folder / "adapter").result()
            for number, sampling in self._ahead.items():
                store = response_store(folder / _AHEAD.format(number))
                store.append(_answered(sampling.result()))

        state = {
            "step": step,
            "kl": asdict(self._state.kl),
            "centers": self._state.centers.to_json(),
            "config": self._data.settings,
            "data": self._data.digest,
        }
        path = write_checkpoint(
            self._checkpoints,
            f"step_{step:06d}",
            write,
            keep=self._config.ppo.keep_checkpoints,
            state=state,
        )
        self._roles.learner.set_restore_point(path / "learner")
        if critic:
            self._roles.reference.set_restore_point(path / "reference")
        self._kept = step, path

    def _resume(self) -> None:
        """Continue from ``ppo.resume``; refuse what is damaged, of other settings or other data."""
        wanted = self._config.ppo.resume
        if wanted is None:
            return
        path = resume_point(wanted, self._checkpoints)
        state = read_state(path)
        self._data.check_resumable(state, path)
        if state["data"] != self._data.digest:
            raise ConfigError(
                f"ppo.resume = {wanted!r}: {path} was made with data {state['data']} but this run "
                f"has {self._data.digest}; restore the prompts it was made with, or start a new run"
            )
        centers = RewardCenters.from_json(state["centers"])
        check_kinds(path, centers.kinds, self._config.kind_names, CheckpointError)
        learner = self._roles.learner.restore(path / "learner")
        if self._config.ppo.has_critic:
            self._roles.reference.restore(path / "reference").result()
        learner.result()
        self._state = LoopState(
            step=state["step"],
            kl=KlState(**state["kl"]),
            centers=centers,
        )
        self._kept = state["step"], path
        for number in range(state["step"], state["step"] + self._config.ppo.async_depth):
            file = path / _AHEAD.format(number)
            if file.is_file():
                self._ahead[number] = Ready(list(response_store(file)))


_AHEAD = "ahead/step_{:06d}.jsonl"
"""Responses of later steps that were sampled when a checkpoint was written."""


def _is_latest(path: Path, root: Path) -> bool:
    try:
        return latest_checkpoint(root) == path
    except CheckpointError:  # it lies elsewhere, and what is here is damaged
        return False


def _came(sampling: Pending[list[Response | None]]) -> bool:
    try:
        sampling.result()
    except FgaifError as error:
        log.warning("a batch sampled ahead is not kept: %s", error)
        return False
    return True


def _answered(sampled: Sequence[Response | None]) -> list[Response]:
    return [response for response in sampled if response is not None]
