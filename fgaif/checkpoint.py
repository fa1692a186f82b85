"""Checkpoint directories that are whole or not there, and tensors in them without pickle.

    root/step-000010/...          files of the writer
    root/step-000010/state.json   small state of the caller
    root/step-000010/manifest.json  digest of every file, written last
    root/latest                   name of the newest checkpoint

A checkpoint is written aside, every file is flushed to the disk, then the directory is renamed: a
kill at any moment leaves the previous checkpoint in force.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgaif.errors import CheckpointError, FgaifError
from fgaif.types import FloatArray, Json

_MANIFEST = "manifest.json"
_STATE = "state.json"
_LATEST = "latest"
_ASIDE = ".aside-"
_READ_BLOCK = 2**20

log = logging.getLogger(__name__)


def write_checkpoint(
    root: Path, name: str, writer: Callable[[Path], None], *, keep: int, state: Json
) -> Path:
    """Write the checkpoint ``root/name`` atomically, point ``latest`` at it, prune old ones.

    Args:
        root: folder of all checkpoints of a run.
        name: sorts after the names of those it continues (``step-000010``).
        writer: fills the directory it is given; its files may come from other processes.
        keep: checkpoints to leave, this one and the newest others.
        state: JSON-able state of the caller, read back by ``read_state``.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
        FgaifError: the writer raised it; the message gains the checkpoint's name.
    """
    target, aside = root / name, root / f"{_ASIDE}{name}"
    try:
        _remove_leftovers(root)
        aside.mkdir(parents=True)
        writer(aside)
        _write_text(aside / _STATE, json.dumps(state, indent=1))
        _seal(aside)
        if target.exists():  # the same step again, after a resume
            target.rename(root / f"{_ASIDE}old-{name}")
        aside.rename(target)
        _flush(root)
        _point_latest(root, name)
        _remove_leftovers(root)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if full else "check the folder's permissions and disk"
        raise CheckpointError(
            f"checkpoint {target}: {error.strerror or error}; {fix} and resume, earlier "
            "checkpoints are intact"
        ) from error
    except FgaifError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise type(error)(f"checkpoint {target}: {error}") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    # After a resume from an older one there are some with later names, which are older in time.
    others = [other for other in _names(root) if other != name]
    for old in others[keep - 1 :]:
        shutil.rmtree(root / old, ignore_errors=True)
    return target


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None if there is none of any kind.

    The one that ``latest`` names comes first, then the others from the newest; damaged ones are
    logged and passed by.

    Raises:
        CheckpointError: there are some, and not one of them is whole.
    """
    pointer = root / _LATEST
    named = [pointer.read_text(encoding="utf-8").strip()] if pointer.is_file() else []
    damaged = []
    for name in dict.fromkeys([*(n for n in named if n), *checkpoint_names(root)]):
        try:
            verify_checkpoint(root / name)
        except CheckpointError as error:
            log.warning("%s; falling back to the one before", error)
            damaged.append(str(error))
        else:
            return root / name
    if damaged:
        raise CheckpointError(
            f"{root}: none of the checkpoints is whole, so there is nothing to go on from: "
            f"{'; '.join(damaged)}. Put the files back, or train anew with --force and without "
            "ppo.resume (what is there is moved aside, not removed)"
        )
    return None


def resume_point(wanted: str, root: Path) -> Path:
    """The checkpoint that ``ppo.resume`` means, with every file of it checked.

    Args:
        wanted: a checkpoint's folder, or ``latest``: the newest in ``root`` that is whole.

    Raises:
        CheckpointError: it is damaged or not there; says what is.
    """
    if wanted == _LATEST:
        path = latest_checkpoint(root)
        if path is None:
            raise CheckpointError(
                f"ppo.resume = 'latest': no step is kept in {root}: leave out ppo.resume; a "
                "training that was interrupted goes on without it, any other begins at step 1"
            )
        return path
    path = Path(wanted)
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        there = checkpoint_names(path.parent)
        others = f"{path.parent} holds {', '.join(there) or 'no checkpoint'}"
        raise CheckpointError(f"ppo.resume = {wanted!r}: {error}; {others}") from error
    return path


def checkpoint_names(root: Path) -> list[str]:
    """Names of all folders that may be checkpoints in ``root``, whole or not, newest first."""
    if not root.is_dir():
        return []
    found = (path.name for path in root.iterdir() if path.is_dir())
    return sorted((name for name in found if not name.startswith(".")), reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a file's content changed.
    """
    try:
        digests = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for file, digest in digests.items():
            if _digest(path / file) != digest:
                raise CheckpointError(f"checkpoint {path}: {file} is damaged (digest differs)")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is incomplete: {error}") from error


def read_state(path: Path) -> Json:
    """Return the ``state`` given to ``write_checkpoint``.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        state: Json = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {_STATE}: {error}") from error
    return state


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Name an Adam optimiser's parameters and moments by position, ready for safetensors.

    ``masters`` are the tensors that the optimiser steps, in a fixed order; a parameter that was
    never stepped has no moments.
    """
    tensors: dict[str, Tensor] = {}
    for index, master in enumerate(masters):
        tensors[f"{index}.param"] = master.detach().clone().contiguous()
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().clone().contiguous()
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` returned, in place.

    Raises:
        CheckpointError: another number or other shapes of parameters.
    """
    shapes = {f"{index}.param": master.shape for index, master in enumerate(masters)}
    saved = {key: value.shape for key, value in tensors.items() if key.endswith(".param")}
    if shapes != saved:
        raise CheckpointError(
            f"the optimiser state holds {len(saved)} parameters that do not match this model's "
            f"{len(shapes)}: resume with the same model, LoRA rank, ZeRO stage and ranks"
        )
    for index, master in enumerate(masters):
        master.data.copy_(tensors[f"{index}.param"])
        optimizer.state.pop(master, None)
        prefix = f"{index}."
        for key, value in tensors.items():
            if key.startswith(prefix) and key != f"{index}.param":
                # Adam keeps its step counter on the CPU, its moments with the parameter.
                device = master.device if value.ndim else torch.device("cpu")
                optimizer.state[master][key.removeprefix(prefix)] = value.to(device, copy=True)


def arrays_digest(arrays: Mapping[str, FloatArray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _seal(directory: Path) -> None:
    """Flush every file and folder, then write the manifest as the last file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {path.relative_to(directory).as_posix(): _digest(path) for path in files}
    for path in files:
        _flush(path)
    _write_text(directory / _MANIFEST, json.dumps({"sha256": digests}, indent=1))
    for folder in [*directory.rglob("*/"), directory]:
        _flush(folder)


def _point_latest(root: Path, name: str) -> None:
    pending = root / f"{_ASIDE}{_LATEST}"
    _write_text(pending, name)
    os.replace(pending, root / _LATEST)
    _flush(root)


def _names(root: Path) -> list[str]:
    """Names of the checkpoints in ``root``, newest first."""
    if not root.is_dir():
        return []
    return sorted((path.parent.name for path in root.glob(f"[!.]*/{_MANIFEST}")), reverse=True)


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(f"{_ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()
