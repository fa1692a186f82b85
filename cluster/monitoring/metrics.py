"""Metrics of a run for Prometheus, through Ray's own metrics: each node's agent exports them.

Ray puts ``ray_`` before every name; ``grafana.json`` is a dashboard of exactly these. Seconds are
gauges, not histograms: what Ray exports of a histogram has the middles of its buckets for the
values, so its sum, and any mean, would be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ray.util.metrics import Counter, Gauge

from cluster.monitoring.status import ActorState, RunStatus
from fgaif.tracking import kind_of_metric
from fgaif.types import StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """A metric: what it says, and the labels it has besides ``run``."""

    meaning: str
    labels: tuple[str, ...] = ()
    type: Literal["gauge", "counter"] = "gauge"


METRICS: dict[str, MetricSpec] = {
    "fgaif_step": MetricSpec(meaning="finished PPO steps"),
    "fgaif_weights_version": MetricSpec(meaning="version of the policy's weights"),
    "fgaif_reward": MetricSpec(
        meaning="value per response of a kind, before its weight", labels=("kind",)
    ),
    "fgaif_reward_task": MetricSpec(meaning="reward per response without the KL term"),
    "fgaif_hallucination_rate": MetricSpec(
        meaning="hallucinated share of the segments with facts, by the reward models",
        labels=("kind",),
    ),
    "fgaif_kl_response": MetricSpec(meaning="KL to the reference, summed per response"),
    "fgaif_kl_coef": MetricSpec(meaning="weight of the KL in the reward"),
    "fgaif_response_tokens": MetricSpec(meaning="tokens per response"),
    "fgaif_mismatch": MetricSpec(meaning="mean |probability difference|, learner against engine"),
    "fgaif_tokens_per_second": MetricSpec(meaning="sampled tokens per second of the whole step"),
    "fgaif_stage_seconds": MetricSpec(
        meaning="seconds of a stage in the last step", labels=("stage",)
    ),
    "fgaif_sync_seconds": MetricSpec(meaning="seconds of the last weight sync, probe included"),
    "fgaif_sync_bytes_total": MetricSpec(meaning="bytes of weights published", type="counter"),
    "fgaif_queue_chunks": MetricSpec(
        meaning="chunks of prompts, waiting or in work", labels=("state",)
    ),
    "fgaif_actors": MetricSpec(meaning="actors of a role by state", labels=("role", "state")),
    "fgaif_restarts_total": MetricSpec(
        meaning="replacements of actors that died or hung", labels=("role",), type="counter"
    ),
    "fgaif_actor_tokens_per_second": MetricSpec(
        meaning="tokens an actor works on per second", labels=("role", "actor")
    ),
    "fgaif_actor_rss_bytes": MetricSpec(
        meaning="resident memory of an actor's process", labels=("role", "actor")
    ),
    "fgaif_actor_sign_age_seconds": MetricSpec(
        meaning="time since an actor's last heartbeat", labels=("role", "actor")
    ),
    "fgaif_set_aside_total": MetricSpec(meaning="prompts that killed engines", type="counter"),
    "fgaif_stale_dropped_total": MetricSpec(
        meaning="responses too old to train on", type="counter"
    ),
}

_OF_STEP = {
    "reward/task": "fgaif_reward_task",
    "kl/response": "fgaif_kl_response",
    "kl/coef": "fgaif_kl_coef",
    "length/tokens": "fgaif_response_tokens",
    "mismatch/mean": "fgaif_mismatch",
    "tokens_per_second": "fgaif_tokens_per_second",
    "sync/seconds": "fgaif_sync_seconds",
}
_OF_KIND = {"reward": "fgaif_reward", "hallu": "fgaif_hallucination_rate"}
_ACTOR_GAUGES = {
    "tokens_per_second": "fgaif_actor_tokens_per_second",
    "rss": "fgaif_actor_rss_bytes",
    "sign_age_s": "fgaif_actor_sign_age_seconds",
}


class MetricsExporter:
    """Records a run's steps and states; Ray must be running."""

    def __init__(self, run: str) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        for name, spec in METRICS.items():
            made = (Gauge if spec.type == "gauge" else Counter)(
                name, description=spec.meaning, tag_keys=("run", *spec.labels)
            )
            made.set_default_tags({"run": run})
            (self._gauges if spec.type == "gauge" else self._counters)[name] = made
        self._counted: dict[tuple[str, str], int] = {}
        self._known: dict[str, str] = {}

    def step(self, report: StepReport) -> None:
        """Record a finished step."""
        metrics = report.metrics
        self._set("fgaif_step", report.step)
        for key, name in _OF_STEP.items():
            if key in metrics:
                self._set(name, metrics[key])
        for key, value in metrics.items():
            if kind := kind_of_metric(key):
                self._set(_OF_KIND[key.partition("/")[0]], value, kind=kind)
            elif key.startswith("seconds/"):
                self._set("fgaif_stage_seconds", value, stage=key.removeprefix("seconds/"))
        self._add("fgaif_sync_bytes_total", metrics.get("sync/bytes", 0.0))

    def status(self, status: RunStatus) -> None:
        """Record the state of the run and of its actors."""
        self._set("fgaif_weights_version", status.version)
        self._set("fgaif_queue_chunks", status.chunks_waiting, state="waiting")
        self._set("fgaif_queue_chunks", status.chunks_in_flight, state="in_flight")
        self._grown("fgaif_set_aside_total", "", status.set_aside)
        self._grown("fgaif_stale_dropped_total", "", status.stale_dropped)
        states = [(actor.role, actor.state) for actor in status.actors]
        roles = {actor.role for actor in status.actors} | set(self._known.values())
        for role in roles:
            for state in get_args(ActorState):
                self._set("fgaif_actors", states.count((role, state)), role=role, state=state)
        for actor in status.actors:
            self._grown("fgaif_restarts_total", actor.name, actor.restarts, role=actor.role)
            for field, name in _ACTOR_GAUGES.items():
                if (value := getattr(actor, field)) is not None:
                    self._set(name, value, role=actor.role, actor=actor.name)
        self._clear_left([actor.name for actor in status.actors])
        self._known |= {actor.name: actor.role for actor in status.actors}

    def _clear_left(self, present: Sequence[str]) -> None:
        """Ray keeps exporting what was set last: 0 for actors that left."""
        for actor in set(self._known) - set(present):
            for name in _ACTOR_GAUGES.values():
                self._set(name, 0.0, role=self._known[actor], actor=actor)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].set(value, labels)

    def _add(self, name: str, value: float, **labels: str) -> None:
        if value > 0:
            self._counters[name].inc(value, labels)

    def _grown(self, name: str, key: str, total: int, **labels: str) -> None:
        """Add what a total has grown by since it was last told; it starts anew when it falls."""
        before = self._counted.get((name, key), 0)
        self._counted[name, key] = total
        self._add(name, total - before if total >= before else total, **labels)
