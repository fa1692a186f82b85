"""Compare variants of PPO over seeds on the same reward models: at equal steps and matched KL.

Responses, labels, reward models and the evaluation before training are made once, by the study's
own run. Each variant and seed then trains in a run of its own below ``RUN/variants``, which can be
stopped and goes on where it was. The matched-KL figures are those of a run's checkpoint whose KL is
nearest to the smallest final KL of all runs with the same seed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.launch import Cluster
from cluster.pipeline.run_lock import driver_lock
from cluster.pipeline.stage_status import StageStatus
from cluster.pipeline.stages import Run, run_stages
from fgaif.config import Config, with_overrides
from fgaif.errors import ConfigError
from fgaif.eval.run_results import figures_json, read_eval
from fgaif.files import write_json
from fgaif.tracking import read_metrics
from fgaif.types import EvalReport, Json

_SHOWN = ("any", "recall", "true_facts", "length", "repetition")
"""Figures of the tables, after those of the kinds."""
# Student's t, two-sided 95 %, by the number of runs.
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run_study(config: Config, console: Console) -> Path:
    """Run everything that is missing, write ``RUN/study.json`` and print the table.

    Raises:
        ConfigError: fewer than two seeds or more than ten, or no variant.
    """
    study = config.study
    if not 2 <= len(study.seeds) <= max(_T_95) or not study.variants:
        raise ConfigError(
            f"study.seeds = {list(study.seeds)}, study.variants = {list(study.variants)}: give 2 "
            f"to {max(_T_95)} seeds and at least one variant"
        )
    run_stages(config, ("sample", "annotate", "train-reward", "eval-before"), False, console)
    runs = {
        (variant, seed): _train_variant(config, variant, seed, console)
        for seed in study.seeds
        for variant in study.variants
    }
    for seed in study.seeds:
        same_seed = {variant: runs[variant, seed] for variant in study.variants}
        target = min(_kl_by_step(run)[run.ppo.steps] for run in same_seed.values())
        for run in same_seed.values():
            _evaluate_near(run, target, console)
    result = _summary(config, runs)
    path = config.run_dir / "study.json"
    write_json(path, result)
    for table in _tables(result):
        console.print(table)
    console.print(f"study: {path}")
    return path


def variant_config(config: Config, variant: str, seed: int) -> Config:
    """The configuration of one run; every checkpoint is kept, to choose one by its KL."""
    return with_overrides(
        config,
        [
            *config.study.variants[variant],
            f"name={variant}-seed{seed}",
            f"dir={config.run_dir / 'variants'}",
            f"seed={seed}",
            f"ppo.keep_checkpoints={config.ppo.steps}",
        ],
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t over the runs)."""
    count = len(values)
    spread = float(np.std(values, ddof=1)) / count**0.5
    return float(np.mean(values)), _T_95[count] * spread


def nearest_step(kl: dict[int, float], steps: Sequence[int], target: float) -> int:
    """The step among ``steps`` whose KL is nearest to ``target``, the earliest of equals."""
    return min(steps, key=lambda step: (abs(kl[step] - target), step))


def _train_variant(config: Config, variant: str, seed: int, console: Console) -> Config:
    run = variant_config(config, variant, seed)
    console.rule(f"{variant}, seed {seed}", align="left")
    with driver_lock(run.run_dir):
        for part in ("responses", "feedback", "rewards"):
            shutil.copytree(config.run_dir / part, run.run_dir / part, dirs_exist_ok=True)
        stage_status = StageStatus(run.run_dir)
        for stage in ("sample", "annotate", "train-reward"):
            stage_status.adopt(run, stage)
    run_stages(run, ("train", "eval-after"), False, console)
    return run


def _evaluate_near(run: Config, target: float, console: Console) -> None:
    """Evaluate the checkpoint nearest to the target KL, unless that was done."""
    folder = run.run_dir / "eval_matched"
    steps = _checkpoint_steps(run)
    step = nearest_step(_kl_by_step(run), steps, target)
    if (folder / "after.json").is_file():
        return
    if step == run.ppo.steps:
        shutil.copytree(run.run_dir / "eval", folder, dirs_exist_ok=True)
        return
    with driver_lock(run.run_dir), Cluster(run) as cluster:
        adapter = run.run_dir / "policy" / "checkpoints" / f"step_{step:06d}" / "adapter"
        Run(run, cluster, console).evaluate("after", adapter=adapter, folder=folder)


def _checkpoint_steps(run: Config) -> list[int]:
    root = run.run_dir / "policy" / "checkpoints"
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_*"))


def _kl_by_step(run: Config) -> dict[int, float]:
    reports = read_metrics(run.run_dir / "policy" / "metrics.jsonl")
    return {report.step: report.metrics["kl/response"] for report in reports}


def _summary(config: Config, runs: dict[tuple[str, int], Config]) -> Json:
    before = read_eval(config.run_dir / "eval", "before")
    result: Json = {
        "seeds": list(config.study.seeds),
        "kinds": list(before.sampled.kinds),
        "before": _figures(before),
    }
    for label, folder in (("equal_steps", "eval"), ("matched_kl", "eval_matched")):
        result[label] = {}
        for variant in config.study.variants:
            reports = [
                read_eval(runs[variant, seed].run_dir / folder, "after")
                for seed in config.study.seeds
            ]
            rows = [_figures(report) for report in reports]
            result[label][variant] = {
                name: dict(
                    zip(("mean", "half_width"), interval([r[name] for r in rows]), strict=True)
                )
                for name in rows[0]
                if all(row[name] is not None for row in rows)
            }
    return result


def _figures(report: EvalReport) -> Json:
    """Sampled figures by name, greedy ``any`` and POPE's F1."""
    return figures_json(report.sampled) | {
        "greedy_any": report.greedy.any,
        "pope_f1": report.pope.f1 if report.pope else None,
    }


def _tables(result: Json) -> list[Table]:
    """One table per comparison, a row per figure and a column per variant."""
    shown = (*result["kinds"], *_SHOWN, "greedy_any", "pope_f1")
    names = [name for name in shown if result["before"][name] is not None]
    tables = []
    for label in ("equal_steps", "matched_kl"):
        title = f"{label.replace('_', ' ')}, mean ± 95 % of {len(result['seeds'])} seeds"
        table = Table("figure", "before", *result[label], title=title)
        for name in names:
            cells = (figures[name] for figures in result[label].values())
            table.add_row(
                name,
                f"{result['before'][name]:.3f}",
                *(f"{cell['mean']:.3f} ± {cell['half_width']:.3f}" for cell in cells),
            )
        tables.append(table)
    return tables
