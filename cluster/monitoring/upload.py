"""What of a working folder goes along with a job: neither weights and data nor anything secret."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fgaif.errors import ConfigError

_LEFT_OUT = (
    *(".git", ".venv", "venv", "node_modules", "runs", "checkpoints", "data", "__pycache__"),
    *("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet", "*.arrow", "*.tar*", "*.zip"),
    *("*.jpg", "*.jpeg", "*.png", "*.webp", "*.sqlite*"),
)
"""Weights and data are read from storage that the nodes share, never sent with a job."""

_SECRET = (
    *(".env", ".env.*", "*.env", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".htpasswd"),
    *(".aws", ".azure", ".gcloud", ".config", ".kube", ".ssh", ".docker", ".gnupg", ".huggingface"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", "credentials*", "*credentials.json", "service-account*.json"),
    *("secrets*", "*.secret", "*token*.txt", "*api_key*", "*apikey*"),
)
_SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bsk-[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{30,}"
    rb"|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{36}|\bxox[bp]-[0-9A-Za-z-]{20,}"
)
_LARGEST = 20 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Files that are sent, relative to the folder, and those that are not, each with the reason."""

    files: tuple[Path, ...]
    left_out: dict[Path, str]


def choose(folder: Path) -> Upload:
    """Decide for every file below ``folder``; links are not followed.

    Raises:
        ConfigError: no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder}: no such folder")
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in _walk(folder, left_out):
        relative = path.relative_to(folder)
        if why := _reason(path):
            left_out[relative] = why
        else:
            files.append(relative)
    return Upload(files=tuple(sorted(files)), left_out=dict(sorted(left_out.items())))


def copy(upload: Upload, folder: Path, target: Path) -> None:
    """Copy the chosen files to ``target``."""
    for file in upload.files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)


def _walk(folder: Path, left_out: dict[Path, str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in list(folders):
            if why := _named(name) or ("a link" if (here / name).is_symlink() else ""):
                left_out[(here / name).relative_to(folder)] = why
                folders.remove(name)
        yield from (here / name for name in names)


def _named(name: str) -> str:
    lower = name.lower()
    if any(fnmatchcase(lower, pattern) for pattern in _SECRET):
        return "may hold a secret, by its name"
    return "weights, data or runs" if any(fnmatchcase(lower, p) for p in _LEFT_OUT) else ""


def _reason(path: Path) -> str:
    """Why a file is not sent; empty if it is."""
    if path.is_symlink():
        return "a link"
    if not path.is_file():
        return "not a file"
    if why := _named(path.name):
        return why
    try:
        if path.stat().st_size > _LARGEST:
            return f"larger than {_LARGEST:,} bytes"
        return "holds what looks like a key" if _SECRET_TEXT.search(path.read_bytes()) else ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
