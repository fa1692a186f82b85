"""Which stages of a run are up to date: digests of what each stage depends on, in stages.json."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgaif.config import Config
from fgaif.errors import DataError

Stage = Literal["sample", "annotate", "train-reward", "eval-before", "train", "eval-after", "report"]
Status = Literal["done", "missing", "stale"]

_SAMPLING = (
    "seed", "data.train", "data.image_root", "data.feedback_prompts", "policy.model",
    "policy.dtype", "policy.max_new_tokens", "policy.temperature", "feedback.samples_per_prompt",
)  # fmt: skip
_EVALUATION = (
    "seed", "data.held_out", "data.image_root", "data.eval_prompts", "policy.model",
    "policy.dtype", "policy.max_new_tokens", "segment", "eval",
)  # fmt: skip
_RUN_ONLY = {"resume", "checkpoint_every", "keep_checkpoints", "workers", "parallel", "batch_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Configuration keys a stage depends on, and the stages whose output it reads."""

    keys: tuple[str, ...]
    after: tuple[Stage, ...] = ()


STAGES: dict[Stage, StageSpec] = {
    "sample": StageSpec(keys=_SAMPLING),
    "annotate": StageSpec(keys=("segment", "feedback"), after=("sample",)),
    "train-reward": StageSpec(keys=("reward",), after=("annotate",)),
    "eval-before": StageSpec(keys=_EVALUATION, after=("train-reward",)),
    "train": StageSpec(keys=("data.ppo_prompts", "policy", "ppo"), after=("train-reward",)),
    "eval-after": StageSpec(keys=_EVALUATION, after=("train",)),
    "report": StageSpec(keys=(), after=("eval-before", "eval-after")),
}
ORDER: tuple[Stage, ...] = tuple(STAGES)


def stage_digest(config: Config, stage: Stage) -> str:
    """Digest of everything configured that the stage's output depends on, upstream included."""
    spec = STAGES[stage]
    parts: list[Any] = [[key, _value(config, key)] for key in spec.keys]
    parts += [stage_digest(config, upstream) for upstream in spec.after]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """stages.json of a run folder: per stage the digest it was made with and its seconds."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "stages.json"

    def status(self, config: Config, stage: Stage) -> Status:
        """``done`` if the stage finished with this configuration, ``stale`` if with another."""
        entry = self._read().get(stage)
        if entry is None:
            return "missing"
        return "done" if entry["digest"] == stage_digest(config, stage) else "stale"

    def seconds(self) -> dict[str, float]:
        """Wall seconds of every finished stage."""
        return {stage: entry["seconds"] for stage, entry in self._read().items()}

    @contextmanager
    def record(self, config: Config, stage: Stage) -> Iterator[None]:
        """Time the block and mark the stage done if the block ends without an error."""
        start = time.monotonic()
        yield
        entries = self._read()
        entries[stage] = {
            "digest": stage_digest(config, stage),
            "seconds": round(time.monotonic() - start, 2),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        aside = self._file.with_suffix(".tmp")
        aside.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        aside.replace(self._file)

    def forget(self, stage: Stage) -> None:
        """Mark a stage and everything after it as not done."""
        entries = self._read()
        for name in ORDER:
            if name == stage or stage in _upstream(name):
                entries.pop(name, None)
        if self._file.is_file():
            self._file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._file.is_file():
            return {}
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self._file}: not valid JSON ({error}); delete it to redo the stages"
            ) from error


def _upstream(stage: Stage) -> set[Stage]:
    direct = set(STAGES[stage].after)
    return direct.union(*(_upstream(name) for name in direct)) if direct else direct


def _value(config: Config, key: str) -> Any:
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return _without_run_only(node) if isinstance(node, dict) and key != "reward" else node


def _without_run_only(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in _RUN_ONLY}
