"""Questions of a benchmark made ready for a model: images found, checked, corrupted if wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fgaif.data.prompts import Skipped
from fgaif.errors import DataError
from fgaif.eval.corrupt import Corruption, corrupted_ref
from fgaif.eval.images import ImageFolder
from fgaif.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Questions of one benchmark, and the file that takes the answers (model_vqa's JSON Lines).

    ``images`` are the images' names in the benchmark, one per prompt.
    """

    prompts: tuple[Prompt, ...]
    images: tuple[str, ...]
    max_new_tokens: int
    file: Path
    skipped: tuple[Skipped, ...] = ()


def ask(
    rows: Sequence[tuple[str, str, str]],
    file: Path,
    *,
    images: Path,
    max_new_tokens: int,
    suffix: str = "",
    corruption: Corruption | None = None,
) -> Asked:
    """Make prompts of (id, image name, question), their images found under ``images``.

    An image is found by its path or name; COCO's number counts as the name, whatever the year. One
    that is missing or broken costs its questions, which are returned as skipped. Corrupted copies
    are kept beside ``file``.

    Raises:
        DataError: not one image can be used.
    """
    folder = ImageFolder(images)
    prompts, names, skipped = [], [], []
    for identity, name, question in rows:
        try:
            image = folder.check(name)
            if corruption is not None:
                image = corrupted_ref(image, corruption, file.parent / "corrupted")
        except DataError as error:
            skipped.append(Skipped(row=identity, reason=str(error)))
            continue
        prompts.append(Prompt(id=identity, image=image, text=question + suffix))
        names.append(name)
    if not prompts:
        raise DataError(
            f"{images}: none of the images of {len(rows)} questions can be used; the first: "
            f"{skipped[0].reason if skipped else 'no questions'}"
        )
    return Asked(
        prompts=tuple(prompts),
        images=tuple(names),
        max_new_tokens=max_new_tokens,
        file=file,
        skipped=tuple(skipped),
    )
