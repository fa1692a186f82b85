"""A trained projector and any other whole weight, from the learner into engines, without traces.

One engine takes every version; another one starts from the exported weights and never saw any.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import engine_config, photo_prompts, requests, rollout_actor
from ppo_world import hf_logprobs, make_responses, make_train_batch, questions, tiny_config

from actors.deepspeed_setup import free_port
from actors.learner import LearnerActor
from actors.rollout import RolloutActor
from fgaif.checkpoint import arrays_digest
from fgaif.config import Config
from fgaif.errors import SyncError
from fgaif.lvlm.export import export_merged
from fgaif.lvlm.model import load_lvlm
from fgaif.lvlm.weights import make_manifest, manifest_from_adapter, parts
from fgaif.types import FloatArray, Prompt, Response

PROJECTOR = "model.multi_modal_projector"
CHECKPOINT = make_manifest({}, scaling=1.0, version=0)
LONG = "There is a small red star above the square. " * 12  # several cache blocks of 32 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A learner after two updates of adapter and projector, and what it scored before and after."""

    learner: LearnerActor
    responses: list[Response]
    before: FloatArray
    after: FloatArray
    adapter: Path


def projector_config(model: Path, run_dir: Path, **ppo: object) -> Config:
    config = tiny_config(model, run_dir, anchor={"weight": 1.0, "batch_size": 3}, **ppo)
    policy = config.policy.model_copy(update={"train_projector": True, "temperature": 1.0})
    return config.model_copy(update={"policy": policy})


def one_rank(config: Config) -> LearnerActor:
    return LearnerActor(config, 0, 1, "127.0.0.1", free_port())


def update(learner: LearnerActor, responses: list[Response], seeds: Sequence[int]) -> None:
    for seed in seeds:
        batch = make_train_batch(responses, learner.logprobs(responses), seed=seed)
        learner.update(batch, questions(responses))


@pytest.fixture(scope="module")
def trained(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    learner = one_rank(projector_config(tiny_llava_dir, folder, lr=3e-2))
    responses = make_responses(folder, 8)
    before = np.concatenate(learner.logprobs(responses))
    update(learner, responses, range(2))
    learner.save_adapter(folder / "adapter")
    return Trained(
        learner=learner,
        responses=responses,
        before=before,
        after=np.concatenate(learner.logprobs(responses)),
        adapter=folder / "adapter",
    )


@pytest.fixture(scope="module")
def exported(tiny_llava_dir: Path, trained: Trained) -> Path:
    out = trained.adapter.with_name("exported")
    export_merged(tiny_llava_dir, trained.adapter, out, dtype="float32")
    return out


@pytest.fixture
def actor(tiny_llava_dir: Path) -> Iterator[RolloutActor]:
    actor = rollout_actor(tiny_llava_dir)
    actor.load_weights(CHECKPOINT)
    yield actor
    actor.load_weights(CHECKPOINT)


def scores(actor: RolloutActor, responses: list[Response]) -> FloatArray:
    return np.concatenate(actor.probe_logprobs(responses))


def hf_scores(model: torch.nn.Module, path: Path, responses: list[Response]) -> FloatArray:
    rows = hf_logprobs(model, path, responses).numpy()
    pairs = zip(rows, responses, strict=True)
    return np.concatenate([row[: len(response.token_ids)] for row, response in pairs])


def test_engine_and_learner_agree_before_and_after(actor: RolloutActor, trained: Trained) -> None:
    np.testing.assert_allclose(scores(actor, trained.responses), trained.before, atol=1e-4)
    manifest = trained.learner.publish(2)
    assert {name for name in manifest.tensors if "lora_" not in name} == {
        f"{PROJECTOR}.linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")
    }
    assert actor.load_weights(manifest).version == actor.version() == 2
    np.testing.assert_allclose(scores(actor, trained.responses), trained.after, atol=1e-4)
    assert np.abs(trained.after - trained.before).max() > 0.1
    lora = {name: value for name, value in manifest.tensors.items() if "lora_" in name}
    actor.load_weights(make_manifest(lora, scaling=manifest.scaling, version=3))
    without = scores(actor, trained.responses)  # gives the projector back
    assert np.abs(without - trained.after).max() > 1e-2
    actor.load_weights(CHECKPOINT)
    np.testing.assert_allclose(scores(actor, trained.responses), trained.before, atol=1e-4)


def test_an_adapter_directory_carries_the_projector(trained: Trained) -> None:
    saved = manifest_from_adapter(trained.adapter, version=2)
    assert saved.digest == trained.learner.publish(2).digest


def test_the_export_has_the_trained_projector(exported: Path, trained: Trained) -> None:
    found = hf_scores(load_lvlm(exported, dtype="float32"), exported, trained.responses)
    np.testing.assert_allclose(found, trained.after, atol=1e-4)
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "projector: trained with the adapter" in card


def test_the_reference_of_the_anchor_is_the_untrained_projector(
    tiny_llava_dir: Path, trained: Trained, tmp_path: Path
) -> None:
    asked = questions(trained.responses)
    fresh = one_rank(projector_config(tiny_llava_dir, tmp_path))
    new, old = (learner._anchor_pieces(asked, 1)[0] for learner in (fresh, trained.learner))
    for one, other in zip(new, old, strict=True):
        assert torch.equal(one.reference, other.reference)
    names = [n for n, p in trained.learner._engine.model.named_parameters() if p.requires_grad]
    assert any("multi_modal_projector.modules_to_save" in name for name in names)
    assert not any("original_module" in name or "vision_tower" in name for name in names)


def ask(actor: RolloutActor, prompts: list[Prompt], responses: list[Response]) -> FloatArray:
    """Probe, which uses cached image features, and questions, which use cached prefixes too."""
    return np.concatenate([scores(actor, responses), np.log(actor.p_yes(prompts))])


@pytest.mark.parametrize("forgotten", [None, "reset_encoder_cache", "reset_prefix_cache"])
def test_no_cache_outlives_its_weights(
    actor: RolloutActor, trained: Trained, exported: Path, photos: Path,
    monkeypatch: pytest.MonkeyPatch, forgotten: str | None,
) -> None:  # fmt: skip
    """An engine that has answered before equals one that never had other weights.

    With one of the resets left out, it does not: the caches are in use.
    """
    prompts = photo_prompts(photos, text=LONG)
    newcomer = rollout_actor(exported)
    fresh = ask(newcomer, prompts, trained.responses)
    old = ask(actor, prompts, trained.responses)
    if forgotten:
        monkeypatch.setattr(actor._engine._llm, forgotten, lambda: True)
    actor.load_weights(trained.learner.publish(2))
    monkeypatch.undo()
    new = ask(actor, prompts, trained.responses)
    assert np.abs(old - fresh).max() > 0.1
    if forgotten:
        assert np.abs(new - fresh).max() > 1e-2
        return
    np.testing.assert_allclose(new, fresh, atol=1e-4)
    asked = requests(prompts)
    for one, other in zip(actor.generate(asked), newcomer.generate(asked), strict=True):
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-4)


def test_any_weight_can_be_sent(
    actor: RolloutActor, trained: Trained, tiny_llava_dir: Path
) -> None:
    """Also one of several that vLLM fuses, with and without a LoRA update on top."""
    language, vision = "model.language_model", "model.vision_tower"
    names = [
        f"{vision}.encoder.layers.0.self_attn.v_proj.bias",
        f"{vision}.encoder.layers.0.mlp.fc1.weight",
        f"{vision}.embeddings.class_embedding",
        f"{vision}.embeddings.patch_embedding.weight",
        f"{language}.embed_tokens.weight",
        f"{language}.layers.0.self_attn.q_proj.weight",
        f"{language}.layers.1.mlp.up_proj.weight",
        f"{language}.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ]
    model = load_lvlm(tiny_llava_dir, dtype="float32")
    base = scores(actor, trained.responses)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        weight = model.get_parameter(name)
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        tensors[name] = weight.numpy().copy()
        actor.load_weights(make_manifest({name: tensors[name]}, scaling=1.0, version=1))
        assert np.abs(scores(actor, trained.responses) - base).max() > 1e-4, name
    actor.load_weights(make_manifest(tensors, scaling=1.0, version=2))
    found = scores(actor, trained.responses)
    np.testing.assert_allclose(
        found, hf_scores(model, tiny_llava_dir, trained.responses), atol=2e-4
    )
    module = names[5].removesuffix(".weight")
    a, b = np.full((2, 32), 0.1, np.float32), np.full((64, 2), 0.05, np.float32)
    tensors |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
    actor.load_weights(make_manifest(tensors, scaling=0.5, version=3))
    model.get_parameter(names[5]).add_(torch.from_numpy(0.5 * b @ a))
    expected = hf_scores(model, tiny_llava_dir, trained.responses)
    assert np.abs(expected - found).max() > 1e-3
    np.testing.assert_allclose(scores(actor, trained.responses), expected, atol=2e-4)


def test_wrong_names_and_shapes_are_refused_and_change_nothing(
    actor: RolloutActor, trained: Trained
) -> None:
    good = trained.learner.publish(2)
    actor.load_weights(good)
    loaded = scores(actor, trained.responses)
    name = f"{PROJECTOR}.linear_2.weight"
    misnamed, cut = (
        make_manifest(good.tensors | changed, scaling=good.scaling, version=9)
        for changed in (
            {f"{PROJECTOR}.linear_9.weight": good.tensors[name]},
            {name: good.tensors[name][1:]},
        )
    )
    foreign = good.tensors | {"model.audio_tower.weight": good.tensors[name]}
    digest = arrays_digest(foreign)
    cases = {
        f"{PROJECTOR}.linear_9.weight: .* no such weight": misnamed,
        r"linear_2.weight: shape \(31, 32\) instead of \(32, 32\)": cut,
        r"'model.audio_tower.weight' belongs to no part": replace(
            good, version=9, tensors=foreign, digest=digest
        ),
        "digest does not match": replace(good, version=9, tensors=foreign),
    }
    for message, manifest in cases.items():
        with pytest.raises(SyncError, match=f"version 9.*{message}"):
            actor.load_weights(manifest)
    assert actor.version() == 2
    np.testing.assert_array_equal(scores(actor, trained.responses), loaded)


def test_resumed_training_of_the_projector_is_exact(
    tiny_llava_dir: Path, trained: Trained, tmp_path: Path
) -> None:
    config = projector_config(tiny_llava_dir, tmp_path)
    straight, resumed = one_rank(config), one_rank(config)
    update(straight, trained.responses, [0])
    straight.save(tmp_path / "checkpoint")
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.publish(1).digest == straight.publish(1).digest
    for learner in (straight, resumed):
        update(learner, trained.responses, [1])
    assert resumed.publish(2).digest == straight.publish(2).digest


def test_zero_3_trains_the_projector_alike(
    tiny_llava_dir: Path, trained: Trained, tmp_path: Path
) -> None:
    published = []
    for stage in (0, 3):
        learner = one_rank(projector_config(tiny_llava_dir, tmp_path, zero_stage=stage))
        update(learner, trained.responses, [0])
        published.append(learner.publish(1).tensors)
    assert np.abs(published[0][f"{PROJECTOR}.linear_1.bias"]).max() > 1e-3  # starts at zero
    for name, value in published[0].items():
        np.testing.assert_allclose(published[1][name], value, atol=1e-5, err_msg=name)


def scores_elsewhere(model: Path, adapter: Path, responses: list[Response]) -> FloatArray:
    engine = RolloutActor(model, engine_config())
    assert type(engine._engine._llm.engine_core).__name__ == "SyncMPClient"
    engine.load_weights(manifest_from_adapter(adapter, version=2))
    found = scores(engine, responses)
    engine._engine._llm.engine_core.shutdown()
    return found


@pytest.mark.long
def test_versions_reach_a_model_in_another_process(
    trained: Trained, tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where vLLM runs the model beside the actor and messages are serialised."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # Not in this process: an engine that ends takes the process-wide groups of the others along.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        call = pool.submit(scores_elsewhere, tiny_llava_dir, trained.adapter, trained.responses)
        np.testing.assert_allclose(call.result(), trained.after, atol=1e-4)


@pytest.mark.parametrize(("limit", "sizes"), [(8, [2, 1]), (7, [1, 1, 1]), (100, [3])])
def test_parts_hold_whole_tensors_up_to_a_limit(limit: int, sizes: list[int]) -> None:
    tensors = {name: np.zeros(1, np.float32) for name in "abc"}
    cut = list(parts(tensors, limit=limit))
    assert [len(part) for part in cut] == sizes
    assert [name for part in cut for name in part] == ["a", "b", "c"]
