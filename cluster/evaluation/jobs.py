"""What a benchmark of ``fgaif eval`` asks, reads and scores: POPE and CHAIR, and what all share."""

import hashlib
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cluster.evaluation.generate import Asked, ask
from cluster.evaluation.options import DESCRIBE, POPE_SUFFIX
from fgaif.chat.messages import ChatModel
from fgaif.data.coco import CocoImage, read_coco
from fgaif.errors import ConfigError, DataError
from fgaif.eval.answers import image_name, read_answers, read_captions
from fgaif.eval.chair import chair_truth, coco_vocabulary, score_chair
from fgaif.eval.corrupt import Corruption
from fgaif.eval.judge import Progress
from fgaif.eval.pope import PopeRow, read_questions
from fgaif.eval.pope_score import score_pope
from fgaif.eval.scored import Scored

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """Who is asked: the judge of the command line, and FaithScore's verifier if it is another."""

    judge: ChatModel | None = None
    verifier: ChatModel | None = None

    @property
    def needed_judge(self) -> ChatModel:
        """The judge of a benchmark that cannot do without; opened beforehand."""
        assert self.judge is not None, "a judged job runs with a judge"
        return self.judge


Score = Callable[[Judges, Progress], Coroutine[None, None, Scored]]
"""Scores the answers, asking the judges where the benchmark has some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One benchmark: questions to generate answers to, files it reads, how it is scored.

    ``files`` are named in the provenance with their digests; answer files may not exist yet.
    ``judged`` says that it needs the judge, ``items`` how many answers it scores (0: not known).
    """

    benchmark: str
    score: Score
    judged: bool = False
    asked: tuple[Asked, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    items: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """How answers are generated: where images lie, how they are corrupted, where answers go."""

    images: Path
    out: Path
    corruption: Corruption | None = None

    def ask(
        self,
        name: str,
        rows: Sequence[tuple[str, str, str]],
        max_new_tokens: int,
        suffix: str = "",
    ) -> Asked:
        """Questions (id, image, text) whose answers go to ``OUT/NAME_answers.jsonl``."""
        return ask(
            rows,
            self.out / f"{name}_answers.jsonl",
            images=self.images,
            max_new_tokens=max_new_tokens,
            suffix=suffix,
            corruption=self.corruption,
        )


def pope_job(
    questions: Mapping[str, Path],
    answers: Mapping[str, Path],
    asker: Asker | None,
    *,
    max_new_tokens: int = 64,
    suffix: str = POPE_SUFFIX,
) -> Job:
    """POPE over one or more splits, each with a questions and an answers file."""
    rows = {split: read_questions(path) for split, path in questions.items()}
    asked: tuple[Asked, ...] = ()
    files = dict(answers)
    if asker is not None:
        asked = tuple(
            asker.ask(
                f"pope_{split}",
                [(row.id, row.image, row.text) for row in part],
                max_new_tokens,
                suffix,
            )
            for split, part in rows.items()
        )
        files = {split: job.file for split, job in zip(rows, asked, strict=True)}
    return Job(
        benchmark="pope",
        score=partial(_score_pope, rows, files),
        asked=asked,
        files=_named("questions", questions) | _named("answers", files),
        items=sum(len(part) for part in rows.values()),
    )


async def _score_pope(
    rows: Mapping[str, Sequence[PopeRow]],
    answers: Mapping[str, Path],
    judges: Judges,
    progress: Progress,
) -> Scored:
    return score_pope(rows, {split: read_answers(path) for split, path in answers.items()})


def chair_job(
    annotations: Sequence[Path],
    captions: Path | None,
    asker: Asker | None,
    *,
    synonyms: Path | None = None,
    count: int | None = 500,
    seed: int = 0,
    max_new_tokens: int = 512,
    prompt: str = DESCRIBE,
) -> Job:
    """CHAIR against COCO annotations, of instances, reference captions or both."""
    images = read_coco(*annotations)
    asked: tuple[Asked, ...] = ()
    if asker is not None:
        drawn = draw_images(images, count, seed)
        rows = [(str(image.id), image.file_name, prompt) for image in drawn]
        asked = (asker.ask("chair", rows, max_new_tokens),)
    file = asked[0].file if asked else needed(captions, "chair", "--captions")
    return Job(
        benchmark="chair",
        score=partial(_score_chair, images, file, synonyms),
        asked=asked,
        files={
            **{f"annotations {path.name}": path for path in annotations},
            **({"synonyms": synonyms} if synonyms else {}),
            "answers": file,
        },
        items=len(asked[0].prompts) if asked else len(read_captions(file)),
    )


def draw_images(images: Mapping[int, CocoImage], count: int | None, seed: int) -> list[CocoImage]:
    """Draw annotated images, in order of their ids; all if there are no more than ``count``."""
    known = [image for image in images.values() if image.objects or image.captions]
    if count is None or count >= len(known):
        return known
    return sorted(random.Random(f"chair {seed}").sample(known, count), key=lambda image: image.id)


async def _score_chair(
    images: Mapping[int, CocoImage],
    captions: Path,
    synonyms: Path | None,
    judges: Judges,
    progress: Progress,
) -> Scored:
    vocabulary = coco_vocabulary(synonyms)
    # By number or by file name, which are the same in COCO; a file name beats a number.
    names = {str(image.id): image for image in images.values()}
    names |= {image_name(image.file_name): image for image in images.values()}
    truth = chair_truth(
        {name: image.objects for name, image in names.items()},
        {name: image.captions for name, image in names.items()},
        vocabulary,
    )
    return score_chair(read_captions(captions), truth, vocabulary)


def named_splits(values: Sequence[str], option: str) -> dict[str, Path]:
    """Read ``FILE`` or ``SPLIT=FILE``; a plain file's split is in its name, else the name itself.

    Raises:
        ConfigError: two files of one split.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, separator, rest = value.partition("=")
        path = Path(rest if separator else value)
        if not separator:
            name = next((split for split in SPLITS if split in path.stem.lower()), path.stem)
        if name in found:
            raise ConfigError(
                f"{option} {value}: the split {name!r} was given before ({found[name]}); name "
                f"splits with {option} SPLIT=FILE"
            )
        found[name] = path
    return found


def paired_splits(questions: Sequence[str], answers: Sequence[str]) -> dict[str, Path]:
    """Answers by the splits of the questions: by name, or one file for one.

    Raises:
        ConfigError: a split without its other file.
    """
    asked, given = named_splits(questions, "--questions"), named_splits(answers, "--answers")
    if len(asked) == len(given) == 1:
        return dict(zip(asked, given.values(), strict=True))
    if asked.keys() != given.keys():
        raise ConfigError(
            f"--questions are of {', '.join(asked) or 'no split'}, --answers of "
            f"{', '.join(given) or 'no split'}; name them with --answers SPLIT=FILE"
        )
    return {split: given[split] for split in asked}


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of the files that a score depends on, in short, by what they are.

    Raises:
        DataError: one cannot be read.
    """
    found = {}
    for name, path in files.items():
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give an existing file") from error
    return found


def _named(kind: str, files: Mapping[str, Path]) -> dict[str, Path]:
    return {f"{kind} {split}": path for split, path in files.items()}


def needed(path: Path | None, benchmark: str, option: str) -> Path:
    """A file that must have been given.

    Raises:
        ConfigError: it was not.
    """
    if path is None:
        raise ConfigError(f"fgaif eval {benchmark} needs {option}")
    return path
