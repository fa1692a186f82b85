"""Step 2: reward models, and the shape of the rewards made of their scores."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fgaif.config.policy import LoraConfig
from fgaif.config.section import Section, check_ranks_apart, check_single_gpu
from fgaif.types import Kind


class NoiseConfig(Section):
    """Label noise of one kind, as probabilities; for studies of the feedback's quality."""

    ok_to_hallu: float = Field(0.0, ge=0, le=1)
    """Share of the OK segments that are labelled HALLU."""
    hallu_to_ok: float = Field(0.0, ge=0, le=1)
    """Share of the HALLU segments that are labelled OK."""
    flip: float = Field(0.0, ge=0, le=1)
    """Both rates at once (symmetric noise)."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.flip and (self.ok_to_hallu or self.hallu_to_ok):
            raise ValueError(
                f"flip = {self.flip} sets both rates; leave it 0 to set ok_to_hallu = "
                f"{self.ok_to_hallu} and hallu_to_ok = {self.hallu_to_ok}"
            )
        return self

    @property
    def rate_ok_to_hallu(self) -> float:
        """Probability that an OK segment is labelled HALLU."""
        return self.flip or self.ok_to_hallu

    @property
    def rate_hallu_to_ok(self) -> float:
        """Probability that a HALLU segment is labelled OK."""
        return self.flip or self.hallu_to_ok


class RewardConfig(Section):
    """Step 2: one reward model per kind, or one of preferences."""

    form: Literal["segment", "preference"] = "segment"
    """`segment`: a model of each kind for every sub-sentence (the method); `preference`: one number
    for the whole response, learned from pairs (Fact-RLHF), paid at its last token."""
    pairs: Path | None = None
    """Of `preference`: people's choices as rows with `image`, `conversations`, `output_1`,
    `output_2` and `preference` 1 or 2; default: pairs of our labels, fewer hallucinations win."""
    captions: str | None = None
    """Of `preference`: captions that the model reads with every response (factual augmentation): a
    COCO captions file, rows with `image` and `captions`, or `scenes`, the scene graphs."""
    backbone: str | None = None
    """Checkpoint of the reward models, as in `policy.model`; default: the policy's."""
    lora: LoraConfig = LoraConfig()
    lr: float = Field(2e-5, gt=0)
    """Learning rate of adapter and head."""
    batch_size: int = Field(32, ge=1)
    """Responses per optimiser step, over all workers."""
    micro_batch: int = Field(8, ge=1)
    """Responses per forward pass, in training and in scoring."""
    epochs: float = Field(4.0, gt=0)
    """Passes over the labels."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the images held out for early stopping."""
    patience: int = Field(5, ge=1)
    """Evaluations without a better validation loss before training stops."""
    evals: int = Field(6, ge=1)
    """Validation passes over the planned training."""
    class_balance: bool = True
    """Weigh classes by the inverse square root of their frequency."""
    noise: dict[Kind, NoiseConfig] = Field({})
    """Labels made wrong on purpose when they are read for training, by kind; the stored labels stay
    clean."""
    noise_seed: int = 0
    """Draws the labels that `noise` makes wrong."""
    head: Literal["linear", "mlp"] = "linear"
    """`linear` is the paper's; `mlp` adds one hidden layer."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage."""
    workers: int = Field(1, ge=1)
    """Ray Train workers per reward model."""
    parallel: int = Field(1, ge=1)
    """Reward models trained at the same time, at most as many as there are kinds."""
    cpus_per_worker: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for a worker: one, or a fraction of one."""

    @model_validator(mode="after")
    def _workers_share_batches(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"reward.batch_size = {self.batch_size} is not a multiple of reward.workers = "
                f"{self.workers}: a rank without work would hang the others; raise the first"
            )
        return self

    @model_validator(mode="after")
    def _form_has_its_keys(self) -> Self:
        for key in ("pairs", "captions"):
            if self.form == "segment" and getattr(self, key) is not None:
                raise ValueError(
                    f"reward.{key} = {str(getattr(self, key))!r} is for reward.form=preference"
                )
        if self.form == "preference" and self.workers > 1:
            raise ValueError(
                f"reward.workers = {self.workers}: a preference model trains in one worker; set 1"
            )
        if self.form == "preference" and (self.noise or self.head != "linear"):
            raise ValueError(
                "reward.form = 'preference' knows no reward.noise, and its head is linear; leave "
                "out reward.noise and reward.head"
            )
        return self

    @model_validator(mode="after")
    def _workers_fit_gpus(self) -> Self:
        check_single_gpu("reward.gpus_per_worker", self.gpus_per_worker, "reward.workers")
        check_ranks_apart(
            "reward.gpus_per_worker", self.gpus_per_worker, "reward.workers", self.workers
        )
        return self


class RewardShapeConfig(Section):
    """From class probabilities to per-token rewards; see docs in fgaif/reward/dense.py."""

    weights: dict[Kind, float] = Field({})
    """Weight of each kind; 0, or no entry beside others, leaves a kind out. Default: 1 for all."""
    order: tuple[Kind, ...] = ()
    """Kinds of which the first come first: the value of a later one counts only where none of those
    before it is hallucinated, by the most likely class; see fgaif/reward/dense.py. Kinds that are
    not named always count. Default: all count everywhere."""
    values: Literal["hard", "soft"] = "soft"
    """`hard`: the value of the most likely class; `soft`: the expected value."""
    value_ok: float = 1.0
    """Of a segment whose facts are true."""
    value_hallu: float = -1.0
    """Of a segment with a hallucination."""
    value_none: float = 0.0
    """Of a segment without facts."""
    center: bool = True
    """Subtract from each segment with facts the kind's running mean reward."""
    center_offset: float = -0.2
    """Added to the mean that is subtracted: negative values pay a little for every fact stated."""
    center_momentum: float = Field(0.8, ge=0, lt=1)
    """Share of the running mean that a batch leaves as it is."""
    repeat_penalty: float = Field(0.5, ge=0)
    """Subtracted at the end of a segment that repeats an earlier one of the same response, or
    that is malformed where the extractor can tell."""
    no_stop_penalty: float = Field(1.0, ge=0)
    """Subtracted at the last token of a response that never ended."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted per token beyond `length_target`, at the last token."""
    length_target: int = Field(0, ge=0)
    """Tokens of a response that cost nothing."""
    correct_bonus: float = Field(0.0, ge=0)
    """Added at the last token where the prompt has an `answer` and the response begins with it:
    yes, no, a letter of a choice (LLaVA-RLHF's symbolic reward)."""
    wrong_penalty: float = Field(0.0, ge=0)
    """Subtracted where it begins with another word."""
    """Tokens of a response that cost nothing."""
    placement: Literal["segment", "spread", "last"] = "segment"
    """`segment`: at each segment's last token (the method); `spread`: in equal parts on all of its
    tokens; `last`: the same sum on the last token of the response (the coarse control)."""

    @model_validator(mode="after")
    def _weights_make_sense(self) -> Self:
        weights = self.weights.values()
        if self.weights and (sum(weights) <= 0 or min(weights) < 0):
            raise ValueError(
                f"ppo.shape.weights = {self.weights}: weights must be >= 0 and one must be > 0"
            )
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"ppo.shape.order = {list(self.order)}: name each kind once")
        return self

    def weight(self, kind: Kind) -> float:
        """Weight of a kind."""
        return self.weights.get(kind, 0.0) if self.weights else 1.0

    def resolved(self, kinds: Iterable[Kind]) -> Self:
        """The same shape with a weight for each of the kinds."""
        return self.model_copy(update={"weights": {kind: self.weight(kind) for kind in kinds}})
