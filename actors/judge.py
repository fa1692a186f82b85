"""The verifier's vLLM engine: answers yes/no questions about images by their probability."""

from collections.abc import Sequence
from pathlib import Path

from actors.vllm_engine import EngineStats, VllmEngine
from fgaif.config import Config
from fgaif.types import Prompt


class JudgeActor:
    """One replica of the verifier."""

    def __init__(self, model_dir: Path, config: Config) -> None:
        self._engine = VllmEngine(model_dir, config)

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        """Probability of answering yes rather than no, per prompt."""
        return self._engine.p_yes(prompts)

    def stats(self) -> EngineStats:
        """Work done so far."""
        return self._engine.stats()
