"""PPO in virtual time: the real driver, pool, segmenter and batch code; roles that only take time.

A heap of events is the clock. Whoever waits for a result moves it to the event that brings the
result, so a day of a cluster takes seconds, and comes out the same every time. What the driver and
the pool themselves need in CPU time is measured apart from the stand-ins', and can be added to the
clock: then a slow driver makes slow iterations, as it would in earnest. What is missing is Ray:
pickling, copies and its own threads.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np

from actors.pool import ElasticPool, Task
from cluster.driver import PpoData, PpoDriver
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import check_resumable
from cluster.roles import Roles, SyncCheck
from cluster.weight_sync import PROBE_RESPONSES
from fgaif.config import Config
from fgaif.errors import ActorError
from fgaif.feedback.segment import segment_response
from fgaif.pending import Pending
from fgaif.scene_models.tokenizer import build_tokenizer
from fgaif.types import (
    DEFAULT_KINDS,
    Evaluation,
    FloatArray,
    GenerationRequest,
    ImageRef,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
    StepReport,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)

T = TypeVar("T")
Whose = Literal["driver", "pool", "world"]

_TEXT = (
    "The image shows a small red circle to the left of a large blue square, and a green star is "
    "above them. In the background there is a plain wall, which is painted in yellow. There is a "
    "purple triangle in the middle of the picture, next to a tiny orange ring. "
)


class Affine(NamedTuple):
    """Seconds of a call: ``fixed`` and ``each`` per response."""

    fixed: float
    each: float = 0.0

    def of(self, responses: Sequence[object]) -> float:
        return self.fixed + self.each * len(responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """How long everything takes. A chunk takes as long as its longest response."""

    start: float = 30.0
    load: float = 1.0
    prefill: float = 0.5
    token: float = 0.02
    score: Affine
    evaluate: Affine
    logprobs: Affine
    update: Affine
    update_values: Affine
    publish: float = 0.5


class Meter:
    """CPU seconds of this process by whose code was running."""

    def __init__(self) -> None:
        self.seconds: dict[Whose, float] = {"driver": 0.0, "pool": 0.0, "world": 0.0}
        self._whose: Whose = "driver"
        self._since = time.process_time()

    @contextmanager
    def on(self, whose: Whose) -> Iterator[None]:
        before = self._switch(whose)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, whose: Whose) -> Whose:
        now, before = time.process_time(), self._whose
        self.seconds[before] += now - self._since
        self._whose, self._since = whose, now
        return before


@dataclass(slots=True)
class Clock:
    """Virtual time. With ``charge`` the driver's CPU time passes on it too."""

    charge: bool = False
    now: float = 0.0
    meter: Meter = field(default_factory=Meter)
    _charged: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _serial: Iterator[int] = field(default_factory=count)

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._serial), event))

    def reach(self, moment: float) -> None:
        while self._events and self._events[0][0] <= moment:
            self._next()
        self.now = max(self.now, moment)

    def wait_for(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self._events, f"waiting at {self.now:g} s for what nobody is doing"
            self._next()

    @contextmanager
    def world(self) -> Iterator[None]:
        """The driver calls or waits: what it has computed until now has taken its time."""
        with self.meter.on("world"):
            if self.charge:
                used = self.meter.seconds["driver"] - self._charged
                self._charged += used
                self.reach(self.now + used)
            yield

    def _next(self) -> None:
        self.now, _, event = heapq.heappop(self._events)
        event()


class Due(Generic[T]):
    """A result that is there when its condition holds."""

    def __init__(self, clock: Clock, wait: Callable[[], None], value: Callable[[], T]) -> None:
        self._clock, self._wait, self._value = clock, wait, value

    def result(self) -> T:
        with self._clock.world():
            self._wait()
            return self._value()


class Actor:
    """Does its calls one after the other."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free = 0.0

    def call(self, seconds: float, value: T) -> Due[T]:
        self._free = max(self._free, self._clock.now) + seconds
        return Due(self._clock, partial(self._clock.reach, self._free), lambda: value)


class Engines:
    """The rollout role: the real pool over engines on the clock."""

    def __init__(self, clock: Clock, seconds: Seconds, config: Config, sampler: "Sampler") -> None:
        self._clock, self._seconds, self._sampler = clock, seconds, sampler
        self._chunk = config.cluster.rollout.chunk
        self.pool = ElasticPool(
            transport=self,
            max_restarts=config.cluster.max_restarts,
            autoscale=config.cluster.rollout.autoscale,
        )
        self._version = 0
        self.busy = 0.0
        """Engine-seconds of sampling that has led to answers."""
        self.loads = 0
        self.pool.resize(config.cluster.rollout.replicas)

    def generate(
        self, requests: Sequence[GenerationRequest], *, version: int | None = None
    ) -> Pending[list[Response | None]]:
        future: Future[list[Any]] = Future()
        with self._clock.world(), self._clock.meter.on("pool"):
            # Serials of the pool's weights: version 0 is the first that was loaded.
            weights = None if version is None else version + 1
            self.pool.submit("generate", list(requests), self._chunk, future, weights)
        return self._answer(future, future.result)

    def p_yes(self, prompts: Sequence[Prompt]) -> Pending[list[float]]:
        raise NotImplementedError

    def load_weights(self, manifest: WeightsManifest, probe: object) -> Pending[list[SyncCheck]]:
        future: Future[None] = Future()
        with self._clock.world(), self._clock.meter.on("pool"):
            self.pool.load(manifest.version + 1, future)
        return self._answer(future, lambda: [SyncCheck(arrived=1.0)])

    def start(self, name: str, life: int) -> None:
        self._clock.after(self._seconds.start, partial(self._tell, "started", name, life))

    def work(self, name: str, life: int, task: Task, load: bool) -> None:
        with self._clock.meter.on("world"):
            self.loads += load
            version = max(task.weights - 1, 0)
            answers = [self._sampler.sample(request, version) for request in task.items]
            longest = max((len(answer.token_ids) for answer in answers), default=0)
            taken = self._seconds.prefill + self._seconds.token * longest if answers else 0.0
            done = partial(self._done, name, life, answers, taken)
            self._clock.after(self._seconds.load * load + taken, done)

    def stop(self, name: str, life: int) -> None:
        pass

    def resize(self, seconds: float, size: int) -> None:
        """After so many seconds, have so many engines."""
        self._clock.after(seconds, partial(self.pool.resize, size))

    def kill(self, seconds: float, name: str) -> None:
        """After so many seconds, an engine dies, if it is there."""

        def die() -> None:
            if member := self.pool.members.get(name):
                self._tell("died", name, member.life, ActorError(f"{name} died"))

        self._clock.after(seconds, die)

    def _done(self, name: str, life: int, answers: list[Response], taken: float) -> None:
        member = self.pool.members.get(name)
        if member is not None and member.life == life:
            self.busy += taken
        self._tell("finished", name, life, answers)

    def _tell(self, event: str, *news: Any) -> None:
        with self._clock.meter.on("pool"):
            getattr(self.pool, event)(*news)

    def _answer(self, future: "Future[Any]", value: Callable[[], T]) -> Due[T]:
        return Due(self._clock, partial(self._clock.wait_for, future.done), value)


class Trained:
    """Learner, reference with values, and reward models: three actors that take time."""

    def __init__(self, clock: Clock, seconds: Seconds) -> None:
        self._clock, self._seconds = clock, seconds
        self._learner, self._reference, self._rewards = (Actor(clock) for _ in range(3))
        rng = np.random.default_rng(0)
        self._numbers = (rng.normal(size=4096) * 0.1 - 1.0).astype(np.float32)
        self._probs = rng.dirichlet([1.0] * len(SegmentClass), (1024, len(DEFAULT_KINDS)))
        self.newest: list[tuple[str, int]] = []
        """Ids and versions of the responses that the last update was made with."""

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        with self._clock.world():
            probs = self._probs.astype(np.float32)
            scores = [SegmentScores(probs=probs[: len(pieces)]) for pieces in segments]
            return self._rewards.call(self._seconds.score.of(responses), scores)

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        with self._clock.world():
            rows = self._rows(responses)
            found = [Evaluation(reference_logprobs=row, values=row) for row in rows]
            taken = _unless_probe(self._seconds.evaluate, responses)
            return self._reference.call(taken, found)

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        with self._clock.world():
            taken = self._seconds.update_values.of(batch.responses)
            return self._reference.call(taken, UpdateReport(metrics={"value/loss": 0.0}))

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        with self._clock.world():
            taken = _unless_probe(self._seconds.logprobs, responses)
            return self._learner.call(taken, self._rows(responses))

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        with self._clock.world():
            self.newest = [(r.prompt.id, r.policy_version) for r in batch.responses]
            taken = self._seconds.update.of(batch.responses)
            return self._learner.call(taken, UpdateReport(metrics={"policy/loss": 0.0}))

    def publish(self, version: int) -> Pending[WeightsManifest]:
        with self._clock.world():
            manifest = WeightsManifest(version=version, digest="", scaling=1.0, tensors={})
            return self._learner.call(self._seconds.publish, manifest)

    def save(self, path: Path) -> Pending[None]:
        path.mkdir(parents=True, exist_ok=True)
        return self._learner.call(0.0, None)

    def save_adapter(self, path: Path) -> Pending[None]:
        return self.save(path)

    def set_restore_point(self, path: Path) -> None:
        assert path.is_dir()

    def restore(self, path: Path) -> Pending[None]:
        return self._learner.call(0.0, None)

    def _rows(self, responses: Sequence[Response]) -> list[FloatArray]:
        return [self._numbers[: len(response.token_ids)] for response in responses]


class Sampler:
    """Responses of seeded length: lognormal around ``median`` tokens, cut at ``longest``."""

    def __init__(self, median: float, sigma: float, longest: int, kinds: int = 256) -> None:
        tokenizer = build_tokenizer()
        self._backend = tokenizer.backend_tokenizer
        self.segmenter = partial(segment_response, tokenizer=tokenizer)
        words = tokenizer.encode(_TEXT * (1 + longest // 40), add_special_tokens=False)
        rng = np.random.default_rng(0)
        lengths = (median * np.exp(sigma * rng.normal(size=kinds))).clip(2, longest).astype(int)
        eos = tokenizer.eos_token_id
        self._patterns = [self._pattern(words, int(n), longest, eos) for n in lengths]

    def sample(self, request: GenerationRequest, version: int) -> Response:
        pattern = self._patterns[request.seed % len(self._patterns)]
        return replace(
            pattern, prompt=request.prompt, sample=request.sample, policy_version=version
        )

    def _pattern(self, words: list[int], length: int, longest: int, eos: int) -> Response:
        ends = length < longest
        ids = words[: length - ends]
        return Response(
            prompt=make_prompt(0),
            sample=0,
            text=self._backend.decode(ids),
            token_ids=np.array([*ids, eos] if ends else ids),
            rollout_logprobs=np.full(length, -1.0, np.float32),
            finish="stop" if ends else "length",
            policy_version=0,
        )


def _unless_probe(stage: Affine, responses: Sequence[Response]) -> float:
    """A stage's time for a batch; the few responses of a sync's probe take none."""
    return stage.of(responses) if len(responses) > PROBE_RESPONSES else 0.0


def make_prompt(index: int) -> Prompt:
    """Prompt ``pINDEX`` about an image that nobody opens."""
    name = f"p{index}"
    return Prompt(id=name, image=ImageRef(path=name, sha256=f"{index:064x}"), text="Describe.")


class Prompts(Sequence[Prompt]):
    """So many prompts, each made when it is asked for; ``asked`` counts."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.asked = 0

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        assert isinstance(index, int)
        self.asked += 1
        return make_prompt(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step: when it ended, and what it took."""

    report: StepReport
    now: float
    """Virtual time."""
    busy: float
    """Engine-seconds of sampling so far."""
    cpu: dict[Whose, float]
    """CPU seconds so far."""


class Simulation:
    """A PPO run on the clock; ``checkpoint_every`` should be large, checkpoints are real files."""

    def __init__(
        self,
        config: Config,
        seconds: Seconds,
        sampler: Sampler,
        *,
        prompts: int = 14_000,
        charge: bool = False,
    ) -> None:
        self.clock = Clock(charge=charge)
        self.engines = Engines(self.clock, seconds, config, sampler)
        self.trained = Trained(self.clock, seconds)
        self.prompts = Prompts(prompts)
        self.driver = PpoDriver(
            config,
            Roles(
                rollouts=self.engines,
                rewards=self.trained,
                reference=self.trained,
                learner=self.trained,
            ),
            PpoData(
                prompts=self.prompts,
                anchors=[],
                digest="simulated",
                settings=stage_values(config, "train"),
                check_resumable=partial(check_resumable, config),
            ),
            sampler.segmenter,
            lambda *_: (),
        )

    def run(self) -> Iterator[Step]:
        """Yield after every step."""
        for report in self.driver.run():
            with self.clock.world():
                cpu = dict(self.clock.meter.seconds)
                yield Step(report=report, now=self.clock.now, busy=self.engines.busy, cpu=cpu)
