"""Step 3: PPO."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fgaif.config.policy import LoraConfig
from fgaif.config.reward import RewardShapeConfig
from fgaif.config.section import Section
from fgaif.types import Kind

Estimator = Literal["gae", "grpo", "rloo", "reinforce", "token_grpo"]


class AnchorConfig(Section):
    """KL to the reference on question prompts, so that captioning does not erase answering."""

    weight: float = Field(0.0, ge=0)
    """0 turns the term off."""
    prompts: str = "scenes:questions"
    """`scenes:questions` or a .jsonl/.parquet file of rows with `image` and `prompt`."""
    batch_size: int = Field(32, ge=1)
    """Questions per minibatch."""


class KlConfig(Section):
    """KL of the policy to the reference."""

    coef: float = Field(0.1, ge=0)
    """Factor of the KL to the reference, per token."""
    placement: Literal["reward", "loss"] = "reward"
    """`reward`: its k1 estimate, subtracted from each token's reward (the method); `loss`: its k3
    estimate, added to the policy's loss, as GRPO does."""
    target: float | None = Field(None, gt=0)
    """Summed KL per response that an adaptive coefficient steers to; default: fixed coefficient."""
    horizon: int = Field(10_000, ge=1)
    """Responses over which the adaptive coefficient reacts."""


class PpoConfig(Section):
    """Step 3: PPO with per-token rewards."""

    estimator: Estimator = "gae"
    """Advantages from rewards: `gae` with a critic (the method), or without one: `grpo`, `rloo`,
    `reinforce`, `token_grpo`; see docs/estimators.md. Without a critic the keys `value_*`,
    `value_lora` and `lam` say nothing."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt of a step; `grpo`, `rloo` and `token_grpo` compare them."""
    reward_source: Literal["models", "verifier"] = "models"
    """`models`: the trained reward models (the method); `verifier`: the feedback step on every
    response of PPO, whose labels are the rewards: dearer, and without reward models in PPO."""
    token_penalty: float = Field(0.1, ge=0)
    """Of `token_grpo`: share of the advantage's size taken off at the tokens of bad segments."""
    steps: int = Field(54, ge=1)
    """Steps: batches that are sampled and trained on."""
    rollout_batch: int = Field(512, ge=1)
    """Responses per step: those of `rollout_batch / samples_per_prompt` prompts."""
    minibatch: int = Field(256, ge=1)
    """Responses per optimiser step, over all learner ranks."""
    micro_batch: int = Field(16, ge=1)
    """Responses per forward pass of a rank."""
    micro_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass of a rank at most, prompt, image and padding included, so that short
    responses do not wait for long ones; one that has more is alone. Default: only `micro_batch`
    counts. The sums of an update are the same up to the order of their terms."""
    epochs: int = Field(2, ge=1)
    """Passes over each rollout batch."""
    lr: float = Field(3e-5, gt=0)
    """Of the adapter: LoRA needs 1e-5 to 5e-5 (configs/llava15_7b_4gpu.yaml says where from); the
    paper's 1e-7 leaves the policy where it was."""
    value_lr: float = Field(1e-5, gt=0)
    """Learning rate of the value model."""
    value_lora: LoraConfig = LoraConfig()
    value_init: Kind = "policy"
    """Backbone of the value model: the policy's, or, for a kind, its reward model with adapter."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, of policy and value model."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's, of policy and value model."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate after the warm-up."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip: float = Field(0.2, gt=0)
    """PPO's range of the ratio: 1 - clip to 1 + clip."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the old one in the value loss; `null`: anywhere."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed's ZeRO stage of the learner."""
    kl: KlConfig = KlConfig()
    shape: RewardShapeConfig = RewardShapeConfig()
    anchor: AnchorConfig = AnchorConfig()
    checkpoint_every: int = Field(10, ge=1)
    """Steps. The driver keeps the batches since the last checkpoint, to repeat their updates where
    the learner dies: 44 bytes per token, 20 MB for 512 responses of 896 tokens."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept, the newest."""
    resume: str | None = None
    """`latest`, or a checkpoint directory."""
    async_depth: int = Field(0, ge=0, le=2)
    """Batches sampled ahead: 0 is on-policy; 1 samples the next batch while this one is trained on,
    with weights one step older; 2 keeps two batches ahead."""
    tis_cap: float = Field(2.0, gt=0)
    """Cap of the importance weight learner/sampler per token, used where `async_depth` > 0."""
    max_staleness: int = Field(2, ge=0)
    """Responses sampled with weights older than so many steps are dropped and counted."""

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.estimator == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether advantages come from groups of responses to one prompt."""
        return self.estimator in ("grpo", "rloo", "token_grpo")

    @model_validator(mode="after")
    def _groups_are_even(self) -> Self:
        if self.rollout_batch % self.samples_per_prompt:
            raise ValueError(
                f"ppo.rollout_batch = {self.rollout_batch} is not a multiple of "
                f"ppo.samples_per_prompt = {self.samples_per_prompt}: groups would be uneven; "
                f"set ppo.rollout_batch={self._even_batch()}"
            )
        return self

    def _even_batch(self) -> int:
        size = self.samples_per_prompt
        return -(-self.rollout_batch // size) * size

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> Self:
        if not self.compares_samples:
            return self
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.estimator = {self.estimator!r} compares responses to the same prompt, but "
                "ppo.samples_per_prompt = 1 makes groups of one; set ppo.samples_per_prompt=4 or "
                "another number from 2"
            )
        if self.gamma != 1:
            raise ValueError(
                f"ppo.gamma = {self.gamma}: ppo.estimator = {self.estimator!r} compares whole "
                "responses, whose rewards are summed without discount; set ppo.gamma=1"
            )
        if self.estimator == "token_grpo" and self.shape.placement == "last":
            raise ValueError(
                "ppo.shape.placement = 'last' leaves segments without rewards of their own, which "
                "ppo.estimator = 'token_grpo' needs; set ppo.shape.placement=segment, or "
                "ppo.estimator=grpo"
            )
        return self

    @model_validator(mode="after")
    def _batches_nest(self) -> Self:
        if self.minibatch > self.rollout_batch:
            raise ValueError(
                f"ppo.minibatch = {self.minibatch} is larger than ppo.rollout_batch = "
                f"{self.rollout_batch}: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _staleness_allows_depth(self) -> Self:
        if self.async_depth > self.max_staleness:
            raise ValueError(
                f"ppo.async_depth = {self.async_depth} samples with weights older than "
                f"ppo.max_staleness = {self.max_staleness} allows: raise the second"
            )
        return self
