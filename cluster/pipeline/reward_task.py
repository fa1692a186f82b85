"""What one Ray Train run is to do. Light, because Ray's controller of the run imports it too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgaif.config import Config
from fgaif.types import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTask:
    """The kinds that one worker group trains, one after the other.

    ``rows`` is an object reference; ``queue`` (a ``ray.util.queue.Queue``) takes (kind, steps done,
    steps planned, figures).
    """

    kinds: tuple[Kind, ...]
    digests: dict[Kind, str]
    backbone_digest: str
    rows: Any
    config: Config
    out_dir: Path
    queue: Any
