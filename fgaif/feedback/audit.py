"""Verdicts checked by people: a sample of facts, a page to judge them on, the answers read back.

The sample is stratified by kind and verdict, the same number from each where there are enough,
because a plain sample would hold few of the rare "no" verdicts, on which precision and recall
hang. Each item weighs as many facts as it stands for, so that estimates are those of all facts.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import get_args

import jinja2

from fgaif.chat.images import data_uri
from fgaif.errors import DataError
from fgaif.feedback.labels import distinct_facts
from fgaif.files import write_whole
from fgaif.types import Answer, Fact, ImageRef, Json, Kind, LabeledResponse

ITEMS = "audit_items.json"
PAGE = "audit.html"
_MAX_SIDE = 640
_JUDGED: tuple[Answer, ...] = ("yes", "no")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditItem:
    """A fact to be judged by a person, and the verdict that is being checked.

    ``text[start:end]`` is the segment that states it; ``weight`` is the number of distinct facts
    of its kind and verdict that it stands for.
    """

    id: str
    kind: Kind
    fact: str
    answer: Answer
    p_yes: float | None
    votes: tuple[Answer, ...]
    image: ImageRef
    response: str
    prompt: str
    text: str
    start: int
    end: int
    weight: float = 1.0


def audit_item(labeled: LabeledResponse, fact: Fact) -> AuditItem:
    """Describe one fact of a response for the audit."""
    prompt, verdict = labeled.response.prompt, labeled.verdicts[fact.text]
    segment = labeled.segments[fact.segment]
    digest = hashlib.sha256(f"{prompt.image.sha256}\n{fact.text}".encode())
    return AuditItem(
        id=digest.hexdigest()[:16],
        kind=fact.kind,
        fact=fact.text,
        answer=verdict.answer,
        p_yes=verdict.p_yes,
        votes=verdict.votes,
        image=prompt.image,
        response=labeled.response.id,
        prompt=prompt.text,
        text=labeled.response.text,
        start=segment.char_start,
        end=segment.char_end,
    )


def audit_sample(labeled: Iterable[LabeledResponse], n: int, seed: int) -> tuple[AuditItem, ...]:
    """Draw ``n`` distinct facts with a yes/no verdict, in an order that tells nothing.

    Strata are (kind, verdict); each gives n/6, and what one has too few the others give. The draw
    depends on the seed, images and facts alone.

    Raises:
        DataError: no fact has a yes/no verdict.
    """

    def rank(item: AuditItem) -> bytes:
        return hashlib.sha256(f"{seed}:{item.id}".encode()).digest()

    counts: Counter[tuple[Kind, Answer]] = Counter()
    strata: dict[tuple[Kind, Answer], list[AuditItem]] = {}
    for response, fact in distinct_facts(labeled):
        item = audit_item(response, fact)
        if item.answer in _JUDGED:
            key = (item.kind, item.answer)
            counts[key] += 1
            kept = strata.setdefault(key, [])
            kept.append(item)
            if len(kept) >= 2 * n:  # no more than these can be drawn
                kept[:] = sorted(kept, key=rank)[:n]
    if not strata:
        raise DataError("audit: no fact has a yes/no verdict; annotate some responses first")
    drawn = [
        replace(item, weight=counts[key] / size)
        for key, size in _shares(counts, n).items()
        for item in sorted(strata[key], key=rank)[:size]
    ]
    return tuple(sorted(drawn, key=rank))


def write_audit(folder: Path, items: Sequence[AuditItem]) -> Path:
    """Write ``audit.html``, which stands alone, and ``audit_items.json``; return the page's path.

    An image that cannot be shown is named on the page with the reason.
    """
    rows = [asdict(item) for item in items]
    images = {item.image.sha256: _picture(item.image) for item in items}
    digest = audit_digest(items)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fgaif.feedback"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("audit.html.jinja").render(
        data={"audit": digest, "items": rows, "images": images}, count=len(items)
    )
    write_whole(folder / ITEMS, json.dumps({"audit": digest, "items": rows}, indent=1) + "\n")
    write_whole(folder / PAGE, page)
    return folder / PAGE


def read_items(folder: Path) -> tuple[AuditItem, ...]:
    """Read the sample that :func:`write_audit` wrote.

    Raises:
        DataError: there is none, or it was changed.
    """
    path = folder / ITEMS
    tree = _read_json(path, "draw a sample first")
    try:
        items = tuple(
            AuditItem(**{**row, "votes": tuple(row["votes"]), "image": ImageRef(**row["image"])})
            for row in tree["items"]
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: malformed ({error!r}); draw the sample anew") from error
    if tree.get("audit") != audit_digest(items):
        raise DataError(f"{path}: was changed after it was written; draw the sample anew")
    return items


def read_answers(path: Path, items: Sequence[AuditItem]) -> dict[str, Answer]:
    """Read the ``answers.json`` that the page gives: answers by item id; some may be missing.

    Raises:
        DataError: not such a file, of another sample, or a bad answer (names the item).
    """
    tree = _read_json(path, "download it from the audit page")
    answers = tree.get("answers")
    if not isinstance(answers, dict):
        raise DataError(f"{path}: no `answers` by item; download the file from the audit page")
    if tree.get("audit") != audit_digest(items):
        raise DataError(
            f"{path}: answers to sample {tree.get('audit')!r}, but this one is "
            f"{audit_digest(items)!r}; use the folder in which the page was made"
        )
    known = {item.id for item in items}
    for name, answer in answers.items():
        if name not in known:
            raise DataError(f"{path}: item {name!r} is not in the sample; download it again")
        if answer not in get_args(Answer):
            raise DataError(f"{path}: item {name!r}: {answer!r:.40}; expected yes, no or unknown")
    return answers


def audit_digest(items: Sequence[AuditItem]) -> str:
    """Name a sample by its items, their verdicts and weights."""
    parts = [[item.id, item.answer, item.weight] for item in items]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _shares(sizes: Mapping[tuple[Kind, Answer], int], n: int) -> dict[tuple[Kind, Answer], int]:
    """Deal ``n`` draws in turns to the strata that have any left."""
    taken = dict.fromkeys(sorted(sizes), 0)
    left = min(n, sum(sizes.values()))
    for key in cycle(taken):
        if left == 0:
            break
        if taken[key] < sizes[key]:
            taken[key] += 1
            left -= 1
    return {key: size for key, size in taken.items() if size}


def _picture(ref: ImageRef) -> Json:
    try:
        return {"uri": data_uri(ref, _MAX_SIDE), "name": Path(ref.path).name}
    except DataError as error:  # one lost image must not cost the others' audit
        return {"uri": None, "name": str(error)}


def _read_json(path: Path, remedy: str) -> Json:
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected an object; {remedy}")
    return tree
