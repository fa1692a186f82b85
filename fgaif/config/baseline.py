"""SFT and DPO through TRL, to be held against PPO."""

from typing import Self

from pydantic import Field, model_validator

from fgaif.config.section import Section


class BaselineConfig(Section):
    """Settings of `fgaif baseline`; model, LoRA and precision are those of `policy`."""

    sft_lr: float = Field(1e-4, gt=0)
    """Learning rate of SFT (LLaVA-RLHF's for its first LoRA)."""
    dpo_lr: float = Field(5e-6, gt=0)
    """Learning rate of DPO."""
    beta: float = Field(0.1, gt=0)
    """DPO's: how dear it is to leave the reference."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rows; of dpo-iterative, in each round."""
    batch_size: int = Field(32, ge=1)
    """Rows (of DPO: pairs) per optimiser step."""
    micro_batch: int = Field(4, ge=1)
    """Rows per forward pass; a pair counts as one and is two sequences."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps; the last two checkpoints are kept until the end."""
    rounds: int = Field(3, ge=1)
    """Of dpo-iterative: sample, score, pair and train so often."""
    round_prompts: int = Field(500, ge=1)
    """Prompts of a round, one round's after the other's, of those for PPO."""
    samples: int = Field(8, ge=2)
    """Responses per prompt of a round."""

    @model_validator(mode="after")
    def _batches_nest(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"baseline.batch_size = {self.batch_size} is not a multiple of "
                f"baseline.micro_batch = {self.micro_batch}: raise the first or lower the second"
            )
        return self
