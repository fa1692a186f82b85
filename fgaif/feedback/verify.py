"""Put facts to a chat model, with a versioned prompt; a failure never becomes a verdict."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from fgaif.chat.messages import (
    ChatModel,
    ChatRequest,
    PromptFile,
    RequestFailed,
    gather_all,
    load_prompt,
    prompt_of,
)
from fgaif.errors import ConfigError
from fgaif.feedback.facts import FactVerifier
from fgaif.kinds import KindConfig
from fgaif.types import Answer, FactQuery, Kind, Problem, Verdict

PROMPTS = Path(__file__).parent / "prompts"
"""``statement`` is the embedded world's; ``check`` asks any LVLM for one word; ``faithscore`` has
FaithScore's wording, word for word."""

_WORD = re.compile(r"[a-z]+")
_MARKS = " \t\n\u2581\u0120"  # white space, also as SentencePiece and byte-level BPE write it
_MIN_MASS = 0.1
_MAX_TOKENS = 8


def prompt_path(name: str) -> Path:
    """The file of a prompt in ``fgaif/feedback/prompts``, or of a path."""
    shipped = PROMPTS / f"{name}.txt"
    return shipped if "/" not in name and shipped.is_file() else Path(name)


def load_fact_prompt(name: str, key: str = "feedback.prompt") -> PromptFile:
    """Read a prompt by its name in ``fgaif/feedback/prompts``, or from a path.

    ``key`` of the configuration stands in the error.

    Raises:
        ConfigError: no such file, or the text does not hold ``{fact}`` exactly once.
    """
    try:
        return load_prompt(prompt_path(name), ["fact"])
    except ConfigError as error:
        stems = sorted(file.stem for file in PROMPTS.glob("*.txt"))
        known = ", ".join(stem for stem in stems if not stem.startswith("facts"))
        raise ConfigError(f"{key} = {name!r}: {error}; the package brings {known}") from error


def kind_prompts(kinds: Sequence[KindConfig]) -> dict[Kind, PromptFile]:
    """The prompts of kinds that have one of their own: a text with ``{fact}``, or a prompt's name.

    Raises:
        ConfigError: no such file, or it does not hold ``{fact}`` exactly once.
    """
    found: dict[Kind, PromptFile] = {}
    for kind in kinds:
        key = f"kinds: prompt of {kind.name}"
        if kind.prompt is not None and "{fact}" in kind.prompt:
            found[kind.name] = prompt_of(kind.prompt, ["fact"], key, kind.name)
        elif kind.prompt is not None:
            found[kind.name] = load_fact_prompt(kind.prompt, key)
    return found


def parse_answer(text: str) -> Answer:
    """Read a written answer: "yes" or "no" as its first word, and the other one nowhere."""
    words = _WORD.findall(text.lower())
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        return "unknown"
    return "yes" if words[0] == "yes" else "no"


def yes_probability(first_token: Sequence[tuple[str, float]]) -> float | None:
    """Return P(yes) / (P(yes) + P(no)) of the first token.

    P(yes) is the sum of exp(log-prob) over the alternatives that are "yes" but for case and white
    space, P(no) the same for "no". None if the two together have less than a tenth of the mass:
    then the model began to say something else, and their ratio tells nothing.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in first_token:
        word = token.strip(_MARKS).lower()
        if word in mass and logprob < 0.01:  # leaves out NaN; rounding may leave a trace above 0
            mass[word] += math.exp(logprob)
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total >= _MIN_MASS else None


class YesNoVerifier:
    """A verifier over any chat model.

    Where the model gives the log-probs of the first token, the verdict is ``unknown`` within
    ``abstain`` of p(yes) = 0.5; at exactly one half it always is. Else the text decides; one that
    is no clear answer is asked for again, up to ``reads`` times in all. ``own`` are prompts of
    kinds that have another one.
    """

    def __init__(
        self,
        model: ChatModel,
        prompt: PromptFile,
        own: Mapping[Kind, PromptFile] | None = None,
        *,
        abstain: float = 0.0,
        reads: int = 3,
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._own = own or {}
        self._abstain = abstain
        self._reads = reads
        self.name = f"{model.name} abstain={abstain:g}"
        others = (f"{kind}: {other.version}" for kind, other in self._own.items())
        self.prompt_version = " ".join([prompt.version, *others])

    async def verify(self, query: FactQuery) -> Verdict:
        """Return the verdict; see ``FactVerifier``."""
        for attempt in range(self._reads):
            try:
                reply = await self._model.ask(self._request(query, attempt))
            except RequestFailed:
                return Verdict(query=query, answer="unknown", problem="failed")
            p_yes = yes_probability(reply.first_token)
            if p_yes is not None:
                return Verdict(query=query, answer=self._answer(p_yes), p_yes=p_yes)
            answer = parse_answer(reply.text)
            if answer != "unknown":
                return Verdict(query=query, answer=answer)
        return Verdict(query=query, answer="unknown", problem="unreadable")

    def _answer(self, p_yes: float) -> Answer:
        if abs(p_yes - 0.5) <= self._abstain:
            return "unknown"
        return "yes" if p_yes > 0.5 else "no"

    def _request(self, query: FactQuery, attempt: int) -> ChatRequest:
        prompt = self._prompt if query.kind is None else self._own.get(query.kind, self._prompt)
        return ChatRequest(
            prompt_version=prompt.version,
            subject=query.text,
            text=prompt.fill(fact=query.text),
            image=query.image,
            max_tokens=_MAX_TOKENS,
            yes_no=True,
            attempt=attempt,
        )


class VerifierPanel:
    """Several verifiers: the answer of more than half of all members, else ``unknown``.

    ``votes`` are in the members' order; ``p_yes`` is their mean, where all give it, and may be on
    the other side of one half than the majority. If nothing is decided, ``problem`` is that of a
    member: "failed" rather than "unreadable", because asking again may then decide it.
    """

    def __init__(self, members: Sequence[FactVerifier]) -> None:
        if not members:
            raise ConfigError("feedback.verifier = []: names no verifier; give at least one")
        self._members = tuple(members)
        self.name = " + ".join(member.name for member in members)
        self.prompt_version = " + ".join(member.prompt_version for member in members)

    async def verify(self, query: FactQuery) -> Verdict:
        """Ask all members at once; see ``FactVerifier``."""
        verdicts = await gather_all(member.verify(query) for member in self._members)
        votes = tuple(verdict.answer for verdict in verdicts)
        answer: Answer = "unknown"
        if votes.count("yes") * 2 > len(votes):
            answer = "yes"
        elif votes.count("no") * 2 > len(votes):
            answer = "no"
        chances = [verdict.p_yes for verdict in verdicts if verdict.p_yes is not None]
        problems: set[Problem] = {verdict.problem for verdict in verdicts}
        return Verdict(
            query=query,
            answer=answer,
            p_yes=fmean(chances) if len(chances) == len(votes) else None,
            problem=_worst(problems) if answer == "unknown" else "",
            votes=votes,
        )


def _worst(problems: set[Problem]) -> Problem:
    if "failed" in problems:
        return "failed"
    return "unreadable" if "unreadable" in problems else ""
