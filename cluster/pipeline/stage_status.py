"""Which stages of a run are up to date: what each was made with, in stages.json.

seconds    it took; null while it is not finished
keys       values of the keys that its result depends on
contents   digests of what lay in the files that it and those before it read
outputs    the files that must be there for it to count as finished
config     the whole configuration that it ran with
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.pipeline.aside import results_of
from cluster.pipeline.contents import Contents
from cluster.pipeline.keys import AFTER, Change, Stage, changes, stage_values
from cluster.pipeline.old_digests import old_config, old_digest
from fgaif.config import Config
from fgaif.errors import ConfigError, DataError
from fgaif.files import write_whole
from fgaif.types import Json

Status = Literal["done", "partial", "short", "long", "stale", "missing"]
"""``partial``: begun, not finished. ``short``: finished, but more is wanted now; ``long``: less is
wanted than it was begun with. ``stale``: another result is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """What stages.json says of a stage, and what differs from this configuration and its files.

    ``gone`` are outputs of a finished one that are not there any more; it then counts as partial.
    """

    status: Status
    finished: bool = False
    changes: tuple[Change, ...] = ()
    gone: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """What makes it stale, short or partial: keys with both values, files that were edited, or
        outputs that are gone; empty if nothing does."""
        if self.status == "partial" and self.gone:
            shown = ", ".join(self.gone[:3]) + (", ..." if len(self.gone) > 3 else "")
            return f"{shown} {'is' if len(self.gone) == 1 else 'are'} gone"
        results = [change for change in self.changes if change.kind == "result"]
        named = "; ".join(map(str, results or self.changes))
        if self.status == "stale" and not named:
            return "made by an earlier version with other settings, which it did not write down"
        return named


class StageStatus:
    """stages.json of a run folder: per stage its seconds and the values it was made with."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file = run_dir / "stages.json"
        self._contents: tuple[Config, Contents] | None = None

    def found(self, config: Config, stage: Stage) -> StageState:
        """Compare a stage with a configuration; keys of mere execution count for nothing."""
        entry = self._read().get(stage)
        if entry is None:
            return StageState(status="missing")
        finished = entry["seconds"] is not None
        if "keys" in entry:
            differing = changes(config, stage, entry["keys"])
            if not any(change.kind == "result" for change in differing):  # those say enough
                made_of = entry.get("contents", {})
                differing += self._contents_of(config).edits(stage, made_of)
            status = _status(finished, differing)
        else:
            differing = ()
            same = entry["digest"] == old_digest(config, stage)
            status = _status(finished, differing) if same else "stale"
        written = entry.get("outputs", []) if finished else []  # earlier versions did not say
        gone = tuple(name for name in written if not (self._run_dir / name).exists())
        if gone and status in ("done", "short", "long"):
            status = "partial"
        return StageState(status=status, finished=finished, changes=differing, gone=gone)

    def status(self, config: Config, stage: Stage) -> Status:
        """The status alone; see :meth:`found`."""
        return self.found(config, stage).status

    def seconds(self) -> dict[Stage, float]:
        """Wall seconds of every finished stage."""
        entries = self._read().items()
        return {stage: entry["seconds"] for stage, entry in entries if entry["seconds"] is not None}

    def entries(self) -> dict[Stage, Json]:
        """What is stored of all stages."""
        return self._read()

    def entry(self, stage: Stage) -> Json:
        """What is stored of a stage; empty if nothing is."""
        return self._read().get(stage, {})

    @contextmanager
    def record(self, config: Config, stage: Stage) -> Iterator[None]:
        """Mark the stage started, time the block, mark it done if the block ends well.

        Raises:
            DataError: a file that it reads was edited meanwhile. What it made stays, as made of
                what lay there at its start.
        """
        start, self._contents = time.monotonic(), None
        at_start = self._contents_of(config)
        own, entries = at_start.of(stage), self._read()
        made_of: dict[str, Json] = {}
        for before in AFTER[stage]:  # what they were made of, which may not be there any more
            made_of |= entries.get(before, {}).get("contents") or at_start.with_inputs(before)
        made_of |= own
        at_start.save()
        self._write(config, stage, None, made_of)
        yield
        self._contents = None
        self._write(config, stage, round(time.monotonic() - start, 2), made_of)
        if edited := self._contents_of(config).edits(stage, own):
            raise DataError(
                f"{stage}: {'; '.join(map(str, edited))} while it ran, so what it made may mix old "
                "and new: put back what lay there before, and it counts as finished; else run the "
                "command again, which moves it aside and makes it anew"
            )

    def adopt(self, config: Config, stage: Stage) -> None:
        """Mark a stage done whose output was copied from another run."""
        self._write(config, stage, 0.0, self._contents_of(config).with_inputs(stage))

    def forget(self, stage: Stage) -> None:
        """Let a stage be missing, because its outputs are moved away."""
        entries = self._read()
        entries.pop(stage, None)
        self._save(entries)

    def keep_values(self) -> None:
        """Write down what runs of earlier versions were made with, before config.yaml changes."""
        if self._file.is_file():
            self._save(self._read())

    def _contents_of(self, config: Config) -> Contents:
        """The contents of a configuration's files, each read once until a stage has run."""
        if self._contents is None or self._contents[0] is not config:
            self._contents = config, Contents(config)
        return self._contents[1]

    def _write(
        self, config: Config, stage: Stage, seconds: float | None, contents: Mapping[str, Json]
    ) -> None:
        entries = self._read()
        entry = {
            "seconds": seconds,
            "keys": stage_values(config, stage),
            "contents": contents,
            "outputs": results_of(self._run_dir, stage),
            "config": config.model_dump(mode="json"),
        }
        if "digest" in entries.get(stage, {}):  # names it in checkpoints that are gone on from
            entry["digest"] = entries[stage]["digest"]
        entries[stage] = entry
        self._save(entries)

    def _save(self, entries: dict[Stage, Json]) -> None:
        write_whole(self._file, json.dumps(entries, indent=2) + "\n")

    def _read(self) -> dict[Stage, Json]:
        if not self._file.is_file():
            return {}
        try:
            entries: dict[Stage, Json] = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(
                f"{self._file}: not valid JSON ({error}); delete it to redo the stages"
            ) from error
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise DataError(
                f"{self._file}: not what fgaif writes; if this folder is a run, delete the file to "
                "redo the stages"
            )
        self._add_values({stage: entry for stage, entry in entries.items() if "keys" not in entry})
        return entries

    def _add_values(self, old: dict[Stage, Json]) -> None:
        """Give entries of earlier versions their values, where config.yaml is what made them."""
        if not old:
            return
        read = old_config(self._run_dir / "config.yaml")
        if read is None:
            return
        last, tolerance = read
        for stage, entry in old.items():
            if entry["digest"] == old_digest(last, stage, tolerance):
                entry["keys"] = stage_values(last, stage)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "seconds" in entry and ("keys" in entry or "digest" in entry)


def _status(finished: bool, differing: Sequence[Change]) -> Status:
    if any(change.kind == "result" for change in differing):
        return "stale"
    if any(change.now < change.was for change in differing):
        return "long"
    if not finished:
        return "partial"
    return "short" if differing else "done"


def check_resumable(config: Config, state: Json, path: Path) -> None:
    """Refuse to go on from a checkpoint that was made with other settings or is too far.

    Keys of mere execution may differ, and ``ppo.steps`` may have grown.

    Args:
        config: of the run that wants to go on.
        state: of the checkpoint: ``config``, the training's values, and ``step``.
        path: of the checkpoint, for the message.

    Raises:
        ConfigError: names the keys with both values.
    """
    made_with: Any = state["config"]
    if isinstance(made_with, str):  # the digest of an earlier version
        differing: tuple[Change, ...] = ()
        known = (
            old_digest(config, "train"),
            StageStatus(config.run_dir).entry("train").get("digest"),
        )
        status: Status = "done" if made_with in known else "stale"
    else:
        differing = changes(config, "train", made_with)
        status = _status(True, differing)
    if status == "stale":
        why = StageState(status=status, changes=differing).why
        raise ConfigError(
            f"{path} was made with other settings: {why}. Restore them to go on from it; to "
            "train anew with these, leave out ppo.resume (what is there is moved aside, not "
            "removed)"
        )
    if state["step"] > config.ppo.steps:
        raise ConfigError(fewer_steps(config, state["step"], path))


def fewer_steps(config: Config, done: int, where: Path) -> str:
    """Say that a training has gone further than is wanted, and what can be done."""
    return (
        f"ppo.steps = {config.ppo.steps}, but the training in {where} has gone {done} steps: set "
        f"ppo.steps={done} or more; for a shorter training use --force without ppo.resume, "
        "which moves this one aside and trains anew"
    )
