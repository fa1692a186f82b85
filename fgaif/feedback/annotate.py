"""Step 1 after sampling: one response to one labelled response."""

from collections import Counter
from collections.abc import Iterable, Sequence

from fgaif.chat.messages import gather_all
from fgaif.feedback.facts import ExtractedFacts, FactExtractor, FactVerifier
from fgaif.feedback.labels import label_segments
from fgaif.types import DEFAULT_KINDS, UNKNOWN, FactQuery, Kind, LabeledResponse, Response, Segment

DROPPED = "dropped "
"""Before the reason, in the provenance of a response some of whose facts were left out."""


class Annotator:
    """Extracts, verifies and labels; any number of responses at a time.

    It keeps nothing itself: what was asked before is known to the chat models behind the extractor
    and the verifier, so that each distinct fact of an image is put once.
    """

    def __init__(
        self,
        extractor: FactExtractor,
        verifier: FactVerifier,
        min_words: int,
        kinds: tuple[Kind, ...],
    ) -> None:
        self._extractor = extractor
        self._verifier = verifier
        self._min_words = min_words
        self._kinds = kinds

    async def annotate(self, response: Response, segments: Sequence[Segment]) -> LabeledResponse:
        """Label the segments of a response.

        What failed or could not be read labels UNKNOWN. ``provenance`` names extractor, verifier,
        prompt and splitting, the image's hash, and what could not be used of the extraction.

        Raises:
            ServiceError: a model cannot be asked at all.
        """
        image = response.prompt.image
        found = await self._extractor.extract(response, segments)
        texts = fact_texts(found)
        kinds = {fact.text: fact.kind for fact in reversed(found.facts)}
        queries = [FactQuery(image=image, text=text, kind=kinds.get(text)) for text in texts]
        answers = await gather_all(self._verifier.verify(query) for query in queries)
        verdicts = dict(zip(texts, answers, strict=True))
        return LabeledResponse(
            response=response,
            kinds=self._kinds,
            segments=tuple(segments),
            facts=found.facts,
            verdicts=verdicts,
            labels=label_segments(segments, found.facts, verdicts, self._kinds, found.malformed),
            provenance=self._provenance(response, found),
        )

    def _provenance(self, response: Response, found: ExtractedFacts) -> dict[str, str]:
        trouble = {"unreadable": found.unreadable, "failed": int(found.failed)}
        trouble |= {f"{DROPPED}{reason}": count for reason, count in found.dropped.items()}
        return {
            "extractor": self._extractor.name,
            "verifier": self._verifier.name,
            "prompt_version": self._verifier.prompt_version,
            "min_words": str(self._min_words),
            "policy_version": str(response.policy_version),
            "image_sha256": response.prompt.image.sha256,
            "malformed": ",".join(map(str, found.malformed)),
        } | {name: str(count) for name, count in sorted(trouble.items()) if count}


async def label_response(
    response: Response,
    segments: Sequence[Segment],
    extractor: FactExtractor,
    verifier: FactVerifier,
    *,
    min_words: int = 5,
    kinds: tuple[Kind, ...] = DEFAULT_KINDS,
) -> LabeledResponse:
    """Label the segments of one response: whoever extracts states their facts, the verifier checks.

    ``min_words`` is the splitting that made the segments, for the provenance; ``kinds`` are those
    of the extractor's facts. See :class:`Annotator`, which labels many.
    """
    return await Annotator(extractor, verifier, min_words, kinds).annotate(response, segments)


def feedback_losses(labeled: Iterable[LabeledResponse]) -> dict[str, int]:
    """Count what the labels had to do without, over all responses, one pass.

    Verdicts of a fact that several segments state count once per response.
    """
    counts: Counter[str] = Counter()
    for item in labeled:
        counts["responses"] += 1
        counts["segments with an unknown label"] += int((item.labels == UNKNOWN).any(axis=1).sum())
        counts["responses failed"] += int("failed" in item.provenance)
        counts["replies unreadable"] += int(item.provenance.get("unreadable", "0"))
        for name, count in item.provenance.items():
            if name.startswith(DROPPED):
                counts[f"facts {name}"] += int(count)
        for verdict in item.verdicts.values():
            if verdict.answer == "unknown":
                counts[f"facts {verdict.problem or 'undecided'}"] += 1
    return dict(counts)


def fact_texts(found: ExtractedFacts) -> list[str]:
    """Distinct statements of a response, what they presuppose included."""
    texts: dict[str, None] = {}
    for fact in found.facts:
        texts.update(dict.fromkeys((*fact.requires, fact.text)))
    return list(texts)
