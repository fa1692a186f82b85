"""Evaluations on disk: ``eval/{before,after}.json`` and their captions with verdicts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from fgaif.errors import DataError
from fgaif.eval.captions import JudgedCaption, repeated_segments, token_length
from fgaif.eval.policy import MODES, Captions, Mode
from fgaif.eval.pope_questions import STRATEGIES
from fgaif.files import write_json, write_whole
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    CaptionMetrics,
    EvalReport,
    Json,
    Kind,
    PopeMetrics,
    SegmentClass,
)

Phase = Literal["before", "after"]
_TOO_LONG = "data/too_long.json"
PHASES: tuple[Phase, ...] = get_args(Phase)


def note_too_long(run_dir: Path, stage: str, count: int) -> None:
    """Keep how many prompts a stage left out because the engine has no room for them."""
    known = too_long(run_dir)
    if count != known.get(stage, 0):
        write_json(run_dir / _TOO_LONG, known | {stage: count})


def too_long(run_dir: Path) -> dict[str, int]:
    """Prompts that were left out by stage, as :func:`note_too_long` kept them."""
    file = run_dir / _TOO_LONG
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: not what fgaif writes ({error}); delete it") from error


def report_json(report: EvalReport) -> Json:
    """An evaluation as the ``before`` or ``after`` of ``report.json``.

    The figures of the kinds stand beside the others, under the names that ``kinds`` lists.
    """
    pope = None
    if report.pope is not None:
        parts = {name: asdict(metrics) for name, metrics in report.pope_by_strategy.items()}
        pope = {**asdict(report.pope), **parts}
    return {
        "kinds": list(report.sampled.kinds),
        "greedy": figures_json(report.greedy),
        "sampled": figures_json(report.sampled),
        "pope": pope,
    }


def figures_json(metrics: CaptionMetrics) -> Json:
    """All figures under one name each, those of the kinds first."""
    tree = asdict(metrics)
    return tree.pop("kinds") | tree


def write_eval(folder: Path, phase: Phase, report: EvalReport, captions: Captions) -> None:
    """Write ``{phase}.json`` and ``{phase}_captions.jsonl``; the first, complete, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps(caption_json(caption, mode), ensure_ascii=False)
        for mode in MODES
        for caption in captions.of(mode)
    ]
    write_whole(folder / f"{phase}_captions.jsonl", "".join(row + "\n" for row in rows))
    write_whole(folder / f"{phase}.json", json.dumps(report_json(report), indent=2) + "\n")


def read_eval(folder: Path, phase: Phase) -> EvalReport:
    """Read what ``write_eval`` wrote.

    Raises:
        DataError: the file is missing, broken or has other keys.
    """
    path = folder / f"{phase}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        pope, kinds = tree["pope"], tree.get("kinds", DEFAULT_KINDS)
        parts: dict[str, PopeMetrics] = {
            name: PopeMetrics(**pope.pop(name)) for name in STRATEGIES if pope and name in pope
        }
        return EvalReport(
            greedy=_metrics(tree["greedy"], kinds),
            sampled=_metrics(tree["sampled"], kinds),
            pope=PopeMetrics(**pope) if pope else None,
            pope_by_strategy=parts,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not a readable evaluation ({error}); run `fgaif eval run`"
        ) from error


def _metrics(figures: Json, kinds: Sequence[Kind]) -> CaptionMetrics:
    of_kinds = {kind: figures.pop(kind) for kind in kinds}
    return CaptionMetrics(kinds=of_kinds, **figures)


def caption_json(caption: JudgedCaption, mode: Mode) -> Json:
    """A judged caption as one line of the captions file, with facts under their segments."""
    labeled = caption.labeled
    texts = caption.texts
    repeated = repeated_segments(texts)
    verdict = {text: judged.answer for text, judged in labeled.verdicts.items()}
    return {
        "mode": mode,
        "id": labeled.response.prompt.id,
        "image": labeled.response.prompt.image.path,
        "sha256": labeled.response.prompt.image.sha256,
        "prompt": labeled.response.prompt.text,
        "text": labeled.response.text,
        "finish": labeled.response.finish,
        "tokens": token_length(labeled.response),
        "objects": sorted(caption.objects) if caption.objects is not None else None,
        "segments": [
            {
                "text": text,
                "labels": {kind: _class_name(row[k]) for k, kind in enumerate(labeled.kinds)},
                "repeated": repeated[index],
                "malformed": caption.malformed[index] if caption.malformed is not None else None,
                "facts": [
                    {"kind": f.kind, "text": f.text, "verdict": verdict.get(f.text, "unknown")}
                    for f in labeled.facts
                    if f.segment == index
                ],
            }
            for index, (text, row) in enumerate(zip(texts, labeled.labels, strict=True))
        ],
    }


def _class_name(label: int) -> str:
    return "UNKNOWN" if label == UNKNOWN else SegmentClass(label).name
