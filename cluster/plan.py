"""What stages would do, before anything starts: which are run, with which actors, at what cost."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cluster.ledger import ORDER, STAGES, Ledger, Stage
from cluster.placement import Role, plan_roles, plan_table
from fgaif.config import Config
from fgaif.data.rows import read_rows
from fgaif.errors import DataError
from fgaif.feedback.plan import measure, plan_feedback
from fgaif.feedback.store import label_store, response_store


def print_plan(config: Config, stages: Sequence[Stage], force: bool, console: Console) -> None:
    """Show placement and what each stage would do, and start nothing."""
    if bundles := plan_roles(config, stage_roles(config, stages)):
        console.print(plan_table(bundles))
    ledger = Ledger(config.run_dir)
    table = Table(title=f"stages of {config.run_dir}", title_justify="left")
    for column in ("stage", "found", "would"):
        table.add_column(column)
    todo = to_run(ledger, config, [stage for stage in ORDER if stage in stages], force)
    for stage in stages:
        table.add_row(
            stage, ledger.status(config, stage), "run" if stage in todo else "skip, up to date"
        )
    console.print(table)
    if "annotate" in todo:
        console.print(feedback_table(config))


def stage_roles(config: Config, stages: Sequence[Stage]) -> set[Role]:
    """The actors that stages need: a machine for annotation alone has no room for PPO."""
    roles: dict[Stage, set[Role]] = {
        "sample": set() if config.data.responses else {"rollout"},
        "annotate": {"judge"},
        "train-reward": {"trainer"},
        "eval-before": {"rollout", "reward"},
        "train": {"rollout", "reward", "reference", "learner"},
        "eval-after": {"rollout", "reward"},
    }
    return {role for stage in stages for role in roles.get(stage, ())}


def to_run(ledger: Ledger, config: Config, wanted: Sequence[Stage], force: bool) -> list[Stage]:
    """Stages that are missing, stale, forced, always made (the report) or downstream of such."""
    todo: list[Stage] = []
    for stage in wanted:
        redo_upstream = any(upstream in todo for upstream in STAGES[stage].after)
        fresh = ledger.status(config, stage) == "done"
        if force or redo_upstream or not fresh or stage == "report":
            todo.append(stage)
    return todo


def require_upstream(ledger: Ledger, config: Config, todo: Sequence[Stage]) -> None:
    """Refuse a stage whose input was never made, or was made with another configuration."""
    for stage in todo:
        for upstream in STAGES[stage].after:
            status = ledger.status(config, upstream)
            if upstream not in todo and status != "done":
                what = "has not run" if status == "missing" else "ran with other settings"
                raise DataError(
                    f"{stage} needs {upstream}, which {what} in {config.run_dir}: run "
                    f"`fgaif {'eval run' if 'eval' in upstream else upstream}` "
                    "with this configuration first, or `fgaif run`"
                )


def feedback_table(config: Config) -> Table:
    """What annotating will ask of each model, and about what it costs."""
    responses = response_store(config.run_dir / "responses" / "responses.jsonl")
    labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
    count = len(responses)
    if not count and config.data.responses is not None:
        count = sum(1 for _ in read_rows(config.data.responses, ("image",)))
    elif not count:
        count = config.data.feedback_prompts * config.feedback.samples_per_prompt
    plan = plan_feedback(config, count, measure(labels, responses, config))
    table = Table(
        title=f"annotating {count:,} responses takes about this; stored replies are free",
        title_justify="left",
    )
    for column in ("role", "model", "requests", "tokens", "cost"):
        table.add_column(column, justify="left" if column in ("role", "model") else "right")
    for row in plan:
        tokens, cost = (f"{row.tokens:,}", f"{row.cost:,.2f}") if row.tokens else ("", "")
        table.add_row(row.role, row.model, f"{row.requests:,}", tokens, cost)
    table.add_section()
    total = sum(row.cost for row in plan)
    table.add_row("all", "", f"{sum(row.requests for row in plan):,}", "", f"{total:,.2f}")
    return table
