"""What a command does with each stage, decided before anything starts; ``--dry-run`` shows it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.pipeline.aside import existing_outputs, next_aside
from cluster.pipeline.evaluate import judging_engines, verifier_judges
from cluster.pipeline.inputs import refuse_inputs, wrong_inputs
from cluster.pipeline.keys import AFTER, ORDER, Stage
from cluster.pipeline.run_lock import require_own
from cluster.pipeline.split import refuse_too_few, split_of
from cluster.pipeline.stage_status import (
    StageState,
    StageStatus,
    Status,
    check_resumable,
    fewer_steps,
)
from cluster.placement import Role, phases, plan_roles, plan_table
from fgaif.checkpoint import latest_checkpoint, read_state, resume_point
from fgaif.config import Config
from fgaif.data.rows import read_rows
from fgaif.errors import ConfigError, DataError
from fgaif.eval.policy import MODES
from fgaif.feedback.label_order import misplaced
from fgaif.feedback.plan import Asked, measure, plan_feedback
from fgaif.feedback.store import label_store, response_store

_ASKING: dict[Stage, str] = {
    "annotate": "responses",
    "eval-before": "captions before",
    "eval-after": "captions after",
}
"""Stages that ask the models of the feedback, and about what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What is done with a stage.

    It is skipped, goes on from what is there (``goes_on``), or is done anew, before which
    ``outputs`` (relative to the run folder) are moved aside. ``why`` says what made it so.
    """

    stage: Stage
    found: Status
    runs: bool
    goes_on: bool = False
    outputs: tuple[str, ...] = ()
    why: str = ""

    def moving(self, run_dir: Path, *, done_to: Path | None = None) -> str:
        """A line that says what will be moved where and why, or has been, to ``done_to``."""
        verb, target = ("moved", done_to) if done_to else ("moves", next_aside(run_dir, self.stage))
        return f"{self.stage}: {verb} {', '.join(self.outputs)} to {target}: {self.why}"


def print_plan(
    config: Config, stages: Sequence[Stage], force: bool, console: Console, *, full: bool = True
) -> None:
    """Show what each stage would do and what it reads and asks, and start nothing.

    ``full`` adds the placement, and tables in the place of lines.

    Raises:
        ConfigError: the training cannot go on as asked; see :func:`plan_stages`.
        DataError: an input of a stage cannot be used; all that are so are named.
    """
    if full and (bundles := plan_roles(config, stage_roles(config, stages))):
        console.print(plan_table(bundles, phases(config)))
    plans = plan_stages(StageStatus(config.run_dir), config, stages, force)
    table = Table(title=f"stages of {config.run_dir}" if full else None, title_justify="left")
    if not full:
        table = Table.grid(padding=(0, 2))
    for column in ("stage", "found", "would"):
        table.add_column(column)
    for plan in plans:
        table.add_row(plan.stage, plan.found, _would(plan))
    console.print(table)
    for plan in plans:
        if plan.outputs:
            console.print(plan.moving(config.run_dir), markup=False, soft_wrap=True)
        elif plan.goes_on and plan.why:
            console.print(f"{plan.stage}: {plan.why}", markup=False, soft_wrap=True)
    running = [plan.stage for plan in plans if plan.runs]
    wrong = wrong_inputs(config, running)
    judged = verifier_judges(config) and {"eval-before", "eval-after"} & set(running)
    if ("annotate" in running or judged) and "data.responses" not in wrong:
        if full:
            console.print(feedback_table(config, running))
        else:
            console.print(_asking_line(config, running), markup=False, soft_wrap=True)
    refuse_inputs(wrong)
    say_split(config, plans, console)


def say_split(config: Config, plans: Sequence[StagePlan], console: Console) -> None:
    """Say who gets which prompts, where a stage that will run reads them.

    Raises:
        ConfigError: a run would begin with fewer rows than it wants for feedback.
        DataError: a file cannot be read.
    """
    running = {plan.stage: plan for plan in plans if plan.runs}
    if not {"sample", "train"} & set(running):
        return
    split = split_of(config, held_out=bool({"eval-before", "eval-after"} & set(running)))
    console.print(split.line(config), markup=False, soft_wrap=True, highlight=False)
    if "sample" in running and not running["sample"].goes_on:
        refuse_too_few(split, config)
    for warning in split.warnings(config):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _asking_line(config: Config, stages: Collection[Stage]) -> str:
    asked = [row for _, _, rows in _asking(config, stages) for row in rows]
    tokens = sum(row.tokens for row in asked)
    said = f"asks {sum(row.requests for row in asked):,} questions"
    if not tokens:
        return f"{said} of checkpoints on this cluster"
    priced = all(row.priced for row in asked if row.tokens)
    cost = f"cost {sum(row.cost for row in asked):,.2f}" if priced else "no price set"
    return f"{said}, about {tokens:,} tokens of APIs, {cost}; stored replies are free"


def _would(plan: StagePlan) -> str:
    if not plan.runs:
        return "skip, up to date"
    if plan.goes_on:
        return "go on"
    return "move aside, run" if plan.outputs else "run"


def stage_roles(config: Config, stages: Sequence[Stage]) -> set[Role]:
    """The actors that stages need: a machine for annotation alone has no room for PPO."""
    judging: set[Role] = {"judge"} if judging_engines(config) else set()
    rewarding: Role = "reward" if config.ppo.reward_source == "models" else "judge"
    roles: dict[Stage, set[Role]] = {
        "sample": set() if config.data.responses else {"rollout"},
        "annotate": {"judge"},
        "train-reward": {"trainer"},
        "eval-before": {"rollout", "reward", *judging},
        "train": {"rollout", rewarding, "reference", "learner"},
        "eval-after": {"rollout", "reward", *judging},
    }
    return {role for stage in stages for role in roles.get(stage, ())}


def plan_stages(
    stage_status: StageStatus, config: Config, wanted: Sequence[Stage], force: bool
) -> list[StagePlan]:
    """Decide for the wanted stages, in order. Nothing is changed.

    A stage that was made with another value of a result key, whose inputs are made anew, or that
    is forced is done anew; one that was interrupted or is to go further goes on.

    Raises:
        ConfigError: a training cannot go on as asked: its settings differ, it has gone further
            already, or ``force`` asks for the opposite.
        CheckpointError: ``ppo.resume`` names a checkpoint that is not there or damaged, or all
            that the training has are damaged.
        DataError: the run folder holds something that fgaif did not make.
    """
    require_own(config.run_dir)
    plans: dict[Stage, StagePlan] = {}
    for stage in (stage for stage in ORDER if stage in wanted):
        inputs = [plans[name] for name in AFTER[stage] if name in plans and plans[name].runs]
        plans[stage] = _plan(stage, stage_status.found(config, stage), inputs, config, force)
    return list(plans.values())


def _plan(
    stage: Stage, found: StageState, inputs: Sequence[StagePlan], config: Config, force: bool
) -> StagePlan:
    if stage == "report":  # always made, of whatever is there
        return StagePlan(stage=stage, found=found.status, runs=True)
    status = _training(config, found, force) if stage == "train" else found.status
    anew = [plan.stage for plan in inputs if not (stage == "annotate" and plan.goes_on)]
    if force:
        why = "--force"
    elif status == "stale" or (found.gone and stage in ("eval-before", "eval-after")):
        why = found.why
    elif status == "missing":
        why = "not listed in stages.json"
    elif anew or (inputs and status == "done"):
        why = f"{', '.join(anew) or inputs[0].stage} is done again"
    elif status == "done":
        if stage == "annotate" and (damage := _label_damage(config)):
            return StagePlan(stage=stage, found="partial", runs=True, goes_on=True, why=damage)
        return StagePlan(stage=stage, found=status, runs=False)
    else:
        return StagePlan(stage=stage, found=status, runs=True, goes_on=True, why=found.why)
    outputs = existing_outputs(config.run_dir, stage)
    if stage == "train" and outputs and _from_own_folder(config):
        raise ConfigError(
            f"ppo.resume = {config.ppo.resume!r} goes on with what lies in "
            f"{config.run_dir / 'policy'}, which is to be moved aside ({why}): leave out "
            "ppo.resume to train anew"
        )
    return StagePlan(stage=stage, found=found.status, runs=True, outputs=outputs, why=why)


def _label_damage(config: Config) -> str:
    """What was done to a finished label file: rows lost, doubled or moved; empty if nothing."""
    responses = response_store(config.run_dir / "responses" / "responses.jsonl")
    labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
    if wrong := misplaced(labels, responses):
        return wrong
    left = len(responses) - len(labels)
    return f"{labels.path}: the labels of the last {left} responses are gone" if left else ""


def _training(config: Config, found: StageState, force: bool) -> Status:
    """The status of the training, given what is to be resumed; refuses what cannot be."""
    resume, folder = config.ppo.resume, config.run_dir / "policy"
    if force:
        if resume is not None:
            raise ConfigError(
                f"--force trains anew, ppo.resume = {resume!r} goes on with a training: leave out "
                "one of them"
            )
        return found.status
    checkpoints = folder / "checkpoints"
    if resume not in (None, "latest"):
        check_resumable(config, read_state(resume_point(resume, checkpoints)), Path(resume))
    if found.status == "stale" and resume == "latest":
        raise ConfigError(
            f"ppo.resume = 'latest': the training in {folder} was made with other settings: "
            f"{found.why}. Restore them to go on with it; to train anew with these, leave out "
            "ppo.resume (what is there is moved aside, not removed)"
        )
    if found.status in ("stale", "done"):
        return found.status
    kept = resume_point("latest", checkpoints) if resume == "latest" else None
    if found.status == "missing":
        # Its line in stages.json is lost. The checkpoint itself tells whether it fits.
        if kept is not None:
            check_resumable(config, read_state(kept), kept)
        goes_on = kept is not None or (_from_own_folder(config) and folder.exists())
        return "partial" if goes_on else "missing"
    if resume is None:
        kept = latest_checkpoint(checkpoints)
    if found.status == "long":  # an interrupted one may end earlier, if it is not beyond that
        done = found.changes[0].was if found.finished else read_state(kept)["step"] if kept else 0
        if done > config.ppo.steps:
            raise ConfigError(fewer_steps(config, done, folder))
        return "partial"
    if found.status == "short" and kept is None and resume is None:
        raise ConfigError(
            f"{found.why}, but {checkpoints} holds no checkpoint to go on from: keep the steps "
            "that are done, or use --force to train anew (what is there is moved aside, not "
            "removed)"
        )
    return found.status


def _from_own_folder(config: Config) -> bool:
    resume, folder = config.ppo.resume, config.run_dir / "policy"
    if resume in (None, "latest"):
        return resume == "latest"
    return folder.resolve() in Path(resume).resolve().parents


def require_upstream(stage_status: StageStatus, config: Config, todo: Sequence[Stage]) -> None:
    """Refuse a stage whose input was never made, or was made with another configuration."""
    for stage in todo:
        for upstream in AFTER[stage]:
            found = stage_status.found(config, upstream)
            if upstream in todo or found.status == "done":
                continue
            what = {"missing": "which has not run", "partial": "which is not finished"}.get(
                found.status, f"which ran with other settings or files ({found.why})"
            )
            what = f"of which {found.why}" if found.gone else what
            raise DataError(
                f"{stage} needs {upstream}, {what} in {config.run_dir}: run "
                f"`fgaif {'eval run' if 'eval' in upstream else upstream}` "
                "with this configuration first, or `fgaif run`"
            )


def _asking(
    config: Config, stages: Collection[Stage]
) -> Iterator[tuple[int, str, Sequence[Asked]]]:
    """About how many of what each stage that asks models asks about, and what it asks."""
    responses = response_store(config.run_dir / "responses" / "responses.jsonl")
    labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
    count = len(responses)
    if not count and config.data.responses is not None:
        count = sum(1 for _ in read_rows(config.data.responses, ("image",)))
    elif not count:
        count = config.data.feedback_prompts * config.feedback.samples_per_prompt
    sizes = measure(labels, responses, config)
    captions = len(MODES) * config.data.eval_prompts
    for stage, what in _ASKING.items():
        if stage in stages and (stage == "annotate" or verifier_judges(config)):
            number = count if stage == "annotate" else captions
            yield number, what, plan_feedback(config, number, sizes)


def feedback_table(config: Config, stages: Collection[Stage]) -> Table:
    """What annotating and judging captions will ask of each model, and about what it costs."""
    table = Table(
        title="asking models takes about this; stored replies are free", title_justify="left"
    )
    for column in ("for", "role", "model", "requests", "tokens", "cost"):
        table.add_column(column, justify="left" if column in ("for", "role", "model") else "right")
    plan: list[Asked] = []
    for number, what, asked in _asking(config, stages):
        plan += asked
        for row in asked:
            tokens = f"{row.tokens:,}" if row.tokens else ""
            cost = (f"{row.cost:,.2f}" if row.priced else "no price set") if row.tokens else ""
            purpose = f"{number:,} {what}"
            table.add_row(purpose, row.role, row.model, f"{row.requests:,}", tokens, cost)
    table.add_section()
    total = f"{sum(row.cost for row in plan):,.2f}"
    if not all(row.priced for row in plan):
        total = "no price set"
    table.add_row("all", "", "", f"{sum(row.requests for row in plan):,}", "", total)
    return table
