"""Evaluations on disk: ``eval/{before,after}.json`` captions with verdicts, POPE."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from fgaif.errors import DataError
from fgaif.eval.captions import JudgedCaption, caption_counts, repeated_segments, token_length
from fgaif.eval.policy import MODES, Captions, Mode, PopeAnswer
from fgaif.eval.pope_questions import STRATEGIES
from fgaif.files import write_json, write_whole
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    CaptionMetrics,
    CaptionView,
    EvalReport,
    IntArray,
    Json,
    Kind,
    PopeMetrics,
    SegmentClass,
)

Phase = Literal["before", "after"]
_TOO_LONG = "data/too_long.json"
PHASES: tuple[Phase, ...] = get_args(Phase)
ORACLE, REWARDS = "the truth of the embedded world", "the reward models"
"""Names of judges; verifiers have those of their models."""


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
        "judge": report.judge,
        "greedy": figures_json(report.greedy),
        "sampled": figures_json(report.sampled),
        "others": {
            name: {"greedy": figures_json(view.greedy), "sampled": figures_json(view.sampled)}
            for name, view in report.others.items()
        },
        "judging": report.judging,
        "pope": pope,
    }


def figures_json(metrics: CaptionMetrics) -> Json:
    """All figures under one name each, those of the kinds first."""
    tree = asdict(metrics)
    return tree.pop("kinds") | tree


def write_eval(
    folder: Path,
    phase: Phase,
    report: EvalReport,
    captions: Captions,
    answers: Sequence[PopeAnswer] = (),
) -> None:
    """Write ``{phase}.json``, ``{phase}_captions.jsonl`` and, where POPE was asked,
    ``{phase}_pope.jsonl``; the first, complete, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for mode in MODES for row in _rows(captions, mode)]
    write_whole(folder / f"{phase}_captions.jsonl", _lines(rows))
    if answers:
        write_whole(folder / f"{phase}_pope.jsonl", _lines(map(_answer_json, answers)))
    write_whole(folder / f"{phase}.json", json.dumps(report_json(report), indent=2) + "\n")


def _lines(rows: Iterable[Json]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rows(captions: Captions, mode: Mode) -> Iterator[Json]:
    for index, caption in enumerate(captions.of(mode)):
        row = caption_json(caption, mode)
        views = {name: view.of(mode)[index] for name, view in captions.others.items()}
        if views:
            row["others"] = {name: _view_json(view) for name, view in views.items()}
        yield row


def _view_json(caption: JudgedCaption) -> Json:
    labeled = caption.labeled
    return {"labels": [_labels(labeled.kinds, row) for row in labeled.labels]} | {
        "counts": caption_counts(caption)
    }


def _answer_json(answer: PopeAnswer) -> Json:
    question = answer.question
    return {
        "strategy": question.strategy,
        "sha256": question.image.sha256,
        "question": question.text,
        "label": question.label,
        "yes": answer.yes,
    }


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
        sampled = _metrics(tree["sampled"], kinds)
        # Earlier versions named no judge: without the truth it was always the reward models.
        unnamed = REWARDS if sampled.recall is None else ORACLE
        return EvalReport(
            greedy=_metrics(tree["greedy"], kinds),
            sampled=sampled,
            pope=PopeMetrics(**pope) if pope else None,
            pope_by_strategy=parts,
            judge=tree.get("judge") or unnamed,
            others={
                name: CaptionView(
                    greedy=_metrics(view["greedy"], kinds), sampled=_metrics(view["sampled"], kinds)
                )
                for name, view in tree.get("others", {}).items()
            },
            judging=tree.get("judging", {}),
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
        "counts": caption_counts(caption),
        "segments": [
            {
                "text": text,
                "labels": _labels(labeled.kinds, row),
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


def _labels(kinds: Sequence[Kind], row: IntArray) -> dict[Kind, str]:
    return {kind: _class_name(row[k]) for k, kind in enumerate(kinds)}


def _class_name(label: int) -> str:
    return "UNKNOWN" if label == UNKNOWN else SegmentClass(label).name
