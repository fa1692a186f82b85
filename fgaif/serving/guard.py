"""Guarded generation: sub-sentences that are likely hallucinated are sampled again, or cut.

A response is sampled to its end and split; its first segment whose risk is over the threshold is
dropped with all that follows, and sampled anew from there. What was accepted stays: a segment's
score depends on nothing behind it. That is rejection sampling of one segment after another, with as
few calls of the engine as the policy's errors allow. After too many tries the response is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fgaif.data.order import request_seed
from fgaif.types import FinishReason, FloatArray, Segment, SegmentClass

GuardFinish = Literal["stop", "length", "cut"]

MAX_CALLS = 64
"""Samplings of one response at most; then it is cut too."""


class GuardSettings(BaseModel):
    """When a segment is sampled again, and how often."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    threshold: float = Field(0.5, ge=0, le=1)
    """A segment is dropped where the probability of HALLU of some kind is over this."""
    tries: int = Field(4, ge=0, le=16)
    """Times that a segment is sampled again before the response is cut in front of it."""


@dataclass(slots=True, kw_only=True)
class Guarded:
    """One response on its way; ``begin`` it, sample what it asks for and ``take`` the answer.

    ``prefix`` are the ids that are accepted, ``seed`` the next sampling's; ``finish`` is None until
    it is done. ``resampled`` counts dropped segments. Where not even a first segment was accepted,
    the least risky one is kept, and ``unsafe`` says so.
    """

    settings: GuardSettings
    first_seed: int = 0
    prefix: tuple[int, ...] = ()
    text: str = ""
    finish: GuardFinish | None = None
    resampled: int = 0
    unsafe: bool = False
    _tries: int = 0
    _calls: int = 0
    _least: tuple[float, str, tuple[int, ...]] = field(default=(float("inf"), "", ()))

    @property
    def seed(self) -> int:
        """Of the next sampling; the first is the request's own."""
        if not self._calls:
            return self.first_seed
        return request_seed(self.first_seed, "guard", self._calls)

    def take(
        self,
        text: str,
        token_ids: Sequence[int],
        finish: FinishReason,
        segments: Sequence[Segment],
        risks: FloatArray,
    ) -> None:
        """Judge a response that begins with ``prefix``; risks (S,) are those of its segments."""
        self._calls += 1
        kept = len(self.prefix)
        found = zip(segments, risks.tolist(), strict=True)
        # Segments of what was accepted may be cut otherwise by what now follows: they stay.
        bad = next(
            (
                (segment, risk)
                for segment, risk in found
                if segment.token_end > kept and risk > self.settings.threshold
            ),
            None,
        )
        if bad is None:
            self.prefix, self.text, self.finish = tuple(token_ids), text, finish
            return
        segment, risk = bad
        self.resampled += 1
        if segment.token_start > kept:
            self.prefix = tuple(token_ids[: segment.token_start])
            self.text = text[: segment.char_start]
            self._tries = 0
        if not self.prefix and risk < self._least[0]:
            self._least = (risk, text[: segment.char_end], tuple(token_ids[: segment.token_end]))
        self._tries += 1
        if self._tries > self.settings.tries or self._calls >= MAX_CALLS:
            self.finish = "cut"
            if not self.prefix:
                _, self.text, self.prefix = self._least
                self.unsafe = True


def segment_risks(probs: FloatArray) -> FloatArray:
    """Risk of each segment, (S, K, C) -> (S,): the largest P(HALLU) of a kind."""
    risks: FloatArray = probs[..., SegmentClass.HALLU].max(axis=1, initial=0.0)
    return risks
