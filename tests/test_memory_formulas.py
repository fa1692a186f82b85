"""The memory plan's formulas against what torch, PEFT and DeepSpeed allocate, on tiny models."""

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from allocations import peak_bytes, saved_bytes
from peft import PeftModel
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from actors.deepspeed_setup import (
    ZERO_BUCKET,
    deepspeed_config,
    free_port,
    import_deepspeed,
    join_process_group,
)
from actors.engine import LoraEngine
from cluster.memory.actors import (
    Pass,
    body_saved,
    deepspeed_state,
    inference_peak,
    sharded_weights,
    training_peak,
    vision_peak,
)
from fgaif.config import LoraConfig, PpoConfig
from fgaif.lvlm.families.base import ImageFeatures, join_features
from fgaif.lvlm.features import set_vision_aside
from fgaif.lvlm.inputs import EncodedBatch
from fgaif.lvlm.logprobs import response_logprobs
from fgaif.lvlm.model import attach_lora, base_of, image_features, last_hidden, without_dropout
from fgaif.lvlm.sizes import config_facts

IMAGE, IMAGE_TOKENS = 5, 9
LORA = LoraConfig(r=4, alpha=8)


def llava(vocabulary: int = 300) -> LlavaConfig:
    """No two sizes are equal, and heads share keys and values."""
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3,
        image_size=42, patch_size=14, projection_dim=48,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=24, max_position_embeddings=512,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=IMAGE_TOKENS
    )


def frozen(
    config: LlavaConfig, dtype: str, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    base: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return base.eval().requires_grad_(False)


def policy(
    config: LlavaConfig,
    dtype: str,
    *,
    adapter: str = "",
    attention: str = "sdpa",
    checkpointing: bool = False,
) -> PeftModel:
    """A frozen model with LoRA in the dtype ``adapter``, by default the model's."""
    base = frozen(config, dtype, attention)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_lora(base, LORA, 0)
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.to(getattr(torch, adapter or dtype))
    without_dropout(model)
    return model


def batch(rows: int, length: int, response: int) -> EncodedBatch:
    """Sequences without padding, that end in the response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(IMAGE + 1, 300, (rows, length), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE
    start = length - response
    return EncodedBatch(
        input_ids=ids,
        positions=torch.arange(start - 1, length - 1).expand(rows, -1),
        targets=ids[:, start:],
        mask=torch.ones(rows, response, dtype=torch.bool),
    )


def seen(model: torch.nn.Module, pixels: Tensor) -> ImageFeatures:
    """Features of images (B, 3, H, W)."""
    dtype = base_of(model).dtype
    images = [{"pixel_values": each[None].to(dtype)} for each in pixels]
    return join_features(image_features(model, images))


def pictures(rows: int) -> Tensor:
    return torch.randn(rows, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def planned(
    dtype: str, adapter: str, shape: tuple[int, int], attention: str, checkpointing: bool
) -> Pass:
    width = {"float32": 4, "bfloat16": 2}
    return Pass(
        rows=shape[0],
        length=shape[1],
        width=width[dtype],
        adapter_width=width[adapter],
        lora=LORA,
        checkpointing=checkpointing,
        attention=attention,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_what_autograd_keeps_is_what_is_planned(
    dtype: str, adapter: str, attention: str, checkpointing: bool
) -> None:
    """The rotary tables and a few bytes a token are not planned: under 1 % even of this model."""
    for rows, length in ((2, 64), (5, 90)):
        model = policy(
            llava(), dtype, adapter=adapter, attention=attention, checkpointing=checkpointing
        )
        inputs = batch(rows, length, 24)
        features = seen(model, pictures(rows))
        known = [*model.parameters(), *model.buffers(), features.rows, inputs.input_ids]
        found = saved_bytes(lambda: last_hidden(model, inputs.input_ids, features), known)  # noqa: B023
        run = planned(dtype, adapter, (rows, length), attention, checkpointing)
        rel = 0.01 if attention == "sdpa" else 0.04
        assert body_saved(config_facts(llava()), run) == pytest.approx(found, rel=rel)


@pytest.mark.parametrize("vocabulary", [300, 5_000])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_peaks_are_those_of_the_allocator(
    dtype: str, adapter: str, checkpointing: bool, vocabulary: int
) -> None:
    """In the layers with a small vocabulary, in the head with a large one."""
    rows, length, response = 4, 150, 60
    config = llava(vocabulary)
    model = policy(config, dtype, adapter=adapter, checkpointing=checkpointing)
    inputs = batch(rows, length, response)
    features = seen(model, pictures(rows))

    def logprobs() -> Tensor:
        return response_logprobs(model, inputs, temperature=1.0, features=features)

    logprobs().sum().backward()  # gradients exist from here on
    run = planned(dtype, adapter, (rows, length), "sdpa", checkpointing)
    facts, scored = config_facts(config), rows * response
    gradients = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    found = peak_bytes(lambda: logprobs().sum().backward())
    assert training_peak(facts, run, scored) == pytest.approx(found, rel=0.1, abs=gradients)
    with torch.no_grad():
        found = peak_bytes(logprobs)
    assert inference_peak(facts, run, scored, adapted=True) == pytest.approx(found, rel=0.1)
    with torch.no_grad(), model.disable_adapter():
        found = peak_bytes(logprobs)
    assert inference_peak(facts, run, scored, adapted=False) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_attention_is_planned_with_its_scores(dtype: str) -> None:
    model = policy(llava(), dtype, attention="eager")
    inputs = batch(3, 120, 24)
    features = seen(model, pictures(3))
    with torch.no_grad():
        found = peak_bytes(lambda: last_hidden(model, inputs.input_ids, features))
    run = planned(dtype, dtype, (3, 120), "eager", False)
    assert inference_peak(config_facts(llava()), run, adapted=True) == pytest.approx(
        found, rel=0.03
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_counted_one_by_one(dtype: str) -> None:
    model, facts = policy(llava(), dtype), config_facts(llava())
    frozen = [value for value in model.parameters() if not value.requires_grad]
    trained = [value for value in model.parameters() if value.requires_grad]
    assert facts.parameters == sum(value.numel() for value in frozen)
    assert facts.lora_parameters(LORA) == sum(value.numel() for value in trained)


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    """DeepSpeed in a process group of one."""
    module = import_deepspeed("cpu")
    join_process_group(
        module, device="cpu", rank=0, world_size=1, addr="127.0.0.1", port=free_port()
    )
    return module


def held() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process still uses."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter)]
    return {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors
    }


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"),
        (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"),
    ],
)  # fmt: skip
def test_deepspeed_holds_what_is_planned(deepspeed: ModuleType, stage: int, dtype: str) -> None:
    """Adapter, masters, moments and gradients between steps; and the most that a step takes."""
    gc.collect()  # of earlier engines
    base = frozen(llava(), dtype)
    before = held()
    model = attach_lora(base, LORA.model_copy(update={"r": 128}), 0)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    engine = LoraEngine(
        model, deepspeed, PpoConfig(zero_stage=stage), dtype=dtype, rank=0, world_size=1
    )
    ids = torch.randint(IMAGE + 1, 300, (1, 4))

    def loss() -> Tensor:
        return engine.run(
            lambda model: (
                base_of(model)
                .model.language_model(input_ids=ids, use_cache=False)
                .last_hidden_state.float()
                .sum()
            )
        )

    engine.step([loss, loss], 1e-4)
    state = deepspeed_state(trained, stage=stage, ranks=1, width=2 if dtype == "bfloat16" else 4)
    found = sum(held().values()) - sum(before.values())
    assert state.adapters + state.kept == pytest.approx(found, rel=0.02)
    peak = peak_bytes(lambda: engine.step([loss, loss], 1e-4))
    assert max(state.step, state.backward) == pytest.approx(peak, rel=0.1)
    engine._engine.destroy()


def test_the_reduction_bucket_is_as_large_as_what_is_trained() -> None:
    def bucket(trained: int) -> int:
        settings = deepspeed_config(
            zero_stage=2, micro_batch=1, max_grad_norm=1.0, dtype="bfloat16", trained=trained
        )
        return int(settings["zero_optimization"]["reduce_bucket_size"])

    assert bucket(1234) == 1234
    assert bucket(2 * ZERO_BUCKET) == ZERO_BUCKET


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_vision_tower_is_planned_with_all_its_hidden_states(dtype: str) -> None:
    config = llava()
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 96, 384
    config.vision_config.image_size = 112
    model = policy(config, dtype)
    pixels = torch.randn(6, 3, 112, 112)
    found = peak_bytes(lambda: seen(model, pixels))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert vision_peak(config_facts(config), 6, width) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("projector", [False, True])
def test_what_zero_3_divides_is_what_is_left_among_the_modules(projector: bool) -> None:
    """Of a 7B over four ranks; a billion parameters at most are gathered at a time."""
    config = LlavaConfig()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    facts = config_facts(config)
    set_vision_aside(model, projector=not projector)
    divided = sum(value.numel() for value in model.parameters())
    expected = facts.parameters - divided + -(-divided // 4) + 10**9
    assert sharded_weights(facts, 4, 2, projector=projector) == 2 * expected
    assert sharded_weights(facts, 1, 2, projector=projector) == 2 * facts.parameters
