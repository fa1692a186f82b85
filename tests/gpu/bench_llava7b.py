"""Speed and memory of a LLaVA-1.5-7B-shaped policy on one GPU, with random weights.

    PYTHONPATH=. python tests/gpu/bench_llava7b.py [--device cuda] [--shape 7b] [--json FILE]

Needs torch, transformers, peft and what ``import fgaif`` needs; nothing is downloaded. It prints

- the learner's step (forward, backward, AdamW on LoRA r 64) with and without gradient
  checkpointing: tokens/s, MFU and peak memory;
- scoring of the three kinds on one shared base (an adapter pass each, image features once)
  against three models with merged adapters (a pass each, image features each time);
- token log-probabilities in bfloat16 against float32 on a small model.

MFU is model FLOPs over time and the device's dense bfloat16 peak. Model FLOPs of one step, for L
tokens of a sequence of which T are scored, width D, N frozen linear weights, n LoRA weights:

    forward   2 (N + n) L + 2 V D T + 2 L^2 D per layer (causal: half of the square)
    backward  2 N L       activations only: the base is frozen
              4 n L       activations and weights of the adapter
              2 V D T     activations of the frozen head
              4 L^2 D     per layer

less the activation gradients that nobody needs, those of the first layer's q, k and v inputs. What
gradient checkpointing or the chunked head computes twice counts as time, not as model FLOPs. Image
features are computed once per image, outside the step, as the learner does.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fgaif.config import LoraConfig
from fgaif.lvlm.inputs import EncodedBatch, image_token_count
from fgaif.lvlm.logprobs import response_logprobs
from fgaif.lvlm.model import LORA_TARGETS, attach_lora, image_features
from fgaif.ppo.losses import policy_loss
from fgaif.reward.model import RewardModel, SharedRewardModels, make_head
from fgaif.types import KINDS

# Dense bfloat16 peaks by the vendors' data sheets, by what the device's name contains.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
IMAGE_ID = 5
SEGMENT_TOKENS = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a LLaVA and of the sequences that it is measured on."""

    width: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    vision_width: int
    vision_layers: int
    image_size: int
    prompt: int
    response: int
    lora_r: int

    def config(self) -> LlavaConfig:
        """The architecture: CLIP with 14-pixel patches, two-layer projector, Llama."""
        vision = CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=max(1, self.vision_width // 64),
            image_size=self.image_size,
            patch_size=14,
            projection_dim=self.vision_width,
        )
        text = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_ID,
            tie_word_embeddings=False,
        )

    @property
    def length(self) -> int:
        """Tokens of a sequence: image, prompt, response."""
        return image_token_count(self.config()) + self.prompt + self.response


SHAPES = {
    "7b": Shape(
        width=4096,
        layers=32,
        heads=32,
        ffn=11008,
        vocab=32064,
        vision_width=1024,
        vision_layers=24,
        image_size=336,
        prompt=128,
        response=896,
        lora_r=64,
    ),
    "small": Shape(
        width=1024,
        layers=8,
        heads=8,
        ffn=2816,
        vocab=32064,
        vision_width=256,
        vision_layers=4,
        image_size=336,
        prompt=128,
        response=256,
        lora_r=16,
    ),
    "tiny": Shape(
        width=64,
        layers=2,
        heads=2,
        ffn=128,
        vocab=96,
        vision_width=64,
        vision_layers=2,
        image_size=28,
        prompt=8,
        response=12,
        lora_r=4,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """One learner step. Peak memory is None on the CPU, MFU None where the peak is unknown."""

    gradient_checkpointing: bool
    batch: int
    seconds: float
    tokens_per_second: float
    model_tflops: float
    mfu: float | None
    peak_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpeed:
    """Scoring all three kinds, in milliseconds per response, and the weights it keeps, in GiB."""

    layout: str
    batch: int
    ms_per_response: float
    weights_gib: float
    peak_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """|log p(bfloat16) - log p(float32)| over response tokens of the same weights."""

    tokens: int
    mean: float
    max: float


def build(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Make the frozen model on the device, weight by weight in ``dtype``: no copy on the host."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            shape.config(), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def make_batch(shape: Shape, size: int, device: str, dtype: torch.dtype) -> EncodedBatch:
    """Random images, prompts and responses, all of the same length: nothing is padding."""
    generator = torch.Generator().manual_seed(1)
    start = shape.length - shape.response
    ids = torch.randint(IMAGE_ID + 1, shape.vocab, (size, shape.length), generator=generator)
    ids[:, 1 : 1 + start - shape.prompt] = IMAGE_ID
    side = shape.image_size
    positions = torch.arange(start - 1, shape.length - 1).expand(size, -1)
    return EncodedBatch(
        input_ids=ids.to(device),
        pixel_values=torch.randn(size, 3, side, side, generator=generator).to(device, dtype),
        positions=positions.to(device),
        targets=ids[:, start:].to(device),
        mask=torch.ones(size, shape.response, dtype=torch.bool, device=device),
    )


def linear_weights(shape: Shape) -> tuple[int, int]:
    """Weights of the language model's linear layers, and of the LoRA on all of them."""
    width, ffn = shape.width, shape.ffn
    base = shape.layers * (4 * width * width + 3 * width * ffn)
    return base, shape.layers * shape.lora_r * (4 * (width + width) + 3 * (width + ffn))


def step_flops(shape: Shape, sequences: int) -> float:
    """Model FLOPs of a learner step by the formula in this module's docstring."""
    base, lora = linear_weights(shape)
    length, width = shape.length, shape.width
    linear = (4 * base + 6 * lora) * length
    unneeded = 3 * 2 * (width * width + shape.lora_r * width) * length
    attention = shape.layers * 6 * length**2 * width
    head = 4 * shape.vocab * width * shape.response
    return float(sequences * (linear - unneeded + attention + head))


class MasterAdamW:
    """AdamW on float32 masters of low-precision parameters, as DeepSpeed keeps them."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self._parameters = parameters
        self._masters = [nn.Parameter(value.detach().float()) for value in parameters]
        fused = parameters[0].device.type == "cuda"
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and clear the gradients."""
        for master, value in zip(self._masters, self._parameters, strict=True):
            assert value.grad is not None
            master.grad = value.grad.float()
            value.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        torch._foreach_copy_(self._parameters, self._masters)


def learner_step(
    model: nn.Module, optimizer: MasterAdamW, batch: EncodedBatch, features: Tensor
) -> Tensor:
    """One PPO optimiser step on a whole minibatch; returns the loss."""
    logprobs = response_logprobs(model, batch, temperature=1.0, features=features)
    advantages = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    loss = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        batch.mask.float(),
        clip=0.2,
        num_valid_tokens=float(logprobs.numel()),
    )
    loss.backward()
    optimizer.step()
    return loss.detach()


def trainable(shape: Shape, device: str, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
    """The policy as the learner holds it: frozen base, LoRA in the training dtype."""
    base = build(shape, device, dtype)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_lora(base, LoraConfig(r=shape.lora_r, alpha=16.0), seed=0)
    return model.to(dtype).train()


def step_seconds(
    model: nn.Module, optimizer: MasterAdamW, shape: Shape, size: int, device: str, repeats: int
) -> float | None:
    """Median time of a step on ``size`` sequences; None if the memory does not suffice."""
    reset_peak(device)
    try:
        batch = make_batch(shape, size, device, torch.bfloat16)
        features = image_features(model, batch.pixel_values)
        return median_seconds(
            lambda: learner_step(model, optimizer, batch, features), device, repeats
        )
    except torch.OutOfMemoryError:
        return None  # a smaller batch is the answer; leaving this frame frees what was made


def measure_step(
    shape: Shape,
    device: str,
    *,
    checkpointing: bool,
    peak: float | None,
    sizes: tuple[int, ...] = (8, 4, 2, 1),
    repeats: int = 5,
) -> StepSpeed:
    """Time the learner step at the largest batch of ``sizes`` that fits into memory."""
    model = trainable(shape, device, torch.bfloat16, checkpointing=checkpointing)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = MasterAdamW(parameters, lr=1e-6)
    for size in sizes:
        seconds = step_seconds(model, optimizer, shape, size, device, repeats)
        if seconds is not None:
            break
        for value in parameters:
            value.grad = None
        release()
    else:
        raise SystemExit(f"not even a batch of {sizes[-1]} fits into the memory of {device}")
    rate = step_flops(shape, size) / seconds
    return StepSpeed(
        gradient_checkpointing=checkpointing,
        batch=size,
        seconds=seconds,
        tokens_per_second=size * shape.length / seconds,
        model_tflops=rate / 1e12,
        mfu=rate / peak if peak else None,
        peak_gib=peak_gib(device),
    )


def shared_models(base: nn.Module, shape: Shape) -> SharedRewardModels:
    """All kinds on one base, each an adapter and a head, in the base's dtype."""
    lora = PeftLoraConfig(r=shape.lora_r, lora_alpha=16.0, target_modules=LORA_TARGETS)
    first, *rest = KINDS
    # PEFT would keep adapters of a bfloat16 base in float32 and cast at every layer.
    model = get_peft_model(base, lora, adapter_name=first, autocast_adapter_dtype=False)
    for kind in rest:
        model.add_adapter(kind, lora, autocast_adapter_dtype=False)
    heads = nn.ModuleDict({kind: new_head(base, shape) for kind in KINDS})
    return SharedRewardModels(model, heads).eval().requires_grad_(False)


def new_head(base: nn.Module, shape: Shape) -> nn.Module:
    """A linear head where the base is, in its dtype."""
    weight = base.get_input_embeddings().weight
    return make_head("linear", shape.width).to(weight.device, weight.dtype)


def segment_ends(shape: Shape, size: int, device: str) -> Tensor:
    """Separators (N, 2) as (row, column), every ``SEGMENT_TOKENS`` tokens of each response."""
    first = shape.length - shape.response
    columns = range(min(first + SEGMENT_TOKENS, shape.length) - 1, shape.length, SEGMENT_TOKENS)
    pairs = [(row, column) for row in range(size) for column in columns]
    return torch.tensor(pairs, device=device)


@torch.no_grad()
def measure_scoring(
    shape: Shape, device: str, *, size: int = 8, repeats: int = 5
) -> list[ScoringSpeed]:
    """Time three kinds on a shared base and on three merged models.

    Merged models differ in their weights only, so one of them is run three times for the time and
    counted three times for the memory.
    """
    base = build(shape, device, torch.bfloat16)
    batch = make_batch(shape, size, device, torch.bfloat16)
    ends = segment_ends(shape, size, device)
    merged = RewardModel(base, new_head(base, shape)).eval()

    def three_passes() -> None:
        for _ in KINDS:
            merged(batch.input_ids, image_features(base, batch.pixel_values), ends)

    reset_peak(device)
    seconds = median_seconds(three_passes, device, repeats)
    weights = weights_gib(merged)
    peak = peak_gib(device)
    rows = [
        ScoringSpeed(
            layout="three merged models",
            batch=size,
            ms_per_response=1e3 * seconds / size,
            weights_gib=3 * weights,
            peak_gib=None if peak is None else peak + 2 * weights,
        )
    ]
    shared = shared_models(base, shape)
    reset_peak(device)
    seconds = median_seconds(
        lambda: shared(batch.input_ids, image_features(base, batch.pixel_values), ends),
        device,
        repeats,
    )
    return [
        *rows,
        ScoringSpeed(
            layout="one shared base",
            batch=size,
            ms_per_response=1e3 * seconds / size,
            weights_gib=weights_gib(shared),
            peak_gib=peak_gib(device),
        ),
    ]


@torch.no_grad()
def measure_precision(shape: Shape, device: str, *, size: int = 4) -> Precision:
    """Compare token log-probs of one set of weights in both precisions.

    The weights are rounded to bfloat16 first, so only the arithmetic differs.
    """
    model = build(shape, device, torch.float32)
    exact_weights = model.to(torch.bfloat16).to(torch.float32)
    batch = make_batch(shape, size, device, torch.float32)
    exact = response_logprobs(exact_weights, batch, temperature=1.0)
    rounded = make_batch(shape, size, device, torch.bfloat16)
    error = (response_logprobs(model.to(torch.bfloat16), rounded, temperature=1.0) - exact).abs()
    return Precision(tokens=error.numel(), mean=error.mean().item(), max=error.max().item())


def median_seconds(action: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of ``action`` after two runs to warm up."""
    times = []
    for index in range(repeats + 2):
        with timer(device) as elapsed:
            action()
        if index >= 2:
            times.append(elapsed[0])
    return statistics.median(times)


@contextmanager
def timer(device: str) -> Iterator[list[float]]:
    """Time a block, waiting for the device; the list gets the seconds."""
    elapsed: list[float] = []
    synchronize(device)
    started = time.perf_counter()
    yield elapsed
    synchronize(device)
    elapsed.append(time.perf_counter() - started)


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Start counting peak memory anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Most memory allocated at once since ``reset_peak``."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def weights_gib(model: nn.Module) -> float:
    """Memory of a model's parameters."""
    return sum(value.nbytes for value in model.parameters()) / 2**30


def release() -> None:
    """Give freed device memory back, between measurements that each build their own model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured_matmul_tflops(device: str, n: int = 8192) -> float:
    """What a large bfloat16 matrix product reaches here: the practical ceiling."""
    left = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    right = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / median_seconds(lambda: left @ right, device, 10) / 1e12


def device_name(device: str) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 peak by device name; None if the table does not hold it."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def table(rows: list[dict[str, object]]) -> str:
    """Rows of equal keys as aligned text."""
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def show(value: object) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run all measurements, print tables, optionally write JSON, return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--precision-shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matmul", type=int, default=8192, help="size of the ceiling's product")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    shape, device, repeats = SHAPES[options.shape], options.device, options.repeats
    name = device_name(device)
    peak = peak_flops(name)
    figures: dict[str, object] = {
        "device": name,
        "torch": torch.__version__,
        "shape": asdict(shape) | {"length": shape.length},
        "peak_tflops": peak and peak / 1e12,
        "matmul_tflops": measured_matmul_tflops(device, options.matmul),
    }
    print(json.dumps(figures))
    steps = []
    for checkpointing in (False, True):
        speed = measure_step(shape, device, checkpointing=checkpointing, peak=peak, repeats=repeats)
        steps.append(asdict(speed))
        release()
    scoring = [asdict(row) for row in measure_scoring(shape, device, repeats=repeats)]
    release()
    precision = asdict(measure_precision(SHAPES[options.precision_shape], device))
    figures |= {"learner_step": steps, "scoring": scoring, "bf16_against_fp32": precision}
    for title, rows in (
        ("learner step", steps),
        ("scoring, three kinds", scoring),
        ("token log-probs, bfloat16 against float32", [precision]),
    ):
        print(f"\n{title}\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
