"""``fgaif eval rewards``: reward models and judges on public data with annotated hallucinations."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cluster.console import progress_bars
from cluster.evaluation.run import file_digests
from cluster.evaluation.settings import Settings, open_judge
from fgaif.errors import ConfigError, DataError
from fgaif.eval.detection import ANY, ScoredSpan, best_of_n, detection_report
from fgaif.eval.detection_data import (
    HALLUCINATION_SOURCES,
    DetectionForm,
    GoldText,
    RankedResponses,
    read_gold,
    read_ranked,
)
from fgaif.eval.images import ImageFolder
from fgaif.eval.judge import Progress, in_parallel
from fgaif.eval.rows import read_rows
from fgaif.eval.subsentences import on_one_line, sub_sentences
from fgaif.feedback.verify import YesNoVerifier, load_fact_prompt
from fgaif.files import write_whole
from fgaif.types import FactQuery, Json, SegmentClass

_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardsOptions:
    """Options of ``fgaif eval rewards``."""

    data: Annotated[Path, typer.Option(help="The public data's own file, JSON or JSONL.")]
    form: Annotated[DetectionForm, typer.Option(help="Whose rows these are.")]
    rewards: Annotated[
        Path | None, typer.Option(help="Trained reward models (RUN/rewards) to score with.")
    ] = None
    scores: Annotated[
        Path | None, typer.Option(help="Scores of any tool instead: rows of id and texts.")
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows only.")] = None
    all_sources: Annotated[
        bool, typer.Option(help="VL-RewardBench: also what is not about hallucination.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """What is said of one text: its segments, and how good the whole is (higher: better)."""

    segments: tuple[ScoredSpan, ...]
    whole: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Texts about one image that are scored together; ``id`` is their place in the data."""

    id: str
    image: str
    prompt: str
    texts: tuple[str, ...]


Scores = dict[str, list[TextScore]]
"""By the question's id, one per text."""


def run_rewards(options: RewardsOptions, settings: Settings, out: Console, err: Console) -> None:
    """Score the data and print figures; with ``--out``, write ``rewards.json`` and the scores.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    given = [options.rewards, options.scores, settings.judge]
    if sum(value is not None for value in given) != 1:
        raise ConfigError(
            "fgaif eval rewards scores with one of --rewards DIR, --judge NAME and --scores FILE"
        )
    if options.scores is None and settings.images is None:
        raise ConfigError("fgaif eval rewards needs --images, the folder of the data's images")
    ranked = options.form == "vlrewardbench"
    pairs = _ranked(options) if ranked else []
    texts = [] if ranked else read_gold(options.data, options.form)[: options.limit]
    items: list[GoldText | RankedResponses] = [*pairs, *texts]
    questions = [
        Question(id=str(n), image=one.image, prompt=one.prompt, texts=_texts(one))
        for n, one in enumerate(items)
    ]
    about, found, counts = asyncio.run(_score(options, settings, questions, err))
    counts["texts_without_score"] = sum(question.id not in found for question in questions)
    files = {"data": options.data} | ({"scores": options.scores} if options.scores else {})
    tree: Json = {
        "form": options.form,
        **(_ranking(pairs, found) if ranked else _detection(texts, found, settings.seed)),
        "seed": settings.seed,
        "counts": counts,
        "provenance": about | file_digests(files),
    }
    if settings.out is not None:
        rows = "".join(json.dumps(_row(name, scores)) + "\n" for name, scores in found.items())
        write_whole(settings.out / "scores.jsonl", rows)
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        write_whole(settings.out / "rewards.json", text)
    if settings.as_json:
        typer.echo(json.dumps(tree, ensure_ascii=False))
    else:
        _print(tree, out)


def _texts(item: GoldText | RankedResponses) -> tuple[str, ...]:
    return (item.text,) if isinstance(item, GoldText) else item.responses


def _ranked(options: RewardsOptions) -> list[RankedResponses]:
    rows = read_ranked(options.data)[: options.limit]
    if options.all_sources:
        return rows
    kept = [row for row in rows if row.source.lower() in HALLUCINATION_SOURCES]
    if not kept:
        sources = ", ".join(sorted({row.source for row in rows}))
        raise DataError(
            f"{options.data}: no question is about hallucination (query_source: {sources}); "
            "--all-sources takes them all"
        )
    return kept


async def _score(
    options: RewardsOptions, settings: Settings, questions: Sequence[Question], err: Console
) -> tuple[dict[str, str], Scores, dict[str, int]]:
    """Provenance, scores, and what was left out."""
    if options.scores is not None:
        return {}, read_scores(options.scores), {}
    assert settings.images is not None, "checked with the options"
    folder = ImageFolder(settings.images)
    usable, unusable = [], 0
    for question in questions:
        try:
            usable.append((question, folder.check(question.image)))
        except DataError:
            unusable += 1
    if not usable:
        raise DataError(f"{settings.images}: holds none of the {len(questions)} images")
    counts = Counter({"images_unusable": unusable})
    with progress_bars(err, "scoring", passing=True) as report:
        if options.rewards is not None:
            paths = [(question, settings.images / ref.path) for question, ref in usable]
            about, found = _by_rewards(options.rewards, paths, counts, report)
            return about, found, dict(counts)

        def usage(line: str) -> None:
            err.print(f"judge: {line}", highlight=False)

        async with open_judge(settings.config, settings.judge, settings.replies, usage) as judge:
            verifier = YesNoVerifier(judge, load_fact_prompt("statement"))
            min_words = settings.config.segment.min_words

            async def one(pair: tuple[Question, Any]) -> list[TextScore]:
                question, ref = pair
                return [await _judged(verifier, ref, t, min_words, counts) for t in question.texts]

            lists = await in_parallel(one, usable, _AT_ONCE, report)
        about = {"judge": verifier.name, "prompt": verifier.prompt_version}
        scores = {q.id: scored for (q, _), scored in zip(usable, lists, strict=True)}
        return about, scores, dict(counts)


def _by_rewards(
    folder: Path, questions: Sequence[tuple[Question, Path]], counts: Counter[str], report: Progress
) -> tuple[dict[str, str], Scores]:
    """P(hallucinated) by segment and kind, and PPO's total reward of the text."""
    from fgaif.serving.rewards import load_rewards  # torch

    rewards = load_rewards(folder)
    found: Scores = {}
    for number, (question, path) in enumerate(questions, start=1):
        try:
            scored = rewards.score(path, list(question.texts), question.prompt)
        except DataError:
            counts["texts_unusable"] += len(question.texts)
            continue
        found[question.id] = [
            TextScore(
                segments=tuple(
                    ScoredSpan(
                        start=segment.char_start,
                        end=segment.char_end,
                        scores={
                            kind: float(p[SegmentClass.HALLU])
                            for kind, p in zip(text.kinds, probs, strict=True)
                        },
                    )
                    for segment, probs in zip(text.segments, text.probs, strict=True)
                ),
                whole=text.total,
            )
            for text in scored
        ]
        report(number, len(questions))
    return {"rewards": rewards.version}, found


async def _judged(
    verifier: YesNoVerifier, ref: Any, text: str, min_words: int, counts: Counter[str]
) -> TextScore:
    """1 - P(yes) that a sub-sentence is true (1 or 0 without probabilities), and minus their mean
    for the whole; sub-sentences without a verdict are left out."""
    spans = sub_sentences(text, min_words)
    queries = [FactQuery(image=ref, text=on_one_line(text, span)) for span in spans]
    verdicts = await in_parallel(verifier.verify, queries)
    segments = []
    for (start, end), verdict in zip(spans, verdicts, strict=True):
        if verdict.p_yes is None and verdict.answer == "unknown":
            counts["segments_without_verdict"] += 1
            continue
        p = 1 - verdict.p_yes if verdict.p_yes is not None else float(verdict.answer == "no")
        segments.append(ScoredSpan(start=start, end=end, scores={ANY: p}))
    mean = sum(s.scores[ANY] for s in segments) / len(segments) if segments else 1.0
    return TextScore(segments=tuple(segments), whole=-mean)


def _detection(texts: Sequence[GoldText], found: Scores, seed: int) -> Json:
    known = [(text, found[str(n)][0].segments) for n, text in enumerate(texts) if str(n) in found]
    if not known:
        raise DataError("no annotated text has a score; ids of scores count rows from 0")
    report = detection_report([t for t, _ in known], [s for _, s in known], seed=seed)
    if not report["segment"] and not report["response"]:
        raise DataError(
            f"{len(known)} texts, all hallucinated or all right: nothing to tell apart; take more"
        )
    return report


def _ranking(pairs: Sequence[RankedResponses], found: Scores) -> Json:
    known = [(pair, found[str(n)]) for n, pair in enumerate(pairs) if str(n) in found]
    if not known or any(len(scores) != len(pair.responses) for pair, scores in known):
        raise DataError("scores and responses do not go together; ids of scores count from 0")

    def figures(rows: Sequence[tuple[RankedResponses, list[TextScore]]]) -> Json:
        return best_of_n(
            [pair.preferred for pair, _ in rows],
            [[score.whole for score in scores] for _, scores in rows],
            [[len(response) for response in pair.responses] for pair, _ in rows],
        )

    sources = sorted({pair.source for pair, _ in known})
    by_source = {s: figures([row for row in known if row[0].source == s]) for s in sources}
    return {"best_of_n": figures(known), "sources": by_source}


def read_scores(path: Path) -> Scores:
    """Read scores: rows of ``id`` (place in the data, from 0) and ``texts``, each ``{"segments":
    [{"start", "end", "scores": {KIND: P}}], "whole": X}``; P is that of being hallucinated.

    Raises:
        DataError: a row cannot be used (names row and key).
    """
    found: Scores = {}
    for row in read_rows(path):
        try:
            found[row.identity("id")] = [_text_score(text) for text in row.data["texts"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wanted = f"texts with segments ({error!r:.80})"
            raise row.wrong("texts", row.data.get("texts"), wanted) from None
    return found


def _text_score(text: Mapping[str, Any]) -> TextScore:
    segments = tuple(
        ScoredSpan(
            start=int(s["start"]),
            end=int(s["end"]),
            scores={str(kind): float(p) for kind, p in s["scores"].items()},
        )
        for s in text["segments"]
    )
    if not all(0 <= p <= 1 for segment in segments for p in segment.scores.values()):
        raise ValueError("scores are probabilities, 0 to 1")
    return TextScore(segments=segments, whole=float(text.get("whole", 0.0)))


def _row(name: str, scores: Sequence[TextScore]) -> Json:
    texts = [
        {
            "segments": [
                {"start": s.start, "end": s.end, "scores": s.scores} for s in score.segments
            ],
            "whole": score.whole,
        }
        for score in scores
    ]
    return {"id": name, "texts": texts}


def _print(tree: Json, out: Console) -> None:
    table = Table(title=f"{tree['form']}", title_justify="left", box=SIMPLE)
    table.padding = (0, 1, 0, 0)
    if "best_of_n" in tree:
        for column in ("source", "questions", "accuracy", "longest", "shortest", "chance"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for name, row in {"all": tree["best_of_n"], **tree["sources"]}.items():
            shares = [row["accuracy"], *row["baselines"].values()]
            table.add_row(name, str(row["questions"]), *(f"{100 * s:.1f} %" for s in shares))
    else:
        table.add_column("", no_wrap=True, min_width=20)
        for column in ("AUROC", "95 %", "AP", "F1", "ECE", "share", "length"):
            table.add_column(column, justify="right", no_wrap=True)
        for level in ("segment", "response"):
            for kind, row in tree[level].items():
                table.add_row(f"{level}: {kind} ({row['units']})", *_cells(row))
    out.print(table)
    if "segment" in tree:
        out.print("share: hallucinated, AP of chance; length: its AUROC", style="dim")
    notes = [f"{n} {reason.replace('_', ' ')}" for reason, n in tree["counts"].items() if n]
    notes += [f"{kind} is annotated and not scored" for kind in tree.get("not_scored", ())]
    for note in notes:
        out.print(f"beware: {note}", style="yellow", highlight=False)


def _cells(row: Json) -> list[str]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    low, high = row["auroc"]["interval"]
    first, *others = ("auroc", "average_precision", "f1", "calibration_error")
    return [
        number(row[first]["value"]),
        f"[{number(low)}, {number(high)}]",
        *(number(row[name]["value"]) for name in others),
        f"{100 * row['hallucinated']:.1f} %",
        number(row["baselines"]["length"]["auroc"]),
    ]
