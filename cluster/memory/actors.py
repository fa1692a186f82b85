"""What one actor keeps in memory at its peak, by part: pure arithmetic on sizes and configuration.

All figures are bytes. P is the number of trained parameters, w the bytes of the model's dtype, H
the hidden size, I that of the MLP, Q and K the widths of queries and of keys (or values), V the
vocabulary, N the ranks.

The formulas follow what autograd, DeepSpeed and vLLM allocate (tests/test_memory_formulas.py and
tests/test_arrival.py hold them against that). The constants named ``_PROCESS`` and ``_GPU_...`` are
estimates.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from actors.deepspeed_setup import ZERO_BUCKET
from actors.served_adapter import lora_slot
from cluster.placement import Role
from fgaif.config import Config, LoraConfig
from fgaif.lvlm.logprobs import CHUNK
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.lvlm.sizes import ModelFacts, read_facts

GIB = 2**30
MIB = 2**20

PROMPT_TEXT = 64
"""Tokens of a prompt beside its image."""
_FEATURE_CACHE = 2**30
_PIXEL_CACHE = 256 * MIB
_PROCESS: Mapping[Role, int] = {
    "rollout": 900 * MIB,
    "judge": 900 * MIB,
    "reward": 600 * MIB,
    "reference": 600 * MIB,
    "learner": 700 * MIB,
    "trainer": 800 * MIB,
}
"""Resident memory on the host before the model is loaded: interpreter and libraries."""
_CPU_LIBRARIES = 12 * MIB
"""What libraries keep once they have worked on the CPU: oneDNN's kernels and scratch (in bfloat16 6
MiB of 14 measured, gone with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0), small blocks of the heap."""
_GPU_CONTEXT = 512 * MIB
"""CUDA context with torch's kernels, per process and device: 0.4 to 0.6 GiB on A100 and H100, what
nvidia-smi shows of a process beside torch.cuda.memory_reserved; not measured here."""
_GPU_HOST = 1024 * MIB
"""What a process with CUDA libraries keeps on the host beside ``_PROCESS``; not measured here."""
_GPU_FRAGMENTS = 0.1
"""Share of the activations that torch's caching allocator holds beyond them; not measured here."""
_ZERO3_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 may hold gathered at a time, at DeepSpeed's default."""
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, of 64 one scale of 8 bits, and of 256 scales one of 32."""
_LARGE_GPU = 70 * GIB  # vLLM's own limit between its two defaults
_CPU_BATCHED_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMemory:
    """Bytes on an actor's device by part, and bytes on the host.

    Of an actor without a GPU the host is the device: ``host`` is then the total. ``shortage`` says
    what an engine lacks inside its own share of the device, empty if nothing.
    """

    weights: int = 0
    adapters: int = 0
    optimizer: int = 0
    activations: int = 0
    caches: int = 0
    process: int = 0
    host: int = 0
    shortage: str = ""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(f.name for f in fields(ActorMemory) if f.name not in ("host", "shortage"))


Models = Mapping[str, ModelFacts]
"""Facts of checkpoints by their names in the configuration (``config.policy.model``, ...)."""


def read_models(config: Config, roles: Collection[Role]) -> Models:
    """Facts of the checkpoints that these roles load; raises CheckpointError if one is missing."""
    names = {_checkpoint(role, config) for role in roles if role != "judge"}
    if "judge" in roles:
        names.update(config.judge_checkpoints)
    critic = config.ppo.has_critic and "reference" in roles
    if critic and config.ppo.value_init != "policy":
        names.add(config.reward_backbone)
    pixels = config.data.image_pixels
    return {name: read_facts(resolve_checkpoint(name), pixels) for name in names if name}


def actor_memory(
    role: Role,
    config: Config,
    models: Models,
    *,
    gpu: int | None,
    on_gpu: bool,
    holds: Sequence[Role] = (),
) -> ActorMemory:
    """Peak memory of one actor. ``gpu`` is its device's memory in bytes, None where unknown;
    ``holds`` are the roles of a shared process."""
    if role in ("rollout", "judge"):
        return _engine(role, config, models, gpu, on_gpu=on_gpu)
    if role == "shared":
        found = _shared(holds, config, models, on_gpu=on_gpu)
    else:
        found = _trained(role, config, models, on_gpu=on_gpu)
    return _settle(found, holds or [role], config, models, on_gpu=on_gpu)


def _trained(role: Role, config: Config, models: Models, *, on_gpu: bool) -> ActorMemory:
    """A role that is no engine, without what its process takes anyway."""
    if role == "reference":
        found = _reference(config, models, on_gpu=on_gpu)
    else:
        build = {"reward": _scorer, "trainer": _trainer, "learner": _learner}[role]
        found = build(config, models)
    if config.policy.quantization == "none":
        return found
    # A product unpacks the weights of one layer.
    largest = max(rows * columns for rows, columns in _model(role, config, models).linears)
    return replace(found, activations=found.activations + largest * _width(config))


def _base(model: ModelFacts, config: Config) -> int:
    """A base's weights; in 4 bits only the linears of the language model."""
    if config.policy.quantization == "none":
        return model.parameters * _width(config)
    linears = sum(rows * columns for rows, columns in model.linears)
    return (model.parameters - linears) * _width(config) + round(linears * _NF4)


def _settle(
    found: ActorMemory, roles: Sequence[Role], config: Config, models: Models, *, on_gpu: bool
) -> ActorMemory:
    """Add the process of these roles, and put each part where it is kept."""
    process, caches = max(_PROCESS[role] for role in roles), _host_caches(roles, config, models)
    if not on_gpu:
        caches += found.caches + _CPU_LIBRARIES
        whole = replace(found, caches=caches, process=process)
        return replace(whole, host=whole.total)
    # from_pretrained reads the weights on the host, then moves them.
    host = process + _GPU_HOST + caches + found.weights
    activations = round(found.activations * (1 + _GPU_FRAGMENTS))
    return replace(found, activations=activations, process=_GPU_CONTEXT, host=host)


def _host_caches(roles: Sequence[Role], config: Config, models: Models) -> int:
    """Image features and pixels that a process has kept when it has seen all its images; features
    once for all its roles that need the same ones."""
    data, total, features = config.data, 0, {}
    for role in roles:
        model = _model(role, config, models)
        images = {
            "trainer": data.feedback_prompts,
            "rollout": data.feedback_prompts + data.ppo_prompts,
            "judge": data.feedback_prompts,
        }.get(role, data.ppo_prompts)
        total += min(_PIXEL_CACHE, images * model.pixel_values * 4)
        if role in ("rollout", "judge"):
            continue
        projected = not (role == "learner" and config.policy.train_projector)
        width = model.hidden if projected else model.vision_hidden
        size = images * model.image_tokens * width * _width(config)
        features[_checkpoint(role, config), projected] = min(_FEATURE_CACHE, size)
    return total + sum(features.values())


def _checkpoint(role: Role, config: Config) -> str:
    return config.reward_backbone if role in ("reward", "trainer") else config.policy.model


def _model(role: Role, config: Config, models: Models) -> ModelFacts:
    """The model of a role; of the verifiers, which come one after the other, the largest."""
    if role == "judge":
        judges = [models[name] for name in config.judge_checkpoints]
        return max(judges, key=lambda model: model.parameters)
    return models[_checkpoint(role, config)]


def _width(config: Config) -> int:
    return 2 if config.policy.dtype == "bfloat16" else 4


# --- the language model ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass: ``rows`` sequences of ``length`` tokens, and how it is computed.

    ``adapter_width`` is the bytes of LoRA's dtype: where it is not the model's, PEFT converts the
    input of every adapted layer.
    """

    rows: int
    length: int
    width: int
    adapter_width: int
    lora: LoraConfig
    checkpointing: bool = False
    attention: str = "sdpa"

    @property
    def tokens(self) -> int:
        """Of all rows, padding included."""
        return self.rows * self.length


def layer_saved(model: ModelFacts, run: Pass) -> int:
    """What autograd keeps of one decoder layer with LoRA on its seven linears, the base frozen.

    Per token: float32 inputs of both norms (2 H), the four tensors of the MLP (4 I), queries, keys,
    values and the result of attention (2 Q + 2 K), LoRA's inner states (7 r) and, as LoRA's inputs,
    both normed states (2 H). A LoRA of another dtype keeps its own copy of each of its inputs.
    Attention by the flash kernels (sdpa, on CPU and GPU alike) keeps one float32 per head and
    token, eager attention the (L, L) probabilities of every head.
    """
    w, a, q = run.width, run.adapter_width, model.heads * model.head_dim
    k, r = model.kv_heads * model.head_dim, run.lora.r
    per_token = 2 * 4 * model.hidden + 2 * 4 + (3 * model.ffn + 2 * q + 2 * k) * w + 7 * r * a
    if a == w:
        per_token += (2 * model.hidden + model.ffn) * w
    else:
        per_token += (5 * model.hidden + q + model.ffn) * a
    if run.lora.dropout > 0:  # its result and its mask, for each of the seven
        per_token += (5 * model.hidden + q + model.ffn) * (a + 1)
    saved = run.tokens * per_token
    if run.attention == "eager":
        square = run.rows * model.heads * run.length**2
        repeated = 2 * (q - k) * w * run.tokens  # keys and values, where heads share them
        return saved + repeated + square * (4 if w == 4 else 4 + w)
    return saved + run.tokens * model.heads * 4


def body_saved(model: ModelFacts, run: Pass) -> int:
    """What autograd keeps of the language model without its head.

    With gradient checkpointing: the input of every layer. The first layer's norm keeps nothing,
    because embeddings and image features have no gradient.
    """
    ends = run.tokens * model.hidden * (4 + run.width)  # input of the last norm, and its output
    if run.checkpointing:
        return ends + run.tokens * model.layers * model.hidden * run.width
    return ends + model.layers * layer_saved(model, run) - run.tokens * 4 * model.hidden


def training_peak(model: ModelFacts, run: Pass, scored: int) -> int:
    """Activations of a training pass at their peak, ``scored`` tokens going through the head.

    Either where the backward pass begins, with (scored, V) logits, their gradient and two more such
    tensors in float32, in chunks; or in a layer, which checkpointing has computed again, with the
    gradients of an MLP tensor and two hidden states.
    """
    head = 4 * 4 * min(scored, CHUNK) * model.vocabulary
    layer = run.tokens * (model.ffn + 2 * model.hidden) * max(run.width, run.adapter_width)
    if run.checkpointing:
        layer += layer_saved(model, run)
    return body_saved(model, run) + max(head, layer)


def inference_peak(model: ModelFacts, run: Pass, scored: int = 0, *, adapted: bool) -> int:
    """Activations of a pass without gradients at their peak: in a layer, or in the head.

    The MLP: three of its tensors, four hidden states, one more of each adapted layer. An adapter of
    another dtype converts its input, and its result is added in the wider one.

    Attention: three hidden states, keys, values and, where queries are rotated, four like these.
    Eager attention has instead the scores of every head twice, in bfloat16 in float32 as well,
    queries, keys and values (repeated for heads that share them) and the mask.
    """
    w, a = run.width, run.adapter_width
    hidden = run.tokens * model.hidden * w
    mlp = run.tokens * (3 * model.ffn + 4 * model.hidden) * w
    if adapted and a == w:
        mlp += run.tokens * (model.ffn + run.lora.r) * a
    elif adapted:
        mlp += run.tokens * ((2 * model.ffn + model.hidden + run.lora.r) * a - model.ffn * w)
    q, k = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = run.tokens * (3 * model.hidden + 4 * q + 2 * k) * w
    if run.attention == "eager":
        square = run.rows * run.length**2
        attention = square * (model.heads * (8 if w == 4 else 8 + w) + w) + run.tokens * w * (
            3 * model.hidden + q + 2 * k + (2 * q if q > k else 0)
        )
    return max(mlp, attention, hidden + 2 * 4 * min(scored, CHUNK) * model.vocabulary)


def vision_peak(model: ModelFacts, images: int, width: int) -> int:
    """Activations of the vision tower and projector: pixels, in float32 and in the model's dtype,
    all hidden states, and one MLP or the projector."""
    tokens = images * model.vision_tokens
    kept = (model.vision_layers + 1) * model.vision_hidden
    mlp = 3 * model.vision_ffn + model.vision_hidden
    pixels = images * model.pixel_values * 4  # in float32 joined, in 16 bits also one by one
    return pixels + tokens * width * (kept + max(mlp, 3 * model.hidden))


def kv_token(model: ModelFacts, width: int) -> int:
    """Keys and values of a token in all layers."""
    return 2 * model.layers * model.kv_heads * model.head_dim * width


def _sequence(config: Config, model: ModelFacts) -> int:
    length = model.image_tokens + PROMPT_TEXT + config.policy.max_new_tokens
    # Longer prompts are left out before the first step.
    return min(length, max(config.cluster.engine.max_model_len, config.policy.max_new_tokens))


_JUDGING, _CAPTIONS = 16, 256
"""Tokens of a preference model's judging prompt, and of the captions of an image."""


def _reward_sequence(config: Config, model: ModelFacts) -> int:
    """Each sub-sentence ends with a separator; one has ``segment.min_words`` tokens or more. For
    larger units that is an upper bound. A preference model reads a judging prompt and captions."""
    if config.reward.form == "preference":
        more = _CAPTIONS if config.reward.captions is not None else 0
        return _sequence(config, model) + _JUDGING + more
    return _sequence(config, model) + config.policy.max_new_tokens // config.segment.min_words


def _rows(config: Config, model: ModelFacts, share: int) -> int:
    """Rows of a micro-batch of PPO if all are as long as can be, of ``share`` in a minibatch."""
    ppo = config.ppo
    rows = min(ppo.micro_batch, share)
    if ppo.micro_tokens is not None:
        rows = min(rows, max(1, ppo.micro_tokens // _sequence(config, model)))
    return rows


# --- training states ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Bytes of an adapter in training. ``backward`` is held beside activations, ``step`` is not."""

    adapters: int
    kept: int
    backward: int
    step: int


def deepspeed_state(trained: int, *, stage: int, ranks: int, width: int) -> TrainingState:
    """What DeepSpeed 0.19 allocates for torch's AdamW over P trained parameters, on each rank.

    ====== ======== ================================== ======================= ===================
    stage  dtype    kept: master, moments, gradients   in the backward pass    in the step
    ====== ======== ================================== ======================= ===================
    0      float32  8 P                                4 P gradients           8 P
    1      float32  12 P / N                           4 P gradients + bucket  12 P / N
    1      bfloat16 12 P / N + 4 P                     2 P gradients           8 P / N + 2 P
    2      both     12 P / N                           4 P / N + bucket        12 P / N
    3      both     16 P / N + bucket                  w P                     12 P / N
    ====== ======== ================================== ======================= ===================

    The adapter itself is w P, with stage 3 w P / N. The bucket has room for P parameters, at most
    for ``ZERO_BUCKET``; a step holds the gradient and two temporaries of AdamW.
    """
    share = -(-trained // ranks)
    bucket = width * min(ZERO_BUCKET, trained)
    adapters = width * (share if stage == 3 else trained)
    if stage == 0:
        return TrainingState(
            adapters=adapters, kept=8 * trained, backward=4 * trained, step=8 * trained
        )
    kept, step = 12 * share, 12 * share
    if stage == 3:
        return TrainingState(
            adapters=adapters, kept=kept + 4 * share + bucket, backward=width * trained, step=step
        )
    if stage == 2:
        return TrainingState(adapters=adapters, kept=kept, backward=4 * share + bucket, step=step)
    if width == 4:
        return TrainingState(adapters=adapters, kept=kept, backward=4 * trained + bucket, step=step)
    return TrainingState(
        adapters=adapters,
        kept=kept + 4 * trained,
        backward=2 * trained,
        step=8 * share + 2 * trained,
    )


def sharded_weights(model: ModelFacts, ranks: int, width: int, *, projector: bool = False) -> int:
    """What a rank holds of the base where ZeRO-3 divides it over several.

    Its share, and what is gathered at a time. The vision tower and a frozen projector are whole on
    every rank (`fgaif.lvlm.features.set_vision_aside`); ``projector`` says that it is trained.
    """
    divided = model.language + (model.projector if projector else 0)
    whole = model.parameters - divided
    if ranks > 1:
        divided = min(divided, -(-divided // ranks) + min(divided, _ZERO3_LIVE))
    return (whole + divided) * width


def _with_state(weights: int, state: TrainingState, activations: int) -> ActorMemory:
    """Activations and the step do not meet: what the step needs beyond them counts as optimiser."""
    beyond = max(0, state.step - state.backward - activations)
    return ActorMemory(
        weights=weights,
        adapters=state.adapters,
        optimizer=state.kept + state.backward + beyond,
        activations=activations,
    )


# --- actors ---------------------------------------------------------------------------------------


def _learner(config: Config, models: Models) -> ActorMemory:
    model, policy, ppo, w = models[config.policy.model], config.policy, config.ppo, _width(config)
    trained = model.lora_parameters(policy.lora)
    projector = 0
    share = -(-ppo.minibatch // config.cluster.learner.replicas)
    rows = _rows(config, model, share)
    run = Pass(
        rows=rows,
        length=_sequence(config, model),
        width=w,
        adapter_width=w,
        lora=policy.lora,
        checkpointing=policy.gradient_checkpointing,
        attention=policy.attention,
    )
    if policy.train_projector:  # the frozen one stays beside it
        trained += model.projector
        tokens = rows * model.image_tokens
        projector = tokens * (model.vision_hidden + 3 * model.hidden) * w
    ranks = config.cluster.learner.replicas
    shards = ranks if ppo.zero_stage == 3 else 1
    weights = _base(model, config)
    if shards > 1:
        weights = sharded_weights(model, shards, w, projector=policy.train_projector)
    state = deepspeed_state(trained, stage=ppo.zero_stage, ranks=ranks, width=w)
    scored = rows * policy.max_new_tokens
    activations = max(
        training_peak(model, run, scored) + projector,
        inference_peak(model, run, scored, adapted=True),
        vision_peak(model, rows, w),
    )
    return _with_state(weights, state, activations)


def _reference(config: Config, models: Models, *, on_gpu: bool) -> ActorMemory:
    """One backbone, or two where the value model starts from another checkpoint; the reference
    alone where the estimator has no critic.

    Not under DeepSpeed: PEFT keeps the value adapter in float32, so weight, gradient and moments
    take 4 + 4 + 8 bytes, and AdamW on GPUs two more sets of temporaries.
    """
    ppo, policy, w = config.ppo, config.policy, _width(config)
    from_policy = ppo.value_init == "policy"
    base = models[policy.model]
    rows = _rows(config, base, ppo.minibatch)
    if not ppo.has_critic:
        run = Pass(
            rows=rows,
            length=_sequence(config, base),
            width=w,
            adapter_width=w,
            lora=ppo.value_lora,
            attention=policy.attention,
        )
        reading = inference_peak(base, run, rows * policy.max_new_tokens, adapted=False)
        return ActorMemory(
            weights=_base(base, config), activations=max(reading, vision_peak(base, rows, w))
        )
    model = base if from_policy else models[config.reward_backbone]
    lora = ppo.value_lora if from_policy else config.reward.lora
    two = not from_policy and config.reward_backbone != policy.model
    weights = _base(model, config) + (_base(base, config) if two else 0)
    trained = model.lora_parameters(lora) + model.hidden + 1
    run = Pass(
        rows=rows,
        length=_sequence(config, model),
        width=w,
        adapter_width=4,
        lora=lora,
        checkpointing=policy.gradient_checkpointing,
        attention=policy.attention,
    )
    scored = rows * policy.max_new_tokens
    reads = replace(run, length=_sequence(config, base))
    activations = max(
        training_peak(model, run, 0),
        inference_peak(model, run, adapted=True),
        inference_peak(base, reads, scored, adapted=False),
        vision_peak(model, rows, w),
    )
    state = TrainingState(
        adapters=4 * trained,
        kept=8 * trained,
        backward=4 * trained,
        step=(12 if on_gpu else 4) * trained,
    )
    return _with_state(weights, state, activations)


def _scorer(config: Config, models: Models) -> ActorMemory:
    """A backbone with one kind's adapter merged, or with all kinds' beside it."""
    shared = config.cluster.reward.shared and config.reward.form == "segment"
    model, w = models[config.reward_backbone], _width(config)
    run = Pass(
        rows=config.reward.micro_batch,
        length=_reward_sequence(config, model),
        width=w,
        adapter_width=w,
        lora=config.reward.lora,
        attention=config.policy.attention,
    )
    return ActorMemory(
        weights=_base(model, config),
        adapters=len(config.kinds) * model.lora_parameters(run.lora) * w if shared else 0,
        activations=max(
            inference_peak(model, run, adapted=shared), vision_peak(model, run.rows, w)
        ),
    )


def _shared(roles: Sequence[Role], config: Config, models: Models, *, on_gpu: bool) -> ActorMemory:
    """Roles in one process: the weights of their bases once, adapters and optimisers of all.

    On a GPU they take turns, so activations are those of the one that needs most; on the CPU they
    work side by side.
    """
    cluster = config.cluster
    reward = cluster.reward.model_copy(update={"shared": True})
    kinds_on_one = config.model_copy(
        update={"cluster": cluster.model_copy(update={"reward": reward})}
    )
    parts = [_trained(role, kinds_on_one, models, on_gpu=on_gpu) for role in roles]
    bases = {_checkpoint(role, config) for role in roles}
    if "reference" in roles and config.ppo.has_critic and config.ppo.value_init != "policy":
        bases.add(config.reward_backbone)
    activations = [part.activations for part in parts]
    return ActorMemory(
        weights=sum(_base(models[name], config) for name in bases),
        adapters=sum(part.adapters for part in parts),
        optimizer=sum(part.optimizer for part in parts),
        activations=max(activations) if on_gpu else sum(activations),
    )


def _trainer(config: Config, models: Models) -> ActorMemory:
    model, reward, w = models[config.reward_backbone], config.reward, _width(config)
    head = (model.hidden + 1) * 3 + (model.hidden**2 if reward.head == "mlp" else 0)
    share = reward.batch_size // reward.workers
    run = Pass(
        rows=min(reward.micro_batch, share),
        length=_reward_sequence(config, model),
        width=w,
        adapter_width=w,
        lora=reward.lora,
        checkpointing=config.policy.gradient_checkpointing,
        attention=config.policy.attention,
    )
    trained = model.lora_parameters(reward.lora) + head
    weights = _base(model, config)
    if reward.zero_stage == 3 and reward.workers > 1:
        weights = sharded_weights(model, reward.workers, w)
    state = deepspeed_state(trained, stage=reward.zero_stage, ranks=reward.workers, width=w)
    activations = max(
        training_peak(model, run, 0),
        inference_peak(model, replace(run, rows=reward.micro_batch), adapted=True),
        vision_peak(model, reward.micro_batch, w),
    )
    return _with_state(weights, state, activations)


def _engine(
    role: Role, config: Config, models: Models, gpu: int | None, *, on_gpu: bool
) -> ActorMemory:
    """A vLLM engine. On a GPU it takes its share of the device, whatever the model needs."""
    model = _model(role, config, models)
    engine, w = config.cluster.engine, _width(config)
    context = min(engine.max_model_len, model.max_length)
    default = _CPU_BATCHED_TOKENS
    if on_gpu:
        default = 16384 if (gpu or 0) >= _LARGE_GPU else 8192
    batched = min(engine.max_num_seqs * context, default)
    weights = model.parameters * w // engine.tensor_parallel
    lora, adapters, copy = config.policy.lora, 0, 0
    if role == "rollout" and not config.merges_adapters:  # a slot, and vLLM's copy on the host
        slot = lora.model_copy(update={"r": lora_slot(lora.r)})
        adapters, copy = model.lora_parameters(slot) * w, model.lora_parameters(lora) * w
    run = Pass(rows=1, length=batched, width=w, adapter_width=w, lora=lora)
    images = max(1, min(engine.max_num_seqs, batched // model.image_tokens))
    logits = engine.max_num_seqs * model.vocabulary * (w + 3 * 4)
    # Of a probe: logits and two tensors of log-probs. On the CPU ranks are counted without a
    # compiler: one of log-probs, a mask, and the mask in 64 bits to be summed.
    scored = min(batched, context) * model.vocabulary
    probe = scored * (w + (8 if on_gpu else 13)) if role == "rollout" else 0
    body = inference_peak(model, run, adapted=adapters > 0)
    if not on_gpu:
        # Embeddings and head are kept beside the copies that vLLM packs for its kernels, and what
        # adapters are merged into beside the checkpoint's; a version comes in float32. An adapter
        # served unmerged is gathered for every token, and converted.
        weights += 2 * model.vocabulary * model.hidden * w
        if role == "rollout" and config.merges_adapters:
            weights += sum(rows * columns for rows, columns in model.linears) * w
            copy = 4 * model.lora_parameters(lora)
        if adapters:
            gathered = batched * max(model.ffn, model.hidden) * (4 if w == 4 else w + 4)
            body += gathered * lora_slot(lora.r)
        found = ActorMemory(
            weights=weights,
            adapters=adapters + copy,
            activations=max(body, logits, probe),
            caches=engine.kv_cache_mib * MIB,
        )
        return _settle(found, [role], config, models, on_gpu=False)
    activations = max(body, logits, probe, vision_peak(model, images, w))
    activations += images * model.image_tokens * model.hidden * w  # vLLM's cache of features
    token = kv_token(model, w) // engine.tensor_parallel
    found = ActorMemory(
        weights=weights, adapters=adapters, activations=activations, process=_GPU_CONTEXT
    )
    need = weights + adapters + activations
    host = _PROCESS[role] + _GPU_HOST + _host_caches([role], config, models) + weights + copy
    least = token * context
    if gpu is None:
        return replace(found, caches=least, host=host)
    share = int(gpu * engine.gpu_memory_utilization)
    shortage = ""
    if share < need + least:
        shortage = (
            f"cluster.engine.gpu_memory_utilization = {engine.gpu_memory_utilization:g} gives it "
            f"{share / GIB:.1f} GiB, but weights ({weights / GIB:.1f}), activations "
            f"({(activations + adapters) / GIB:.1f}) and one sequence of {context} tokens "
            f"({least / GIB:.1f}) need {(need + least) / GIB:.1f}"
        )
    return replace(found, caches=max(least, share - need), host=host, shortage=shortage)
