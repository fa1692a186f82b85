"""What lies in the files that a stage reads: one that is edited in place is another input.

    data.train, data.held_out, ppo.anchor.prompts   the rows that are used, and their images
    data.responses                                  all rows, and their images
    feedback.prompt, feedback.prompts_dir           the templates
    kinds.NAME.prompt, kinds.NAME.description       those of a kind that lie in files
    policy.model, reward.backbone, feedback.verifier   checkpoints that do not come with fgaif
    feedback/labels.jsonl                           the labels, for the reward models

Images and large files are hashed again only where size or time of change differ from those in
``RUN/data/hashes.json``. The embedded world is drawn by fgaif itself and needs none of this.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.pipeline.keys import AFTER, Change, Kind, Stage
from fgaif.config import API, Config
from fgaif.data.captions import SCENE_GRAPHS
from fgaif.data.images import check_image
from fgaif.data.prompts import SCENES, PromptSet
from fgaif.data.rows import read_rows
from fgaif.data.sources import QUESTIONS, open_source
from fgaif.errors import DataError, FgaifError
from fgaif.feedback.extract import PROMPTS
from fgaif.feedback.verify import prompt_path
from fgaif.files import write_whole
from fgaif.types import ImageRef, Json

LABELS = "feedback/labels.jsonl"
_ROW = ("id", "image", "images", "prompt", "response", "text")
_LARGE = 2**24
_SETTLED_S = 2.0
"""A file changed so short a while ago may change again within the clock's tick."""

Reader = Callable[[int | None], Json]
"""Gives a content; of rows, so many of the first, or as many as are used."""
Source = tuple[object, Reader]
"""What is read, as messages show it, and how."""


class Contents:
    """Contents of a configuration's files, each read at most once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._hashes = Hashes(config.run_dir)
        self._sources: dict[tuple[str, int], PromptSet] = {}
        self._read: dict[tuple[object, ...], Json] = {}

    def of(self, stage: Stage) -> dict[str, Json]:
        """By configuration key: what the stage's own files hold.

        One that cannot be read is left out: what is wrong with it is said where it is needed.
        """
        found: dict[str, Json] = {}
        for key, (_, read) in self._readers(stage).items():
            try:
                found[key] = self._once(read, None)
            except (FgaifError, OSError):
                continue
        return found

    def with_inputs(self, stage: Stage) -> dict[str, Json]:
        """As :meth:`of`, with what the stages before read."""
        found: dict[str, Json] = {}
        for before in AFTER[stage]:
            found |= self.with_inputs(before)
        return found | self.of(stage)

    def save(self) -> None:
        """Keep the hashes for the next command."""
        self._hashes.save()

    def edits(self, stage: Stage, made_with: Mapping[str, Json]) -> tuple[Change, ...]:
        """Where they differ from ``made_with``; a file that cannot be read counts as unchanged:
        nothing else could be made of it."""
        readers = self._all_readers(stage)
        found = []
        for key, was in made_with.items():
            if key not in readers:
                continue
            shown, read = readers[key]
            try:
                now, same = self._once(read, None), self._once(read, was.get("rows"))
            except (FgaifError, OSError):
                continue
            if same != was:
                note = f"the contents of {key} = {shown} were edited"
                found.append(Change(key=key, was=was, now=now, kind="result", note=note))
            elif now != was:
                kind: Kind = "extends" if stage in ("sample", "annotate") else "result"
                rows = {"was": was["rows"], "now": now["rows"]}
                found.append(Change(key=f"usable rows of {key}", kind=kind, **rows))
        return tuple(found)

    def _once(self, read: Reader, rows: int | None) -> Json:
        """Read, unless that was read before; what fails is tried again."""
        key = read.func, read.args, rows  # type: ignore[attr-defined]
        if key not in self._read:
            self._read[key] = read(rows)
        return self._read[key]

    def _all_readers(self, stage: Stage) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for before in AFTER[stage]:
            found |= self._all_readers(before)
        return found | self._readers(stage)

    def _readers(self, stage: Stage) -> dict[str, Source]:
        data, feedback = self._config.data, self._config.feedback
        prompts = data.feedback_prompts
        policy = self._checkpoint("policy.model", self._config.policy.model)
        if stage == "sample" and data.responses is not None:
            path = data.responses
            return {"data.responses": (path, partial(self._responses, path))}
        if stage == "sample":
            return self._prompts("data.train", data.train, prompts) | policy
        if stage == "annotate":
            asks = feedback.extractor == "model" or feedback.extractor.startswith(API)
            folder = feedback.prompts_dir or PROMPTS
            extracting: dict[str, Source] = {}
            if asks:
                templates = folder, partial(self._templates, folder)
                extracting = {"feedback.prompts_dir": templates} | self._descriptions()
            local = self._checkpoint("feedback.verifier", feedback.local_verifier)
            asking = {"feedback.prompt": feedback.prompt} | {
                f"kinds.{kind.name}.prompt": kind.prompt
                for kind in self._config.kinds
                if kind.prompt is not None and "{fact}" not in kind.prompt
            }
            files = {key: self._whole(prompt_path(name)) for key, name in asking.items()}
            return files | extracting | local
        if stage == "train-reward":
            backbone = self._checkpoint("reward.backbone", self._config.reward_backbone)
            reward = self._config.reward
            own = {} if reward.pairs is None else {"reward.pairs": self._whole(reward.pairs)}
            if reward.captions is not None and reward.captions != SCENE_GRAPHS:
                own["reward.captions"] = self._whole(Path(reward.captions))
            return {LABELS: self._whole(self._config.run_dir / LABELS)} | own | backbone
        if stage == "train":
            anchor = self._config.ppo.anchor
            asked = anchor.prompts if anchor.weight and anchor.prompts != QUESTIONS else SCENES
            return (
                self._prompts("data.train", data.train, prompts + data.ppo_prompts)
                | self._prompts("ppo.anchor.prompts", asked, data.ppo_prompts)
                | policy
            )
        if stage in ("eval-before", "eval-after"):
            second = self._config.eval.second_verifier
            checked = None if second is None or second.startswith(API) else second
            return (
                self._prompts("data.held_out", data.held_out, data.eval_prompts)
                | policy
                | self._checkpoint("eval.second_verifier", checked)
            )
        return {}

    def _descriptions(self) -> dict[str, Source]:
        """Those of kinds that lie in files of their own; the shipped ones come with fgaif."""
        return {
            f"kinds.{kind.name}.description": self._whole(Path(kind.description))
            for kind in self._config.kinds
            if kind.description is not None and kind.description.endswith(".txt")
        }

    def _prompts(self, key: str, name: str, wanted: int) -> dict[str, Source]:
        return {} if name.startswith(SCENES) else {key: (name, partial(self._rows, name, wanted))}

    def _rows(self, name: str, wanted: int, rows: int | None) -> Json:
        limit = max(wanted, rows or 0)
        if (name, limit) not in self._sources:
            source = open_source(name, self._config, limit, self._hashes.check_image)
            self._sources[name, limit] = source.prompts
        prompts = self._sources[name, limit].prompts[: wanted if rows is None else rows]
        used = PromptSet(source=name, prompts=prompts)
        return {"rows": len(prompts), "sha256": used.digest}

    def _responses(self, path: Path, _: int | None) -> Json:
        root = self._config.data.image_root or path.parent
        digest = hashlib.sha256()
        for _number, row in read_rows(path, _ROW):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            try:
                pixels = self._config.data.max_image_pixels
                image = self._hashes.check_image(row["image"], root, pixels).sha256
            except (DataError, KeyError, TypeError) as error:
                image = type(error).__name__  # said where the responses are read
            digest.update(image.encode())
        return {"sha256": digest.hexdigest()}

    def _whole(self, path: Path) -> Source:
        return path, partial(self._file, path)

    def _file(self, path: Path, _: int | None) -> Json:
        return {"sha256": self._hashes.of(path)}

    def _templates(self, folder: Path, _: int | None) -> Json:
        return {"sha256": self._hashes.of_all(sorted(folder.glob("facts*.txt")))}

    def _checkpoint(self, key: str, name: str | None) -> dict[str, Source]:
        if name is None or name.startswith(SCENES):
            return {}
        return {key: (name, partial(self._weights, name))}

    def _weights(self, name: str, _: int | None) -> Json:
        from fgaif.lvlm.model import resolve_checkpoint  # torch: not for --help
        from fgaif.reward.checkpoint import checkpoint_digest

        path = resolve_checkpoint(name)
        beside = [
            file for end in ("json", "jinja", "model", "txt") for file in path.glob(f"*.{end}")
        ]
        parts = [checkpoint_digest(path), self._hashes.of_all(sorted(beside))]
        return {"sha256": hashlib.sha256("".join(parts).encode()).hexdigest()}


class Hashes:
    """SHA-256 of files; those of images and large files are remembered by size and time."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "data" / "hashes.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._new = False

    def save(self) -> None:
        """Write what was hashed anew, if anything was."""
        if self._new:
            write_whole(self._file, json.dumps(self._known) + "\n")
        self._new = False

    def check_image(self, path: str | Path, root: Path | None, max_pixels: int) -> ImageRef:
        """As ``fgaif.data.images.check_image``, but for images that have not changed since."""
        try:
            file = ((root or Path()) / path).resolve()
            inside = root is None or file.is_relative_to(root.resolve())
        except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
            return check_image(path, root, max_pixels)
        known = self._remembered(file, max_pixels) if inside else None
        if known is not None:
            return ImageRef(path=str(file), sha256=known)
        ref = check_image(path, root, max_pixels)
        self._remember(file, ref.sha256, max_pixels)
        return ref

    def of(self, path: Path) -> str:
        """Of one file."""
        if path.stat().st_size < _LARGE:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        if (known := self._remembered(path.resolve(), 0)) is not None:
            return known
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        self._remember(path.resolve(), found, 0)
        return found

    def of_all(self, paths: list[Path]) -> str:
        """Of files and their names."""
        parts = [f"{path.name} {self.of(path)}\n" for path in paths]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _remembered(self, path: Path, checked: int) -> str | None:
        known = self._known.get(str(path))
        try:
            stat = path.stat()
        except (OSError, ValueError):
            return None
        if known is None or known[:3] != [stat.st_size, stat.st_mtime_ns, checked]:
            return None
        return str(known[3])

    def _remember(self, path: Path, digest: str, checked: int) -> None:
        stat = path.stat()
        if time.time() - stat.st_mtime > _SETTLED_S:
            self._known[str(path)] = [stat.st_size, stat.st_mtime_ns, checked, digest]
            self._new = True
