"""Public data with annotated hallucinations, in their own row forms.

``mhaldetect``: M-HalDetect's ``val_raw.json`` (question, response, image, annotations of start, end
and label). ``mhalubench``: MHaluBench (image_path, claim_list and ref_claim_label; or response and
label). ``hsa``: HSA-DPO's ``hsa_dpo_detection.jsonl`` (a description to assess, and what it was
found to hold). ``spans``: annotations with characters and a kind, such as HalLoc's are made into.
``vlrewardbench``: pairs of responses with a ranking by people.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import DataError
from fgaif.eval.rows import Row, read_rows
from fgaif.types import Kind

DetectionForm = Literal["mhaldetect", "mhalubench", "hsa", "spans", "vlrewardbench"]
HALLUCINATION_SOURCES = ("povid", "rlaif-v", "rlhf-v")
"""VL-RewardBench's sources of questions about hallucination."""
_LABELS = {"inaccurate": True, "accurate": False, "analysis": None, "unsure": None}
_VERDICTS = {
    "hallucination": True, "hallucinatory": True,
    "non-hallucination": False, "non-hallucinatory": False,
}  # fmt: skip
_SAME_KIND = {"relationship": "relation", "obj": "object", "attr": "attribute", "rel": "relation"}
_TAG = re.compile(r"<(object|attribute|relationship|relation)>")
_ASSESS = re.compile(r".*Description to Assess:\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldSpan:
    """Characters [start, end) of a text: hallucinated, right, or (None) of no known truth.

    ``kind`` is that of the hallucination, or of the question that was answered; None: any.
    """

    start: int
    end: int
    hallucinated: bool | None
    kind: Kind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldText:
    """An annotated text about an image; ``group`` is the response that it belongs to."""

    where: str
    group: str
    image: str
    text: str
    spans: tuple[GoldSpan, ...]
    prompt: str = DESCRIBE


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedResponses:
    """A question with responses, of which people prefer one; ``source`` is where it comes from."""

    where: str
    image: str
    prompt: str
    responses: tuple[str, ...]
    preferred: int
    source: str


def read_gold(path: Path, form: DetectionForm) -> list[GoldText]:
    """Read annotated texts.

    Raises:
        DataError: the file or a row cannot be used (names row and key).
    """
    readers: dict[DetectionForm, Callable[[Row, str], list[GoldText]]] = {
        "mhaldetect": _mhaldetect, "mhalubench": _mhalubench, "hsa": _hsa, "spans": _spans,
    }  # fmt: skip
    return [
        text
        for number, row in enumerate(read_rows(path))
        for text in readers[form](row, str(number))
    ]


def read_ranked(path: Path) -> list[RankedResponses]:
    """Read VL-RewardBench's rows, images as paths; rank 0 is the preferred response.

    Raises:
        DataError: the file or a row cannot be used (names row and key).
    """
    found = []
    for row in read_rows(path):
        responses = row.texts("response")
        ranks: Any = row.data.get("human_ranking")
        if not isinstance(ranks, list) or sorted(ranks, key=str) != list(range(len(responses))):
            wanted = f"ranks 0 to {len(responses) - 1}, one for each response"
            raise row.wrong("human_ranking", ranks, wanted)
        found.append(
            RankedResponses(
                where=row.where,
                image=row.identity("image", "image_path"),
                prompt=row.text("query"),
                responses=tuple(responses),
                preferred=ranks.index(0),
                source=row.shown("query_source") or "unknown",
            )
        )
    return found


def _mhaldetect(row: Row, group: str) -> list[GoldText]:
    text = row.text("response")
    spans = []
    for span, start, end in _annotations(row, text):
        label = str(span.get("label", span.get("class", ""))).lower()
        if label not in _LABELS:
            raise row.wrong("annotations.label", label, ", ".join(_LABELS).upper())
        spans.append(GoldSpan(start=start, end=end, hallucinated=_LABELS[label]))
    return [_gold(row, group, row.identity("image", "image_id"), text, spans)]


def _spans(row: Row, group: str) -> list[GoldText]:
    """Annotated spans are hallucinated; all between them is right."""
    text = row.text("response", "text", "answer")
    spans, at = [], 0
    for span, start, end in sorted(_annotations(row, text), key=lambda found: found[1:]):
        kind = str(span.get("kind") or span.get("type") or span.get("label") or "").lower()
        if not kind:
            raise row.wrong("annotations.kind", span, "a kind, such as object")
        spans += [GoldSpan(start=at, end=start, hallucinated=False)] if start > at else []
        spans.append(
            GoldSpan(start=start, end=end, hallucinated=True, kind=_SAME_KIND.get(kind, kind))
        )
        at = max(at, end)
    spans += [GoldSpan(start=at, end=len(text), hallucinated=False)] if at < len(text) else []
    return [_gold(row, group, row.identity("image", "image_path"), text, spans)]


def _annotations(row: Row, text: str) -> list[tuple[dict[str, Any], int, int]]:
    spans = row.data.get("annotations", row.data.get("spans"))
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise row.wrong("annotations", spans, "a list of spans with start, end and label")
    found = []
    for span in spans:
        start, end = span.get("start"), span.get("end")
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            raise row.wrong("annotations", span, f"start and end within {len(text)} characters")
        said = span.get("text")
        if isinstance(said, str) and said.strip() != text[start:end].strip():
            raise row.wrong("annotations.text", said, f"what stands there, {text[start:end]!r}")
        found.append((span, start, end))
    return found


def _mhalubench(row: Row, group: str) -> list[GoldText]:
    image = row.identity("image_path", "image")
    if "claim_list" not in row.data:
        claims, labels = [row.text("response", "claim")], [row.text("label")]
    else:
        key = "ref_claim_label" if "ref_claim_label" in row.data else "claim_label"
        claims, labels = row.texts("claim_list"), row.texts(key)
        if len(claims) != len(labels):
            raise row.wrong(key, labels, f"{len(claims)} labels")
    found = []
    for claim, label in zip(claims, labels, strict=True):
        if (verdict := label.strip().lower()) not in _VERDICTS:
            raise row.wrong("label", label, "hallucination or non-hallucination")
        whole = GoldSpan(start=0, end=len(claim), hallucinated=_VERDICTS[verdict])
        found += [_gold(row, group, image, claim, [whole])] if claim.strip() else []
    return found


def _hsa(row: Row, group: str) -> list[GoldText]:
    """A description, and a reply that is NO HALLUCINATION or lists tags with what is wrong."""
    turns = row.data.get("conversations")
    try:
        asked, found = (str(turn["value"]) for turn in turns)  # type: ignore[union-attr]
    except (TypeError, ValueError, KeyError):
        raise row.wrong("conversations", turns, "a question and its reply") from None
    text = _ASSESS.sub("", asked).strip()
    if not text:
        raise row.wrong("conversations", asked, "a description to assess")
    tags = {_SAME_KIND.get(tag, tag) for tag in _TAG.findall(found)}
    if not tags and "no hallucination" not in found.lower():
        raise row.wrong("conversations", found, "NO HALLUCINATION, or tags such as <object>")
    spans = [
        GoldSpan(start=0, end=len(text), hallucinated=kind in tags, kind=kind)
        for kind in ("object", "attribute", "relation")
    ]
    return [_gold(row, group, row.identity("image"), text, spans)]


def _gold(row: Row, group: str, image: str, text: str, spans: list[GoldSpan]) -> GoldText:
    known = {"prompt": prompt} if (prompt := row.shown("question", "prompt", "query")) else {}
    if not any(span.hallucinated is not None for span in spans) and not spans:
        raise DataError(f"{row.where}: no annotated span; leave the row out")
    return GoldText(
        where=row.where, group=group, image=image, text=text, spans=tuple(spans), **known
    )
