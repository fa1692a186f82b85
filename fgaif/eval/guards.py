"""Guards: did the model lose what it could do? Results of lmms-eval and VLMEvalKit, side by side.

Read are lmms-eval's ``*_results.json`` and VLMEvalKit's ``MODEL_DATASET_acc.csv`` (or
``_score.csv``); every figure becomes a share of 1.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgaif.errors import DataError
from fgaif.types import Json

_Z = 1.96
_POINT = 0.01
"""A drop by more than this is said where no standard errors are known."""
_LMMS: Mapping[str, tuple[str, str, float]] = {
    "mmvet": ("MM-Vet", "gpt_eval_score", 100),
    "mmbench_en_dev": ("MMBench", "gpt_eval_score", 100),
    "mmstar": ("MMStar", "average", 1),
    "mme": ("MME perception", "mme_perception_score", 2000),
    "mmmu_val": ("MMMU", "mmmu_acc", 1),
    "pope": ("POPE accuracy", "pope_accuracy", 1),
}
"""By lmms-eval's task: name, metric, and what it is divided by."""
_VLMEVAL: Mapping[str, tuple[str, str, float]] = {
    "MMVet": ("MM-Vet", "acc", 100),
    "MMBench_DEV_EN_V11": ("MMBench 1.1", "Overall", 1),
    "MMBench_DEV_EN": ("MMBench", "Overall", 1),
    "MMStar": ("MMStar", "Overall", 1),
    "MMMU_DEV_VAL": ("MMMU", "Overall", 1),
    "HallusionBench": ("HallusionBench aAcc", "aAcc", 100),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A figure as a share of 1, with its standard error where the tool gives one."""

    value: float
    error: float | None = None


def read_guards(paths: Sequence[Path]) -> dict[str, Guard]:
    """Read one model's result files; returns the figures by name.

    Raises:
        DataError: a file cannot be read, holds no known figure, or one that another holds as well.
    """
    found: dict[str, Guard] = {}
    for path in paths:
        own = _read_csv(path) if path.suffix == ".csv" else _read_lmms(path)
        if twice := found.keys() & own.keys():
            raise DataError(f"{path}: {', '.join(sorted(twice))} is in another file too; keep one")
        found |= own
    return found


def _read_lmms(path: Path) -> dict[str, Guard]:
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8-sig"))["results"]
        found = {
            name: Guard(value=value / whole, error=None if error is None else error / whole)
            for task, (name, metric, whole) in _LMMS.items()
            if task in results
            for value in [_number(results[task], metric)]
            for error in [_number(results[task], f"{metric}_stderr")]
            if value is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a result of lmms-eval ({error!r:.80}); give its *_results.json"
        ) from error
    if not found:
        raise DataError(
            f"{path}: none of the tasks {', '.join(_LMMS)} is in it, only {', '.join(results)}"
        )
    return found


def _number(task: Mapping[str, Any], metric: str) -> float | None:
    """The metric under its name, or under "NAME,FILTER" as newer versions write it."""
    for key, value in task.items():
        if key.partition(",")[0] == metric and isinstance(value, int | float):
            return None if math.isnan(value) else float(value)
    return None


def _read_csv(path: Path) -> dict[str, Guard]:
    known = next((data for data in _VLMEVAL if f"_{data}_" in f"_{path.name}"), None)
    if known is None:
        raise DataError(
            f"{path}: its name holds none of the data sets {', '.join(_VLMEVAL)}; give "
            "VLMEvalKit's file under its own name, such as MODEL_MMStar_acc.csv"
        )
    name, column, whole = _VLMEVAL[known]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        # Files with a row per category have one over all; others have one row, of their split.
        whole_set = [row for row in rows if "Overall" in row.values()]
        value = float((whole_set or rows[-1:])[0][column])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{path}: no number under {column!r} in its last row ({error!r:.80})"
        ) from error
    return {name: Guard(value=value / whole)}


def compare_guards(before: Mapping[str, Guard], after: Mapping[str, Guard]) -> Json:
    """Set two models' guards side by side.

    A guard ``dropped`` if it fell by more than 1.96 standard errors of the difference, or, where
    the tool gives none, by more than a point.

    Raises:
        DataError: they have none in common.
    """
    names = [name for name in before if name in after]
    if not names:
        raise DataError(
            f"the two have no guard in common: {', '.join(before)} and {', '.join(after)}; run the "
            "same tasks for both"
        )
    rows: Json = {}
    for name in names:
        a, b = before[name], after[name]
        difference = b.value - a.value
        errors = [a.error, b.error]
        sure = [error for error in errors if error is not None]
        reach = _Z * math.hypot(*sure) if len(sure) == len(errors) else _POINT
        rows[name] = {
            "before": a.value,
            "after": b.value,
            "difference": difference,
            "reach": reach,
            "dropped": difference < -reach,
        }
    return {"guards": rows, "only_in_one": sorted(before.keys() ^ after.keys())}
