"""Responses that our policy did not sample: tokenised with its tokenizer, so that they fit in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fgaif.data.images import MAX_PIXELS, Picture, as_image, check_image
from fgaif.data.prompts import FIRST_ROWS, CheckImage, Skipped, require_image, skipped_warning
from fgaif.data.rows import read_rows, row_id, text_of
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import DataError
from fgaif.types import ImageRef, Json, Prompt, Response

_COLUMNS = ("id", "image", "prompt", "response", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenResponses:
    """Responses of a file in order, and the rows left out, by what is wrong with them."""

    source: str
    responses: tuple[Response, ...]
    skipped: tuple[Skipped, ...] = ()

    def warning(self, examples: int = 3) -> str:
        """Say how many rows were skipped and why, with the first examples; empty if none was."""
        return skipped_warning(self.source, len(self.responses), self.skipped, examples)


class ResponseMaker:
    """Makes responses of the rows of one file; images must lie in ``root`` and are checked once.

    Rows with the same id are samples 0, 1, ... of one prompt. ``skipped`` collects the rows that
    cannot be used.
    """

    def __init__(
        self,
        root: Path,
        tokenizer: Any,
        max_pixels: int = MAX_PIXELS,
        check: CheckImage = check_image,
    ) -> None:
        self._root = root
        self._check = check
        self.tokenizer = tokenizer
        self._max_pixels = max_pixels
        self._images: dict[str, ImageRef | str] = {}
        self._prompts: dict[str, Prompt] = {}
        self._samples: dict[str, int] = {}
        self.skipped: list[Skipped] = []

    def make(self, where: str, *, id: str, image: str, prompt: str, text: str) -> Response | None:
        """Return the response, with log-probs of zero and EOS at its end; None if it is skipped.

        Raises:
            DataError: the tokenizer cannot write the text exactly, or the id was used for another
                image or prompt.
        """
        ref = self._image(image)
        if isinstance(ref, str):
            self.skipped.append(Skipped(row=where, reason=ref))
            return None
        asked = Prompt(id=id, image=ref, text=prompt)
        if self._prompts.setdefault(id, asked) != asked:
            raise DataError(f"{where}: id {id!r} was used for another image or prompt; rename it")
        response = given_response(where, asked, text, self.tokenizer)
        sample = self._samples[id] = self._samples.get(id, -1) + 1
        return replace(response, sample=sample)

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """Skip the row that is worked on if it turns out to be bad (DataError)."""
        try:
            yield
        except DataError as error:
            reason = str(error).removeprefix(f"{where}: ")
            self.skipped.append(Skipped(row=where, reason=reason))

    def _image(self, image: str) -> ImageRef | str:
        if image not in self._images:
            try:
                self._images[image] = self._check(image, self._root, self._max_pixels)
            except DataError as error:
                self._images[image] = str(error)
        return self._images[image]


def make_response(
    image: Picture | ImageRef, text: str, tokenizer: Any, *, prompt: str = DESCRIBE
) -> Response:
    """Make a response of a text about an image, with log-probs of zero and EOS at its end.

    Args:
        image: a path, a file's bytes, or a Pillow image.
        tokenizer: whose ids the text gets, a ``PreTrainedTokenizerFast``.
        prompt: what was asked.

    Raises:
        DataError: the image cannot be read, or the tokenizer cannot write the text exactly.
    """
    asked = Prompt(id="given", image=as_image(image), text=prompt)
    return given_response("the text", asked, text, tokenizer)


def given_response(where: str, prompt: Prompt, text: str, tokenizer: Any) -> Response:
    """Make a response of a text, with log-probs of zero and EOS at its end, as sample 0.

    Args:
        where: what messages call it.
        tokenizer: the policy's, a ``PreTrainedTokenizerFast``.

    Raises:
        DataError: the tokenizer cannot write the text exactly.
    """
    backend = tokenizer.backend_tokenizer
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    written = backend.decode(ids, skip_special_tokens=True)
    if written != text:
        raise DataError(
            f"{where}: the policy's tokenizer writes {_differ(text, written)}; take special "
            "tokens and characters that it does not know out of the text"
        )
    ids.append(tokenizer.eos_token_id)
    return Response(
        prompt=prompt,
        sample=0,
        text=text,
        token_ids=np.array(ids, dtype=np.int64),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        finish="stop",
        policy_version=0,
    )


def read_responses(
    path: Path,
    tokenizer: Any,
    *,
    root: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    check: CheckImage = check_image,
) -> GivenResponses:
    """Read rows {"image", "prompt", "response" (or "text"), "id"?} of a .jsonl or .parquet file.

    A row that cannot be used (its image, a column, a text that the tokenizer cannot write) is
    skipped and returned as such.

    Args:
        tokenizer: the policy's, a ``PreTrainedTokenizerFast``.
        root: folder that image paths start from and must lie in; default: the file's folder.
        max_pixels: larger images count as broken.
        check: looks at each image, as ``check_image`` does.

    Raises:
        DataError: unreadable file (names ``FILE:ROW``), or no usable row.
    """
    maker = ResponseMaker(root or path.parent, tokenizer, max_pixels, check)
    responses: list[Response] = []
    for number, row in read_rows(path, _COLUMNS):
        where = f"{path}:{number}"
        with maker.skipping(where):
            columns = _columns(where, row, f"{path.stem}-{number}")
            response = maker.make(where, **columns)
            responses += [response] if response is not None else []
    given = GivenResponses(
        source=str(path), responses=tuple(responses), skipped=tuple(maker.skipped)
    )
    if not responses:
        raise DataError(given.warning() or f"{path}: no rows; add some")
    return given


def look_at_responses(
    path: Path, *, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> None:
    """Look at the first rows of a file, their columns and images, as :func:`read_responses` would.

    Raises:
        DataError: unreadable file, no row, bad rows only, or no usable image among them.
    """
    rows: list[dict[str, str]] = []
    bad: DataError | None = None
    for number, row in islice(read_rows(path, _COLUMNS), FIRST_ROWS):
        try:
            rows.append(_columns(f"{path}:{number}", row, ""))
        except DataError as error:
            bad = bad or error
    if bad is not None and not rows:
        raise bad
    require_image(path, [row["image"] for row in rows], root, max_pixels)


def _columns(where: str, row: Any, name: str) -> dict[str, str]:
    """Id (by default ``name``), image, prompt and text of a row."""
    row = object_row(where, row)
    column = "text" if row.get("response") is None and "text" in row else "response"
    return {
        "id": row_id(where, row, name),
        "image": text_of(where, row, "image"),
        "prompt": text_of(where, row, "prompt"),
        "text": text_of(where, row, column),
    }


def object_row(where: str, row: Any) -> Json:
    """Return a row that must be an object; raises DataError otherwise."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r:.80}: a row must be an object")
    return row


def _differ(text: str, written: str) -> str:
    pairs = enumerate(zip(text, written, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(text), len(written)))
    begin = max(0, start - 10)
    return f"{written[begin : start + 20]!r} for {text[begin : start + 20]!r}"
