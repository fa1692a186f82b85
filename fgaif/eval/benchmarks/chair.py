"""CHAIR: objects that captions name and images do not show (Rohrbach et al., 2018).

One and the same for COCO's annotations, which the command reads, and for the embedded world, whose
scenes say what an image shows: ``caption_stats`` counts what captions name against that.
"""

import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.data.coco import CocoImage, read_coco
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import ConfigError, DataError
from fgaif.eval.answers import Caption, image_finder, image_name, read_captions
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.checks import language_check, warned
from fgaif.eval.figures import Figure
from fgaif.eval.judge import Progress
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import Scored, Stats
from fgaif.eval.vocabulary import Vocabulary, coco_vocabulary
from fgaif.types import Json

log = logging.getLogger(__name__)

OUR_TABLE = "fgaif's own table, not CHAIR's: figures differ from published ones (--synonyms)"
NOT_OFFICIAL = (
    "objects were counted with fgaif's own table of words: figures do not compare with published "
    "ones (CHAIR_i .0403 for .0325 on the same 90 answers); give the official table of CHAIR, "
    "data/synonyms.txt of LisaAnne/Hallucination, as --synonyms"
)
_MANY_SILENT = 0.1
COLUMNS = ("captions", "hallucinating", "mentions", "hallucinated", "shown", "covered", "words")
FIGURES = (
    Figure(
        key="chair_i",
        title="CHAIR_i",
        meaning="Object mentions that the image does not show",
        better=-1,
    ),
    Figure(
        key="chair_s",
        title="CHAIR_s",
        meaning="Captions that name an object which the image does not show",
        better=-1,
    ),
    Figure(
        key="recall",
        title="recall",
        meaning="Objects of the image that the caption names",
        better=1,
    ),
    Figure(
        key="objects", title="objects", meaning="Objects named per caption", better=0, share=False
    ),
    Figure(key="length", title="length", meaning="Words per caption", better=0, share=False),
)


def caption_stats(mentions: Sequence[str], objects: Collection[str], words: int = 0) -> list[float]:
    """Count for one caption what is summed, in the order of ``COLUMNS``."""
    wrong = sum(name not in objects for name in mentions)
    shown = set(objects)
    return [1, wrong > 0, len(mentions), wrong, len(shown), len(shown & set(mentions)), words]


def chair_figures(sums: Stats) -> dict[str, Stats]:
    """Compute the figures from sums (..., 7) of ``COLUMNS``; NaN without a denominator.

    chair_i = hallucinated / mentions; chair_s = hallucinating / captions; recall = covered / shown
    (distinct objects per caption); objects = mentions / captions; length = words / captions.
    """
    captions, hallucinating, mentions, hallucinated, shown, covered, words = np.moveaxis(
        np.asarray(sums, np.float64), -1, 0
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "chair_i": hallucinated / mentions,
            "chair_s": hallucinating / captions,
            "recall": covered / shown,
            "objects": mentions / captions,
            "length": words / captions,
        }


def chair_truth(
    instances: Mapping[str, Iterable[str]],
    references: Mapping[str, Iterable[str]],
    vocabulary: Vocabulary,
) -> dict[str, frozenset[str]]:
    """Unite per image the annotated objects with those that its reference captions name.

    ``instances`` holds category names by image (as ``answers.image_name`` gives it), ``references``
    captions. Categories that the vocabulary does not know cannot be named either, and are left out.
    """
    truth: dict[str, set[str]] = {}
    for image, categories in instances.items():
        names = {vocabulary.object_named(category) for category in categories}
        truth.setdefault(image, set()).update(name for name in names if name is not None)
    for image, captions in references.items():
        for caption in captions:
            truth.setdefault(image, set()).update(vocabulary.mentions(caption))
    return {image: frozenset(names) for image, names in truth.items()}


def score_chair(
    captions: Sequence[Caption],
    truth: Mapping[str, Collection[str]],
    vocabulary: Vocabulary,
    *,
    images: Collection[str] = (),
) -> Scored:
    """Score captions against the objects of their images.

    Figures: ``chair_i``, ``chair_s``, ``recall``, ``length`` (mean number of words between blanks).
    A caption of an image that ``truth`` does not know is left out and counted
    (``captions_without_truth``), as is an image of ``images`` that has no caption
    (``images_without_caption``). Captions that name no object hallucinate none, however bad they
    are: they are counted (``captions_without_objects``), and warned about from a tenth on.

    Raises:
        DataError: no caption is of a known image.
    """
    find = image_finder(truth)
    captions = [replace(caption, image=find(caption.image)) for caption in captions]
    known = [caption for caption in captions if caption.image in truth]
    if not known:
        example = f"{captions[0].where}: image {captions[0].image!r}" if captions else "no captions"
        raise DataError(
            f"CHAIR: the ground truth knows no image of the captions ({example}); give annotations "
            "of the images that were captioned"
        )
    rows: list[list[float]] = []
    items: list[Json] = []
    for caption in known:
        mentions, shown = vocabulary.mentions(caption.text), truth[caption.image]
        rows.append(caption_stats(mentions, shown, len(caption.text.split())))
        items.append(_item(caption, mentions, shown))
    stats = np.array(rows, np.float64)
    silent = int((stats[:, COLUMNS.index("mentions")] == 0).sum())
    return Scored(
        benchmark="chair",
        ids=tuple(caption.id for caption in known),
        units=tuple(caption.image for caption in known),
        stats=stats,
        figures=chair_figures,
        items=tuple(items),
        badness=stats[:, COLUMNS.index("hallucinated")],
        counts={
            "captions_without_truth": len(captions) - len(known),
            "captions_without_objects": silent,
            "images_without_caption": len(set(images) - {caption.image for caption in captions}),
        },
        warnings=warned(log, _silence_checks(items)),
    )


def _silence_checks(items: Sequence[Json]) -> list[str]:
    """Say where captions count as free of hallucination only because no object was found."""
    silent = [item["answer"] for item in items if not item["named"]]
    if len(silent) < _MANY_SILENT * len(items):
        return []
    what = "chair_i has no value, and chair_s of 0 means nothing"
    if len(silent) < len(items):
        what = (
            "they count as free of hallucination, so that chair_s and chair_i look better than "
            "they are"
        )
    return [
        f"CHAIR: {len(silent)} of {len(items)} captions name no object of the synonym table; {what}"
        ": see the captions, and that the table (--synonyms) is for their language and objects",
        *language_check("CHAIR", silent, "the table and the singular forms"),
    ]


def _item(caption: Caption, mentions: Sequence[str], shown: Collection[str]) -> Json:
    return {
        "id": caption.id,
        "image": caption.image,
        "question": caption.question,
        "answer": caption.text,
        "named": list(mentions),
        "hallucinated": [name for name in mentions if name not in shown],
        "shown": sorted(shown),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChairOptions:
    """Options of ``fgaif eval chair``."""

    annotations: Annotated[
        list[Path] | None,
        typer.Option(help="COCO instances and captions files; repeat it for more."),
    ] = None
    captions: Annotated[
        Path | None, typer.Option("--captions", "--answers", help="Captions that exist.")
    ] = None
    synonyms: Annotated[
        Path | None,
        typer.Option(help="CHAIR's own synonyms.txt, or a table like it; default: ours of COCO."),
    ] = None
    count: Annotated[int, typer.Option(min=1, help="Annotated images drawn for --model.")] = 500
    subset: Annotated[
        Path | None,
        typer.Option(help="File of rows with image_id: --model describes these images instead."),
    ] = None
    prompt: Annotated[str, typer.Option(help="What --model is asked.")] = DESCRIBE
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 512


def with_own_table(scored: Scored) -> Scored:
    """Say that our table counted, which published figures do not compare with."""
    return replace(
        scored,
        provenance={**scored.provenance, "synonyms": OUR_TABLE},
        warnings=(*scored.warnings, *warned(log, [NOT_OFFICIAL])),
    )


def prepare_chair(options: ChairOptions, context: EvalContext) -> PreparedBenchmark:
    """Make CHAIR ready against COCO annotations, of instances, reference captions or both.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    if not options.annotations:
        raise ConfigError(
            "fgaif eval chair needs --annotations: COCO's instances_*.json, and captions_*.json"
        )
    builder = context.builder_unless(options.captions)
    images = read_coco(*options.annotations)
    questions: tuple[QuestionSet, ...] = ()
    if builder is not None:
        drawn = draw_images(images, options.count, context.seed)
        if options.subset is not None:
            drawn = images_listed(images, options.subset)
        rows = [(str(image.id), image.file_name, options.prompt) for image in drawn]
        questions = (builder.build("chair", rows, options.max_new_tokens),)
    file = questions[0].file if questions else needed(options.captions, "chair", "--captions")

    @cache
    def captions() -> list[Caption]:
        return read_captions(file)

    async def score(judges: Judges, progress: Progress) -> Scored:
        vocabulary = coco_vocabulary(options.synonyms)
        scored = score_chair(captions(), coco_truth(images, vocabulary), vocabulary)
        return scored if options.synonyms else with_own_table(scored)

    return PreparedBenchmark(
        benchmark="chair",
        score=score,
        questions=questions,
        files={
            **{f"annotations {path.name}": path for path in options.annotations},
            **({"synonyms": options.synonyms} if options.synonyms else {}),
            "answers": file,
        },
        items=len(questions[0].prompts) if questions else len(captions()),
    )


def draw_images(images: Mapping[int, CocoImage], count: int | None, seed: int) -> list[CocoImage]:
    """Draw annotated images, in order of their ids; all if there are no more than ``count``."""
    known = [image for image in images.values() if image.objects or image.captions]
    if count is None or count >= len(known):
        return known
    return sorted(random.Random(f"chair {seed}").sample(known, count), key=lambda image: image.id)


def images_listed(images: Mapping[int, CocoImage], path: Path) -> list[CocoImage]:
    """Return the annotated images that a file's rows name by ``image_id`` or ``image``.

    Raises:
        DataError: the file cannot be used, or one of its images is not annotated.
    """
    named = {image_name(image.file_name): image for image in images.values()}
    found: dict[int, CocoImage] = {}
    for row in read_rows(path):
        name = image_name(row.identity("image_id", "image"))
        image = named.get(name) or (images.get(int(name)) if name.isdecimal() else None)
        if image is None:
            raise row.wrong("image_id", name, "an image that --annotations know")
        found[image.id] = image
    return sorted(found.values(), key=lambda image: image.id)


def coco_truth(
    images: Mapping[int, CocoImage], vocabulary: Vocabulary
) -> dict[str, frozenset[str]]:
    """Return what each image shows, by its number and by its file name.

    The two are the same in COCO; where they differ a file name beats a number.
    """
    names = {str(image.id): image for image in images.values()}
    names |= {image_name(image.file_name): image for image in images.values()}
    return chair_truth(
        {name: image.objects for name, image in names.items()},
        {name: image.captions for name, image in names.items()},
        vocabulary,
    )


def official_annotations(data: Path) -> list[Path]:
    """Find COCO's annotation files in a folder, those of instances first."""
    return sorted(data.glob("instances*.json")) + sorted(data.glob("captions*.json"))


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make CHAIR ready with the annotations of a folder, or return the path that is not there."""
    annotations = official_annotations(data)
    if not annotations:
        return data / "instances_*.json"
    return prepare_chair(ChairOptions(annotations=annotations, count=count), context)


BENCHMARK = Benchmark(
    name="chair",
    title="CHAIR",
    summary="objects that captions name and images do not show",
    answers="--captions",
    truth="--annotations (COCO instances, captions), --synonyms",
    options=ChairOptions,
    prepare=prepare_chair,
    figures=FIGURES,
    compute=lambda groups: chair_figures,
    descriptions=True,
    coverage=dict.fromkeys(("chair_i", "chair_s"), ("recall", "objects", "length")),
    official=prepare_official,
)
