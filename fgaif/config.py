"""One frozen configuration tree: YAML file first, dotted overrides last, unknown keys refused."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fgaif.errors import ConfigError
from fgaif.types import KINDS, Kind

API = "api:"
"""Before the name of an entry of ``endpoints``."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )


class DataConfig(_Section):
    """Images and prompts."""

    train: str = "scenes:train"
    """Prompts of steps 1 and 3: `scenes:SPLIT` (embedded world), a .jsonl/.parquet file of rows
    with `image`, `prompt` and optionally `id`, or `coco:PATH`, a COCO folder or annotation file."""
    responses: Path | None = None
    """Responses to label that some other tool sampled, instead of sampling: a .jsonl or .parquet
    file of rows with `image`, `prompt`, `response` and optionally `id`."""
    held_out: str = "scenes:test"
    """Prompts of the evaluation and of the reward models' final check, never trained on."""
    image_root: Path | None = None
    """Folder that image paths start from and must lie in, links followed; default: the folder of
    the prompts file, or of COCO's images."""
    shuffle: bool = False
    """Draw the prompts of a .jsonl or .parquet file by `data.seed` instead of taking the first;
    the images of `coco:PATH` are always drawn."""
    seed: int = 0
    """Draws prompts; apart from `seed`, so that runs compared over seeds see the same images."""
    feedback_prompts: int = Field(2000, ge=1)
    """Prompts sampled for AI feedback (the paper: 3,500 images)."""
    ppo_prompts: int = Field(2000, ge=1)
    """Prompts for PPO, disjoint from the feedback prompts where the data set is large enough
    (the paper: 14,000 images)."""
    eval_prompts: int = Field(300, ge=1)
    """Held-out prompts of the evaluation."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Larger images are refused before they are decoded."""


class LoraConfig(_Section):
    """Low-rank adapter, anchored to the language model's linear layers."""

    r: int = Field(64, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of reward models only: PPO trains without."""

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.r


class PolicyConfig(_Section):
    """The LVLM to align."""

    model: str = "scenes:policy"
    """A LLaVA checkpoint directory, or `scenes:policy`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Training and sampling precision."""
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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class SegmentConfig(_Section):
    """Sub-sentence splitting."""

    min_words: int = Field(5, ge=1)
    """A break character ends a sub-sentence only if the piece has at least this many words."""


class EndpointConfig(_Section):
    """A model behind an OpenAI-compatible API; named in `endpoints`, used as `api:NAME`."""

    model: str
    """Model name as the endpoint knows it."""
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = Field("OPENAI_API_KEY", pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key; the key itself is never configured."""
    api_key_file: Path | None = None
    """File that holds the key; read instead of the environment variable."""
    concurrency: int = Field(16, ge=1)
    """Requests on their way at the same time."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    """Input and output tokens, estimated before the request, counted after it."""
    timeout_s: float = Field(120.0, gt=0)
    attempts: int = Field(10, ge=1)
    """Tries of a request before it counts as failed."""
    backoff_s: float = Field(0.5, gt=0)
    """First pause after a failure; it doubles, with jitter, up to a minute."""
    breaker: int = Field(30, ge=1)
    """Failures in a row, over all requests, that stop the job; always more than `concurrency`."""
    structured: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How JSON is asked for; `text` uses the plain-text form of the prompts."""
    logprobs: bool = True
    """Ask for the log-probs of the first token of yes/no answers."""
    max_image_side: int = Field(1024, ge=16)
    """Larger images are shrunk to this many pixels before they are sent."""
    image_tokens: int = Field(1000, ge=0)
    """Tokens that an image counts for in estimates; replies bring the true number."""
    price_input: float = Field(0.0, ge=0)
    """Price of a million input tokens, for the cost display and `max_cost`."""
    price_output: float = Field(0.0, ge=0)
    """Price of a million output tokens."""

    @field_validator("base_url")
    @classmethod
    def _address_alone(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"holds a user, a password or a query at {parts.hostname}; keys belong in the "
                "environment or in api_key_file"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an address such as https://api.openai.com/v1")
        return url


class FeedbackConfig(_Section):
    """Step 1: facts, verdicts, labels."""

    extractor: str = Field("scenes", pattern="^(scenes|model|segment|api:.+)$")
    """Who states a segment's atomic facts: `scenes` parses the embedded world's English, `model`
    asks the verifier checkpoint, as a language model with JSON output, `api:NAME` asks an entry of
    `endpoints`, `segment` takes each whole segment as one statement of every kind (no language
    model; a coarse control)."""
    extract_per: Literal["response", "segment"] = "response"
    """One request for all segments of a response, or one per segment, with the response around."""
    verifier: str | tuple[str, ...] = "scenes:verifier"
    """Who answers yes or no for each fact: a LLaVA checkpoint or `api:NAME`; of a list, at most one
    checkpoint, and the majority decides."""
    prompt: str = "statement"
    """Verification prompt: a file name in fgaif/feedback/prompts, or a path."""
    prompts_dir: Path | None = None
    """Folder with other extraction prompts; see fgaif/feedback/prompts for the names and slots."""
    abstain: float = Field(0.0, ge=0, lt=0.5)
    """Half-width around p(yes) = 0.5 within which the verdict is `unknown`."""
    samples_per_prompt: int = Field(1, ge=1)
    max_facts: int = Field(16, ge=1)
    """Facts of one kind in one segment; a longer list is cut and the segment not trusted."""
    reads: int = Field(3, ge=1)
    """Times that a question is put whose replies cannot be read."""
    max_cost: float | None = Field(None, gt=0)
    """Money, in the currency of the prices, that all replies of this run may cost, those of
    earlier tries included."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens, input and output, that all replies of this run may use."""

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The verifiers as a tuple."""
        return (self.verifier,) if isinstance(self.verifier, str) else self.verifier

    @property
    def local_verifier(self) -> str | None:
        """The checkpoint among the verifiers, which runs on our own actors."""
        return next((name for name in self.verifiers if not name.startswith(API)), None)

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        local = [name for name in self.verifiers if not name.startswith(API)]
        if not self.verifiers or len(local) > 1 or len(set(self.verifiers)) < len(self.verifiers):
            raise ValueError(
                f"feedback.verifier = {list(self.verifiers)}: give one or more different ones, at "
                "most one of them a checkpoint; serve others with `fgaif openai-server`"
            )
        if self.extractor == "model" and not local:
            raise ValueError(
                "feedback.extractor = 'model' asks the verifier checkpoint, but every verifier is "
                "an API: use feedback.extractor=api:NAME"
            )
        return self


class NoiseConfig(_Section):
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


def _check_single_gpu(key: str, gpus: float, more: str) -> None:
    """Refuse several GPUs for a process that computes on one."""
    if gpus > 1:
        raise ValueError(
            f"{key} = {gpus:g}: one process uses one GPU: set {key}=1, or a fraction of 1 to share "
            f"a GPU; to use more GPUs raise {more}"
        )


def _check_ranks_apart(key: str, gpus: float, count_key: str, count: int) -> None:
    """Refuse ranks of one process group on the same GPU."""
    if count > 1 and 0 < gpus <= 0.5:
        raise ValueError(
            f"{key} = {gpus:g} with {count_key} = {count}: ranks would share a GPU, which NCCL "
            f"refuses: set {key}=1, or {count_key}=1"
        )


class RewardConfig(_Section):
    """Step 2: one reward model per kind."""

    backbone: str | None = None
    """LLaVA checkpoint of the reward models; default: the policy's."""
    lora: LoraConfig = LoraConfig()
    lr: float = Field(2e-5, gt=0)
    batch_size: int = Field(32, ge=1)
    """Responses per optimiser step, over all workers."""
    micro_batch: int = Field(8, ge=1)
    """Responses per forward pass, in training and in scoring."""
    epochs: float = Field(4.0, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the images held out for early stopping."""
    patience: int = Field(5, ge=1)
    """Evaluations without a better validation loss before training stops."""
    evals: int = Field(6, ge=1)
    """Validation passes over the planned training."""
    class_balance: bool = True
    """Weigh classes by the inverse square root of their frequency."""
    noise: dict[Kind, NoiseConfig] = {}
    """Labels made wrong on purpose when they are read for training, by kind; the stored labels stay
    clean."""
    noise_seed: int = 0
    """Draws the labels that `noise` makes wrong."""
    head: Literal["linear", "mlp"] = "linear"
    """`linear` is the paper's; `mlp` adds one hidden layer."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = Field(1, ge=1)
    """Ray Train workers per reward model."""
    parallel: int = Field(1, ge=1, le=len(KINDS))
    """Reward models trained at the same time."""
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _workers_share_batches(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"reward.batch_size = {self.batch_size} is not a multiple of reward.workers = "
                f"{self.workers}: a rank without work would hang the others; raise the first"
            )
        return self

    @model_validator(mode="after")
    def _workers_fit_gpus(self) -> Self:
        _check_single_gpu("reward.gpus_per_worker", self.gpus_per_worker, "reward.workers")
        _check_ranks_apart(
            "reward.gpus_per_worker", self.gpus_per_worker, "reward.workers", self.workers
        )
        return self


class RewardShapeConfig(_Section):
    """From class probabilities to per-token rewards; see docs in fgaif/reward/dense.py."""

    weights: dict[Kind, float] = dict.fromkeys(KINDS, 1.0)
    """Weight of each kind; 0 leaves the kind out."""
    values: Literal["hard", "soft"] = "soft"
    """`hard`: the value of the most likely class; `soft`: the expected value."""
    value_ok: float = 1.0
    value_hallu: float = -1.0
    value_none: float = 0.0
    center: bool = True
    """Subtract from each segment with facts the kind's running mean reward."""
    center_offset: float = -0.2
    """Added to the mean that is subtracted: negative values pay a little for every fact stated."""
    center_momentum: float = Field(0.8, ge=0, lt=1)
    repeat_penalty: float = Field(0.5, ge=0)
    """Subtracted at the end of a segment that repeats an earlier one of the same response, or
    that is malformed where the extractor can tell."""
    no_stop_penalty: float = Field(1.0, ge=0)
    """Subtracted at the last token of a response that never ended."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted per token beyond `length_target`, at the last token."""
    length_target: int = Field(0, ge=0)
    placement: Literal["segment", "last"] = "segment"
    """`segment`: at each segment's last token (the method); `last`: the same sum on the last
    token of the response (the coarse control)."""

    @model_validator(mode="after")
    def _weights_make_sense(self) -> Self:
        if sum(self.weights.values()) <= 0 or min(self.weights.values()) < 0:
            raise ValueError(
                f"ppo.shape.weights = {self.weights}: weights must be >= 0 and one must be > 0"
            )
        return self


class AnchorConfig(_Section):
    """KL to the reference on question prompts, so that captioning does not erase answering."""

    weight: float = Field(0.0, ge=0)
    """0 turns the term off."""
    prompts: str = "scenes:questions"
    """`scenes:questions` or a .jsonl/.parquet file of rows with `image` and `prompt`."""
    batch_size: int = Field(32, ge=1)
    """Questions per minibatch."""


class KlConfig(_Section):
    """KL of the policy to the reference, inside the reward."""

    coef: float = Field(0.1, ge=0)
    target: float | None = Field(None, gt=0)
    """Summed KL per response that an adaptive coefficient steers to; default: fixed coefficient."""
    horizon: int = Field(10_000, ge=1)
    """Responses over which the adaptive coefficient reacts."""


class PpoConfig(_Section):
    """Step 3: PPO with per-token rewards."""

    steps: int = Field(54, ge=1)
    rollout_batch: int = Field(512, ge=1)
    """Responses per step."""
    minibatch: int = Field(256, ge=1)
    """Responses per optimiser step, over all learner ranks."""
    micro_batch: int = Field(16, ge=1)
    """Responses per forward pass of a rank."""
    epochs: int = Field(2, ge=1)
    """Passes over each rollout batch."""
    lr: float = Field(3e-5, gt=0)
    """Of the adapter: LoRA needs 1e-5 to 5e-5 (configs/llava15_7b_4gpu.yaml says where from); the
    paper's 1e-7 leaves the policy where it was."""
    value_lr: float = Field(1e-5, gt=0)
    value_lora: LoraConfig = LoraConfig()
    value_init: Literal["policy", "object", "attribute", "relation"] = "policy"
    """Backbone of the value model: the policy's, or the reward model of a kind with its adapter."""
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)
    value_clip: float | None = Field(0.2, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    kl: KlConfig = KlConfig()
    shape: RewardShapeConfig = RewardShapeConfig()
    anchor: AnchorConfig = AnchorConfig()
    checkpoint_every: int = Field(10, ge=1)
    """Steps. The driver keeps the batches since the last checkpoint, to repeat their updates where
    the learner dies: 44 bytes per token, 20 MB for 512 responses of 896 tokens."""
    keep_checkpoints: int = Field(2, ge=1)
    resume: str | None = None
    """`latest`, or a checkpoint directory."""
    async_depth: int = Field(0, ge=0, le=2)
    """Batches sampled ahead: 0 is on-policy; 1 samples the next batch while this one is trained on,
    with weights one step older; 2 keeps two batches ahead."""
    tis_cap: float = Field(2.0, gt=0)
    """Cap of the importance weight learner/sampler per token, used where `async_depth` > 0."""
    max_staleness: int = Field(2, ge=0)
    """Responses sampled with weights older than so many steps are dropped and counted."""

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


class EvalConfig(_Section):
    """Before and after."""

    pope_questions_per_image: int = Field(6, ge=2)
    """Half yes, half no."""
    seed: int = 123


class RoleConfig(_Section):
    """Resources of one role."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)


class RewardRoleConfig(RoleConfig):
    """Scorers: an actor for each kind, or one for all three."""

    shared: bool = False
    """One actor holds one backbone and the adapters of all kinds, which take turns: a third of the
    memory. The adapters are not merged then, so in bfloat16 scores differ by rounding."""


class AutoscaleConfig(_Section):
    """Number of rollout engines by the length of their queue."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)
    target_queue: float = Field(2.0, gt=0)
    """Chunks per engine and batch that are aimed at."""
    patience: int = Field(3, ge=1)
    """Batches in a row that must need fewer engines before any is let go."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"cluster.rollout.autoscale.min = {self.min} is above max = {self.max}: lower the "
                "first or raise the second"
            )
        return self


class RolloutRoleConfig(RoleConfig):
    """Rollout engines; `fgaif scale` changes their number while a run goes on."""

    chunk: int = Field(64, ge=1)
    """Responses that an engine is given at a time. Smaller ones spread better over engines that
    come and go, larger ones fill an engine better; not the number of engines but this decides
    which responses share a batch, so scaling does not change what is sampled."""
    autoscale: AutoscaleConfig | None = None


class EngineConfig(_Section):
    """vLLM settings."""

    max_num_seqs: int = Field(64, ge=1)
    max_model_len: int = Field(2048, ge=16)
    kv_cache_mib: int = Field(64, ge=1)
    """KV cache on CPU engines; on GPU, `gpu_memory_utilization` rules."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    tensor_parallel: int = Field(1, ge=1)
    enforce_eager: bool = True
    adapters: Literal["auto", "merged", "unmerged"] = "auto"
    """How engines hold the policy's LoRA adapter: `merged` adds it to the weights, which is faster,
    and in bfloat16 rounds small updates away; `unmerged` serves it beside them, as vLLM does with
    LoRA requests, and loses nothing. `auto` merges in float32 only."""


class ClusterConfig(_Section):
    """Roles and where they run."""

    address: str | None = None
    """Ray address; default: the cluster this process belongs to, else a local one."""
    local_cpus: int | None = Field(None, ge=1)
    """CPUs of a local Ray; default: all."""
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reward: RewardRoleConfig = RewardRoleConfig()
    """Resources of each of the three reward actors, or of the shared one."""
    reference: RoleConfig = RoleConfig()
    learner: RoleConfig = RoleConfig()
    """`replicas` is the number of DeepSpeed ranks."""
    judge: RoleConfig = RoleConfig()
    engine: EngineConfig = EngineConfig()
    threads: int = Field(1, ge=1)
    """OMP threads of each actor on CPU."""
    max_restarts: int = Field(5, ge=0)
    """Times in a row that an actor is replaced when it dies or hangs, without having answered in
    between; the run stops after that."""
    heartbeat_s: float = Field(5.0, gt=0)
    """Time between two heartbeats of an actor's process."""
    heartbeat_timeout_s: float = Field(60.0, gt=0)
    """An actor without a heartbeat for so long is frozen, and is replaced."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """An actor at work that makes no progress for so long hangs, and is replaced."""
    start_timeout_s: float = Field(600.0, gt=0)
    call_timeout_s: float = Field(3600.0, gt=0)

    @model_validator(mode="after")
    def _actors_fit_gpus(self) -> Self:
        for name in ("reward", "reference", "learner"):
            key = f"cluster.{name}"
            _check_single_gpu(f"{key}.gpus", getattr(self, name).gpus, f"{key}.replicas")
        learner, width = self.learner, self.engine.tensor_parallel
        _check_ranks_apart(
            "cluster.learner.gpus", learner.gpus, "cluster.learner.replicas", learner.replicas
        )
        for name in ("rollout", "judge"):
            gpus = getattr(self, name).gpus
            if gpus > 0 and (gpus != width if width > 1 else gpus > 1):
                raise ValueError(
                    f"cluster.{name}.gpus = {gpus:g} with cluster.engine.tensor_parallel = {width}:"
                    f" an engine takes as many GPUs: set cluster.{name}.gpus={width}"
                    + (" (or a fraction, to share one)" if width == 1 else "")
                    + f" or another tensor_parallel; more engines are cluster.{name}.replicas"
                )
        return self


class TrackingConfig(_Section):
    """Where metrics go besides console and JSONL."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: str = "fgaif"
    rollouts: int = Field(0, ge=0)
    """Write all rollouts of every so many steps to `policy/rollouts`, for `fgaif replay`; 0: never.
    A file takes about 100 bytes per token."""


class StudyConfig(_Section):
    """Variants of PPO compared over seeds on the same reward models; see `fgaif study`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    variants: dict[str, tuple[str, ...]] = {"segment": (), "last": ("ppo.shape.placement=last",)}
    """Name of each variant and its overrides."""


class ServeBatchConfig(_Section):
    """Dynamic batching of requests; a request's texts stay together."""

    size: int = Field(16, ge=1)
    """Requests scored together at most; 1 turns batching off."""
    wait_ms: float = Field(2.0, ge=0)
    """Longest wait for a batch to fill once its turn has come."""


class ServeReplicasConfig(_Section):
    """Replicas of a scoring deployment: autoscaled where `min` and `max` differ."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    target_ongoing: float = Field(8.0, gt=0)
    """Requests per replica that autoscaling aims at."""
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"serve.replicas.min = {self.min} is more than serve.replicas.max = {self.max}: "
                "raise the second"
            )
        return self


class ServeConfig(_Section):
    """The reward models as a service; see `fgaif serve`."""

    placement: Literal["shared", "separate"] = "shared"
    """`shared`: three adapters and heads on one backbone; `separate`: a deployment per kind."""
    batch: ServeBatchConfig = ServeBatchConfig()
    replicas: ServeReplicasConfig = ServeReplicasConfig()
    """Of the scoring deployment, or of each kind's."""
    ingress_replicas: int = Field(1, ge=1)
    """Processes that read and check requests."""
    ingress_cpus: float = Field(0.5, ge=0)
    queue: int = Field(128, ge=1)
    """Requests in work or waiting, per ingress replica; more are refused with 429."""
    streams: int = Field(64, ge=1)
    """WebSockets open at a time, per ingress replica."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time for a request, 504 after it, and for silence on a stream."""
    reload_timeout_s: float = Field(600.0, gt=0)
    """Longest time for loading another version of the models."""
    drain_s: float = Field(30.0, ge=0)
    """Time that requests in work get when the service stops."""
    max_body_mib: float = Field(32.0, gt=0)
    """Larger bodies are refused before they are read; base64 makes an image a third larger."""
    max_image_pixels: int = Field(20_000_000, ge=1)
    """Larger images are refused before they are decoded."""
    allow_urls: bool = False
    """Fetch images by https URL; never from private addresses."""
    url_timeout_s: float = Field(10.0, gt=0)
    cors: tuple[str, ...] = ()
    """Origins of other sites' pages that may call the service, such as `https://a.example`."""
    key_env: str = "FGAIF_SERVE_KEY"
    """Environment variable with the API key; the key itself is never configured."""
    key_file: Path | None = None
    """File that holds the key; read instead of the environment variable."""


class Config(_Section):
    """The whole run."""

    name: str = Field("scenes", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: its folder is `dir/name`."""
    dir: Path = Path("runs")
    seed: int = 0
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    segment: SegmentConfig = SegmentConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    endpoints: dict[str, EndpointConfig] = {}
    """OpenAI-compatible APIs by a name of your choice."""
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    study: StudyConfig = StudyConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _endpoints_exist(self) -> Self:
        for key, names in (
            ("feedback.extractor", (self.feedback.extractor,)),
            ("feedback.verifier", self.feedback.verifiers),
        ):
            for name in names:
                if name.startswith(API) and name.removeprefix(API) not in self.endpoints:
                    known = ", ".join(self.endpoints) or "none"
                    raise ValueError(f"{key} = {name!r}: no such entry of endpoints ({known})")
        return self

    @model_validator(mode="after")
    def _ppo_without_dropout(self) -> Self:
        adapters = {"policy.lora": self.policy.lora, "ppo.value_lora": self.ppo.value_lora}
        for key, lora in adapters.items():
            if lora.dropout:
                raise ValueError(
                    f"{key}.dropout = {lora.dropout}: PPO compares log-probs and values before and "
                    "after a step, and dropout would pass for the step's effect; set it to 0 (that "
                    "of reward.lora may stay)"
                )
        return self

    @model_validator(mode="after")
    def _bfloat16_with_zero(self) -> Self:
        stages = {"ppo": self.ppo.zero_stage, "reward": self.reward.zero_stage}
        for section, stage in stages.items():
            if self.policy.dtype == "bfloat16" and stage == 0:
                raise ValueError(
                    f"{section}.zero_stage = 0 with policy.dtype = 'bfloat16': without ZeRO "
                    "DeepSpeed keeps no float32 copy of what it trains in bfloat16; set "
                    f"{section}.zero_stage=1"
                )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run writes."""
        return self.dir / self.name

    @property
    def merges_adapters(self) -> bool:
        """Whether engines add the policy's adapter to their weights (`cluster.engine.adapters`)."""
        wanted = self.cluster.engine.adapters
        return wanted == "merged" or (wanted == "auto" and self.policy.dtype == "float32")

    @property
    def reward_backbone(self) -> str:
        """Checkpoint of the reward models."""
        return self.reward.backbone or self.policy.model


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or the defaults) and apply overrides such as ``ppo.lr=1e-5``.

    Raises:
        ConfigError: unknown key (with the nearest name), bad value, unreadable file.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--config {path}: {error.strerror}; give an existing file"
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {path}: expected keys and values at the top level")
        tree = loaded or {}
    for item in overrides:
        _apply_override(tree, item)
    return parse_config(tree)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with dotted overrides applied; raises ConfigError like ``load_config``."""
    tree = config.model_dump(mode="json")
    for item in overrides:
        _apply_override(tree, item)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict; errors name the dotted key, the value and the nearest known key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], item: str) -> None:
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {item!r}: expected KEY=VALUE, for example ppo.lr=1e-5")
    node = tree
    *parents, leaf = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {part!r} holds a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not valid YAML") from error


_REMOVED = {
    "ppo.probe_tolerance": "no such key any more; leave it out: a sync is held against the noise "
    "of the dtype and the effect of the update (docs/precision.md)",
}


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    # A key may have been put where it does not belong.
    secret = item["loc"][:1] == ("endpoints",) and not isinstance(item["input"], int | float)
    shown = key if secret else f"{key} = {item['input']!r}"
    if item["type"] == "extra_forbidden" and key in _REMOVED:
        return f"{shown}: {_REMOVED[key]}"
    if item["type"] == "extra_forbidden":
        *parents, leaf = [str(part) for part in item["loc"]]
        near = difflib.get_close_matches(leaf, _keys_at(parents), n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*parents, near[0]])}?" if near else ""
        return f"{shown}: unknown key{hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{shown}: {message}" if key else message


def _keys_at(parents: list[str]) -> list[str]:
    if parents[:1] == ["endpoints"]:
        return list(EndpointConfig.model_fields)
    section: type[BaseModel] = Config
    for part in parents:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        section = field.annotation
    return list(section.model_fields)
