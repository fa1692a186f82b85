"""What a run's labels are like: summary.json, the console's lines, and the audit by the oracle."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fgaif.feedback.annotate import feedback_losses
from fgaif.feedback.audit_report import oracle_report
from fgaif.feedback.labels import Oracle, class_balance, feedback_accuracy
from fgaif.files import write_json
from fgaif.types import LabeledResponse


def write_summary(
    folder: Path,
    labeled: Iterable[LabeledResponse],
    truth: Oracle | None,
    skipped_rows: int,
    console: Console,
) -> None:
    """Write classes, losses and, where the truth is known, accuracy; say what was left out.

    ``labeled`` is iterated several times; ``audit/oracle.json`` has the whole audit.
    """
    kinds = feedback_accuracy(labeled, truth) if truth else {}
    losses = feedback_losses(labeled)
    responses = losses.pop("responses", 0)
    write_json(
        folder / "summary.json",
        {
            "accuracy": {kind: item.accuracy for kind, item in kinds.items() if item.judged},
            "facts": {kind: asdict(item) for kind, item in kinds.items()},
            "classes": class_balance(labeled),
            "responses": responses,
            "losses": losses,
            "skipped": {"rows": skipped_rows},
        },
    )
    if truth:
        report = oracle_report(labeled, truth)
        write_json(folder / "audit" / "oracle.json", report.to_json())
    if any(losses.values()):
        text = ", ".join(f"{count} {name}" for name, count in losses.items() if count)
        console.print(f"left out of {responses} responses: {text}", markup=False)
    if losses.get("facts failed") or losses.get("responses failed"):
        console.print(
            "`fgaif annotate --force` asks failed requests again and pays for no stored reply"
        )
