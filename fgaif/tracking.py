"""Metrics of the PPO loop: one JSONL line per step always, other trackers by choice.

``GLOSSARY`` says what each metric means and which values are healthy. A kind stands for itself:
``reward/object`` is explained by the entry ``reward/KIND``.
"""

import importlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from fgaif.config import TrackingConfig
from fgaif.errors import ConfigError, DataError
from fgaif.files import write_whole
from fgaif.types import Json, Kind, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a metric means; ``low`` and ``high`` bound the values that need no second look."""

    meaning: str
    low: float | None = None
    high: float | None = None

    @property
    def healthy(self) -> str:
        """The healthy range in words, empty if there is none."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.high is not None:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else ""

    def ok(self, value: float) -> bool:
        """Say whether a value lies in the healthy range."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


GLOSSARY: dict[str, Metric] = {
    "reward/KIND": Metric(meaning="value per response of the kind, before its weight"),
    "reward/task": Metric(meaning="reward per response without the KL term; should rise"),
    "reward/total": Metric(meaning="reward per response with the KL term"),
    "hallu/KIND": Metric(meaning="hallucinated share of the segments with facts; should fall"),
    "kl/response": Metric(
        meaning="log-prob of policy minus reference, summed per response", low=-0.5, high=15
    ),
    "kl/token": Metric(meaning="the same per token", high=0.5),
    "kl/coef": Metric(meaning="weight of the KL in the reward, or in the loss"),
    "length/tokens": Metric(meaning="tokens per response; a drift means reward hacking"),
    "length/segments": Metric(meaning="segments per response"),
    "length/truncated": Metric(meaning="share of responses that never ended", high=0.05),
    "segments/penalised": Metric(meaning="share of repeated or malformed segments", high=0.1),
    "policy/loss": Metric(meaning="clipped surrogate loss"),
    "policy/clip_frac": Metric(meaning="tokens whose ratio was clipped", high=0.3),
    "policy/approx_kl": Metric(meaning="KL between old and new policy in the step", high=0.1),
    "policy/grad_norm": Metric(meaning="gradient norm before clipping"),
    "policy/lr": Metric(meaning="learning rate of the policy"),
    "policy/entropy": Metric(meaning="mean -log p of the sampled tokens; 0 is a collapsed policy"),
    "policy/ratio_max": Metric(meaning="largest ratio of new to old probability", high=10),
    "policy/tokens": Metric(meaning="tokens trained on, over all epochs of the step"),
    "policy/seconds": Metric(meaning="seconds of the learner's update"),
    "policy/kl_loss": Metric(
        meaning="k3 estimate of the KL to the reference per token, where it is in the loss",
        high=0.5,
    ),
    "policy/anchor_kl": Metric(meaning="KL to the reference on the anchor questions", high=0.5),
    "value/loss": Metric(meaning="squared error of the values"),
    "value/explained_variance": Metric(
        meaning="share of the returns' variance that the values explain; should rise", low=0
    ),
    "mismatch/mean": Metric(
        meaning="mean |probability difference| of the sampled tokens, learner against engine",
        high=0.005,
    ),
    "mismatch/max": Metric(meaning="largest |log-prob difference| of a sampled token", high=1),
    "staleness/mean": Metric(meaning="updates between a response's weights and the learner's"),
    "staleness/max": Metric(meaning="the same of the oldest response"),
    "rollout/stale": Metric(meaning="responses too old to be trained on", high=0),
    "rollout/set_aside": Metric(meaning="requests given up: they kill engines", high=0),
    "rollout/alone": Metric(
        meaning="responses left out: of all to their prompt no other was answered", high=0
    ),
    "verifier/questions": Metric(
        meaning="questions to the models that give the rewards; stored replies cost none"
    ),
    "verifier/seconds": Metric(meaning="seconds that their answers took"),
    "tis/mean_weight": Metric(
        meaning="mean importance weight of the tokens, learner against sampler", low=0.8, high=1.2
    ),
    "tis/capped_frac": Metric(meaning="share of the weights that were cut at the cap", high=0.05),
    "sync/arrived": Metric(
        meaning="share of the policy's update that the engines hold; less than 0.9 stops the run",
        low=0.99,
    ),
    "sync/mean_abs_diff": Metric(
        meaning="mean log-prob difference of the probe after the sync, learner against engine"
    ),
    "sync/max_abs_diff": Metric(meaning="the same, of the token that differs most"),
    "sync/noise": Metric(
        meaning="mean log-prob difference of the probe under the checkpoint, reference against "
        "engine"
    ),
    "sync/effect": Metric(meaning="mean log-prob difference that the update makes on the probe"),
    "sync/bytes": Metric(meaning="bytes of the published weights"),
    "sync/seconds": Metric(meaning="seconds of the sync, probe included"),
    "seconds/total": Metric(meaning="seconds per step"),
    "seconds/STAGE": Metric(meaning="seconds of one stage of the step"),
    "tokens_per_second": Metric(meaning="sampled tokens per second of the whole step"),
}


def explain(name: str) -> Metric | None:
    """Find the glossary's entry for a metric name."""
    if name in GLOSSARY:
        return GLOSSARY[name]
    group = name.partition("/")[0]
    return GLOSSARY.get(f"{group}/{'KIND' if kind_of_metric(name) else 'STAGE'}")


def kind_of_metric(name: str) -> Kind | None:
    """The kind that a metric is about; None for one that is about none."""
    group, _, last = name.partition("/")
    return last if f"{group}/KIND" in GLOSSARY and name not in GLOSSARY else None


class Sink(Protocol):
    """One place that metrics go to."""

    def log(self, report: StepReport) -> None:
        """Write one step."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class Tracker:
    """Sends each step's metrics to every sink; a context manager that closes them.

    Raises:
        ConfigError: a tracker is switched on and its package is missing.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        name: str = "fgaif",
        settings: Json | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """``settings``: the run's configuration, for trackers that keep it."""
        self._sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", say)]
        if config.tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard"))
        for package in ("wandb", "trackio"):
            if getattr(config, package):
                self._sinks.append(_Hosted(package, config.project, name, folder, settings))

    def log(self, report: StepReport) -> None:
        """Send one step to every sink."""
        for sink in self._sinks:
            sink.log(report)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class JsonlSink:
    """Appends ``{"step", "version", "metrics"}`` lines, each flushed to disk.

    The first step that is logged decides what of an older file still holds: lines from that step
    on (a run that was cut off after its last checkpoint, or an earlier run) and a line that was
    not finished are removed, and said.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._path = path
        self._say = say
        self._file: IO[str] | None = None

    def log(self, report: StepReport) -> None:
        """Append one line."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._cut(report.step)
            self._file = self._path.open("a", encoding="utf-8")
        # JSON has no NaN and no infinity: both are written as null.
        finite = {k: v if math.isfinite(v) else None for k, v in report.metrics.items()}
        row = {"step": report.step, "version": report.version, "metrics": finite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _cut(self, first_step: int) -> None:
        if not self._path.is_file():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) < first_step]
        if len(kept) == len(lines):
            return
        write_whole(self._path, "".join(line + "\n" for line in kept))
        self._say(
            f"{self._path}: removed {len(lines) - len(kept)} lines from step {first_step} on, "
            "which is done again"
        )


def _step_of(line: str) -> float:
    """Read a line's step; infinite if the line was not finished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> Iterator[StepReport]:
    """Read a metrics file; a null is a value that was not finite, and comes back as NaN.

    Raises:
        DataError: a line is not a step; the message gives its number.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            metrics = {k: math.nan if v is None else float(v) for k, v in row["metrics"].items()}
            yield StepReport(step=row["step"], version=row["version"], metrics=metrics)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: not a line of metrics ({error}); delete the line"
            ) from error


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._writer = _load("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, report: StepReport) -> None:
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """W&B, or trackio, which has the same calls.

    A run is known by an id of its own in its folder, not by its name: runs that are called the same
    stay apart, and one that goes on, or whose results come later, is found again.
    """

    def __init__(
        self, package: str, project: str, name: str, folder: Path, settings: Json | None = None
    ) -> None:
        self._module = _load(package, package)
        own: Json = {"name": f"{name}-{_run_id(folder)}"}
        if package == "wandb":
            own = {"name": name, "dir": str(folder), "id": _run_id(folder)}
        self._run = self._module.init(project=project, resume="allow", config=settings or {}, **own)

    def log(self, report: StepReport) -> None:
        self._run.log(report.metrics, step=report.step)

    def results(
        self, figures: Mapping[str, float], columns: Sequence[str], rows: list[Any]
    ) -> None:
        """Final figures, and a table of samples where the tracker has them."""
        if hasattr(self._run, "summary"):
            self._run.summary.update(figures)
            table = self._module.Table(columns=list(columns), data=rows)
            self._run.log({"captions": table})
        else:
            self._run.log(dict(figures))

    def close(self) -> None:
        self._run.finish()


def log_results(
    folder: Path,
    config: TrackingConfig,
    name: str,
    settings: Json,
    figures: Mapping[str, float],
    columns: Sequence[str],
    rows: list[Any],
) -> None:
    """Send a run's final figures and sample captions to the hosted trackers that are switched on.

    Raises:
        ConfigError: as :class:`Tracker`.
    """
    for package in ("wandb", "trackio"):
        if getattr(config, package):
            run = _Hosted(package, config.project, name, folder, settings)
            run.results(figures, columns, rows)
            run.close()


def _run_id(folder: Path) -> str:
    """The id of the training in this folder, made at the first use; one anew gets another."""
    file = folder / "tracking_id"
    if not file.is_file():
        write_whole(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text(encoding="utf-8").strip()


def _load(module: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tracking.{key} = true: the package {key!r} is missing; install it with "
            f"`pip install 'fgaif[track]'`, or set tracking.{key}=false"
        ) from error
