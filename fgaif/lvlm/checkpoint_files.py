"""The files of a checkpoint, read so that every kind of damage becomes a named error."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fgaif.errors import CheckpointError
from fgaif.types import Json

SCENES = "scenes:"
EMBEDDED = Path(__file__).parents[1] / "data" / "scenes" / "models"
"""Folder of the embedded models, which `scenes:NAME` names."""
_LFS = b"version https://git-lfs"
_JSON_BYTES = 64 * 2**20
_HEADER_BYTES = 100_000_000
"""The largest header that the safetensors library reads."""


def read_json(path: Path) -> Json:
    """Read a checkpoint's JSON file.

    Raises:
        CheckpointError: missing, a Git LFS pointer, not JSON, or no object.
    """
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_JSON_BYTES:,} bytes; no JSON of a model")
        content = path.read_bytes()
        _refuse_pointer(path, content[:64])
        found: Any = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({_short(error)}); copy the checkpoint again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object; copy the checkpoint again")
    return found


def check_weights(directory: Path) -> None:
    """See by their headers that the weights of a checkpoint are there and whole; nothing is loaded.

    Raises:
        CheckpointError: no safetensors, a Git LFS pointer, a truncated file, or a part that the
            index names and that is missing.
    """
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{index}: holds no weight_map; copy the checkpoint again")
        named = {str(name) for name in places.values()}
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise CheckpointError(
                f"{directory}: {missing[0]} is missing ({len(missing)} of {len(named)} parts that "
                f"{index.name} names); copy the checkpoint again"
            )
    if not files:
        raise CheckpointError(
            f"{directory}: no *.safetensors; weights in other formats are not loaded, because "
            "reading them can run code: convert them with transformers' save_pretrained"
        )
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> None:
    """Hold a file's size against its header; raises as :func:`read_header`."""
    read_header(path)


def read_header(path: Path) -> dict[str, Json]:
    """Read what a safetensors file says of its tensors, by name, and hold its size against that.

    Raises:
        CheckpointError: a Git LFS pointer, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            _refuse_pointer(path, start)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            file.seek(8)
            header = json.loads(file.read(length))
        tensors: dict[str, Json] = {n: item for n, item in header.items() if n != "__metadata__"}
        ends = [item["data_offsets"][1] for item in tensors.values()]
        wanted = 8 + length + max(ends, default=0)
        if size != wanted:
            raise ValueError(f"{size:,} bytes where its header says {wanted:,}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no whole safetensors file ({_short(error)}); copy it again"
        ) from error
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whose tensors must all be finite.

    Raises:
        CheckpointError: as :func:`check_safetensors`, or a tensor holds NaN or infinity.
    """
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_short(error)}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; the training that made it has failed"
            )
    return tensors


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_LFS):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


def _short(error: Exception) -> str:
    """An error's text on one line of at most 200 characters."""
    return re.sub(r"\s+", " ", str(error) or type(error).__name__)[:200]
