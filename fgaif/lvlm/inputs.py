"""Turn prompts and responses into padded model inputs, the same way for every role."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from fgaif.data.images import PixelCache, image_size, load_image
from fgaif.data.messages import MARK
from fgaif.errors import DataError
from fgaif.lvlm.families import family_of
from fgaif.lvlm.families.base import Pixels, Tensors
from fgaif.lvlm.model import load_processor
from fgaif.types import ImageRef, Prompt, Response

_CACHE_BYTES = 256 * 2**20
_PROMPTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """Prompts with responses, right-padded, on one device.

    ``input_ids`` (B, L) hold prompt (image placeholders expanded) and response; ``positions``
    (B, T) index the hidden state that predicts response token t; ``targets`` (B, T) are the
    response ids; ``mask`` (B, T) is 1 at response tokens.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor


class Encoder:
    """Tokenises prompts and preprocesses images of one checkpoint, caching pixels by content."""

    def __init__(
        self,
        processor: Any,
        config: Any,
        *,
        max_image_pixels: int = 50_000_000,
        image_pixels: int | None = None,
    ) -> None:
        """``processor`` and ``config`` are transformers' of the checkpoint.

        ``max_image_pixels`` and ``image_pixels`` are those of ``fgaif.config.DataConfig``.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.family = family_of(config)
        self.image_token = self.family.image_token(processor)
        """Stands for an image in a rendered prompt."""
        self.image_token_id = int(config.image_token_id)
        """Stands for one feature of an image in token ids; no response may hold it."""
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self.config = config
        self._special = _special_pattern(self.tokenizer)
        self._max_pixels = max_image_pixels
        if image_pixels is not None and self.family.bound is not None:
            for name, value in self.family.bound(image_pixels).items():
                setattr(processor.image_processor, name, value)
        self._pixels = PixelCache(_CACHE_BYTES)
        self._placed: dict[str, str] = {}
        self._prompts: dict[tuple[str, str], list[int]] = {}

    def render(self, text: str) -> str:
        """Apply the chat template to a user's text and one image.

        Image tokens in the text are removed, with a line break beside them: data of many models
        begin prompts with "<image>", and the image comes anyway. Other special tokens become plain
        text.
        """
        said = {"type": "text", "text": self.said(text)}
        message = {"role": "user", "content": [{"type": "image"}, said]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the rendered prompt with the image placeholder expanded."""
        key = prompt.text, self.placeholders(prompt.image)
        if key not in self._prompts:
            if len(self._prompts) >= _PROMPTS:
                self._prompts.clear()
            rendered = self._expand(self.render(prompt.text), prompt.image)
            self._prompts[key] = self._tokenize(rendered)
        return self._prompts[key]

    def raw_ids(self, text: str, image: ImageRef) -> list[int]:
        """Token ids of an image and a text after it, without a chat template."""
        return list(self.tokenizer(self._expand(self._written + text, image))["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a prompt without an image, its text treated as in ``render``."""
        said = {"type": "text", "text": self.said(text)}
        message = {"role": "user", "content": [said]}
        rendered = self.processor.apply_chat_template([message], add_generation_prompt=True)
        return self._tokenize(rendered)

    def _tokenize(self, rendered: str) -> list[int]:
        """Token ids of a rendered prompt; a start token that the template wrote is not doubled."""
        start = self.tokenizer.bos_token
        written = bool(start) and rendered.startswith(start)
        return list(self.tokenizer(rendered, add_special_tokens=not written)["input_ids"])

    def plain(self, text: str) -> str:
        """A user's text with nothing in it that is a special token to the tokenizer.

        What reads as one gets a space after its first character, one character alone becomes the
        space; ordinary text stays as it is.
        """
        while self._special.search(text):
            text = self._special.sub(lambda found: f"{found[0][:-1][:1]} {found[0][1:]}", text)
        return text

    def said(self, text: str) -> str:
        """What somebody says, as ``render`` writes it: no image token, no special tokens."""
        return self.plain(self._without_image_token(text))

    def _without_image_token(self, text: str) -> str:
        # What is left may form another, as in "<<image>image>".
        while found := [token for token in (self.image_token, MARK) if token in text]:
            for form in (f"{found[0]}\n", f"\n{found[0]}", found[0]):
                text = text.replace(form, "")
        return text

    @property
    def _written(self) -> str:
        return self.family.written(self.processor)

    def placeholders(self, image: ImageRef) -> str:
        """What stands for the image in a prompt's text: a placeholder for each of its features."""
        if image.sha256 not in self._placed:
            if len(self._placed) >= _PROMPTS:
                self._placed.clear()
            shown = _Shown(self, image)
            self._placed[image.sha256] = self.family.expand(self.processor, self.config, shown)
        return self._placed[image.sha256]

    def _expand(self, text: str, image: ImageRef) -> str:
        """Put an image's placeholders where the text has the token of one image."""
        if text.count(self.image_token) != 1:
            raise DataError(f"a prompt must hold {self.image_token!r} exactly once: {text[:200]!r}")
        return text.replace(self.image_token, self.placeholders(image))

    def pixels(self, image: ImageRef) -> Pixels:
        """Preprocessed arrays of an image, from the cache if it was seen."""
        return self._pixels.get(image.sha256, lambda: self._preprocess(image))

    def tensors(self, image: ImageRef, like: Tensor) -> Tensors:
        """The same on the device of ``like``, floats in its dtype."""
        return {name: as_tensor(value, like) for name, value in self.pixels(image).items()}

    def encode(self, responses: Sequence[Response], like: Tensor) -> EncodedBatch:
        """Pad prompts and responses to one batch on the device of ``like``."""
        prompts = [self.prompt_ids(response.prompt) for response in responses]
        rows = [
            [*prompt, *response.token_ids.tolist()]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        starts = torch.tensor([len(prompt) for prompt in prompts])
        lengths = torch.tensor([len(response.token_ids) for response in responses])
        steps = torch.arange(int(lengths.max()))
        mask = steps[None] < lengths[:, None]
        input_ids = pad_rows(rows, self.pad_id)
        # The hidden state just before token t predicts it; padded t read position 0, masked out.
        positions = (starts[:, None] - 1 + steps[None]) * mask
        targets = input_ids.gather(1, (positions + 1).clamp(max=input_ids.shape[1] - 1)) * mask
        device = like.device
        return EncodedBatch(
            input_ids=input_ids.to(device),
            positions=positions.to(device),
            targets=targets.to(device),
            mask=mask.to(device),
        )

    def encode_prompts(self, prompts: Sequence[Prompt], like: Tensor) -> tuple[Tensor, Tensor]:
        """Right-pad prompts alone: ids (B, L) and the index (B,) of each last prompt token."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        last = torch.tensor([len(row) - 1 for row in rows])
        return pad_rows(rows, self.pad_id).to(like.device), last.to(like.device)

    def size(self, image: ImageRef) -> tuple[int, int]:
        """Height and width of an image before it is preprocessed."""
        return image_size(image, self._max_pixels)

    def _preprocess(self, image: ImageRef) -> Pixels:
        return self.family.preprocess(self.processor, load_image(image, self._max_pixels))


@dataclass(frozen=True, slots=True)
class _Shown:
    """See :class:`fgaif.lvlm.families.base.Shown`."""

    encoder: Encoder
    image: ImageRef

    def size(self) -> tuple[int, int]:
        return self.encoder.size(self.image)

    def pixels(self) -> Pixels:
        return self.encoder.pixels(self.image)


def load_encoder(
    path: Path, *, max_image_pixels: int = 50_000_000, image_pixels: int | None = None
) -> Encoder:
    """The encoder of a checkpoint folder; the limits are those of ``fgaif.config.DataConfig``.

    Raises:
        CheckpointError: as :func:`fgaif.lvlm.model.load_processor`.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    return Encoder(
        load_processor(path), config, max_image_pixels=max_image_pixels, image_pixels=image_pixels
    )


def as_tensor(array: Any, like: Tensor) -> Tensor:
    """An array on the device of ``like``, and in its dtype if it holds floats."""
    tensor = torch.from_numpy(array)
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=like.device, dtype=dtype)


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches what the tokenizer reads as one special token, wherever it stands in a text."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Right-pad id lists to (B, L)."""
    padded = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
