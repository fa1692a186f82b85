"""The share of an update that arrives: the sums, and what engines in bfloat16 really hold."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import photo_prompts, requests
from test_weight_sync import LORA, HfLearner, OneReplica
from torch import Tensor

from actors.rollout import RolloutActor
from actors.served_adapter import lora_settings, lora_slot, write_adapter
from cluster.memory.actors import kv_token
from cluster.roles import SyncCheck
from cluster.weight_sync import sync
from fgaif.checkpoint import arrays_digest
from fgaif.config import Config, parse_config
from fgaif.errors import ConfigError, SyncError
from fgaif.lvlm.arrival import add_sums, arrived, factor_sums, lora_update, merged_sums
from fgaif.lvlm.sizes import read_facts
from fgaif.pending import Ready
from fgaif.types import FloatArray, LoadedWeights, Response, WeightsManifest

LEARNING_RATES = (1e-7, 1e-6, 1e-5, 3e-5)
STEPS = 216  # the 4-GPU configuration: 54 steps of 2 epochs over 2 minibatches
FALSE_ALARMS_LOOKED_FOR = 200


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_a_merge_in_float32_keeps_all_and_one_in_bfloat16_loses_small_updates() -> None:
    base = normal(256, 512, scale=0.02).bfloat16()
    shares = {}
    for lr in LEARNING_RATES:
        a, b = normal(64, 512, seed=1, scale=0.04), normal(256, 64, seed=2, scale=lr * STEPS / 8)
        update = lora_update(a, b, 0.25)
        rounded = (base.float() + update).bfloat16()
        exact = base.float() + update
        assert arrived({"q": merged_sums(base, exact, update)}).share == pytest.approx(1, abs=1e-3)
        shares[lr] = arrived({"q": merged_sums(base, rounded, update)}).share
    assert shares[1e-7] < 0.02
    assert shares[1e-6] < 0.1
    assert 0.3 < shares[1e-5] < 0.8
    assert shares[3e-5] > 0.85


def test_factors_are_compared_without_their_product() -> None:
    a, b = normal(4, 30), normal(20, 4, seed=1)
    held_a, held_b = torch.zeros(8, 30), torch.zeros(20, 8)  # a slot has room for rank 8
    held_a[:4], held_b[:, :4] = a, 0.5 * b
    update = lora_update(a, b, 0.5)
    dot, norm = factor_sums(a, b, held_a, held_b, 0.5)
    assert dot == pytest.approx(float((held_b @ held_a * update).sum()), rel=1e-5)
    assert norm == pytest.approx(float(update.square().sum()), rel=1e-5)
    assert dot == pytest.approx(norm, rel=1e-6)


def test_shares_are_over_all_layers_and_workers() -> None:
    found = arrived(add_sums([{"q": (1.0, 2.0), "k": (3.0, 3.0)}, {"q": (1.0, 1.0)}]))
    assert found.share == pytest.approx(5 / 6)
    assert (found.weakest_layer, found.weakest) == ("q", pytest.approx(2 / 3))
    assert (found.strongest_layer, found.strongest) == ("k", 1.0)
    assert arrived({"q": (0.0, 0.0)}).share == 1.0  # a fresh adapter changes nothing


def test_a_rank_without_a_slot_is_refused() -> None:
    assert lora_settings(3)["max_lora_rank"] == 8
    assert lora_settings(512)["max_lora_rank"] == 512
    with pytest.raises(ConfigError, match=r"policy\.lora\.r = 513.*merged"):
        lora_settings(513)


def engine(model_dir: Path, adapters: str) -> RolloutActor:
    return RolloutActor(model_dir, bfloat16_config(adapters))


def bfloat16_config(adapters: str) -> Config:
    return parse_config(
        {
            "policy": {"dtype": "bfloat16", "lora": {"r": LORA.r, "alpha": LORA.alpha}},
            "cluster": {"engine": {"max_num_seqs": 16, "kv_cache_mib": 16, "adapters": adapters}},
        }
    )


@pytest.fixture(scope="module")
def learner(tiny_llava_dir: Path) -> HfLearner:
    return HfLearner(tiny_llava_dir, dtype="bfloat16")


@pytest.fixture(scope="module")
def served(tiny_llava_dir: Path) -> RolloutActor:
    return engine(tiny_llava_dir, "auto")


@pytest.fixture(scope="module")
def merging(tiny_llava_dir: Path) -> RolloutActor:
    return engine(tiny_llava_dir, "merged")


@pytest.fixture(scope="module")
def probe(served: RolloutActor, photos: Path) -> list[Response]:
    prompts = photo_prompts(photos)
    return served.generate(requests([*prompts, *prompts][:8], tokens=48))


def trained_to(learner: HfLearner, lr: float, version: int) -> WeightsManifest:
    """An adapter as large as ``STEPS`` steps of Adam leave it: an eighth of their sum."""
    learner.randomise(version, scale=lr * STEPS / 8)
    for name, parameter in learner.model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=version, scale=0.1))
    return learner.publish(version).result()


@pytest.mark.slow
@pytest.mark.parametrize("lr", LEARNING_RATES)
def test_an_engine_in_bfloat16_holds_the_whole_adapter_at_any_learning_rate(
    lr: float,
    served: RolloutActor,
    merging: RolloutActor,
    learner: HfLearner,
    probe: list[Response],
) -> None:
    manifest = trained_to(learner, lr, version=1)
    kept = served.load_weights(manifest).arrived
    assert kept.share >= 0.99
    assert kept.weakest >= 0.99
    assert len(manifest.tensors) == 2 * 2 * 7  # A and B, two layers of seven projections
    rounded = merging.load_weights(manifest).arrived
    assert rounded.share < kept.share
    if lr <= 1e-6:
        assert rounded.share < 0.5
        with pytest.raises(SyncError, match=r"of the update is in rollout-0's.*adapters=unmerged"):
            sync(learner, learner, OneReplica(merging), probe, version=1).result()


@pytest.mark.slow
def test_an_adapter_served_unmerged_is_used_as_the_learner_uses_it(
    served: RolloutActor, learner: HfLearner, probe: list[Response]
) -> None:
    learner.randomise(1)
    metrics = sync(learner, learner, OneReplica(served), probe, version=1).result().metrics()
    assert metrics["sync/effect"] > 20 * metrics["sync/noise"] > 0
    assert metrics["sync/mean_abs_diff"] < 3 * metrics["sync/noise"]
    without = np.concatenate(served.probe_logprobs(probe, base=True))
    base = learner.evaluate(probe).result()
    expected = np.concatenate([row.reference_logprobs for row in base])
    assert np.abs(without - expected).mean() == pytest.approx(metrics["sync/noise"], rel=0.5)
    learner.randomise(0, scale=0.0)
    sync(learner, learner, OneReplica(served), probe, version=2).result()
    np.testing.assert_array_equal(np.concatenate(served.probe_logprobs(probe)), without)


def reserved(worker: Any) -> dict[str, int]:
    """Bytes of the adapter slots and of the KV cache, and the tokens that the cache holds."""
    runner = worker.model_runner
    layers = runner.lora_manager._adapter_manager.modules.values()
    slots = [part for layer in layers for part in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    caches = [cache.untyped_storage() for cache in runner.kv_caches]
    blocks, size = runner.cache_config.num_gpu_blocks, runner.cache_config.block_size
    return {
        "slots": sum(part.nbytes for part in slots),
        "cache": sum({cache.data_ptr(): cache.nbytes() for cache in caches}.values()),
        "tokens": blocks * size,
    }


@pytest.mark.slow
def test_an_engine_reserves_what_the_memory_plan_says(
    served: RolloutActor, tiny_llava_dir: Path
) -> None:
    (found,) = served._engine._llm.collective_rpc(reserved)
    facts = read_facts(tiny_llava_dir)
    slot = LORA.model_copy(update={"r": lora_slot(LORA.r)})
    assert found["slots"] == 2 * facts.lora_parameters(slot)
    assert found["cache"] == found["tokens"] * kv_token(facts, 2) <= 16 * 2**20


@pytest.mark.slow
def test_an_engine_leaves_no_adapter_behind(
    served: RolloutActor, learner: HfLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed cannot clean up, and shared memory outlives it."""
    from actors import vllm_engine

    folders: list[Path] = []

    def written(manifest: WeightsManifest) -> Path | None:
        folder = write_adapter(manifest)
        folders.extend([folder] if folder else [])
        return folder

    monkeypatch.setattr(vllm_engine, "write_adapter", written)
    for version in (1, 2):
        served.load_weights(trained_to(learner, 1e-5, version))
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


Fault = Callable[[WeightsManifest, WeightsManifest], WeightsManifest]
"""From the version that is due, and the one before it, what an engine loads instead."""


def changed(manifest: WeightsManifest, tensors: dict[str, FloatArray]) -> WeightsManifest:
    return replace(manifest, tensors=tensors, digest=arrays_digest(tensors))


def stale(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    return replace(before, version=due.version)


def zeroed_layer(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    name = "model.language_model.layers.1.self_attn.v_proj.lora_B"
    return changed(due, due.tensors | {name: np.zeros_like(due.tensors[name])})


def transposed(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    name = "model.language_model.layers.0.self_attn.o_proj"
    a, b = due.tensors[f"{name}.lora_A"], due.tensors[f"{name}.lora_B"]
    # Read column by column: of the same shape, so that nothing but the values tells.
    turned = {
        f"{name}.lora_A": a.reshape(a.shape[::-1]).T,
        f"{name}.lora_B": b.reshape(b.shape[::-1]).T,
    }
    return changed(due, due.tensors | {n: np.ascontiguousarray(v) for n, v in turned.items()})


def unscaled(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    return replace(due, scaling=1.0)


def swapped_layers(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return changed(
        due,
        {
            name: due.tensors[name.replace(here, there)]
            for name in due.tensors
            for here, there in other.items()
            if here in name
        },
    )


def of_another_rank(due: WeightsManifest, before: WeightsManifest) -> WeightsManifest:
    half = {
        name: value[: LORA.r // 2] if name.endswith("A") else value[:, : LORA.r // 2]
        for name, value in due.tensors.items()
    }
    return changed(due, {name: np.ascontiguousarray(value) for name, value in half.items()})


FAULTS = (stale, zeroed_layer, transposed, unscaled, swapped_layers, of_another_rank)


class FaultyReplica(OneReplica):
    """An engine that loads something else than it is given, and reads back what it was given."""

    def __init__(self, actor: RolloutActor, fault: Fault, before: WeightsManifest) -> None:
        super().__init__(actor)
        self.fault, self.before = fault, before

    def load_weights(self, manifest: WeightsManifest, probe: object) -> Ready[list[SyncCheck]]:
        return super().load_weights(self.fault(manifest, self.before), probe)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_is_seen_by_the_probe(
    fault: Fault, served: RolloutActor, learner: HfLearner, probe: list[Response]
) -> None:
    """What arrives is whole, so that only the log-probs can tell: the effect is as of training."""
    learner.randomise(7)
    before = learner.publish(7).result()
    learner.randomise(8)
    replica = FaultyReplica(served, fault, before)
    with pytest.raises(SyncError, match=r"differ by .* between the learner and rollout-0"):
        sync(learner, learner, replica, probe, version=8).result()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_engine_is_seen_however_small_the_update_is(
    fault: Fault,
    served: RolloutActor,
    learner: HfLearner,
    probe: list[Response],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a learning rate of 1e-7 no log-prob moves by more than noise."""
    before = trained_to(learner, 1e-7, version=7)
    due = trained_to(learner, 1e-7, version=8)
    from actors import vllm_engine

    written: dict[str, Path] = {}

    def fault_after_writing(manifest: WeightsManifest) -> Path:
        folder = write(fault(manifest, before))
        truth = write(manifest)
        assert folder is not None
        assert truth is not None
        written[str(folder)] = truth
        return folder

    write = vllm_engine.write_adapter
    monkeypatch.setattr(vllm_engine, "write_adapter", fault_after_writing)
    call = served._engine._llm.collective_rpc

    def read_the_truth(method: str, *, args: tuple[object, ...] = ()) -> object:
        if method == "served_sums":
            args = (str(written[str(args[0])]), *args[1:])
        return call(method, args=args)

    monkeypatch.setattr(served._engine._llm, "collective_rpc", read_the_truth)
    loaded = served.load_weights(due, probe)
    for truth in written.values():
        shutil.rmtree(truth)
    difference = np.abs(
        np.concatenate(loaded.logprobs) - np.concatenate(loaded.base_logprobs or ())
    )
    assert difference.mean() < 0.01
    with pytest.raises(SyncError, match=r"of the update is in rollout-0's weights"):
        sync(learner, learner, Loaded(loaded), probe, version=8).result()


class Loaded:
    """A replica that has loaded already."""

    def __init__(self, loaded: LoadedWeights) -> None:
        self.loaded = loaded

    def load_weights(self, manifest: WeightsManifest, probe: object) -> Ready[list[SyncCheck]]:
        from cluster.weight_sync import check_load

        return Ready([check_load("rollout-0", manifest.version, self.loaded, probe)])  # type: ignore[arg-type]


@pytest.mark.long
def test_clean_syncs_raise_no_alarm(
    served: RolloutActor, learner: HfLearner, probe: list[Response], photos: Path
) -> None:
    """Of updates of every size, each with responses of its own version as the probe."""
    prompts = photo_prompts(photos)
    scales = np.geomspace(1e-5, 0.3, FALSE_ALARMS_LOOKED_FOR)
    largest = 0.0
    for version, scale in enumerate(scales, start=1):
        learner.randomise(version, scale=float(scale))
        checks = sync(learner, learner, OneReplica(served), probe, version=version).result().checks
        largest = max(largest, checks[0].mean_abs_diff / checks[0].noise)
        probe = served.generate(
            [replace(r, seed=version) for r in requests([*prompts, *prompts][:8], tokens=48)]
        )
    print(f"largest difference over the base's noise: {largest:.2f}")
