"""What a run's labels are like: their summary, the audit by the oracle, and the audit by hand."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fgaif.config import Config
from fgaif.errors import DataError
from fgaif.feedback.annotate import feedback_losses
from fgaif.feedback.audit import audit_sample, read_answers, read_items, write_audit
from fgaif.feedback.audit_report import AuditReport, audit_report, audit_tables, oracle_report
from fgaif.feedback.labels import Oracle, class_balance, feedback_accuracy
from fgaif.feedback.parquet import read_labels
from fgaif.feedback.store import JsonlStore, label_store
from fgaif.files import write_json
from fgaif.types import Kind, LabeledResponse


def write_summary(
    folder: Path,
    labeled: Iterable[LabeledResponse],
    kinds: Sequence[Kind],
    truth: Oracle | None,
    skipped_rows: int,
    console: Console,
) -> None:
    """Write classes, losses and, where the truth is known, accuracy; say what was left out.

    ``labeled`` is iterated several times; ``audit/oracle.json`` has the whole audit.
    """
    accuracy = feedback_accuracy(labeled, truth, kinds) if truth else {}
    losses, classes = feedback_losses(labeled), class_balance(labeled, kinds)
    responses = losses.pop("responses", 0)
    write_json(
        folder / "summary.json",
        {
            "accuracy": {kind: item.accuracy for kind, item in accuracy.items() if item.judged},
            "facts": {kind: asdict(item) for kind, item in accuracy.items()},
            "classes": classes,
            "responses": responses,
            "losses": losses,
            "skipped": {"rows": skipped_rows},
        },
    )
    if truth:
        report = oracle_report(labeled, truth, kinds)
        write_json(folder / "audit" / "oracle.json", report.to_json())
    if any(losses.values()):
        text = ", ".join(f"{count} {name}" for name, count in losses.items() if count)
        console.print(f"left out of {responses} responses: {text}", markup=False)
    for line in one_sided(classes):
        console.print(line, markup=False)
    if losses.get("facts failed") or losses.get("responses failed"):
        console.print(
            "`fgaif annotate --force` asks failed requests again and pays for no stored reply"
        )


def one_sided(classes: Mapping[Kind, Mapping[str, int]]) -> list[str]:
    """A line for each kind whose labels hold no OK or no HALLU, from the counts of its classes."""
    return [
        f"warning: {kind}: {counts['ok']} segments are labelled OK and {counts['hallu']} HALLU, so "
        "its reward model cannot learn to tell them apart; annotate more prompts "
        "(data.feedback_prompts), look at the verdicts (fgaif annotate --audit), or give the kind "
        f"no weight in PPO (ppo.shape.weights.{kind}=0)"
        for kind, counts in classes.items()
        if not (counts["ok"] and counts["hallu"])
    ]


def open_labels(config: Config) -> JsonlStore[LabeledResponse]:
    """The label table of a run.

    Raises:
        DataError: there is none yet, or it is of other kinds.
    """
    path = config.run_dir / "feedback" / "labels.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: does not exist; run `fgaif annotate` first")
    return label_store(path, config.kind_names)


def prepare_audit(config: Config, size: int, then: str, console: Console) -> None:
    """Write the page with a sample of the run's verdicts, drawn by the run's seed; say what is
    ``then`` to be run."""
    page = write_audit(audit_folder(config), audit_sample(open_labels(config), size, config.seed))
    console.print(
        f"wrote {page}\nOpen it in a browser, answer, download the answers, then: {then}",
        markup=False,
        soft_wrap=True,
    )


def report_audit(config: Config, answers: Path, second: Path | None, console: Console) -> None:
    """Compare the verdicts with a person's answers; print it and write ``audit/report.json``.

    ``second`` is the label file, .jsonl or .parquet, of another verifier on the same responses.

    Raises:
        DataError: a file is missing, broken, or of another sample.
    """
    folder = audit_folder(config)
    items = read_items(folder)
    report = audit_report(
        open_labels(config),
        items,
        read_answers(answers, items),
        config.kind_names,
        second=read_labels(second) if second else None,
    )
    show_audit(report, folder / "report.json", console.print)


def show_audit(report: AuditReport, path: Path, say: Callable[[object], None]) -> None:
    """Print a report's tables and write it as JSON."""
    for table in audit_tables(report):
        say(table)
    write_json(path, report.to_json())
    say(f"wrote {path}")


def audit_folder(config: Config) -> Path:
    """Where a run's audit lies."""
    return config.run_dir / "feedback" / "audit"
