"""The DeepSpeed learner on one CPU rank, against torch, Hugging Face, itself resumed, two ranks."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from ppo_world import (
    make_responses,
    make_train_batch,
    questions,
    tiny_config,
    with_attention_dropout,
)
from transformers import AutoProcessor, LlavaForConditionalGeneration

from actors.deepspeed_setup import free_port
from actors.learner import LearnerActor
from fgaif.config import Config
from fgaif.errors import CheckpointError, DivergedError
from fgaif.types import Response

ANCHOR = {"weight": 2.0, "batch_size": 3}


def one_rank(config: Config) -> LearnerActor:
    return LearnerActor(config, 0, 1, "127.0.0.1", free_port())


def hf_logprobs(model: torch.nn.Module, directory: Path, response: Response) -> np.ndarray:
    """Teacher forcing through the processor and the whole model, at temperature 0.7."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(directory)
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": response.prompt.text}],
    }
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(
        images=Image.open(response.prompt.image.path), text=text, return_tensors="pt"
    )
    ids = torch.cat([inputs["input_ids"], torch.tensor(response.token_ids)[None]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    start = inputs["input_ids"].shape[1]
    rows = (logits[start - 1 : -1].float() / 0.7).log_softmax(-1)
    return rows.gather(1, ids[0, start:, None])[:, 0].numpy()


def test_a_loss_that_is_no_number_names_the_figure_and_the_key_to_lower(tiny_llava_dir, tmp_path):
    learner = one_rank(tiny_config(tiny_llava_dir, tmp_path, lr=0.5))
    responses = make_responses(tmp_path, 4)
    batch = make_train_batch(responses, learner.logprobs(responses))
    batch = replace(batch, advantages=np.full_like(batch.advantages, np.nan))
    with pytest.raises(
        DivergedError, match=r"PPO step 1: not finite: policy/loss = nan.*; lower ppo\.lr = 0\.5 "
    ):
        learner.update(batch, [])


def test_logprobs_equal_hugging_face_before_and_after_an_update(tiny_llava_dir, tmp_path):
    learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
    responses = make_responses(tmp_path, 5)
    before = learner.logprobs(responses)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).eval()
    for response, ours in zip(responses, before, strict=True):
        np.testing.assert_allclose(ours, hf_logprobs(base, tiny_llava_dir, response), atol=1e-4)

    learner.update(make_train_batch(responses, before), [])
    learner.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    after = learner.logprobs(responses)
    assert np.abs(after[0] - before[0]).max() > 1e-2
    for response, ours in zip(responses, after, strict=True):
        np.testing.assert_allclose(ours, hf_logprobs(adapted, tiny_llava_dir, response), atol=1e-4)


def test_an_update_raises_the_probability_of_rewarded_responses(tiny_llava_dir, tmp_path):
    learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
    responses = make_responses(tmp_path, 8)
    old = learner.logprobs(responses)
    batch = make_train_batch(responses, old)
    report = learner.update(batch, []).metrics
    moved = np.concatenate(
        [new - start for new, start in zip(learner.logprobs(responses), old, strict=True)]
    )
    assert np.corrcoef(moved, batch.advantages[batch.mask > 0])[0, 1] > 0.3
    assert report["policy/loss"] < 0  # advantages are white, so the loss starts at 0
    assert report["policy/ratio_max"] > 1.0
    assert 0 <= report["policy/clip_frac"] <= 1
    assert report["policy/grad_norm"] > 0
    assert report["policy/tokens"] == 2 * batch.mask.sum()
    assert report["policy/anchor_kl"] == 0


def test_an_update_from_far_old_logprobs_stays_finite(tiny_llava_dir, tmp_path):
    """Ratios of e^495 count as e^20, and such tokens pass no gradient."""
    learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
    responses = make_responses(tmp_path, 8)
    old = learner.logprobs(responses)
    far = [row - 500 * (np.arange(len(row)) == 1).astype(np.float32) for row in old]
    report = learner.update(make_train_batch(responses, far), []).metrics
    assert np.isfinite(list(report.values())).all()
    assert report["policy/ratio_max"] == pytest.approx(np.exp(20), rel=1e-5)
    assert all(np.isfinite(row).all() for row in learner.logprobs(responses))


def test_the_kl_loss_pulls_towards_the_reference(tiny_llava_dir, tmp_path):
    """Without advantages it is all that moves the policy; at coefficient 0 nothing does."""
    responses = make_responses(tmp_path, 8)
    reports = []
    for coef in (0.0, 0.5):
        learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
        old = learner.logprobs(responses)
        batch = make_train_batch(responses, [row + np.float32(0.5) for row in old])
        batch = replace(
            batch,
            old_logprobs=batch.old_logprobs - np.float32(0.5) * batch.mask,
            advantages=0 * batch.advantages,
            kl_loss_coef=coef,
        )  # the reference is more probable than the policy, by e^.5
        reports.append(learner.update(batch, []).metrics)
        moved = [new - was for new, was in zip(learner.logprobs(responses), old, strict=True)]
        reports[-1]["moved"] = float(np.concatenate(moved).mean())
    still, pulled = reports
    assert "policy/kl_loss" not in still
    assert still["policy/grad_norm"] == still["moved"] == 0
    assert pulled["policy/kl_loss"] == pytest.approx(np.exp(0.5) - 0.5 - 1, rel=0.5)
    assert pulled["moved"] > 1e-3


def test_importance_weights_scale_the_gradient_of_their_tokens(tiny_llava_dir, tmp_path):
    """Ones change no bit of the update, zeros leave no gradient."""
    responses = make_responses(tmp_path, 8)
    reports = []
    for weight in (None, 1.0, 0.0):
        learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
        batch = make_train_batch(responses, learner.logprobs(responses))
        weights = None if weight is None else weight * batch.mask
        reports.append(learner.update(replace(batch, weights=weights), []).metrics)
    plain, ones, zeros = reports
    for name in ("policy/loss", "policy/grad_norm", "policy/approx_kl"):
        assert plain[name] == ones[name] != 0
    assert zeros["policy/loss"] == zeros["policy/grad_norm"] == 0


def test_published_factors_rebuild_the_policy(tiny_llava_dir, tmp_path):
    """W0 + scaling B A, added to a plain model by module name, gives the learner's log-probs."""
    learner = one_rank(tiny_config(tiny_llava_dir, tmp_path))
    responses = make_responses(tmp_path, 4)
    learner.update(make_train_batch(responses, learner.logprobs(responses)), [])
    manifest = learner.publish(7)
    assert manifest.version == 7
    assert manifest.scaling == 2.0
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).eval()
    modules = sorted({name.rpartition(".")[0] for name in manifest.tensors})
    assert modules[0] == "model.language_model.layers.0.mlp.down_proj"
    assert len(modules) == 2 * 7
    for name in modules:
        a, b = manifest.tensors[f"{name}.lora_A"], manifest.tensors[f"{name}.lora_B"]
        model.get_submodule(name).weight.data += manifest.scaling * torch.from_numpy(b @ a)
    for response, ours in zip(responses, learner.logprobs(responses), strict=True):
        np.testing.assert_allclose(ours, hf_logprobs(model, tiny_llava_dir, response), atol=1e-4)
    digest = manifest.digest
    learner.update(make_train_batch(responses, learner.logprobs(responses)), [])
    assert learner.publish(8).digest != digest
    assert manifest.digest == digest


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_resumed_run_equals_the_straight_run_bitwise(tiny_llava_dir, tmp_path, stage, dtype):
    """In bfloat16 too, at a learning rate whose steps the float32 masters alone can hold."""
    config = tiny_config(tiny_llava_dir, tmp_path, zero_stage=stage, anchor=ANCHOR,
                         schedule="cosine", warmup_steps=2,
                         lr=1e-2 if dtype == "float32" else 1e-5)  # fmt: skip
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": dtype})})
    responses = make_responses(tmp_path, 8)
    asked = questions(responses)

    def go_on(learner: LearnerActor, steps: range) -> None:
        for step in steps:
            batch = make_train_batch(responses, learner.logprobs(responses), seed=step)
            learner.update(batch, asked)

    straight = one_rank(config)
    go_on(straight, range(2))
    straight.save(tmp_path / "checkpoint")
    go_on(straight, range(2, 4))
    resumed = one_rank(config)
    resumed.restore(tmp_path / "checkpoint")
    go_on(resumed, range(2, 4))
    assert resumed.publish(4).digest == straight.publish(4).digest

    there = 1 if stage != 1 else 2
    other = one_rank(tiny_config(tiny_llava_dir, tmp_path, zero_stage=there))
    refused = (
        f"saved with cluster.learner.replicas=1 ppo.zero_stage={stage}, this run has "
        f"cluster.learner.replicas=1 ppo.zero_stage={there}; to resume, set cluster.learner.repl"
    )
    with pytest.raises(CheckpointError, match=refused):
        other.restore(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="cannot read"):
        resumed.restore(tmp_path)


def test_zero_stages_agree(tiny_llava_dir, tmp_path):
    responses = make_responses(tmp_path, 8)
    published = []
    for stage in (0, 1, 2, 3):
        learner = one_rank(tiny_config(tiny_llava_dir, tmp_path, zero_stage=stage, anchor=ANCHOR))
        batch = make_train_batch(responses, learner.logprobs(responses))
        learner.update(batch, questions(responses))
        published.append(learner.publish(1).tensors)
    for tensors in published[1:]:
        for name, value in published[0].items():
            np.testing.assert_allclose(tensors[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_step_the_ratio_is_one(tiny_llava_dir, tmp_path, checkpointing):
    """Old log-probs and those of the update are of the same policy, whatever drops out in it."""
    base = with_attention_dropout(tiny_llava_dir, tmp_path / "base")
    config = tiny_config(base, tmp_path, lr=1e-12, zero_stage=0)  # parameters are their own masters
    lora = config.policy.lora.model_copy(update={"dropout": 0.2})  # as an older configuration
    changes = {"lora": lora, "gradient_checkpointing": checkpointing}
    config = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
    learner = one_rank(config)
    randomise(learner)
    responses = make_responses(tmp_path, 8)
    report = learner.update(make_train_batch(responses, learner.logprobs(responses)), []).metrics
    assert report["policy/clip_frac"] == 0
    assert report["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert report["policy/grad_norm"] > 0


def randomise(learner: LearnerActor) -> None:
    """Make the adapter count: a fresh one adds nothing, and so does its dropout."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in learner._engine.model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.3, generator=generator)


def test_gradient_checkpointing_is_on_where_it_is_asked_for(tiny_llava_dir, tmp_path, monkeypatch):
    """transformers checkpoints layers in training mode only, which dropout forbids elsewhere."""
    recomputed = []
    for wanted in (False, True):
        config = tiny_config(tiny_llava_dir, tmp_path)
        policy = config.policy.model_copy(update={"gradient_checkpointing": wanted})
        learner = one_rank(config.model_copy(update={"policy": policy}))
        calls = []
        layer = learner._engine.model.get_base_model().model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        responses = make_responses(tmp_path, 4)
        batch = make_train_batch(responses, learner.logprobs(responses))
        calls.clear()
        learner.update(batch, [])
        recomputed.append(len(calls))
    assert recomputed[1] == 2 * recomputed[0]


def test_anchor_term_holds_the_answers(tiny_llava_dir, tmp_path):
    """The same update with and without the term: KL on the questions is smaller with it."""
    responses = make_responses(tmp_path, 8)
    kl = {}
    for weight in (1e-9, 30.0):
        config = tiny_config(
            tiny_llava_dir, tmp_path, epochs=4, anchor={"weight": weight, "batch_size": 8}
        )
        learner = one_rank(config)
        batch = make_train_batch(responses, learner.logprobs(responses))
        learner.update(batch, questions(responses))
        kl[weight] = learner.update(batch, questions(responses)).metrics["policy/anchor_kl"]
    assert 0 < kl[30.0] < 0.5 * kl[1e-9]


def test_micro_batching_does_not_change_the_update(tiny_llava_dir, tmp_path):
    responses = make_responses(tmp_path, 8)
    published = []
    for cut in ({"micro_batch": 1}, {"micro_batch": 8}, {"micro_batch": 8, "micro_tokens": 60}):
        learner = one_rank(tiny_config(tiny_llava_dir, tmp_path, anchor=ANCHOR, **cut))
        batch = make_train_batch(responses, learner.logprobs(responses))
        learner.update(batch, questions(responses))
        published.append(learner.publish(1).tensors)
    for tensors in published[1:]:
        for name, value in published[0].items():
            np.testing.assert_allclose(tensors[name], value, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_equal_one(tiny_llava_dir, tmp_path, dtype):
    """Five responses, so the ranks' shares differ in size; published weights agree.

    In bfloat16 other micro-batches round otherwise, and Adam gives the smallest gradients whole
    steps. The updates of one rank with other micro-batches are .05 to .16 of their length apart;
    with the gradients of one rank lost it would be .64.
    """
    import ray

    exact = dtype == "float32"
    config = tiny_config(tiny_llava_dir, tmp_path, minibatch=5, anchor=ANCHOR,
                         lr=1e-2 if exact else 1e-3)  # fmt: skip
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": dtype})})
    responses = make_responses(tmp_path, 5)
    asked = questions(responses)
    alone = one_rank(config)
    start = alone.publish(0).tensors
    old = alone.logprobs(responses)
    batch = make_train_batch(responses, old)
    reports = [alone.update(batch, asked), alone.update(batch, asked)]
    expected = alone.publish(1).tensors

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    try:
        port = free_port()
        remote = ray.remote(num_cpus=1)(LearnerActor)
        environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}}
        ranks = [
            remote.options(runtime_env=environment).remote(config, rank, 2, "127.0.0.1", port)
            for rank in range(2)
        ]
        shares = ray.get([r.logprobs.remote(responses) for r in ranks])
        for number, rows in enumerate(zip(*shares, strict=True)):
            (row,) = (row for row in rows if row is not None)  # one rank answers for each
            np.testing.assert_allclose(row, old[number], atol=1e-5 if exact else 0.05)
        first = ray.get([r.update.remote(batch, asked) for r in ranks])
        ray.get([r.save.remote(tmp_path / "two") for r in ranks])
        ray.get([r.update.remote(batch, asked) for r in ranks])
        ray.get([r.restore.remote(tmp_path / "two") for r in ranks])
        second = ray.get([r.update.remote(batch, asked) for r in ranks])
        tensors = ray.get([r.publish.remote(1) for r in ranks])
    finally:
        ray.shutdown()
    with pytest.raises(CheckpointError, match=r"replicas=2 .*, this run has \S+replicas=1 "):
        alone.restore(tmp_path / "two")
    assert tensors[0].digest == tensors[1].digest
    found = tensors[0].tensors
    for name, value in expected.items() if exact else ():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    apart, moved = (
        sum(float(np.square(expected[name] - other[name]).sum()) for name in expected)
        for other in (found, start)
    )
    assert apart < 0.35**2 * moved
    for two, one in zip((first[0], second[1]), reports, strict=True):
        for key in ("policy/loss", "policy/anchor_kl", "policy/entropy", "policy/grad_norm"):
            rel, atol = (1e-3, 1e-5) if exact else (0.1, 5e-3)
            assert two.metrics[key] == pytest.approx(one.metrics[key], rel=rel, abs=atol), key
