"""A study's figures: variants over seeds, with intervals and paired tests against the first one.

Two things vary, and each has its own test. Trainings differ by seed: differences are paired by
seed, with Student's t over the seeds. Images differ too: differences are paired by image, each
averaged over the seeds first, because captions of one image by several trainings are no independent
samples.
"""

import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from fgaif.errors import DataError
from fgaif.eval.run_results import figures_json, read_eval
from fgaif.eval.uncertainty import LEVEL, RESAMPLES, holm
from fgaif.tracking import read_metrics
from fgaif.types import EvalReport, Json, StepReport

Images = dict[str, float]
"""Hallucinated share of the segments with facts, by image, of the sampled captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One training of a study, or why there is none.

    ``steps`` are those of PPO, none for a policy that another command made. ``at`` holds the
    evaluations of its checkpoints by step, the last one's among them; ``figures`` those at the end.
    """

    variant: str
    seed: int
    failure: str = ""
    steps: tuple[StepReport, ...] = ()
    figures: Json = field(default_factory=dict)
    at: dict[int, Json] = field(default_factory=dict)
    images: Images = field(default_factory=dict)
    costs: Json = field(default_factory=dict)

    @property
    def kl(self) -> dict[int, float]:
        """KL to the reference, summed per response, at the start of each step."""
        return {report.step: report.metrics["kl/response"] for report in self.steps}


def figures_of(report: EvalReport) -> Json:
    """Sampled figures by name, greedy ``any`` and POPE's F1."""
    return figures_json(report.sampled) | {
        "greedy_any": report.greedy.any,
        "pope_f1": report.pope.f1 if report.pope else None,
    }


def read_run(
    folder: Path, variant: str, seed: int, *, steps: int, batch: int, kinds: int
) -> StudyRun:
    """Read a finished run of a study.

    Args:
        folder: the run.
        variant, seed: which it is.
        steps: PPO steps it was to make.
        batch: responses per step.
        kinds: reward models that score each response.

    Raises:
        DataError: a file is missing or broken.
    """
    metrics = folder / "policy" / "metrics.jsonl"
    reports = tuple(read_metrics(metrics)) if metrics.is_file() else ()
    end = figures_of(read_eval(folder / "eval", "after"))
    at = {
        int(path.name.removeprefix("step_")): figures_of(read_eval(path, "after"))
        for path in sorted((folder / "eval_steps").glob("step_*"))
        if (path / "after.json").is_file()
    }
    return StudyRun(
        variant=variant,
        seed=seed,
        steps=reports,
        figures=end,
        at=at | ({steps: end} if reports else {}),
        images=image_errors(folder / "eval" / "after_captions.jsonl"),
        costs=run_costs(reports, batch=batch, kinds=kinds),
    )


def run_costs(steps: Sequence[StepReport], *, batch: int, kinds: int) -> Json:
    """What a training took: responses, their tokens, seconds, calls of reward models.

    The verifier's questions are counted where it was asked instead of reward models.
    """
    if not steps:
        return {}
    lost = ("rollout/set_aside", "rollout/stale", "rollout/alone")
    samples = [batch - sum(step.metrics.get(name, 0.0) for name in lost) for step in steps]
    tokens = [
        count * step.metrics["length/tokens"] for count, step in zip(samples, steps, strict=True)
    ]
    found = {
        "samples": sum(samples),
        "tokens": sum(tokens),
        "seconds": sum(step.metrics.get("seconds/total", math.nan) for step in steps),
        "reward_calls": kinds * sum(samples),
    }
    if any("verifier/questions" in step.metrics for step in steps):
        found["verifier_questions"] = sum(s.metrics.get("verifier/questions", 0.0) for s in steps)
    return found


def image_errors(path: Path) -> Images:
    """Read each image's share from a captions file of an evaluation; images without facts are out.

    Raises:
        DataError: the file is missing or broken.
    """
    found: Images = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["mode"] != "sampled":
                continue
            labels = [set(segment["labels"].values()) for segment in row["segments"]]
            judged = [classes for classes in labels if classes & {"OK", "HALLU"}]
            if judged:
                found[row["id"]] = sum("HALLU" in classes for classes in judged) / len(judged)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not captions of an evaluation ({error})") from error
    return found


def interval(values: Sequence[float]) -> Json:
    """Mean and half-width of its 95 % interval, Student's t; no half-width for one value."""
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return {"mean": float(np.mean(values)), "half_width": half, "n": len(values)}


def paired(first: Sequence[float], other: Sequence[float]) -> Json:
    """Mean of ``other - first``, its 95 % interval and p, by Student's paired t test.

    Without two pairs, or where all differences are equal, there is no p.
    """
    differences = [b - a for a, b in zip(first, other, strict=True)]
    found = interval(differences)
    p = None
    if found["half_width"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of differences that are nearly equal
            p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return found | {"p": p}


def paired_by_image(first: Sequence[StudyRun], other: Sequence[StudyRun]) -> Json | None:
    """Mean difference of the images' errors, its bootstrap interval, and p of the paired t test.

    The runs have the same seeds, in order. Each image's difference is its mean over the seeds;
    images that lack judged facts in one of the runs are left out. None without two images.
    """
    known = set.intersection(*(set(run.images) for run in (*first, *other)))
    if len(known) < 2:
        return None
    images = sorted(known)
    sides = [
        np.mean([[run.images[i] for i in images] for run in side], 0) for side in (first, other)
    ]
    apart = sides[1] - sides[0]
    found: Json = {"mean": float(apart.mean()), "n": len(images), "low": None, "high": None}
    if not np.ptp(apart):
        return found | {"p": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that hardly differ
        ends = stats.bootstrap(
            (apart,), np.mean, n_resamples=RESAMPLES, method="percentile",
            confidence_level=LEVEL, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        p = float(stats.ttest_rel(sides[1], sides[0]).pvalue)
    return found | {"low": float(ends.low), "high": float(ends.high), "p": p}


def nearest_step(kl: Mapping[int, float], steps: Collection[int], target: float) -> int:
    """The step among ``steps`` whose KL is nearest to ``target``, the earliest of equals."""
    return min(steps, key=lambda step: (abs(kl[step] - target), step))


def matched_steps(
    first: Mapping[int, float], other: Mapping[int, float], first_kept: Collection[int],
    other_kept: Collection[int],
) -> tuple[int, int]:  # fmt: skip
    """Steps of two trainings whose KL is nearest to the smaller of their final ones.

    Args:
        first, other: KL by step.
        first_kept, other_kept: steps whose checkpoints there are.
    """
    target = min(first[max(first)], other[max(other)])
    return nearest_step(first, first_kept, target), nearest_step(other, other_kept, target)


def study_json(
    before: EvalReport,
    runs: Sequence[StudyRun],
    matched: Mapping[tuple[str, int], tuple[int, int]],
    rewards: Mapping[str, Json],
) -> Json:
    """Everything that ``study.json`` says, from the runs in order; the first variant leads.

    Args:
        before: evaluation before training.
        runs: of all variants and seeds.
        matched: by variant and seed, the steps of the first variant and of this one at equal KL.
        rewards: by variant, F1 of HALLU of its reward models by kind, where it was measured.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    done = {(run.variant, run.seed): run for run in runs if not run.failure}
    lead = variants[0]
    result: Json = {
        "seeds": sorted({run.seed for run in runs}),
        "kinds": list(before.sampled.kinds),
        "first": lead,
        "before": figures_of(before),
        "runs": [_run_json(run) for run in runs],
        "equal_steps": {},
        "matched_kl": {},
        "against_first": {},
        "costs": {},
        "reward_models": dict(rewards),
    }
    for variant in variants:
        own = [run for run in runs if run.variant == variant and not run.failure]
        result["equal_steps"][variant] = _means([run.figures for run in own])
        result["costs"][variant] = _means([run.costs for run in own])
        pairs = [(done[lead, r.seed], r) for r in own if (lead, r.seed) in done]
        if variant == lead or not pairs:
            continue
        result["against_first"][variant] = _against(pairs)
        at = [
            (a.at[steps[0]], b.at[steps[1]])
            for a, b in pairs
            if (steps := matched.get((variant, b.seed))) and steps[0] in a.at and steps[1] in b.at
        ]
        if at:
            result["matched_kl"][variant] = _matched(at)
    by_image = {v: (row["images"] or {}).get("p") for v, row in result["against_first"].items()}
    for variant, p in holm(by_image).items():
        result["against_first"][variant]["p_holm"] = p
    return result


def _run_json(run: StudyRun) -> Json:
    kl = run.kl
    return {
        "variant": run.variant,
        "seed": run.seed,
        "failure": run.failure or None,
        "kl": kl[max(kl)] if kl else None,
        "figures": run.figures,
        "at": {str(step): figures for step, figures in sorted(run.at.items())},
        "kl_by_step": {str(step): value for step, value in kl.items()},
        "costs": run.costs,
    }


def _means(rows: Sequence[Json]) -> Json:
    """Mean and interval of each figure that all rows know."""
    if not rows:
        return {}
    known = [name for name in rows[0] if all(row.get(name) is not None for row in rows)]
    return {name: interval([row[name] for row in rows]) for name in known}


def _against(pairs: Sequence[tuple[StudyRun, StudyRun]]) -> Json:
    first, other = [a for a, _ in pairs], [b for _, b in pairs]
    names = [
        name
        for name in first[0].figures
        if all(run.figures[name] is not None for run in (*first, *other))
    ]
    return {
        "seeds": [run.seed for run in first],
        "figures": {
            name: paired([r.figures[name] for r in first], [r.figures[name] for r in other])
            for name in names
        },
        "images": paired_by_image(first, other),
    }


def _matched(at: Sequence[tuple[Json, Json]]) -> Json:
    names = [n for n in at[0][0] if all(side[n] is not None for pair in at for side in pair)]
    return {
        name: interval([b[name] for _, b in at])
        | {
            "first": interval([a[name] for a, _ in at]),
            "difference": paired([a[name] for a, _ in at], [b[name] for _, b in at]),
        }
        for name in names
    }


def verdict(difference: Json) -> str:
    """What a difference with its interval says of errors, in words."""
    half, n = difference["half_width"], difference["n"]
    if half is None:
        return "one seed: no interval"
    if abs(difference["mean"]) <= half:
        return f"no difference that {n} seeds could show"
    return "fewer errors" if difference["mean"] < 0 else "more errors"
