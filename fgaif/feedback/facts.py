"""Who turns segments into atomic facts, and who checks them: the seams of step 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fgaif.data.scenes.facts import parse_facts
from fgaif.types import KINDS, Fact, FactQuery, Response, Segment, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedFacts:
    """Facts of a response, and the indexes of segments that could not be (wholly) understood."""

    facts: tuple[Fact, ...]
    malformed: tuple[int, ...] = ()


class FactExtractor(Protocol):
    """Breaks the segments of a response into atomic facts of the three kinds."""

    @property
    def name(self) -> str:
        """Model and prompt version, for the provenance of labels."""

    def extract(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[ExtractedFacts]:
        """Return the facts of each response's segments, in order.

        A segment that cannot be parsed is reported as malformed; only an extractor that cannot be
        asked at all raises.
        """


class FactVerifier(Protocol):
    """Checks facts against images."""

    @property
    def name(self) -> str:
        """Model, its digest, and whatever else changes its verdicts."""

    @property
    def prompt_version(self) -> str:
        """Name and digest of the prompt."""

    def verify(self, queries: Sequence[FactQuery]) -> list[Verdict]:
        """Return one verdict per query, in order.

        ``unknown`` with ``p_yes`` says that the model is undecided; ``unknown`` without it that
        asking failed, so that it is asked again by a later run. Raises if nothing can be asked.
        """


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """Extractor for the English of the embedded world."""

    name: str = "scenes"

    def extract(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[ExtractedFacts]:
        """Parse each segment; text that is not of this world is malformed."""
        return [self.parse(*pair) for pair in zip(responses, segments, strict=True)]

    def parse(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """Parse the segments of one response."""
        facts: list[Fact] = []
        malformed: list[int] = []
        for segment in segments:
            text = response.text[segment.char_start : segment.char_end]
            found, wellformed = parse_facts(text, segment.index)
            facts += found
            if not wellformed:
                malformed.append(segment.index)
        return ExtractedFacts(facts=tuple(facts), malformed=tuple(malformed))


@dataclass(frozen=True, slots=True)
class WholeSegments:
    """Extractor without a language model: each segment is one statement, checked as it stands.

    Its verdict counts for every kind, so the three reward models learn the same thing: a coarse
    control, and a start where nothing else is at hand.
    """

    name: str = "segment"

    def extract(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[ExtractedFacts]:
        """State every segment with words in it, once per kind."""
        return [
            ExtractedFacts(
                facts=tuple(
                    Fact(kind=kind, text=text, segment=part.index)
                    for part in parts
                    if (text := " ".join(response.text[part.char_start : part.char_end].split()))
                    for kind in KINDS
                )
            )
            for response, parts in zip(responses, segments, strict=True)
        ]
