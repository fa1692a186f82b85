"""Put facts to a yes/no model, with a versioned prompt; a failure never becomes a verdict."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgaif.errors import ActorError, ConfigError
from fgaif.types import Answer, FactQuery, Prompt, Verdict

PROMPTS = Path(__file__).parent / "prompts"
"""``statement`` is the embedded world's; ``faithscore`` has FaithScore's wording, word for word."""

_FACT = "{fact}"
_WORD = re.compile(r"[a-z]+")

YesNoModel = Callable[[Sequence[Prompt]], list[float]]
"""Returns p(yes) / (p(yes) + p(no)) of the first answer token for each prompt, in order; NaN where
asking failed. It raises if the model as a whole cannot be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactPrompt:
    """The question put for each fact; ``version`` is its name and a digest of its text."""

    version: str
    text: str

    def ask(self, query: FactQuery) -> Prompt:
        """Return the prompt for a fact of an image."""
        return Prompt(
            id=f"{query.image.sha256[:16]}:{query.text}",
            image=query.image,
            text=self.text.replace(_FACT, query.text),
        )


def load_fact_prompt(name: str) -> FactPrompt:
    """Read a prompt by its name in ``fgaif/feedback/prompts``, or from a path.

    Raises:
        ConfigError: no such file, or the text does not hold ``{fact}`` exactly once.
    """
    shipped = PROMPTS / f"{name}.txt"
    path = shipped if "/" not in name and shipped.is_file() else Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.txt")))
        raise ConfigError(
            f"feedback.prompt = {name!r}: cannot be read; give a text file or one of {known}"
        ) from error
    if text.count(_FACT) != 1:
        raise ConfigError(
            f"feedback.prompt = {name!r}: {path} holds {_FACT} {text.count(_FACT)} times; "
            "put it once, where the fact goes"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return FactPrompt(version=f"{path.stem}-{digest}", text=text)


def parse_answer(text: str) -> Answer:
    """Read a written answer: "yes" or "no" as its first word, and the other one nowhere."""
    words = _WORD.findall(text.lower())
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        return "unknown"
    return "yes" if words[0] == "yes" else "no"


class YesNoVerifier:
    """A verifier over any yes/no model: ``unknown`` within ``abstain`` of p(yes) = 0.5."""

    def __init__(
        self, model: YesNoModel, *, model_id: str, prompt: FactPrompt, abstain: float = 0.0
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._abstain = abstain
        self.name = f"{model_id} abstain={abstain:g}"
        self.prompt_version = prompt.version

    def verify(self, queries: Sequence[FactQuery]) -> list[Verdict]:
        """Return one verdict per query, in order; see ``FactVerifier``.

        Raises:
            ActorError: the model returned another number of answers, or no probability.
        """
        probabilities = self._model([self._prompt.ask(query) for query in queries])
        if len(probabilities) != len(queries):
            raise ActorError(
                f"verifier {self.name}: {len(probabilities)} answers to {len(queries)} questions"
            )
        return [
            self._verdict(query, p_yes) for query, p_yes in zip(queries, probabilities, strict=True)
        ]

    def _verdict(self, query: FactQuery, p_yes: float) -> Verdict:
        if math.isnan(p_yes):
            return Verdict(query=query, answer="unknown")
        if not 0 <= p_yes <= 1:
            raise ActorError(f"verifier {self.name}: p(yes) = {p_yes} for {query.text!r}")
        # At exactly one half the model says neither, whatever the band.
        undecided = abs(p_yes - 0.5) <= self._abstain
        answer: Answer = "unknown" if undecided else "yes" if p_yes > 0.5 else "no"
        return Verdict(query=query, answer=answer, p_yes=float(p_yes))
