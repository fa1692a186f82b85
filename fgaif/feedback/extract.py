"""Atomic facts of English text, asked of a chat model (FGAIF, step 1).

As in the paper, one request per response: all its segments, numbered, so that the whole response is
the context of each. What comes back is read by ``fgaif/feedback/parse_reply.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fgaif.chat.messages import ChatModel, ChatRequest, RequestFailed, gather_all, load_prompt
from fgaif.feedback.facts import ExtractedFacts, merge_facts, segment_text
from fgaif.feedback.parse_reply import facts_schema, read_facts
from fgaif.types import Response, Segment

PROMPTS = Path(__file__).parent / "prompts"
_SLOTS = {
    "response": ("facts", ("segments",)),
    "segment": ("facts_segment", ("response", "segment")),
}
_TOKENS = 64
_TOKENS_PER_SEGMENT = 192


class ModelFacts:
    """Extractor over any chat model.

    A reply that cannot be read is asked for again, up to ``reads`` times in all, and from the
    second time on in the plain-text form: a model that failed at JSON once mostly fails again. If
    none can be read, or a request fails, its segments are malformed.

    Args:
        per: ``segment`` puts each segment in a request of its own, the response around it.
        text_form: use the plain-text form from the start.
        max_facts: facts of one kind in one segment.
        prompts_dir: folder with ``facts.txt`` and ``facts_text.txt``, each with ``{segments}`` once
            (or ``facts_segment.txt`` and ``facts_segment_text.txt``, with ``{response}`` and
            ``{segment}``); with ``text_form`` only the second.

    Raises:
        ConfigError: a prompt is missing or lacks a slot.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        per: Literal["response", "segment"] = "response",
        text_form: bool = False,
        max_facts: int = 16,
        reads: int = 3,
        prompts_dir: Path | None = None,
    ) -> None:
        folder = prompts_dir or PROMPTS
        stem, slots = _SLOTS[per]
        self._model = model
        self._per_segment = per == "segment"
        self._text = load_prompt(folder / f"{stem}_text.txt", slots)
        self._json = None if text_form else load_prompt(folder / f"{stem}.txt", slots)
        self._max_facts = max_facts
        self._reads = reads
        forms = [form.version for form in (self._json, self._text) if form]
        self.name = f"{model.name} {' '.join(forms)}"

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """Return the facts of a response's segments; see ``FactExtractor``."""
        worded = [segment for segment in segments if segment_text(response, segment)]
        groups = [[one] for one in worded] if self._per_segment else [worded] if worded else []
        return merge_facts(await gather_all(self._group(response, group) for group in groups))

    async def _group(self, response: Response, group: Sequence[Segment]) -> ExtractedFacts:
        asked = tuple(segment.index for segment in group)
        for attempt in range(self._reads):
            try:
                reply = await self._model.ask(self._request(response, group, attempt))
            except RequestFailed:
                return ExtractedFacts(facts=(), malformed=asked, unreadable=attempt, failed=True)
            # What a cut reply would still have said is not known, even if the rest can be read.
            found = None if reply.cut else self._read(reply.text, asked, response.text)
            if found is not None:
                return replace(found, unreadable=attempt)
        return ExtractedFacts(facts=(), malformed=asked, unreadable=self._reads)

    def _read(self, text: str, asked: Sequence[int], described: str) -> ExtractedFacts | None:
        return read_facts(text, asked=asked, described=described, max_facts=self._max_facts)

    def _request(self, response: Response, group: Sequence[Segment], attempt: int) -> ChatRequest:
        prompt = self._json if self._json and attempt == 0 else self._text
        texts = [segment_text(response, segment) for segment in group]
        lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
        described = " ".join(response.text.split())
        return ChatRequest(
            prompt_version=prompt.version,
            subject=lines,
            text=prompt.fill(segments=lines, response=described, segment=texts[0]),
            schema=facts_schema(len(group), self._max_facts) if prompt is self._json else None,
            max_tokens=_TOKENS + _TOKENS_PER_SEGMENT * len(group),
            attempt=attempt,
        )
