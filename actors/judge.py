"""The verifier's vLLM engine: yes/no questions about images, and anything else that is asked."""

import math
from collections.abc import Sequence
from pathlib import Path

from actors.settings import EngineSettings
from actors.vllm_engine import EngineStats, VllmEngine
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.types import Prompt

_NEVER = 1e-9


class JudgeActor:
    """One replica of the verifier."""

    def __init__(self, model_dir: Path, config: EngineSettings) -> None:
        self._engine = VllmEngine(model_dir, config)

    def answer(self, requests: Sequence[ChatRequest]) -> list[Reply | None]:
        """Answer in order; None for a question that does not fit the context.

        Yes/no questions about images are read from the first token alone, without a word written.
        """
        asked = [i for i, r in enumerate(requests) if r.yes_no and r.image is not None]
        written = [i for i in range(len(requests)) if i not in set(asked)]
        replies: dict[int, Reply | None] = dict(
            zip(written, self._engine.complete([requests[i] for i in written]), strict=True)
        )
        prompts = [
            Prompt(id=r.subject, image=r.image, text=r.text)
            for i in asked
            if (r := requests[i]).image is not None
        ]
        chances = self._engine.p_yes(prompts)
        replies |= {i: _yes_no(p_yes) for i, p_yes in zip(asked, chances, strict=True)}
        return [replies[i] for i in range(len(requests))]

    def stats(self) -> EngineStats:
        """Work done so far."""
        return self._engine.stats()


def _yes_no(p_yes: float) -> Reply:
    """The reply of a model that answers with one of two words."""
    words = (("yes", p_yes), ("no", 1 - p_yes))
    first = tuple((word, math.log(max(p, _NEVER))) for word, p in words)
    return Reply(text="yes" if p_yes > 0.5 else "no", first_token=first, output_tokens=1)
