"""LLaVA-Bench's files: questions, reference answers, contexts, answers, and rules of the judge."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fgaif.chat.messages import load_prompt
from fgaif.errors import DataError
from fgaif.eval.judge import PROMPTS
from fgaif.eval.rows import Row, read_rows, warn_of_repeats

CATEGORIES = ("conv", "detail", "complex")
IN_THE_WILD = "llava_bench_"
"""Prefix of the categories of the in-the-wild set in rule files and reviews."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the judge is told to do for a category; ``version`` names the file and its digest."""

    version: str
    prompt: str
    role: str = "Assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaBenchItem:
    """One question with its context; ``answer`` is the model's, ``reference`` the one to match."""

    id: str
    image: str
    category: str
    context: str
    question: str
    reference: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaBenchItems:
    """Answered items in the order of the questions; ``in_the_wild`` says which set it is."""

    items: tuple[LlavaBenchItem, ...]
    in_the_wild: bool
    counts: dict[str, int]


def read_bench(questions: Path, references: Path, contexts: Path, answers: Path) -> LlavaBenchItems:
    """Join the four files by ``question_id``, and contexts by ``image``.

    Rows: questions ``question_id, image, text, category``; references and answers ``question_id,
    text`` (``model_vqa``'s other keys are ignored, but a ``prompt`` must hold the question);
    contexts ``image, captions, instances`` (COCO) or ``image, caption`` (in the wild). Questions
    without an answer are left out; counts: ``items_unanswered``, ``answers_unmatched``,
    ``answers_empty`` (these are judged).

    Raises:
        DataError: names row and key; a question has no reference or context, a row is there twice,
            or no answer matches.
    """
    question_rows = rows_by_key(questions, "question_id")
    reference_rows = rows_by_key(references, "question_id")
    answer_rows = rows_by_key(answers, "question_id")
    context_rows = rows_by_key(contexts, "image")
    items = []
    for identity, row in question_rows.items():
        if identity not in answer_rows:
            continue
        _check_prompt(row, answer_rows[identity])
        image = row.text("image")
        items.append(
            LlavaBenchItem(
                id=identity,
                image=image,
                category=category_of(row),
                context=_context(_needed(context_rows, image, row, "image", contexts)),
                question=row.text("text"),
                reference=_needed(reference_rows, identity, row, "question_id", references).text(
                    "text"
                ),
                answer=answer_rows[identity].text("text", empty=True),
            )
        )
    if not items:
        raise DataError(f"{answers}: key `question_id`: none is that of a question in {questions}")
    return LlavaBenchItems(
        items=tuple(items),
        in_the_wild=any("caption" in row.data for row in context_rows.values()),
        counts={
            "items_unanswered": len(question_rows) - len(items),
            "answers_unmatched": len(answer_rows) - len(items),
            "answers_empty": sum(not item.answer.strip() for item in items),
        },
    )


def load_rules(path: Path | None, in_the_wild: bool) -> dict[str, Rule]:
    """Read the rules by category from a ``rule.json``, or our own.

    Args:
        path: an object ``{CATEGORY: {"role", "prompt"}}``, the categories being ``conv``,
            ``detail`` and ``complex``, in the wild with the prefix ``llava_bench_``.

    Raises:
        DataError: the file cannot be read, or a category is missing or incomplete.
    """
    if path is None:
        own = {name: load_prompt(PROMPTS / f"{IN_THE_WILD}{name}.txt", ()) for name in CATEGORIES}
        return {name: Rule(version=file.version, prompt=file.text) for name, file in own.items()}
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no readable rule file ({error}); give a JSON object") from error
    return {name: _rule(path, tree, f"{IN_THE_WILD * in_the_wild}{name}") for name in CATEGORIES}


def _rule(path: Path, tree: object, key: str) -> Rule:
    rule = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(rule, dict):
        raise DataError(f"{path}: key `{key}`: expected an object with texts `role` and `prompt`")
    row = Row(where=f"{path}: {key}", data=rule)
    role, prompt = row.text("role"), row.text("prompt")
    digest = hashlib.sha256(json.dumps([role, prompt]).encode()).hexdigest()[:8]
    return Rule(version=f"{path.stem}:{key}-{digest}", prompt=prompt, role=role)


def rows_by_key(path: Path, key: str) -> dict[str, Row]:
    """Read rows by the id under ``key``; equal rows count once, with a warning.

    Raises:
        DataError: the file or a row cannot be used, or an id is there twice.
    """
    rows: dict[str, Row] = {}
    repeated = 0
    for row in read_rows(path):
        first = rows.setdefault(row.identity(key), row)
        if first is not row and row.repeats(first):
            repeated += 1
        elif first is not row:
            raise DataError(
                f"{row.where}: key `{key}`: {row.data[key]!r} was there at {first.where}; keep one"
            )
    warn_of_repeats(str(path), repeated)
    return rows


def _needed(rows: Mapping[str, Row], name: str, row: Row, key: str, path: Path) -> Row:
    if name not in rows:
        raise DataError(f"{row.where}: key `{key}`: {name!r} is not in {path}; complete that file")
    return rows[name]


def category_of(row: Row) -> str:
    """Return the category of a question or review, without the in-the-wild prefix.

    Raises:
        DataError: it is missing or unknown.
    """
    name = row.text("category").removeprefix(IN_THE_WILD)
    if name not in CATEGORIES:
        raise row.wrong("category", name, f"one of {', '.join(CATEGORIES)}")
    return name


def _context(row: Row) -> str:
    """Captions, a line each; for COCO an empty line and a line ``category: [bbox]`` per object."""
    if "captions" not in row.data:
        return "\n".join(row.texts("caption"))
    boxes = row.data.get("instances")
    if not isinstance(boxes, list) or not all(
        isinstance(box, dict) and {"category", "bbox"} <= box.keys() for box in boxes
    ):
        raise row.wrong("instances", boxes, "a list of objects with `category` and `bbox`")
    lines = [f"{box['category']}: {box['bbox']}" for box in boxes]
    return "\n".join([*row.texts("captions"), "", *lines])


def _check_prompt(question: Row, answer: Row) -> None:
    prompt = answer.data.get("prompt")
    if isinstance(prompt, str) and question.text("text").strip() not in prompt:
        raise DataError(
            f"{answer.where}: key `prompt`: {prompt!r:.60} is not the question of "
            f"{question.where}; give the answers to these questions"
        )
