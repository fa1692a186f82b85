"""Turn prompts and responses into padded model inputs, the same way for every role."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgaif.data.images import PixelCache, load_image
from fgaif.errors import DataError
from fgaif.types import FloatArray, ImageRef, Prompt, Response

_CACHE_BYTES = 256 * 2**20
_PROMPTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """Prompts with responses, right-padded, on one device.

    ``input_ids`` (B, L) hold prompt (image placeholders expanded) and response; ``pixel_values``
    (B, 3, H, W); ``positions`` (B, T) index the hidden state that predicts response token t;
    ``targets`` (B, T) are the response ids; ``mask`` (B, T) is 1 at response tokens.
    """

    input_ids: Tensor
    pixel_values: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor


class Encoder:
    """Tokenises prompts and preprocesses images of one checkpoint, caching pixels by content."""

    def __init__(
        self, processor: Any, *, image_tokens: int, max_image_pixels: int = 50_000_000
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self._special = _special_pattern(self.tokenizer)
        self._image_tokens = image_tokens
        self._max_pixels = max_image_pixels
        self._pixels = PixelCache(_CACHE_BYTES)
        self._prompts: dict[str, list[int]] = {}

    def render(self, text: str) -> str:
        """Apply the chat template to a user's text and one image.

        Image tokens in the text are removed, with a line break beside them: LLaVA's data begins
        prompts with them, and the image comes anyway. Other special tokens become plain text.
        """
        said = {"type": "text", "text": self.said(text)}
        message = {"role": "user", "content": [{"type": "image"}, said]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of the rendered prompt with the image placeholder expanded."""
        if text not in self._prompts:
            if len(self._prompts) >= _PROMPTS:
                self._prompts.clear()
            self._prompts[text] = self.expand(self._tokenize(self.render(text)))
        return self._prompts[text]

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
        token = self.image_token
        while token in text:  # what is left may form another, as in "<<image>image>"
            for form in (f"{token}\n", f"\n{token}", token):
                text = text.replace(form, "")
        return text

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Repeat the single image placeholder once per image feature."""
        if list(ids).count(self.image_token_id) != 1:
            raise DataError(f"a prompt must hold {self.image_token!r} exactly once, ids {ids}")
        at = list(ids).index(self.image_token_id)
        return [*ids[:at], *[self.image_token_id] * self._image_tokens, *ids[at + 1 :]]

    def pixels(self, image: ImageRef) -> FloatArray:
        """Preprocessed pixels (3, H, W) of an image, from the cache if it was seen."""
        return self._pixels.get(image.sha256, lambda: self._preprocess(image))

    def pixel_batch(self, images: Sequence[ImageRef], like: Tensor) -> Tensor:
        """Stack images to (B, 3, H, W) on the device and in the dtype of ``like``."""
        stacked = torch.from_numpy(np.stack([self.pixels(image) for image in images]))
        return stacked.to(device=like.device, dtype=like.dtype)

    def encode(
        self, responses: Sequence[Response], like: Tensor, *, pixels: bool = True
    ) -> EncodedBatch:
        """Pad prompts and responses to one batch; ``like`` gives device and pixel dtype.

        Without ``pixels``, for callers that keep image features, ``pixel_values`` are (0,).
        """
        prompts = [self.prompt_ids(response.prompt.text) for response in responses]
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
            pixel_values=(
                self.pixel_batch([r.prompt.image for r in responses], like)
                if pixels
                else like.new_empty(0)
            ),
            positions=positions.to(device),
            targets=targets.to(device),
            mask=mask.to(device),
        )

    def encode_prompts(self, prompts: Sequence[Prompt], like: Tensor) -> tuple[Tensor, Tensor]:
        """Right-pad prompts alone: ids (B, L) and the index (B,) of each last prompt token."""
        rows = [self.prompt_ids(prompt.text) for prompt in prompts]
        last = torch.tensor([len(row) - 1 for row in rows])
        return pad_rows(rows, self.pad_id).to(like.device), last.to(like.device)

    def _preprocess(self, image: ImageRef) -> FloatArray:
        picture = load_image(image, self._max_pixels)
        output = self.processor.image_processor(images=picture, return_tensors="np")
        return np.asarray(output["pixel_values"][0], dtype=np.float32)


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


def image_token_count(config: Any) -> int:
    """Number of image features per image of a LLaVA config (336 px, patch 14: 576).

    The strategy "default" leaves out the tower's first feature, whatever it is: of CLIP's that is
    [CLS], SigLIP has none.
    """
    vision = config.vision_config
    patches = int((vision.image_size // vision.patch_size) ** 2)
    with_cls = "siglip" not in vision.model_type
    return patches + with_cls - (config.vision_feature_select_strategy == "default")
