"""Compare variants of a run over seeds: at equal steps, at matched KL, and by what they cost.

What variants share is made once: responses, labels, reward models and the evaluation before
training by the study's own run; where a variant changes one of these, by a run below
``RUN/shared``, which takes over the stages that it does not change. Each variant and seed then
trains in a run of its own below ``RUN/variants``, by PPO or by the commands that ``study.commands``
names. Everything can be stopped and goes on where it was; a run that fails is a row that says so.
"""

import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from cluster.launch import Cluster
from cluster.pipeline.dry_run import stage_roles
from cluster.pipeline.keys import Stage, stage_values
from cluster.pipeline.run_lock import driver_lock
from cluster.pipeline.stage_status import StageStatus
from cluster.pipeline.stages import Run, run_stages
from fgaif.config import Config, dump_config, with_overrides
from fgaif.errors import ConfigError, DataError, FgaifError
from fgaif.eval.run_results import read_eval
from fgaif.eval.study import StudyRun, matched_steps, read_run, study_json
from fgaif.eval.study_page import console_tables, write_page
from fgaif.files import write_json, write_whole
from fgaif.tracking import read_metrics
from fgaif.types import Json

Key = tuple[str, int]
"""Variant and seed."""
_SHARED: dict[Stage, str] = {
    "sample": "responses",
    "annotate": "feedback",
    "train-reward": "rewards",
}
"""Stages that variants share, and the folder of each in a run."""


def _beside(run: Config, suffix: str) -> Path:
    """A file about a run, beside its folder, which nothing but stages writes into."""
    return run.run_dir.with_name(f"{run.name}.{suffix}")


def run_study(
    config: Config, console: Console, *, summary: bool = False, only: str | None = None
) -> Path:
    """Run everything that is missing, write ``RUN/study.json``, page and tables; print the tables.

    With ``summary`` nothing is run: what is finished is summed up, the rest said to be not run.
    ``only`` (``VARIANT:SEED``) makes this one training and sums up nothing; its folder is returned.

    Raises:
        ConfigError: fewer than two seeds, no variant, or a command of none.
        FgaifError: the stages that all variants share failed.
    """
    study = config.study
    if len(study.seeds) < 2 or not study.variants:
        raise ConfigError(
            f"study.seeds = {list(study.seeds)}, study.variants = {list(study.variants)}: give 2 "
            "seeds or more and at least one variant"
        )
    if unknown := set(study.commands) - set(study.variants):
        raise ConfigError(
            f"study.commands.{min(unknown)}: no such variant; study.variants = "
            f"{list(study.variants)}"
        )
    runs = {
        (variant, seed): variant_config(config, variant, seed)
        for seed in study.seeds
        for variant in study.variants
    }
    if only is not None:
        key = _key(only, runs)
        _attempt(config, key, runs[key], console)
        return runs[key].run_dir
    if not summary:
        run_stages(config, (*_SHARED, "eval-before"), False, console)
        _attempt_all(config, runs, console)
    results = {key: _result(config, key, run) for key, run in runs.items()}
    matched = _matched(config, runs, results)
    if not summary:
        for key, steps in _to_evaluate(config, runs, results, matched).items():
            _evaluate_steps(runs[key], steps, console)
        results = {key: _result(config, key, run) for key, run in runs.items()}
    ordered = [results[variant, seed] for variant in study.variants for seed in study.seeds]
    before = read_eval(config.run_dir / "eval", "before")
    found = study_json(before, ordered, matched, _reward_f1(config)) | {"made_with": _made_with()}
    path = config.run_dir / "study.json"
    write_json(path, found)
    page = write_page(config.run_dir, config.name, found)
    for table in console_tables(found):
        console.print(table)
    console.print(f"study: {path}\npage: {page}", soft_wrap=True, markup=False)
    return path


def _made_with() -> Json:
    """Version, commit where this is a checkout, and machine of the summary."""
    line = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(line, check=False, capture_output=True, text=True)
        commit = asked.stdout.strip() if asked.returncode == 0 else None
    except OSError:  # no git here
        commit = None
    return {"fgaif": version("fgaif"), "commit": commit, "system": platform.platform()}


def variant_config(config: Config, variant: str, seed: int) -> Config:
    """The configuration of one run; every checkpoint is kept, to choose one by its KL.

    ``{seed}`` in an override stands for the seed.
    """
    return with_overrides(
        config,
        [
            *(item.replace("{seed}", str(seed)) for item in config.study.variants[variant]),
            f"name={variant}-seed{seed}",
            f"dir={config.run_dir / 'variants'}",
            f"seed={seed}",
            f"ppo.keep_checkpoints={config.ppo.steps}",
        ],
    )


def shared_config(config: Config, run: Config) -> Config:
    """The configuration of what the run's training starts from: the study's own, or another.

    PPO's seed changes nothing of it: all seeds train on the same reward models.
    """
    plain = with_overrides(run, [f"seed={config.seed}"])
    if all(_same(config, plain, stage) for stage in _SHARED):
        return config
    values = json.dumps([stage_values(plain, stage) for stage in _SHARED], sort_keys=True)
    name = hashlib.sha256(values.encode()).hexdigest()[:12]
    return with_overrides(plain, [f"name={name}", f"dir={config.run_dir / 'shared'}"])


def _same(config: Config, other: Config, stage: Stage) -> bool:
    return stage_values(config, stage) == stage_values(other, stage)


def _key(only: str, runs: Mapping[Key, Config]) -> Key:
    variant, _, seed = only.rpartition(":")
    if seed.lstrip("-").isdecimal() and (variant, int(seed)) in runs:
        return variant, int(seed)
    known = ", ".join(f"{name}:{number}" for name, number in runs)
    raise ConfigError(f"--only {only}: no such run; there are {known}")


def _attempt_all(config: Config, runs: Mapping[Key, Config], console: Console) -> None:
    """Train and evaluate all runs, so many at a time as ``study.parallel`` says."""
    if config.study.parallel == 1:
        for key, run in runs.items():
            _attempt(config, key, run, console)
        return
    shared = {made.run_dir: made for made in (shared_config(config, run) for run in runs.values())}
    for made in shared.values():
        if made is not config:
            try:
                _make_shared(config, made, console)
            except FgaifError as error:  # its runs will say so too
                console.print(f"{made.run_dir}: {error}", style="red", markup=False)
    file = config.run_dir / "study.yaml"
    write_whole(file, dump_config(config))

    def attempt(key: Key) -> None:
        name = f"{key[0]}:{key[1]}"
        log = _beside(runs[key], "log")
        log.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "fgaif", "study", "--config", str(file), "--only", name]
        with log.open("ab") as output:
            code = subprocess.run(line, check=False, stdout=output, stderr=output).returncode
        note = _beside(runs[key], "failure.txt")
        if code and not note.is_file():
            write_whole(note, f"its process ended with exit code {code}; see {log}\n")
        console.print(f"{name} {'failed' if code else 'is done'}: {log}", markup=False)

    with ThreadPoolExecutor(config.study.parallel) as pool:
        list(pool.map(attempt, runs))


def _attempt(config: Config, key: Key, run: Config, console: Console) -> None:
    """Train and evaluate a run; what stops it is written down, and the study goes on."""
    note = _beside(run, "failure.txt")
    console.rule(f"{key[0]}, seed {key[1]}", align="left")
    try:
        shared = shared_config(config, run)
        if shared is not config:
            _make_shared(config, shared, console)
        _adopt(shared, run, tuple(_SHARED))
        if commands := config.study.commands.get(key[0]):
            _run_commands(run, commands, console)
        else:
            run_stages(run, ("train", "eval-after"), False, console)
    except FgaifError as error:
        write_whole(note, f"{error}\n")
        console.print(f"{key[0]}, seed {key[1]} failed: {error}", style="red", markup=False)
    else:
        note.unlink(missing_ok=True)


def _make_shared(config: Config, shared: Config, console: Console) -> None:
    """Make responses, labels and reward models of a variant that has its own of one of them."""
    equal: list[Stage] = []
    for stage in _SHARED:
        if not _same(config, shared, stage):
            break
        equal.append(stage)
    _adopt(config, shared, tuple(equal))
    run_stages(shared, (*_SHARED, "eval-before"), False, console)


def _adopt(source: Config, run: Config, stages: Sequence[Stage]) -> None:
    """Take over finished stages of another run, unless they are there."""
    stage_status = StageStatus(run.run_dir)
    wanted = [stage for stage in stages if stage_status.status(run, stage) != "done"]
    if not wanted:
        return
    with driver_lock(run.run_dir):
        for stage in wanted:
            part = _SHARED[stage]
            shutil.copytree(source.run_dir / part, run.run_dir / part, dirs_exist_ok=True)
            stage_status.adopt(run, stage)


def _run_commands(run: Config, commands: Sequence[str], console: Console) -> None:
    """Make a policy by other commands, each in a process of its own, and evaluate it."""
    folder = run.run_dir / "eval"
    if (folder / "after.json").is_file():
        console.print("eval-after: up to date")
        return
    file = run.run_dir / "config.yaml"
    write_whole(file, dump_config(run))
    for command in commands:
        line = [sys.executable, "-m", "fgaif", *shlex.split(command), "--config", str(file)]
        done = subprocess.run(line, check=False)
        if done.returncode:
            raise DataError(
                f"`fgaif {command} --config {file}` ended with exit code {done.returncode}; run it "
                "by hand to see why"
            )
    adapter = _adapter_of(run.run_dir, commands)
    with driver_lock(run.run_dir), Cluster(run, stage_roles(run, ["eval-after"])) as cluster:
        Run(run, cluster, console).evaluate("after", adapter=adapter, folder=folder)


def _adapter_of(run_dir: Path, commands: Sequence[str]) -> Path:
    """The adapter that the commands left; there must be one."""
    places = [run_dir / "policy" / "adapter", *sorted((run_dir / "baselines").glob("*/adapter"))]
    found = [path for path in places if (path / "adapter_config.json").is_file()]
    named = [path for path in found if path.parent.name in commands[-1].split()]
    if len(named or found) != 1:
        raise DataError(
            f"{run_dir}: `fgaif {commands[-1]}` should leave one adapter in policy/adapter or "
            f"baselines/*/adapter, and {len(found)} are there"
        )
    return (named or found)[0]


def _result(config: Config, key: Key, run: Config) -> StudyRun:
    """What a run came to, from its folder."""
    variant, seed = key
    note = _beside(run, "failure.txt")
    if note.is_file():
        lines = note.read_text(encoding="utf-8").splitlines()
        return StudyRun(variant=variant, seed=seed, failure=lines[0] if lines else "failed")
    status = StageStatus(run.run_dir)
    finished = (run.run_dir / "eval" / "after.json").is_file() and (
        variant in config.study.commands or status.status(run, "eval-after") == "done"
    )
    if not finished:
        return StudyRun(variant=variant, seed=seed, failure="not run")
    return read_run(
        run.run_dir, variant, seed, steps=run.ppo.steps, batch=run.ppo.rollout_batch,
        kinds=len(run.kind_names) if run.ppo.reward_source == "models" else 0,
    )  # fmt: skip


def _matched(
    config: Config, runs: Mapping[Key, Config], results: Mapping[Key, StudyRun]
) -> dict[Key, tuple[int, int]]:
    """By variant and seed: steps of the first variant and of this one at equal KL."""
    lead, found = next(iter(config.study.variants)), {}
    for (variant, seed), result in results.items():
        first = results[lead, seed]
        if variant != lead and first.steps and result.steps:
            kept = [_checkpoint_steps(runs[name, seed]) for name in (lead, variant)]
            if all(kept):
                found[variant, seed] = matched_steps(first.kl, result.kl, *kept)
    return found


def _to_evaluate(
    config: Config,
    runs: Mapping[Key, Config],
    results: Mapping[Key, StudyRun],
    matched: Mapping[Key, tuple[int, int]],
) -> dict[Key, list[int]]:
    """Steps whose checkpoints are still to be evaluated, by run."""
    lead, every = next(iter(config.study.variants)), config.study.evaluate_every
    wanted: dict[Key, set[int]] = {}
    for key, result in results.items():
        kept = _checkpoint_steps(runs[key]) if result.steps else []
        wanted[key] = {step for step in kept if every and step % every == 0}
    for (variant, seed), (of_first, own) in matched.items():
        wanted[lead, seed].add(of_first)
        wanted[variant, seed].add(own)
    left = {key: sorted(steps - set(results[key].at)) for key, steps in wanted.items()}
    return {key: steps for key, steps in left.items() if steps}


def _evaluate_steps(run: Config, steps: Sequence[int], console: Console) -> None:
    """Evaluate checkpoints of a run into ``eval_steps``; one that fails stays without figures."""
    console.rule(f"{run.name}: evaluate steps {', '.join(map(str, steps))}", align="left")
    try:
        with driver_lock(run.run_dir), Cluster(run, stage_roles(run, ["eval-after"])) as cluster:
            for step in steps:
                name = f"step_{step:06d}"
                adapter = run.run_dir / "policy" / "checkpoints" / name / "adapter"
                Run(run, cluster, console).evaluate(
                    "after", adapter=adapter, folder=run.run_dir / "eval_steps" / name
                )
    except FgaifError as error:
        console.print(f"{run.name}: not evaluated: {error}", style="red", markup=False)


def _checkpoint_steps(run: Config) -> list[int]:
    root = run.run_dir / "policy" / "checkpoints"
    known = {report.step for report in read_metrics(run.run_dir / "policy" / "metrics.jsonl")}
    found = {int(path.name.removeprefix("step_")) for path in root.glob("step_*")}
    return sorted(found & known)


def _reward_f1(config: Config) -> dict[str, Json]:
    """F1 of HALLU of each variant's reward models on held-out images, where truth is known: the
    mean over all that its seeds trained on."""
    found = {}
    for variant in config.study.variants:
        runs = [variant_config(config, variant, seed) for seed in config.study.seeds]
        folders = {shared_config(config, run).run_dir for run in runs}
        files = [path for folder in folders if (path := folder / "eval" / "rewards.json").is_file()]
        trees = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        if trees:
            found[variant] = {
                kind: sum(tree[kind]["f1_hallu"] for tree in trees) / len(trees)
                for kind in trees[0]
            }
    return found
