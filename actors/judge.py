"""The verifier's vLLM engine: yes/no questions about images, facts of a text as JSON."""

from collections.abc import Sequence
from pathlib import Path

from actors.vllm_engine import EngineStats, VllmEngine
from fgaif.config import Config
from fgaif.feedback.model_facts import TextRequest
from fgaif.types import Prompt


class JudgeActor:
    """One replica of the verifier."""

    def __init__(self, model_dir: Path, config: Config) -> None:
        self._engine = VllmEngine(model_dir, config)

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        """Probability of answering yes rather than no, per prompt."""
        return self._engine.p_yes(prompts)

    def complete(self, requests: Sequence[TextRequest]) -> list[str]:
        """One answer per text prompt, held to its JSON schema."""
        return self._engine.complete(requests)

    def stats(self) -> EngineStats:
        """Work done so far."""
        return self._engine.stats()
