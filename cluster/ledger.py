"""Which stages of a run are up to date: digests of what each stage depends on, in stages.json."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgaif.config import API, Config
from fgaif.errors import DataError
from fgaif.files import write_whole

Stage = Literal[
    "sample", "annotate", "train-reward", "eval-before", "train", "eval-after", "report"
]
Status = Literal["done", "partial", "stale", "missing"]

_SAMPLING = (
    "seed", "data.train", "data.responses", "data.image_root", "data.shuffle", "data.seed",
    "data.feedback_prompts", "policy.model", "policy.dtype", "policy.max_new_tokens",
    "policy.temperature", "feedback.samples_per_prompt",
)  # fmt: skip
_EVALUATION = (
    "seed", "data.held_out", "data.image_root", "data.shuffle", "data.seed", "data.eval_prompts",
    "policy.model", "policy.dtype", "policy.max_new_tokens", "segment", "eval",
)  # fmt: skip
_RUN_ONLY = {
    *("resume", "checkpoint_every", "keep_checkpoints"),
    *("max_cost", "max_tokens", "price_input", "price_output", "image_tokens"),
    *("concurrency", "requests_per_minute", "tokens_per_minute", "timeout_s", "attempts"),
    *("backoff_s", "breaker", "api_key_env", "api_key_file"),
}
"""Keys that change how the work is done, not what comes out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Configuration keys a stage depends on, and the stages whose output it reads."""

    keys: tuple[str, ...]
    after: tuple[Stage, ...] = ()


STAGES: dict[Stage, StageSpec] = {
    "sample": StageSpec(keys=_SAMPLING),
    "annotate": StageSpec(keys=("segment", "feedback", "endpoints"), after=("sample",)),
    "train-reward": StageSpec(keys=("reward",), after=("annotate",)),
    "eval-before": StageSpec(keys=_EVALUATION, after=("train-reward",)),
    "train": StageSpec(keys=("data.ppo_prompts", "policy", "ppo"), after=("train-reward",)),
    "eval-after": StageSpec(keys=_EVALUATION, after=("train",)),
    "report": StageSpec(keys=()),
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
        """``partial`` if started but not finished, ``stale`` if made with another configuration."""
        entry = self._read().get(stage)
        if entry is None:
            return "missing"
        if entry["digest"] != stage_digest(config, stage):
            return "stale"
        return "partial" if entry["seconds"] is None else "done"

    def seconds(self) -> dict[str, float]:
        """Wall seconds of every finished stage."""
        entries = self._read().items()
        return {stage: entry["seconds"] for stage, entry in entries if entry["seconds"] is not None}

    @contextmanager
    def record(self, config: Config, stage: Stage) -> Iterator[None]:
        """Mark the stage started, time the block, mark it done if the block ends well."""
        start = time.monotonic()
        self._write(config, stage, None)
        yield
        self._write(config, stage, round(time.monotonic() - start, 2))

    def adopt(self, config: Config, stage: Stage) -> None:
        """Mark a stage done whose output was copied from another run."""
        self._write(config, stage, 0.0)

    def _write(self, config: Config, stage: Stage, seconds: float | None) -> None:
        entries = self._read()
        entries[stage] = {"digest": stage_digest(config, stage), "seconds": seconds}
        write_whole(self._file, json.dumps(entries, indent=2) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._file.is_file():
            return {}
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self._file}: not valid JSON ({error}); delete it to redo the stages"
            ) from error


def _value(config: Config, key: str) -> Any:
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    if key == "endpoints":  # those of step 1: a judge for benchmarks changes no label
        asked = (config.feedback.extractor, *config.feedback.verifiers)
        node = {name: entry for name, entry in node.items() if f"{API}{name}" in asked}
    return _without_run_only(node) if isinstance(node, dict) else node


def _without_run_only(section: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_run_only(value) if isinstance(value, dict) else value
        for name, value in section.items()
        if name not in _RUN_ONLY
    }
