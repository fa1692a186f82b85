"""The model to align, its adapter, and the splitting of its responses."""

from typing import Literal

from pydantic import Field

from fgaif.config.section import Section


class LoraConfig(Section):
    """Low-rank adapter, anchored to the language model's linear layers."""

    r: int = Field(64, ge=1)
    """Rank."""
    alpha: float = Field(16.0, gt=0)
    """The adapter is scaled by `alpha / r`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of reward models only: PPO trains without."""

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.r


class PolicyConfig(Section):
    """The LVLM to align."""

    model: str = "scenes:policy"
    """A checkpoint of a family in docs/families.md: a directory, `ORG/NAME@REVISION` of the Hugging
    Face Hub (`@main`: its newest, which a run pins), or `scenes:policy`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Training and sampling precision."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: learner, reference, value and reward models hold the linear weights of their language
    model in 4 bits (QLoRA; needs bitsandbytes), adapters in the precision of training: a quarter of
    the memory. Engines sample with the whole weights, so `mismatch/mean` is larger; watch it."""
    max_new_tokens: int = Field(128, ge=1)
    """Responses are cut here (the reference: 896)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of rollouts; the loss uses the same."""
    lora: LoraConfig = LoraConfig()
    train_projector: bool = False
    """Train the multi-modal projector in full beside the LoRA adapter, at the same learning rate;
    the reference: no. The vision tower stays frozen: the method aligns what is said about an image,
    and features of frozen towers are computed once."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Transformers' implementation of attention."""


SENTENCES = 1_000_000
"""So many words no piece of a sentence has: only sentences are cut."""
WHOLE = 0
"""Nothing is cut: a response is one piece."""


class SegmentConfig(Section):
    """What a label, a score and a reward are about."""

    unit: Literal["sub-sentence", "sentence", "response"] = "sub-sentence"
    """`sub-sentence` is the method; `sentence` cuts at sentences only; `response` gives the whole
    response one label, score and reward, at its end (the coarse form)."""
    min_words: int = Field(5, ge=1)
    """A break character ends a sub-sentence only if the piece has at least this many words."""

    @property
    def least_words(self) -> int:
        """``min_words`` of `fgaif.feedback.segment.split`, which gives pieces of this unit."""
        return {"sub-sentence": self.min_words, "sentence": SENTENCES, "response": WHOLE}[self.unit]
