"""Answers about images as benchmarks of atomic facts take them: read, and their facts extracted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.images import ImageFolder
from fgaif.eval.rows import Row, read_rows, warn_of_repeats
from fgaif.eval.subsentences import Span
from fgaif.feedback.facts import ExtractedFacts, FactExtractor
from fgaif.types import ImageRef, Prompt, Response, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredImage:
    """An answer about an image; ``image`` is the image's name in the file."""

    id: str
    image: str
    ref: ImageRef
    answer: str
    question: str = ""


def read_lines(path: Path, image_root: Path) -> list[AnsweredImage]:
    """Read lines ``{"answer", "image"}``; ``text`` may stand for ``answer`` (as model_vqa has it).

    ``id`` or ``question_id`` names an answer, else its image does, with "#2" and so on where a file
    has several of one; ``question`` or ``prompt`` is shown to people. An equal row counts once,
    with a warning.

    Args:
        image_root: folder that the images lie in, found by path or name.

    Raises:
        DataError: the file, a row or an image cannot be used (names row and key), or an id is there
            twice.
    """
    answers: dict[str, AnsweredImage] = {}
    images: dict[str, ImageRef] = {}
    folder = ImageFolder(image_root)
    repeats: Counter[str] = Counter()
    seen: dict[tuple[str, ...], str] = {}
    repeated = 0
    for row in read_rows(path):
        image = row.text("image")
        if image not in images:
            images[image] = _image(row, image, folder)
        answer = row.text("answer", "text", empty=True)
        question = row.shown("question", "prompt")
        name = next((key for key in ("id", "question_id") if key in row.data), None)
        given = row.identity(name) if name else ""
        first = seen.setdefault((given, image, answer, question), row.where)
        if first != row.where:
            repeated += 1
            continue
        repeats[image] += 1
        own = image if repeats[image] == 1 else f"{image}#{repeats[image]}"
        identity = given or own
        if identity in answers:
            raise DataError(f"{row.where}: key `{name}`: {identity!r} is there twice; ids differ")
        answers[identity] = AnsweredImage(
            id=identity,
            image=image,
            ref=images[image],
            answer=answer,
            question=question,
        )
    warn_of_repeats(str(path), repeated)
    return list(answers.values())


async def facts_of(
    extractor: FactExtractor, item: AnsweredImage, spans: Sequence[Span]
) -> ExtractedFacts:
    """Ask for the facts that sub-sentences of an answer state; there are no token ids to span."""
    if not spans:
        return ExtractedFacts(facts=())
    response = Response(
        prompt=Prompt(id=item.id, image=item.ref, text=item.question),
        sample=0,
        text=item.answer,
        token_ids=np.empty(0, np.int64),
        rollout_logprobs=np.empty(0, np.float32),
        finish="stop",
        policy_version=0,
    )
    segments = [
        Segment(index=index, char_start=start, char_end=end, token_start=0, token_end=0)
        for index, (start, end) in enumerate(spans)
    ]
    return await extractor.extract(response, segments)


def _image(row: Row, image: str, folder: ImageFolder) -> ImageRef:
    try:
        return folder.check(image)
    except DataError as error:
        raise DataError(f"{row.where}: key `image`: {error}") from error
