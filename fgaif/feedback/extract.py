"""Atomic facts of English text, asked of a chat model (FGAIF, step 1).

As in the paper, one request per response: all its segments, numbered, so that the whole response is
the context of each. What comes back is read by ``fgaif/feedback/parse_reply.py``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fgaif.chat.messages import (
    ChatModel,
    ChatRequest,
    PromptFile,
    RequestFailed,
    gather_all,
    load_prompt,
)
from fgaif.config import API, Config
from fgaif.errors import ConfigError
from fgaif.feedback.facts import ExtractedFacts, merge_facts, segment_text
from fgaif.feedback.parse_reply import facts_schema, read_facts
from fgaif.kinds import KindConfig
from fgaif.types import Kind, Response, Segment

PROMPTS = Path(__file__).parent / "prompts"
_SLOTS = {
    "response": ("facts", ("segments",)),
    "segment": ("facts_segment", ("response", "segment")),
}
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
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
            ``{segment}``); with ``text_form`` only the second. ``{kinds}`` in them is what
            :func:`describe_kinds` says.
        kinds: of the facts.

    Raises:
        ConfigError: a prompt is missing, lacks a slot or says nothing of a kind.
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
        kinds: Sequence[KindConfig] = KindConfig.default(),
    ) -> None:
        self._model = model
        self._per_segment = per == "segment"
        self._text = load_facts_prompt(kinds, per, text_form=True, folder=prompts_dir)
        self._json = None
        if not text_form:
            self._json = load_facts_prompt(kinds, per, text_form=False, folder=prompts_dir)
        self._kinds = tuple(kind.name for kind in kinds)
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
        return read_facts(
            text, asked=asked, described=described, max_facts=self._max_facts, kinds=self._kinds
        )

    def _request(self, response: Response, group: Sequence[Segment], attempt: int) -> ChatRequest:
        prompt = self._json if self._json and attempt == 0 else self._text
        texts = [segment_text(response, segment) for segment in group]
        lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
        described = " ".join(response.text.split())
        return ChatRequest(
            prompt_version=prompt.version,
            subject=lines,
            text=prompt.fill(segments=lines, response=described, segment=texts[0]),
            schema=facts_schema(len(group), self._max_facts, self._kinds)
            if prompt is self._json
            else None,
            max_tokens=_TOKENS + _TOKENS_PER_SEGMENT * len(group),
            attempt=attempt,
        )


def load_facts_prompt(
    kinds: Sequence[KindConfig],
    per: Literal["response", "segment"],
    *,
    text_form: bool = False,
    folder: Path | None = None,
) -> PromptFile:
    """Read the prompt that asks for facts of these kinds, of ``folder`` or the package.

    Raises:
        ConfigError: it is missing, lacks a slot or says nothing of a kind.
    """
    stem, slots = _SLOTS[per]
    path = (folder or PROMPTS) / f"{stem}{'_text' if text_form else ''}.txt"
    fixed = {}
    if folder is None or "{kinds}" in load_prompt(path, slots).text:
        fixed["kinds"] = describe_kinds(kinds)
    if folder is None:
        fixed |= _examples([kind.name for kind in kinds], text_form)
    prompt = load_prompt(path, slots, fixed)
    for kind in kinds:
        if kind not in KindConfig.default() and kind.name not in prompt.text:
            raise ConfigError(
                f"prompt {path}: says nothing of the kind {kind.name!r}; put {{kinds}} where the "
                "kinds are listed, or describe it in the file"
            )
    return prompt


def asks_in_text(config: Config) -> bool:
    """Whether the run's extractor is asked in the plain-text form from the start."""
    endpoint = config.endpoints.get(config.feedback.extractor.removeprefix(API))
    return endpoint is not None and endpoint.structured == "text"


def describe_kinds(kinds: Sequence[KindConfig]) -> str:
    """How many kinds there are, and a line for each on what its facts are.

    Raises:
        ConfigError: a kind without a description, or a file that cannot be read.
    """
    count = _NUMBERS[len(kinds) - 1] if len(kinds) <= len(_NUMBERS) else str(len(kinds))
    lines = [f"There are {count} kinds:" if len(kinds) > 1 else "There is one kind:"]
    lines += [f"- {kind.name}: {_description(kind)}" for kind in kinds]
    return "\n".join(lines)


def kind_meanings(kinds: Sequence[KindConfig]) -> dict[Kind, str]:
    """What facts of each kind are, for people: the first sentence of its description, if it has
    one."""
    texts = {kind.name: _description(kind, needed=False) for kind in kinds}
    return {name: text.partition(". ")[0].rstrip(".") for name, text in texts.items() if text}


def _description(kind: KindConfig, *, needed: bool = True) -> str:
    given = kind.description
    if given is not None and not given.endswith(".txt"):
        return given
    path = Path(given) if given is not None else PROMPTS / "kinds" / f"{kind.name}.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8-sig").strip()
    if not needed:
        return ""
    raise ConfigError(
        f"kinds: description of {kind.name}: "
        f"{'none is given' if given is None else f'there is no file {path}'}; say what a fact of "
        "this kind is and how it is worded, as a text or as a .txt file: "
        "{name: ..., description: ...}"
    )


def _examples(kinds: Sequence[Kind], text_form: bool) -> dict[str, str]:
    """The answers of the prompts' examples, by name; of a kind unknown to them they state none."""
    known = json.loads((PROMPTS / "examples.json").read_text(encoding="utf-8"))
    answers = {}
    for name, segments in known.items():
        entries = [{kind: segment.get(kind, []) for kind in kinds} for segment in segments]
        answers[name] = _text_answer(entries) if text_form else json.dumps({"segments": entries})
    return answers


def _text_answer(entries: Sequence[dict[Kind, list[str]]]) -> str:
    lines: list[str] = []
    for number, entry in enumerate(entries, start=1):
        stated = [f"{kind}: {fact}" for kind, facts in entry.items() for fact in facts]
        lines += [f"Segment {number}", *(stated or ["none"])]
    return "\n".join(lines)
