"""Questions of a benchmark made ready for a model: the images found, the prompts written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fgaif.data.prompts import Skipped
from fgaif.errors import DataError
from fgaif.eval.corrupt import Corruption, corrupted_ref
from fgaif.eval.images import ImageFolder
from fgaif.types import Prompt

QuestionRow = tuple[str, str, str]
"""A question's id, the name of its image, and its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """Questions of one benchmark, and the file that takes the answers (model_vqa's JSON Lines).

    ``images`` are the images' names in the benchmark, one per prompt; ``skipped`` are the questions
    whose image cannot be used.
    """

    prompts: tuple[Prompt, ...]
    images: tuple[str, ...]
    max_new_tokens: int
    file: Path
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionBuilder:
    """Makes sets of questions from rows: where images lie, how they are corrupted, and the folder
    that takes the answers."""

    images: Path
    out: Path
    corruption: Corruption | None = None
    longest_answer: int | None = None
    """Most new tokens, where a benchmark would allow more."""

    def answers_file(self, name: str) -> Path:
        """Return the file that takes the answers to the set of this name."""
        return self.out / f"{name}_answers.jsonl"

    def build(
        self, name: str, rows: Sequence[QuestionRow], max_new_tokens: int, suffix: str = ""
    ) -> QuestionSet:
        """Make a set of questions, each with ``suffix`` after it.

        An image is found by its path or name; COCO's number counts as the name, whatever the year.
        One that is missing or broken costs its questions, which are returned as skipped. Corrupted
        copies are kept beside the answers.

        Raises:
            DataError: not one image can be used.
        """
        folder = ImageFolder(self.images)
        file = self.answers_file(name)
        prompts, names, skipped = [], [], []
        for identity, image_name, question in rows:
            try:
                image = folder.check(image_name)
                if self.corruption is not None:
                    image = corrupted_ref(image, self.corruption, file.parent / "corrupted")
            except DataError as error:
                skipped.append(Skipped(row=identity, reason=str(error)))
                continue
            prompts.append(Prompt(id=identity, image=image, text=question + suffix))
            names.append(image_name)
        if not prompts:
            raise DataError(
                f"{self.images}: none of the images of {len(rows)} questions can be used; the "
                f"first: {skipped[0].reason if skipped else 'no questions'}"
            )
        return QuestionSet(
            prompts=tuple(prompts),
            images=tuple(names),
            max_new_tokens=min(max_new_tokens, self.longest_answer or max_new_tokens),
            file=file,
            skipped=tuple(skipped),
        )
