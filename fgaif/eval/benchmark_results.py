"""Scored benchmarks on disk: ``NAME.json`` for people and scripts, ``NAME_items.jsonl`` for tests.

The items keep the sums that figures are made from, so two folders can be compared at any time
without scoring anything again.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.benchmarks import benchmark_names, load_benchmark
from fgaif.eval.buckets import with_buckets
from fgaif.eval.scored import Scored
from fgaif.eval.uncertainty import LEVEL, Comparison, Estimate
from fgaif.files import write_whole
from fgaif.types import Json


def with_length_figures(scored: Scored) -> Scored:
    """Add the figures by number of sub-sentences to benchmarks of descriptions."""
    if not load_benchmark(scored.benchmark).descriptions:
        return scored
    return with_buckets(scored, [item["answer"] for item in scored.items])


def result_json(scored: Scored, estimates: Mapping[str, Estimate], seed: int = 0) -> Json:
    """A result as one object: every figure under its own name, then intervals and circumstances."""
    figures: Json = {name: estimate.value for name, estimate in estimates.items()}
    return {
        "benchmark": scored.benchmark,
        **(_nested(figures) if load_benchmark(scored.benchmark).nested else figures),
        "intervals": {name: [e.low, e.high] for name, e in estimates.items()},
        "level": LEVEL,
        "seed": seed,
        "items": len(scored.ids),
        "units": len(set(scored.units)),
        "counts": scored.counts,
        "provenance": scored.provenance,
        "warnings": list(scored.warnings),
    }


def comparison_json(comparison: Comparison) -> Json:
    """A comparison as one object."""
    tree = asdict(comparison)
    for figure in tree["figures"].values():
        spread = figure.pop("difference")
        figure |= {"difference": spread["value"], "interval": [spread["low"], spread["high"]]}
    return tree | {"level": LEVEL}


def write_scored(
    folder: Path, scored: Scored, estimates: Mapping[str, Estimate], seed: int = 0
) -> Path:
    """Write ``NAME_items.jsonl`` and, last, ``NAME.json``; returns the path of the second.

    ``scored`` is the benchmark as it was scored; ``estimates`` may hold more (see ``by_length``).
    """
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(scored))
    write_whole(folder / f"{scored.benchmark}_items.jsonl", rows)
    tree = result_json(scored, estimates, seed) | {"groups": list(scored.groups)}
    path = folder / f"{scored.benchmark}.json"
    write_whole(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    return path


def read_scored(folder: Path, benchmark: str) -> Scored:
    """Read back what ``write_scored`` wrote.

    Raises:
        DataError: a file is missing or broken, or the figures are no longer computed as they were.
    """
    path, items = folder / f"{benchmark}.json", folder / f"{benchmark}_items.jsonl"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        text = items.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        scored = Scored(
            benchmark=benchmark,
            ids=tuple(row["id"] for row in rows),
            units=tuple(row["unit"] for row in rows),
            stats=np.array([row["stats"] for row in rows], dtype=np.float64),
            figures=load_benchmark(benchmark).compute(tuple(tree["groups"])),
            groups=tuple(tree["groups"]),
            items=tuple(row["item"] for row in rows),
            badness=np.array([row["badness"] for row in rows], dtype=np.float64),
            counts=tree["counts"],
            provenance=tree["provenance"],
            warnings=tuple(tree.get("warnings", ())),  # results of before there were any
        )
        same = len(rows) == tree["items"] and _as_before(scored.metrics(), tree)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a readable result ({error}); score again") from error
    if not same:
        raise DataError(
            f"{path}: its figures do not follow from {items.name}; the two files do not belong "
            "together, or another version wrote them: score again"
        )
    return scored


def benchmarks_in(folder: Path) -> list[str]:
    """Names of the benchmarks with a result in the folder.

    Raises:
        DataError: there is none.
    """
    names = benchmark_names()
    found = [name for name in names if (folder / f"{name}.json").is_file()]
    if not found:
        raise DataError(
            f"{folder}: no results ({', '.join(f'{name}.json' for name in names)}); give a "
            "folder that `fgaif eval ... --out` wrote"
        )
    return found


def worst_items(scored: Scored, count: int) -> list[Json]:
    """The items that went worst, worst first, one per unit; only those that went wrong at all."""
    if scored.badness is None or not scored.items:
        return []
    first: dict[str, int] = {}
    for index in np.argsort(-scored.badness, kind="stable").tolist():
        if scored.badness[index] > 0:
            first.setdefault(scored.units[index], index)
    return [scored.items[index] for index in list(first.values())[:count]]


def _rows(scored: Scored) -> Iterator[Json]:
    badness = scored.badness if scored.badness is not None else np.zeros(len(scored.ids))
    items: Sequence[Json] = scored.items or [{}] * len(scored.ids)
    for index, (identity, unit) in enumerate(zip(scored.ids, scored.units, strict=True)):
        yield {
            "id": identity,
            "unit": unit,
            "stats": scored.stats[index].tolist(),
            "badness": float(badness[index]),
            "item": items[index],
        }


def _nested(figures: Mapping[str, Any]) -> Json:
    """Put figures named ``GROUP/NAME`` into an object ``GROUP``, as deep as the name goes."""
    tree: Json = {}
    for name, value in figures.items():
        *groups, key = name.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return tree


def figure_in(tree: Mapping[str, Any], name: str) -> float | None:
    """Look a figure of a result up by its whole name, or part by part where groups are nested.

    None if it has no value, or is not there.
    """
    place: Any = tree
    for part in [name] if name in tree else name.split("/"):
        place = place.get(part) if isinstance(place, Mapping) else None
    value: float | None = place
    return value


def _as_before(metrics: Mapping[str, float], tree: Mapping[str, Any]) -> bool:
    """Whether the figures are those of the file, as far as an earlier version had them."""
    return all(
        math.isnan(value) if old is None else math.isclose(value, old, abs_tol=1e-9)
        for name, value in metrics.items()
        if name in tree["intervals"]
        for old in [figure_in(tree, name)]
    )
