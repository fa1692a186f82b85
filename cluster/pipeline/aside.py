"""Outputs of stages, and where they go before a stage is done anew: ``RUN/aside/STAGE-N``.

    aside/train-1/policy/...   as it lay in the run folder
    aside/train-1/aside.json   why it was moved, and what stages.json said of it

Numbers only grow, so nothing there is overwritten. Nothing is removed either: that is for people.
"""

from collections.abc import Sequence
from pathlib import Path

from cluster.pipeline.keys import Stage
from fgaif.errors import DataError
from fgaif.files import write_json
from fgaif.types import Json

OUTPUTS: dict[Stage, tuple[str, ...]] = {
    "sample": ("responses",),
    "annotate": ("feedback/labels.jsonl", "feedback/summary.json"),
    "train-reward": ("rewards",),
    "eval-before": (
        "eval/before.json",
        "eval/before_captions.jsonl",
        "eval/before_pope.jsonl",
        "eval/rewards.json",
    ),
    "train": ("policy",),
    "eval-after": (
        "eval/after.json",
        "eval/after_captions.jsonl",
        "eval/after_pope.jsonl",
        "eval_matched",
        "eval_steps",
    ),
    "report": (),
}
"""What a stage writes, but for the replies of models, which are keyed by all they depend on."""


RESULTS: dict[Stage, tuple[str, ...]] = {
    "sample": ("responses/responses.jsonl",),
    "annotate": ("feedback/labels.jsonl",),
    "train-reward": ("rewards/*/*",),
    "eval-before": ("eval/before.json",),
    "train": ("policy/adapter/*",),
    "eval-after": ("eval/after.json",),
    "report": (),
}
"""Of these what later stages and people need: without them a stage is not finished."""


def results_of(run_dir: Path, stage: Stage) -> list[str]:
    """The files of ``RESULTS`` that are there, relative to the run folder."""
    found = (path for pattern in RESULTS[stage] for path in run_dir.glob(pattern))
    names = (path.relative_to(run_dir) for path in found)
    return sorted(n.as_posix() for n in names if not any(p.startswith(".") for p in n.parts))


def existing_outputs(run_dir: Path, stage: Stage) -> tuple[str, ...]:
    """Outputs of a stage that are there, relative to the run folder."""
    return tuple(name for name in OUTPUTS[stage] if (run_dir / name).exists())


def next_aside(run_dir: Path, stage: str) -> Path:
    """The folder that the stage's, or another command's, outputs would be moved into."""
    root = run_dir / "aside"
    used = [path.name.removeprefix(f"{stage}-") for path in root.glob(f"{stage}-*")]
    return root / f"{stage}-{max((int(n) for n in used if n.isdecimal()), default=0) + 1}"


def move_aside(run_dir: Path, stage: str, outputs: Sequence[str], note: Json) -> Path:
    """Move outputs into a new folder below ``RUN/aside``, with ``note`` in ``aside.json``.

    Raises:
        DataError: something cannot be moved; it stays where it is.
    """
    target = next_aside(run_dir, stage)
    try:
        target.mkdir(parents=True)
        write_json(target / "aside.json", note)
        for name in outputs:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).rename(target / name)
    except OSError as error:
        raise DataError(
            f"{run_dir}: {', '.join(outputs)} cannot be moved to {target}: {error.strerror}; "
            "correct the folder's rights, or move them yourself"
        ) from error
    return target
