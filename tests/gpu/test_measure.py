"""The GPU measurements: all of their logic at tiny size on the CPU, their arithmetic by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import measure
import pytest
import torch
from measure import LLAVA_7B, TINY, Bench, Row
from torch.utils.flop_counter import FlopCounterMode

from cluster.memory.actors import PROMPT_TEXT, Pass, training_peak
from fgaif.config import LoraConfig
from fgaif.lvlm.sizes import config_facts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# A bare GPU machine has none of these.
ABSENT = ["pydantic", "ray", "vllm", "deepspeed", "skimage", "openai"]


def bench(dtype: torch.dtype = torch.float32, **changes: object) -> Bench:
    settings = {"device": "cpu", "dtype": dtype, "shape": TINY, "middle": TINY} | changes
    return Bench(repeats=1, sizes=(2, 1), **settings)  # type: ignore[arg-type]


@pytest.mark.long
def test_the_one_command_runs_with_torch_transformers_and_peft_alone(tmp_path: Path) -> None:
    script = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); "
        "sys.argv[1:] = ['--small']; runpy.run_path('tests/gpu/measure.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert list(figures) == ["shape", *measure.SECTIONS]
    for title in measure.SECTIONS:
        assert f"\n{title} (" in done.stdout
    assert [row["checkpointing"] for row in figures["learner"]] == [False, True]
    merged, shared = figures["scoring"]
    assert shared["weights_gib"] < merged["weights_gib"] / 2


def test_sections_share_less_than_eight_minutes() -> None:
    assert sum(seconds for seconds, _ in measure.SECTIONS.values()) < 480


def test_a_section_that_fails_or_comes_too_late_is_reported_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(bench: Bench) -> list[Row]:
        raise RuntimeError("no such kernel")

    def fine(bench: Bench) -> list[Row]:
        return [{"speed": 1.0}]

    figures = measure.run(bench(), {"first": (5, broken), "second": (5, fine)})
    assert "no such kernel" in figures["first"]["error"]
    assert figures["second"] == [{"speed": 1.0}]
    assert "first: FAILED: RuntimeError('no such kernel')" in capsys.readouterr().out
    late = measure.run(bench(), {"first": (-5, fine)})
    assert "no time was left" in late["first"]["error"]


def test_the_shape_is_that_of_llava_15_7b() -> None:
    """576 image tokens + 64 + 896; 6.48 billion weights in Vicuna-7B's linear layers.

    LoRA r 64: 32 layers x 64 x (4 x 8,192 + 3 x 15,104) = 159,907,840.
    """
    assert LLAVA_7B.length == 1536
    assert measure.linear_weights(LLAVA_7B) == (6_476_005_376, 159_907_840)


def test_step_flops_are_what_torch_counts() -> None:
    """Torch counts attention kernels as full squares and their backward as 5/2 of the forward.

    So attention is left out of both sides: 6 L^2 D per layer of the formula, and every operator
    of the counter that is an attention kernel.
    """
    model = measure.trainable(TINY, "cpu", torch.float32, checkpointing=False)
    optimizer = measure.MasterAdamW(model, lr=1e-6)
    batch = measure.make_batch(TINY, 2, "cpu", torch.float32)
    features = measure.see(model, TINY, 2)
    with FlopCounterMode(display=False) as counter:
        measure.learner_step(model, optimizer, batch, features)
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(value for name, value in by_operator.items() if "attention" not in str(name))
    attention = 2 * TINY.layers * 6 * TINY.length**2 * TINY.width
    assert counted == measure.step_flops(TINY, 2) - attention


def test_a_batch_that_does_not_fit_gives_way_to_a_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.learner_step

    def small_memory(model: torch.nn.Module, optimizer: object, batch: object, f: object) -> object:
        if len(batch.input_ids) > 1:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError
        return real(model, optimizer, batch, f)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "learner_step", small_memory)
    rows = measure.learner(bench())
    assert [row["batch"] for row in rows] == [1, 1]


def test_merging_into_bfloat16_loses_small_updates_and_into_float32_none() -> None:
    """4,096 inputs, as in the 7B: 1e-7 leaves less than 2 %, 3e-5 nearly all.

    Served unmerged all but the rounding of B arrives, whatever the rate: 2^-8 of it at most.
    """
    wide = replace(TINY, width=4096, layers=1, heads=32, r=64)
    rows = measure.adapters(bench(torch.bfloat16, shape=wide))
    small = {row["rate"]: row["kept"] for row in rows}
    assert small[1e-7] < 0.02
    assert 0.3 < small[1e-5] < 0.7
    assert small[3e-5] > 0.85
    for name in ("unmerged", "unmerged_least"):
        assert [row[name] for row in rows] == pytest.approx([1.0] * 4, abs=2**-8)
    assert len({row["unmerged"] for row in rows}) > 1  # rounded, not just one
    exact = measure.adapters(bench())
    assert [row["kept"] for row in exact] == pytest.approx([1.0] * 4, abs=1e-3)
    assert [row["unmerged"] for row in exact] == pytest.approx([1.0] * 4, abs=1e-6)
    assert all(row["lost"] < row["effect"] / 50 for row in exact)


def test_bfloat16_needs_float32_masters() -> None:
    masters, alone = measure.zero_off(bench())
    assert min(masters["kept_A"], masters["kept_B"]) > 0.9
    assert alone["kept_A"] < 0.5


GIB = {"held_gib": 14.0, "peak_gib": 34.0, "reserved_gib": 35.0, "context_gib": 0.625}


class OnGpu(Bench):
    """A bench that says that it is on a GPU."""

    on_gpu = True  # type: ignore[assignment]


def measured(role: str, **changes: object) -> Row:
    row = {"role": role, "shared": False, "checkpointing": True, "batch": 8}
    return row | GIB | changes


def on_gpu(*peaks: Row) -> Bench:
    found = OnGpu(
        device="cuda", dtype=torch.bfloat16, shape=LLAVA_7B, middle=TINY, host_before=0.0
    )  # fmt: skip
    found.peaks.extend(peaks)
    return found


def test_what_each_role_took_of_the_device_stands_beside_its_plan() -> None:
    """Took: 0.625 of context and 35 reserved; beyond what is held: 34 - 14.

    Of LLaVA-1.5-7B every role has 7,063,427,072 weights of two bytes, 13.16 GiB, and 0.5 of
    context. Beside them the learner has 2 + 14 bytes for each of LoRA's 159,907,840 weights, the
    value model as many, a merged scorer none, a shared one those of three adapters.
    """
    peaks = [
        measured("learner"),
        measured("reference"),
        measured("reward", checkpointing=False),
        measured("reward", checkpointing=False, shared=True),
    ]
    rows = measure.memory(on_gpu(*peaks))
    assert [row["role"] for row in rows] == ["learner", "reference", "reward", "reward"]
    for row in rows:
        assert row["took_gib"] == 35.625
        assert row["beyond_gib"] == 20
        assert row["planned_over_took"] == pytest.approx(row["planned_gib"] / 35.625)
    state = [row["planned_gib"] - 1.1 * row["planned_beyond_gib"] - 13.66 for row in rows]
    lora = 159_907_840 / 2**30
    assert state == pytest.approx([16 * lora, 16 * lora, 0, 6 * lora], abs=0.02)


def test_lengths_and_sizes_are_those_that_the_plan_assumes() -> None:
    """Activations are planned for the tokens that were measured."""
    assert LLAVA_7B.prompt == PROMPT_TEXT
    run = Pass(
        rows=8, length=LLAVA_7B.length, width=2, adapter_width=2, lora=LoraConfig(r=64, alpha=16),
        checkpointing=True,
    )  # fmt: skip
    (row,) = measure.memory(on_gpu(measured("learner")))
    facts = config_facts(LLAVA_7B.config())
    expected = training_peak(facts, run, 8 * LLAVA_7B.response) / 2**30
    assert row["planned_beyond_gib"] == pytest.approx(expected, rel=1e-6)


def test_constants_are_the_largest_found() -> None:
    """Fragments: 1 of 20 GiB, and 3 of 12."""
    peaks = measured("learner"), measured("reward", peak_gib=26.0, reserved_gib=29.0,
                                          context_gib=0.75)  # fmt: skip
    context, fragments, host = measure.constants(on_gpu(*peaks))
    assert context["measured"] == 0.75
    assert fragments["measured"] == 0.25
    assert host["measured"] == pytest.approx(measure.resident_gib(), rel=0.1)
    assert [row["measured"] for row in measure.constants(bench())] == [None] * 3
