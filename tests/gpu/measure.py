"""What a CPU cannot tell, on one GPU of 80 GB or more, in at most eight minutes:

    PYTHONPATH=. python tests/gpu/measure.py            # H100, H200; figures also in $OUT/gpu.json
    PYTHONPATH=. python tests/gpu/measure.py --small    # all of its logic at tiny size on the CPU

Needs torch, transformers and peft, for the memory plan pydantic, yaml and rich too. Random weights
of the shape of LLaVA-1.5-7B are made on the device, nothing is downloaded. Each section has a share
of the time; one that fails or comes too late is reported, the others go on, the exit code is 1.

- learner: a PPO step with LoRA r 64 with and without gradient checkpointing; tokens/s, MFU, memory.
- reference: reference log-probs, values and a step of the value model, on one backbone.
- scoring: three kinds as adapters that take turns on one base, against three merged models.
- adapters: which share of an update survives being merged, and being served unmerged, by learning
  rate, and what merging loses of its effect on log-probs; beside it, how far log-probs move when
  only the batch is another.
- zero off: bfloat16 AdamW without the float32 masters that ZeRO keeps, against float32.
- memory: what the memory plan says that each role takes of a device, against what it took.
- constants: what the plan's constants ``_GPU_...`` are on this device.

MFU is model FLOPs over time and the device's dense bfloat16 peak. Model FLOPs of one step, for L
tokens of a sequence (7B: 576 of the image, 64, 896) of which T (896) are scored, width D, N frozen
linear weights, n LoRA weights:

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
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fgaif.lvlm.arrival import arrived, factor_sums, lora_update, merged_sums
from fgaif.lvlm.families.base import ImageFeatures, join_features
from fgaif.lvlm.families.llava import LLAVA, image_token_count
from fgaif.lvlm.inputs import EncodedBatch
from fgaif.lvlm.logprobs import gather_hidden, hidden_logprobs, response_logprobs
from fgaif.lvlm.model import (
    attach_lora,
    image_features,
    last_hidden,
    without_dropout,
)
from fgaif.ppo.losses import policy_loss, value_loss
from fgaif.reward.model import RewardModel, SharedRewardModels, make_head
from fgaif.types import DEFAULT_KINDS

# Dense bfloat16 peaks by the vendors' data sheets, by what the device's name contains.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
RATES = (1e-7, 1e-6, 1e-5, 3e-5)
UPDATES = 216  # 54 steps of 2 epochs and 2 minibatches, as the shipped configurations make
ALPHA = 16.0
IMAGE_ID = 5
SEGMENT_TOKENS = 28

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a LLaVA and of the sequences that it is measured on; by default LLaVA-1.5-7B's."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    ffn: int = 11008
    vocab: int = 32064
    vision_width: int = 1024
    vision_layers: int = 24
    image_size: int = 336
    prompt: int = 64  # as the memory plan assumes
    response: int = 896
    r: int = 64
    alpha: float = ALPHA
    dropout: float = 0.0

    def config(self) -> LlavaConfig:
        """The architecture: CLIP with 14-pixel patches, two-layer projector, Llama."""
        wide = self.vision_width
        vision = CLIPVisionConfig(
            hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=self.vision_layers,
            num_attention_heads=wide // 64, image_size=self.image_size, patch_size=14,
            projection_dim=wide,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            max_position_embeddings=4096, tie_word_embeddings=False,
        )  # fmt: skip
        return LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_ID,
            tie_word_embeddings=False,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens of a sequence: image, prompt, response."""
        return image_token_count(self.config()) + self.prompt + self.response


LLAVA_7B = Shape()
MIDDLE = Shape(
    width=1024, layers=8, heads=8, ffn=2816, vision_width=256, vision_layers=4, response=256, r=16
)
TINY = Shape(
    width=64, layers=2, heads=2, ffn=128, vocab=96, vision_width=64, vision_layers=2,
    image_size=28, response=12, r=4,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Bench:
    """Where and how much is measured; ``until`` is the time at which the section should be over."""

    device: str
    dtype: torch.dtype
    shape: Shape
    middle: Shape
    repeats: int = 5
    sizes: tuple[int, ...] = (8, 4, 2, 1)
    until: float = math.inf
    peaks: list[Row] = field(default_factory=list)
    host_before: float | None = field(default_factory=lambda: resident_gib())

    @property
    def on_gpu(self) -> bool:
        """Whether there is device memory to measure."""
        return self.device == "cuda"

    def name(self) -> str:
        """The GPU's name, or ``cpu``."""
        return torch.cuda.get_device_name() if self.on_gpu else self.device

    def peak_flops(self) -> float | None:
        """Dense bfloat16 peak of the device; None if the table does not hold it."""
        return next((peak for part, peak in PEAK_FLOPS.items() if part in self.name()), None)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Give freed memory back and start counting peak memory anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> Row:
        """The device's memory in GiB since ``reset_peak``; None each on the CPU.

        ``held_gib`` is allocated now, ``peak_gib`` was at once, ``reserved_gib`` is the most that
        torch's allocator took for it. ``context_gib`` is what is gone of the device beside that:
        the CUDA context and its libraries, if nobody else uses the device.
        """
        names = ("held_gib", "peak_gib", "reserved_gib", "context_gib")
        if not self.on_gpu:
            return dict.fromkeys(names)
        free, total = torch.cuda.mem_get_info()
        figures = (
            torch.cuda.memory_allocated(),
            torch.cuda.max_memory_allocated(),
            torch.cuda.max_memory_reserved(),
            total - free - torch.cuda.memory_reserved(),
        )
        return {name: value / 2**30 for name, value in zip(names, figures, strict=True)}

    def seconds(self, action: Callable[[], object]) -> float:
        """Median time of ``action`` after one run to warm up; once only where time is over."""
        times = []
        for index in range(self.repeats + 1):
            self.synchronize()
            started = time.perf_counter()
            action()
            self.synchronize()
            if index:
                times.append(time.perf_counter() - started)
            if times and time.perf_counter() > self.until:
                break
        return statistics.median(times)


def resident_gib() -> float | None:
    """What this process holds on the host; None where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def build(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """Make the frozen model on the device, weight by weight in ``dtype``: no copy on the host."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            shape.config(), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def trainable(shape: Shape, device: str, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
    """The policy as the learner holds it: frozen base, LoRA in the training dtype."""
    base = build(shape, device, dtype)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return attach_lora(base, shape, seed=0).to(dtype).train()  # type: ignore[arg-type]


def make_batch(shape: Shape, size: int, device: str, dtype: torch.dtype) -> EncodedBatch:
    """Random images, prompts and responses, all of the same length: nothing is padding."""
    generator = torch.Generator().manual_seed(1)
    start = shape.length - shape.response
    ids = torch.randint(IMAGE_ID + 1, shape.vocab, (size, shape.length), generator=generator)
    ids[:, 1 : 1 + start - shape.prompt] = IMAGE_ID
    positions = torch.arange(start - 1, shape.length - 1).expand(size, -1)
    return EncodedBatch(
        input_ids=ids.to(device),
        positions=positions.to(device),
        targets=ids[:, start:].to(device),
        mask=torch.ones(size, shape.response, dtype=torch.bool, device=device),
    )


def see(model: nn.Module, shape: Shape, size: int) -> ImageFeatures:
    """Features of random images, in the dtype and on the device of the model."""
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(2)
    side = shape.image_size
    pixels = torch.randn(size, 1, 3, side, side, generator=generator).to(weight)
    return join_features(image_features(model, [{"pixel_values": each} for each in pixels]))


def linear_weights(shape: Shape) -> tuple[int, int]:
    """Weights of the language model's linear layers, and of the LoRA on all of them."""
    width, ffn = shape.width, shape.ffn
    base = shape.layers * (4 * width * width + 3 * width * ffn)
    return base, shape.layers * shape.r * (4 * (width + width) + 3 * (width + ffn))


def step_flops(shape: Shape, sequences: int) -> float:
    """Model FLOPs of a learner step by the formula in this module's docstring."""
    base, lora = linear_weights(shape)
    length, width = shape.length, shape.width
    linear = (4 * base + 6 * lora) * length
    unneeded = 3 * 2 * (width * width + shape.r * width) * length
    attention = shape.layers * 6 * length**2 * width
    head = 4 * shape.vocab * width * shape.response
    return float(sequences * (linear - unneeded + attention + head))


class MasterAdamW:
    """AdamW on float32 masters of low-precision parameters, as DeepSpeed's ZeRO keeps them."""

    def __init__(self, model: nn.Module, lr: float, *, masters: bool = True) -> None:
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        own = [nn.Parameter(value.detach().float()) for value in self._parameters]
        self.masters = own if masters else self._parameters
        fused = self._parameters[0].device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and clear the gradients."""
        for master, value in zip(self.masters, self._parameters, strict=True):
            if master is not value:
                assert value.grad is not None
                master.grad, value.grad = value.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.masters is not self._parameters:
            torch._foreach_copy_(self._parameters, self.masters)


def learner_step(
    model: nn.Module, optimizer: MasterAdamW, batch: EncodedBatch, features: ImageFeatures
) -> Tensor:
    """One PPO optimiser step on a whole minibatch; returns the loss."""
    logprobs = response_logprobs(model, batch, temperature=1.0, features=features)
    advantages = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    loss = policy_loss(
        logprobs, logprobs.detach(), advantages, batch.mask.float(),
        clip=0.2, num_valid_tokens=float(logprobs.numel()),
    )  # fmt: skip
    loss.backward()
    optimizer.step()
    return loss.detach()


def learner(bench: Bench) -> list[Row]:
    """Time the step at the largest batch that fits into memory, without and with checkpointing."""
    rows = [learner_row(bench, checkpointing) for checkpointing in (False, True)]
    bench.peaks += [{"role": "learner", "shared": False, **row} for row in rows]
    return rows


def learner_row(bench: Bench, checkpointing: bool) -> Row:
    """Figures of the learner's step; its model is gone afterwards."""
    bench.reset_peak()
    shape = bench.shape
    model = trainable(shape, bench.device, bench.dtype, checkpointing=checkpointing)
    optimizer = MasterAdamW(model, lr=1e-6)

    def prepare(size: int) -> Callable[[], object]:
        batch = make_batch(shape, size, bench.device, bench.dtype)
        features = see(model, shape, size)
        return lambda: learner_step(model, optimizer, batch, features)

    size, seconds = largest(bench, prepare, model)
    rate, peak = step_flops(shape, size) / seconds, bench.peak_flops()
    return {
        "checkpointing": checkpointing,
        "batch": size,
        "length": shape.length,
        "seconds": seconds,
        "tokens_per_second": size * shape.length / seconds,
        "model_tflops": rate / 1e12,
        "mfu": peak and rate / peak,
        **bench.memory(),
    }


def largest(
    bench: Bench, prepare: Callable[[int], Callable[[], object]], model: nn.Module
) -> tuple[int, float]:
    """Batch size and seconds of the first of ``bench.sizes`` whose action fits."""
    for size in bench.sizes:
        bench.reset_peak()
        try:
            return size, bench.seconds(prepare(size))
        except torch.OutOfMemoryError:
            model.zero_grad()
    raise RuntimeError(f"not even a batch of {bench.sizes[-1]} fits into the device's memory")


def reference(bench: Bench) -> list[Row]:
    """What the reference role does with a batch, gradient checkpointing on, as its actor does it.

    Reference log-probs with the adapter off, values with it, one AdamW step of the values in
    float32.
    """
    shape = bench.shape
    base = build(shape, bench.device, bench.dtype)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_lora(base, shape, seed=0)  # type: ignore[arg-type]
    without_dropout(model)
    head = nn.Linear(shape.width, 1, device=bench.device)
    trained = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)

    def values(batch: EncodedBatch, features: ImageFeatures) -> Tensor:
        hidden = last_hidden(model, batch.input_ids, features)
        return head(gather_hidden(hidden, batch.positions).float())[..., 0]

    def work(batch: EncodedBatch, features: ImageFeatures) -> None:
        with torch.no_grad():
            with model.disable_adapter():
                hidden = last_hidden(model, batch.input_ids, features)
                hidden_logprobs(model, hidden, batch, temperature=1.0)
                del hidden
            old = values(batch, features)
        loss = value_loss(
            values(batch, features), old, old + 1, batch.mask.float(),
            clip=0.2, num_valid_tokens=float(old.numel()),
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prepare(size: int) -> Callable[[], object]:
        batch = make_batch(shape, size, bench.device, bench.dtype)
        features = see(model, shape, size)
        return lambda: work(batch, features)

    size, seconds = largest(bench, prepare, model)
    row = {
        "batch": size,
        "length": shape.length,
        "seconds": seconds,
        "ms_per_response": 1e3 * seconds / size,
        **bench.memory(),
    }
    bench.peaks.append({"role": "reference", "shared": False, "checkpointing": True, **row})
    return [row]


def shared_models(base: nn.Module, shape: Shape) -> SharedRewardModels:
    """All kinds on one base, each an adapter and a head, in the base's dtype."""
    lora = PeftLoraConfig(r=shape.r, lora_alpha=shape.alpha, target_modules=LLAVA.lora_targets)
    first, *rest = DEFAULT_KINDS
    # PEFT would keep adapters of a bfloat16 base in float32 and cast at every layer.
    model = get_peft_model(base, lora, adapter_name=first, autocast_adapter_dtype=False)
    for kind in rest:
        model.add_adapter(kind, lora, autocast_adapter_dtype=False)
    heads = [new_head(base, shape) for _ in DEFAULT_KINDS]
    return SharedRewardModels(model, DEFAULT_KINDS, heads).eval().requires_grad_(False)


def new_head(base: nn.Module, shape: Shape) -> nn.Module:
    """A linear head where the base is, in its dtype."""
    weight = base.get_input_embeddings().weight
    return make_head("linear", shape.width).to(weight.device, weight.dtype)


def segment_ends(shape: Shape, size: int, device: str) -> Tensor:
    """Separators (N, 2) as (row, column), every ``SEGMENT_TOKENS`` tokens of each response."""
    first = shape.length - shape.response
    columns = range(min(first + SEGMENT_TOKENS, shape.length) - 1, shape.length, SEGMENT_TOKENS)
    return torch.tensor([(row, column) for row in range(size) for column in columns], device=device)


@torch.no_grad()
def scoring(bench: Bench) -> list[Row]:
    """Time three kinds on three merged models and on a shared base, which sees images once.

    A separator follows every ``SEGMENT_TOKENS`` tokens of a response. Merged models differ in their
    weights only, so one of them is run three times for the time and counted three times for the
    weights; peaks are of one.
    """
    shape, size, rows = bench.shape, bench.sizes[0], []
    shape = replace(shape, response=shape.response + shape.response // SEGMENT_TOKENS)
    base = build(shape, bench.device, bench.dtype)
    batch = make_batch(shape, size, bench.device, bench.dtype)
    ends = segment_ends(shape, size, bench.device)
    merged = RewardModel(base, new_head(base, shape)).eval()

    def score(model: nn.Module) -> None:
        model(batch.input_ids, see(base, shape, size), ends)

    for layout, copies in (("three merged", len(DEFAULT_KINDS)), ("one shared base", 1)):
        model = merged if copies > 1 else shared_models(base, shape)
        bench.reset_peak()
        seconds = bench.seconds(lambda: [score(model) for _ in range(copies)])  # noqa: B023
        weights = sum(value.nbytes for value in model.parameters()) / 2**30
        rows.append(
            {
                "layout": layout,
                "batch": size,
                "length": shape.length,
                "ms_per_response": 1e3 * seconds / size,
                "weights_gib": copies * weights,
                **bench.memory(),
            }
        )
        one = {"role": "reward", "shared": copies == 1, "checkpointing": False}
        bench.peaks.append(one | rows[-1])
    return rows


@torch.no_grad()
def adapters(bench: Bench) -> list[Row]:
    """What of an update survives being added to the weights in the model's dtype, by rate.

    An update as ``UPDATES`` Adam steps under a cosine make it at most: |B| = rate x updates / 2
    with random signs. ``kept`` is <merged - W, D> / <D, D> over all layers, ``kept_least`` that of
    the worst; ``unmerged`` and ``unmerged_least`` the same of an engine that holds the factors, B
    times the scaling, in its dtype. ``effect`` is the mean |log-prob difference| that the unmerged
    adapter makes, ``lost`` that between merged and unmerged, ``noise`` that between one base in
    batches of another size.
    """
    shape, device = bench.shape, bench.device
    model = trainable(shape, device, bench.dtype, checkpointing=False).eval()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_B")}
    batch = make_batch(shape, 2, device, bench.dtype)
    first = EncodedBatch(**{key: value[:1] for key, value in asdict(batch).items()})
    features = see(model, shape, 2)
    half = ImageFeatures(rows=features.rows[: len(features.rows) // 2])
    base = response_logprobs(model, batch, temperature=1.0, features=features)
    alone = response_logprobs(model, first, temperature=1.0, features=half)
    noise = (alone - base[:1]).abs().mean().item()
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    rows = []
    for rate in RATES:
        generator = torch.Generator(device).manual_seed(2)
        served = {}
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            signs = torch.randint(0, 2, b.shape, generator=generator, device=device) * 2 - 1
            published, scaling = signs * (rate * UPDATES / 2), layer.scaling["default"]
            b.copy_(published)
            held = (b * scaling).to(bench.dtype)
            served[name] = factor_sums(a, published, a.to(bench.dtype), held, scaling)
        unmerged = response_logprobs(model, batch, temperature=1.0, features=features)
        sums = {}
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            update = lora_update(a, b, layer.scaling["default"])
            layer.weight.copy_(weights[name].float() + update)
            sums[name] = merged_sums(weights[name], layer.weight, update)
        with model.disable_adapter():
            merged = response_logprobs(model, batch, temperature=1.0, features=features)
        for name, layer in layers.items():
            layer.weight.copy_(weights[name])
        rows.append(
            {
                "rate": rate,
                "kept": arrived(sums).share,
                "kept_least": arrived(sums).weakest,
                "unmerged": arrived(served).share,
                "unmerged_least": arrived(served).weakest,
                "effect": (unmerged - base).abs().mean().item(),
                "lost": (merged - unmerged).abs().mean().item(),
                "noise": noise,
            }
        )
    return rows


def zero_off(bench: Bench, updates: int = 16, lr: float = 3e-5) -> list[Row]:
    """Share of the float32 update of LoRA's A and B that bfloat16 keeps, with and without masters.

    The same rounded start and batch for all, so that only the steps differ; ``kept`` is the
    projection on the float32 update, over all layers.
    """
    shape, device = bench.middle, bench.device
    moved: dict[str, list[Tensor]] = {}
    for label, dtype, masters in (
        ("float32", torch.float32, False),
        ("bfloat16, float32 masters", torch.bfloat16, True),
        ("bfloat16 alone", torch.bfloat16, False),
    ):
        model = trainable(shape, device, torch.bfloat16, checkpointing=False).to(dtype)
        optimizer = MasterAdamW(model, lr, masters=masters)
        start = [value.detach().clone().float() for value in optimizer.masters]
        batch = make_batch(shape, 2, device, dtype)
        features = see(model, shape, 2)
        for _ in range(updates):
            learner_step(model, optimizer, batch, features)
        moved[label] = [
            value.detach().float() - old
            for value, old in zip(optimizer.masters, start, strict=True)
        ]
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    wanted = moved.pop("float32")

    def kept(found: list[Tensor], factor: str) -> float:
        rows = [i for i, name in enumerate(names) if factor in name]
        norm = sum(wanted[i].square().sum().item() for i in rows)
        return sum((found[i] * wanted[i]).sum().item() for i in rows) / norm

    return [
        {"optimiser": label, "kept_A": kept(found, "lora_A"), "kept_B": kept(found, "lora_B")}
        for label, found in moved.items()
    ]


def device(bench: Bench) -> list[Row]:
    """The device, and what a large matrix product reaches there: the practical ceiling."""
    n = 8192 if bench.on_gpu else 64
    left, right = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    peak = bench.peak_flops()
    return [
        {
            "name": bench.name(),
            "torch": torch.__version__,
            "peak_tflops": peak and peak / 1e12,
            "matmul_tflops": 2 * n**3 / bench.seconds(lambda: left @ right) / 1e12,
        }
    ]


def memory(bench: Bench) -> list[Row]:
    """The memory plan of each role that was measured, beside what it took of the device.

    ``planned_gib`` is the plan's all: with its constants for the CUDA context and fragments.
    ``took_gib`` is context and reserved memory. ``planned_beyond_gib`` are the plan's activations
    without fragments, ``beyond_gib`` is the peak beyond what is held between steps.
    """
    try:  # the plan reads configurations, the other sections do without
        import cluster.memory.actors as plan
    except ImportError as error:
        return [{"skipped": f"the memory plan needs {error.name}"}]

    rows = []
    for measured in bench.peaks:
        planned = planned_memory(bench, measured)
        activations = planned.activations / (1 + plan._GPU_FRAGMENTS)
        took = beyond = None
        if bench.on_gpu:
            took = measured["context_gib"] + measured["reserved_gib"]
            beyond = measured["peak_gib"] - measured["held_gib"]
        rows.append(
            {
                "role": measured["role"],
                "shared": measured["shared"],
                "checkpointing": measured["checkpointing"],
                "batch": measured["batch"],
                "planned_gib": planned.total / 2**30,
                "took_gib": took,
                "planned_over_took": took and planned.total / 2**30 / took,
                "planned_beyond_gib": activations / 2**30,
                "beyond_gib": beyond,
            }
        )
    return rows


def planned_memory(bench: Bench, measured: Row) -> Any:
    """The plan's ``ActorMemory`` of a role on a GPU as it was measured here.

    The learner's optimiser is this script's, not DeepSpeed's: gradients in the model's dtype, and
    in float32 masters and two moments.
    """
    from cluster.memory.actors import actor_memory
    from fgaif.config import LoraConfig, parse_config
    from fgaif.lvlm.sizes import config_facts

    shape, size, width = bench.shape, measured["batch"], bench.dtype.itemsize
    lora = {"r": shape.r, "alpha": shape.alpha}
    config = parse_config(
        {
            "policy": {
                "model": "measured",
                "dtype": str(bench.dtype).removeprefix("torch."),
                "gradient_checkpointing": measured["checkpointing"],
                "lora": lora,
                "max_new_tokens": shape.response,
            },
            "ppo": {
                "micro_batch": size,
                "minibatch": size,
                "rollout_batch": size,
                "zero_stage": 1,
                "value_lora": lora,
            },
            "reward": {"micro_batch": size, "batch_size": size, "zero_stage": 1, "lora": lora},
            "segment": {"min_words": SEGMENT_TOKENS},
            "cluster": {"reward": {"shared": measured["shared"]}},
        }
    )
    facts = config_facts(shape.config())
    planned = actor_memory(
        measured["role"], config, {"measured": facts}, gpu=None, on_gpu=True
    )  # fmt: skip
    if measured["role"] != "learner":
        return planned
    trained = facts.lora_parameters(LoraConfig(**lora))
    return replace(planned, optimizer=(width + 12) * trained)


def constants(bench: Bench) -> list[Row]:
    """The plan's constants for GPUs, and what they are by the roles measured here.

    Context and host: the largest found, in GiB. Fragments: what the allocator reserved beyond its
    peak, as a share of the peak beyond what is held between steps; the largest of the roles.
    """
    try:
        import cluster.memory.actors as plan
    except ImportError as error:
        return [{"skipped": f"the memory plan needs {error.name}"}]
    found: dict[str, float | None] = dict.fromkeys(("context", "fragments", "host"))
    now = resident_gib()
    if bench.on_gpu and bench.peaks:
        found["context"] = max(row["context_gib"] for row in bench.peaks)
        found["fragments"] = max(
            (row["reserved_gib"] - row["peak_gib"]) / (row["peak_gib"] - row["held_gib"])
            for row in bench.peaks
        )
        if now is not None and bench.host_before is not None:
            found["host"] = now - bench.host_before
    return [
        {
            "constant": "_GPU_CONTEXT, GiB",
            "planned": plan._GPU_CONTEXT / 2**30,
            "measured": found["context"],
        },
        {
            "constant": "_GPU_FRAGMENTS",
            "planned": plan._GPU_FRAGMENTS,
            "measured": found["fragments"],
        },
        {
            "constant": "_GPU_HOST, GiB",
            "planned": plan._GPU_HOST / 2**30,
            "measured": found["host"],
        },
    ]


SECTIONS: dict[str, tuple[float, Callable[[Bench], list[Row]]]] = {
    "device": (20, device),
    "learner": (140, learner),
    "reference": (60, reference),
    "scoring": (80, scoring),
    "adapters": (90, adapters),
    "zero off": (50, zero_off),
    "memory": (10, memory),
    "constants": (5, constants),
}
"""Seconds and what is done in them; together less than eight minutes."""


def run(bench: Bench, sections: dict[str, tuple[float, Callable[[Bench], list[Row]]]]) -> Row:
    """Do the sections in turn; the figures of each, or ``{"error": ...}``."""
    figures: Row = {"shape": asdict(bench.shape) | {"length": bench.shape.length}}
    end = time.perf_counter() + sum(seconds for seconds, _ in sections.values())
    for title, (seconds, section) in sections.items():
        started = time.perf_counter()
        bench.until = min(end, started + seconds)
        try:
            if started > end:
                raise TimeoutError("no time was left for it")
            figures[title] = section(bench)
            print(f"\n{title} ({time.perf_counter() - started:.0f} s)\n{table(figures[title])}")
        except Exception as error:
            traceback.print_exc()
            figures[title] = {"error": repr(error)}
            print(f"\n{title}: FAILED: {error!r}", flush=True)
        bench.reset_peak()
    return figures


def table(rows: list[Row]) -> str:
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


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write JSON; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    out = Path(os.environ["OUT"]) / "gpu.json" if "OUT" in os.environ else None
    parser.add_argument("--json", type=Path, default=out, help="default: $OUT/gpu.json")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    if options.small:
        bench = Bench(
            device="cpu", dtype=dtype, shape=TINY, middle=TINY, repeats=1, sizes=(2, 1)
        )  # fmt: skip
    elif torch.cuda.is_available():
        bench = Bench(device="cuda", dtype=dtype, shape=LLAVA_7B, middle=MIDDLE)
    else:
        parser.error("no CUDA device; --small runs the same at tiny size on the CPU")
    figures = run(bench, SECTIONS)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(any("error" in value for value in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
