"""What a reward model reads: image, question, then each segment closed by the separator token.

    <s> <image tokens> "\\nPrompt: {question} \\n" s_1 </s> s_2 </s> ... s_n </s>

The reference's layout (no chat template), with the question taken from the data. With a causal
model the state at the i-th ``</s>`` has seen the image and s_1 .. s_i: that is where segment i is
judged.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgaif.errors import CheckpointError, DataError
from fgaif.lvlm.inputs import Encoder, load_encoder, pad_rows
from fgaif.lvlm.model import load_processor
from fgaif.types import Prompt, Response, Segment

_QUESTIONS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """A padded batch. ``input_ids`` (B, L); ``separators`` (N, 2) holds row and column of every
    segment's separator, responses in order, segments in order."""

    input_ids: Tensor
    separators: Tensor


class RewardEncoder:
    """Lays out responses for a reward model.

    With ``reads_policy_ids`` a segment's tokens are the sampled ids themselves; otherwise the
    backbone has another vocabulary and each segment's text is tokenised by itself. Scores belong
    to segments, so nothing needs aligning.
    """

    def __init__(self, encoder: Encoder, *, reads_policy_ids: bool) -> None:
        self.encoder = encoder
        self.reads_policy_ids = reads_policy_ids
        separator = encoder.tokenizer.eos_token_id
        if separator is None:
            raise CheckpointError("the reward model's tokenizer has no EOS token to separate with")
        self._separator = int(separator)
        self._heads: dict[tuple[str, str], list[int]] = {}

    def row(self, response: Response, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Ids of one response and the columns of its separators.

        Raises:
            DataError: the response holds the image placeholder.
        """
        ids = list(self._head(response.prompt))
        columns = []
        for segment in segments:
            ids += self._segment_ids(response, segment)
            columns.append(len(ids))
            ids.append(self._separator)
        return ids, columns

    def encode(
        self,
        responses: Sequence[Response],
        segments: Sequence[Sequence[Segment]],
        device: torch.device,
    ) -> RewardInputs:
        """Right-pad a batch of responses."""
        rows = [self.row(r, pieces) for r, pieces in zip(responses, segments, strict=True)]
        separators = [(i, column) for i, (_, columns) in enumerate(rows) for column in columns]
        return RewardInputs(
            input_ids=pad_rows([ids for ids, _ in rows], self.encoder.pad_id).to(device),
            separators=torch.tensor(separators, dtype=torch.long).view(-1, 2).to(device),
        )

    def _head(self, prompt: Prompt) -> list[int]:
        key = prompt.text, self.encoder.placeholders(prompt.image)
        if key not in self._heads:
            if len(self._heads) >= _QUESTIONS:
                self._heads.clear()
            token = self.encoder.image_token
            safe = self.encoder.plain(prompt.text.replace(token, token.strip("<>")))
            ids = self.encoder.raw_ids(f"\nPrompt: {safe} \n", prompt.image)
            # Some tokenizers close every text with EOS, which here would be a separator.
            self._heads[key] = ids[:-1] if ids[-1] == self._separator else ids
        return self._heads[key]

    def _segment_ids(self, response: Response, segment: Segment) -> list[int]:
        token_id = self.encoder.image_token_id
        if self.reads_policy_ids:
            ids = response.token_ids[segment.token_start : segment.token_end].tolist()
        else:
            text = self.encoder.plain(response.text[segment.char_start : segment.char_end])
            ids = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if token_id in ids:
            raise DataError(
                f"response {response.id}, segment {segment.index}: holds the image placeholder "
                f"(id {token_id}); ban it when sampling"
            )
        return ids


def load_reward_encoder(
    backbone: Path, policy: Path, *, max_image_pixels: int, image_pixels: int | None = None
) -> RewardEncoder:
    """Encoder of a backbone for the responses of a policy; compares their vocabularies."""
    encoder = load_encoder(backbone, max_image_pixels=max_image_pixels, image_pixels=image_pixels)
    same = policy == backbone or tokenizer_digest(encoder.tokenizer) == tokenizer_digest(
        load_processor(policy).tokenizer
    )
    return RewardEncoder(encoder, reads_policy_ids=same)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: equal digests mean that equal ids are equal tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
