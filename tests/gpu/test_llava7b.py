"""The GPU measurements: their logic at tiny size on the CPU, their aims on a CUDA device."""

import json
from pathlib import Path

import bench_llava7b as bench
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

TINY = bench.SHAPES["tiny"]
BIG = bench.SHAPES["7b"]


@pytest.fixture(scope="module")
def tiny_step() -> bench.StepSpeed:
    return bench.measure_step(TINY, "cpu", checkpointing=False, peak=1e12, sizes=(2,), repeats=1)


def test_the_7b_shape_is_that_of_llava_15() -> None:
    """576 image tokens + 128 + 896; 6.48 billion weights in Vicuna-7B's linear layers.

    LoRA r 64: 32 layers x 64 x (4 x 8,192 + 3 x 15,104) = 159,907,840.
    """
    assert BIG.length == 1600
    assert bench.linear_weights(BIG) == (6_476_005_376, 159_907_840)


def test_counts_of_linear_weights_are_those_of_the_model() -> None:
    model = bench.trainable(TINY, "cpu", torch.float32, checkpointing=False)
    lora = sum(value.numel() for value in model.parameters() if value.requires_grad)
    base = sum(
        value.numel()
        for name, value in model.named_parameters()
        if ".language_model." in name and "_proj." in name and "lora_" not in name
    )
    assert bench.linear_weights(TINY) == (base, lora)


def test_step_flops_are_what_torch_counts() -> None:
    """Torch counts attention kernels as full squares and their backward as 5/2 of the forward.

    So attention is left out of both sides: 6 L^2 D per layer of the formula, and every operator
    of the counter that is an attention kernel.
    """
    model = bench.trainable(TINY, "cpu", torch.float32, checkpointing=False)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = bench.MasterAdamW(parameters, lr=1e-6)
    batch = bench.make_batch(TINY, 2, "cpu", torch.float32)
    features = bench.image_features(model, batch.pixel_values)
    with FlopCounterMode(display=False) as counter:
        bench.learner_step(model, optimizer, batch, features)
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(value for name, value in by_operator.items() if "attention" not in str(name))
    attention = 2 * TINY.layers * 6 * TINY.length**2 * TINY.width
    assert counted == bench.step_flops(TINY, 2) - attention


def test_a_step_moves_only_the_adapter_and_by_the_gradient() -> None:
    model = bench.trainable(TINY, "cpu", torch.bfloat16, checkpointing=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = bench.MasterAdamW(parameters, lr=1e-2)
    batch = bench.make_batch(TINY, 2, "cpu", torch.bfloat16)
    features = bench.image_features(model, batch.pixel_values)
    assert torch.isfinite(bench.learner_step(model, optimizer, batch, features))
    moved = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved
    assert all("lora_B" in name for name in moved)  # B starts at zero, so A has no gradient yet
    assert all(value.grad is None for value in parameters)


def test_gradient_checkpointing_is_on_when_asked_for() -> None:
    for wanted in (False, True):
        model = bench.trainable(TINY, "cpu", torch.float32, checkpointing=wanted)
        assert model.get_base_model().is_gradient_checkpointing is wanted


def test_step_figures_fit_together(tiny_step: bench.StepSpeed) -> None:
    tokens = 2 * TINY.length
    assert tiny_step.tokens_per_second == pytest.approx(tokens / tiny_step.seconds)
    rate = bench.step_flops(TINY, 2) / tiny_step.seconds
    assert tiny_step.mfu == pytest.approx(rate / 1e12)
    assert tiny_step.peak_gib is None


def test_a_batch_that_does_not_fit_gives_way_to_a_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = bench.learner_step

    def small_memory(
        model: torch.nn.Module, optimizer: bench.MasterAdamW, batch: bench.EncodedBatch, f: object
    ) -> torch.Tensor:
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError
        return real(model, optimizer, batch, f)

    monkeypatch.setattr(bench, "learner_step", small_memory)
    speed = bench.measure_step(
        TINY, "cpu", checkpointing=False, peak=None, sizes=(8, 4, 2, 1), repeats=1
    )
    assert (speed.batch, speed.mfu) == (2, None)


def test_segment_ends_lie_inside_the_responses() -> None:
    ends = bench.segment_ends(BIG, 2, "cpu")
    assert len(ends) == 2 * 896 // 28
    assert ends[0].tolist() == [0, 576 + 128 + 27]
    assert ends[-1].tolist() == [1, 1599]


def test_shared_adapters_have_the_dtype_of_the_base_and_take_turns() -> None:
    base = bench.build(TINY, "cpu", torch.bfloat16)
    shared = bench.shared_models(base, TINY)
    lora = {name: value for name, value in shared.named_parameters() if "lora_" in name}
    assert {value.dtype for value in lora.values()} == {torch.bfloat16}
    with torch.no_grad():
        for name, value in lora.items():
            if "lora_B.attribute" in name:
                value.fill_(0.5)
    for kind in bench.KINDS:
        shared.heads[kind].load_state_dict(shared.heads["object"].state_dict())
    batch = bench.make_batch(TINY, 2, "cpu", torch.bfloat16)
    features = bench.image_features(base, batch.pixel_values)
    with torch.no_grad():
        logits = shared(batch.input_ids, features, bench.segment_ends(TINY, 2, "cpu"))
    by_kind = dict(zip(bench.KINDS, logits.unbind(1), strict=True))
    assert torch.equal(by_kind["object"], by_kind["relation"])
    assert not torch.equal(by_kind["object"], by_kind["attribute"])


def test_main_runs_everything_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    flags = "--device=cpu --shape=tiny --precision-shape=tiny --repeats=1 --matmul=64"
    figures = bench.main([*flags.split(), f"--json={file}"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(figures))
    assert [row["gradient_checkpointing"] for row in figures["learner_step"]] == [False, True]
    merged, shared = figures["scoring"]
    assert shared["weights_gib"] < merged["weights_gib"] / 2
    assert 0 < figures["bf16_against_fp32"]["mean"] < 0.2
    assert "learner step" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
def test_learner_reaches_its_aim_on_hopper() -> None:
    peak = bench.peak_flops(bench.device_name("cuda"))
    speed = bench.measure_step(BIG, "cuda", checkpointing=False, peak=peak)
    print(speed)
    bench.release()
    assert speed.peak_gib is not None
    if torch.cuda.get_device_capability() == (9, 0):
        assert speed.mfu is not None
        assert speed.mfu >= 0.40


@pytest.mark.gpu
@pytest.mark.slow
def test_checkpointing_saves_memory() -> None:
    speeds = []
    for checkpointing in (False, True):
        speeds.append(
            bench.measure_step(
                BIG, "cuda", checkpointing=checkpointing, peak=None, sizes=(1,), repeats=2
            )
        )
        bench.release()
    plain, checkpointed = speeds
    print(plain, checkpointed)
    assert checkpointed.peak_gib < plain.peak_gib
    assert checkpointed.seconds > plain.seconds


@pytest.mark.gpu
@pytest.mark.slow
def test_a_shared_base_scores_in_a_third_of_the_memory() -> None:
    merged, shared = bench.measure_scoring(BIG, "cuda", size=4)
    print(merged, shared)
    bench.release()
    assert shared.weights_gib < 0.4 * merged.weights_gib
    assert shared.ms_per_response < 1.6 * merged.ms_per_response


@pytest.mark.gpu
def test_bfloat16_logprobs_stay_near_float32() -> None:
    precision = bench.measure_precision(bench.SHAPES["small"], "cuda")
    print(precision)
    assert precision.mean < 0.05
    assert precision.max < 0.5
