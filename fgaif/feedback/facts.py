"""Who turns segments into atomic facts, and who checks them: the seams of step 1."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fgaif.data.scenes.facts import SCENE_KINDS, parse_facts
from fgaif.errors import ConfigError
from fgaif.types import DEFAULT_KINDS, Fact, FactQuery, Kind, Response, Segment, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedFacts:
    """Facts of a response, and the indexes of segments that could not be (wholly) understood.

    ``dropped`` counts the facts that were left out, by reason. ``unreadable`` counts the replies
    that could not be read, those included after which the question was put again. ``failed`` says
    that a request got no reply at all: a later run may do better.
    """

    facts: tuple[Fact, ...]
    malformed: tuple[int, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0
    failed: bool = False


class FactExtractor(Protocol):
    """Breaks the segments of a response into atomic facts of the configured kinds."""

    @property
    def name(self) -> str:
        """Model and prompt version, for the provenance of labels."""

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """Return the facts of a response's segments.

        A segment that cannot be understood, or whose request failed, is reported as malformed.

        Raises:
            ServiceError: the model cannot be asked at all.
        """


class FactVerifier(Protocol):
    """Checks facts against images."""

    @property
    def name(self) -> str:
        """Model, its digest, and whatever else changes its verdicts."""

    @property
    def prompt_version(self) -> str:
        """Name and digest of the prompt."""

    async def verify(self, query: FactQuery) -> Verdict:
        """Return the verdict; ``unknown`` with ``problem`` where the model gave none.

        Raises:
            ServiceError: the model cannot be asked at all.
        """


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """Extractor for the English of the embedded world; facts of other kinds are left out.

    Raises:
        ConfigError: this English states no facts of one of the kinds.
    """

    kinds: tuple[Kind, ...] = SCENE_KINDS
    name: str = "scenes"

    def __post_init__(self) -> None:
        if foreign := [kind for kind in self.kinds if kind not in SCENE_KINDS]:
            raise ConfigError(
                f"feedback.extractor = 'scenes' states facts of the kinds {', '.join(SCENE_KINDS)}"
                f", but kinds has {', '.join(foreign)}: set feedback.extractor=api:NAME or model"
            )

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """Parse each segment; text that is not of this world is malformed."""
        return self.parse(response, segments)

    def parse(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """Parse the segments of one response."""
        facts: list[Fact] = []
        malformed: list[int] = []
        for segment in segments:
            text = response.text[segment.char_start : segment.char_end]
            found, wellformed = parse_facts(text, segment.index)
            facts += (fact for fact in found if fact.kind in self.kinds)
            if not wellformed:
                malformed.append(segment.index)
        return ExtractedFacts(facts=tuple(facts), malformed=tuple(malformed))


@dataclass(frozen=True, slots=True)
class WholeSegments:
    """Extractor without a language model: each segment is one statement, checked as it stands.

    Its verdict counts for every kind, so all reward models learn the same thing: a coarse control,
    and a start where nothing else is at hand.
    """

    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    name: str = "segment"

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """State every segment with words in it, once per kind."""
        facts = (
            Fact(kind=kind, text=text, segment=segment.index)
            for segment in segments
            if (text := segment_text(response, segment))
            for kind in self.kinds
        )
        return ExtractedFacts(facts=tuple(facts))


def segment_text(response: Response, segment: Segment) -> str:
    """Return the words of a segment on one line."""
    return " ".join(response.text[segment.char_start : segment.char_end].split())


def merge_facts(parts: Iterable[ExtractedFacts]) -> ExtractedFacts:
    """Put together what was found in different segments of one response."""
    found = tuple(parts)
    return ExtractedFacts(
        facts=tuple(fact for part in found for fact in part.facts),
        malformed=tuple(index for part in found for index in part.malformed),
        dropped=dict(sum((Counter(part.dropped) for part in found), Counter())),
        unreadable=sum(part.unreadable for part in found),
        failed=any(part.failed for part in found),
    )
