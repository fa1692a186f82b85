"""Reference log-probs and the value model: against Hugging Face, by learning, resumed."""

import numpy as np
import pytest
import torch
from ppo_world import (
    hf_logprobs,
    make_responses,
    make_train_batch,
    tiny_config,
    with_attention_dropout,
)
from transformers import LlavaForConditionalGeneration

from actors.reference import ReferenceActor
from fgaif.config import Config, LoraConfig
from fgaif.errors import CheckpointError
from fgaif.lvlm.model import attach_lora


def step(actor: ReferenceActor, responses, seed: int = 0):
    evaluations = actor.evaluate(responses)
    logprobs = [evaluation.reference_logprobs for evaluation in evaluations]
    batch = make_train_batch(responses, logprobs, seed=seed)
    return actor.update_values(batch), batch


def test_reference_stays_while_values_learn(tiny_llava_dir, tmp_path):
    actor = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path), tmp_path)
    responses = make_responses(tmp_path, 6)
    before = actor.evaluate(responses)
    assert all((evaluation.values == 0).all() for evaluation in before), "the head starts at zero"
    step(actor, responses)
    after = actor.evaluate(responses)

    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).eval()
    plain = hf_logprobs(model, tiny_llava_dir, responses, temperature=0.7).numpy()
    for row, first, second in zip(plain, before, after, strict=True):
        width = len(first.values)
        np.testing.assert_allclose(first.reference_logprobs, row[:width], atol=1e-5)
        np.testing.assert_array_equal(first.reference_logprobs, second.reference_logprobs)
    assert np.abs(after[0].values).max() > 1e-3
    assert actor.info()["shared_backbone"] == 1


def test_without_a_critic_there_is_the_reference_alone(tiny_llava_dir, tmp_path):
    plain = tiny_config(tiny_llava_dir, tmp_path, estimator="grpo", samples_per_prompt=4)
    alone = ReferenceActor(plain, tmp_path / "no-rewards-there")
    both = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path), tmp_path)
    responses = make_responses(tmp_path, 6)
    assert alone.info()["trainable_parameters"] == 0 < both.info()["trainable_parameters"]
    for ours, theirs in zip(alone.evaluate(responses), both.evaluate(responses), strict=True):
        assert ours.values is None
        np.testing.assert_allclose(ours.reference_logprobs, theirs.reference_logprobs, atol=1e-6)


def test_value_of_a_prefix_does_not_see_the_next_token(tiny_llava_dir, tmp_path):
    """Two responses that differ in token 2 have the same values up to and including values[2]."""
    from dataclasses import replace

    actor = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path), tmp_path)
    responses = make_responses(tmp_path, 8)
    step(actor, responses)
    first = responses[0]
    ids = first.token_ids.copy()
    ids[2] = 200 if ids[2] != 200 else 100
    one, other = (e.values for e in actor.evaluate([first, replace(first, token_ids=ids)]))
    np.testing.assert_allclose(one[:3], other[:3], atol=1e-6)
    assert np.abs(one[3:] - other[3:]).max(initial=1.0 if len(one) == 3 else 0.0) > 1e-5


def test_values_fit_the_returns(tiny_llava_dir, tmp_path):
    config = tiny_config(tiny_llava_dir, tmp_path, epochs=30, value_clip=None)
    actor = ReferenceActor(config, tmp_path)
    responses = make_responses(tmp_path, 8)
    report, batch = step(actor, responses)
    again = actor.update_values(batch)
    assert again.metrics["value/loss"] < 0.5 * report.metrics["value/loss"]


def test_micro_batching_does_not_change_the_update(tiny_llava_dir, tmp_path):
    responses = make_responses(tmp_path, 8)
    results = []
    for cut in ({"micro_batch": 1}, {"micro_batch": 8}, {"micro_batch": 8, "micro_tokens": 60}):
        actor = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path, **cut), tmp_path)
        step(actor, responses)
        results.append(np.concatenate([e.values for e in actor.evaluate(responses)]))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    np.testing.assert_allclose(results[0], results[2], atol=1e-4)


def test_resumed_run_equals_the_straight_run_bitwise(tiny_llava_dir, tmp_path):
    config = tiny_config(tiny_llava_dir, tmp_path, schedule="cosine",
                         value_lora={"r": 4, "alpha": 4.0})  # fmt: skip
    responses = make_responses(tmp_path, 8)

    def go_on(actor: ReferenceActor, steps: range) -> np.ndarray:
        for seed in steps:
            step(actor, responses, seed)
        return np.concatenate([e.values for e in actor.evaluate(responses)])

    straight = ReferenceActor(config, tmp_path)
    go_on(straight, range(2))
    straight.save(tmp_path / "checkpoint")
    expected = go_on(straight, range(2, 4))
    resumed = ReferenceActor(config, tmp_path)
    resumed.restore(tmp_path / "checkpoint")
    np.testing.assert_array_equal(go_on(resumed, range(2, 4)), expected)

    other = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path, value_lora={"r": 2}), tmp_path)
    with pytest.raises(CheckpointError, match="same model"):
        other.restore(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="cannot read"):
        other.restore(tmp_path)


def test_value_model_may_start_from_a_reward_adapter(tiny_llava_dir, tmp_path):
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir)
    adapter = attach_lora(base, LoraConfig(r=3), seed=5)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapter.save_pretrained(tmp_path / "object")
    config: Config = tiny_config(tiny_llava_dir, tmp_path, value_init="object")
    actor = ReferenceActor(config, tmp_path)
    plain = ReferenceActor(tiny_config(tiny_llava_dir, tmp_path), tmp_path)
    responses = make_responses(tmp_path, 4)
    for ours, theirs in zip(actor.evaluate(responses), plain.evaluate(responses), strict=True):
        np.testing.assert_array_equal(ours.reference_logprobs, theirs.reference_logprobs)
    assert actor.info()["trainable_parameters"] < plain.info()["trainable_parameters"]
    assert step(actor, responses)[0].metrics["value/grad_norm"] > 0
    with pytest.raises(CheckpointError, match="no adapter_config"):
        ReferenceActor(tiny_config(tiny_llava_dir, tmp_path, value_init="relation"), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_are_trained_as_they_are_evaluated(tiny_llava_dir, tmp_path, checkpointing):
    """One step's loss is that of the values from before it: nothing drops out of either."""
    base = with_attention_dropout(tiny_llava_dir, tmp_path / "base")
    config = tiny_config(base, tmp_path, epochs=1, minibatch=6, value_clip=None)
    lora = config.ppo.value_lora.model_copy(update={"dropout": 0.2})  # as an older configuration
    changes = {
        "ppo": config.ppo.model_copy(update={"value_lora": lora}),
        "policy": config.policy.model_copy(update={"gradient_checkpointing": checkpointing}),
    }
    actor = ReferenceActor(config.model_copy(update=changes), tmp_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh head gives zeros, and a fresh adapter adds none
        for name, value in actor._parameters.items():
            if "lora_B" in name or name == "head.weight":
                value.normal_(0, 0.3, generator=generator)
    responses = make_responses(tmp_path, 6)
    evaluations = actor.evaluate(responses)
    batch = make_train_batch(responses, [e.reference_logprobs for e in evaluations])
    returns = [row[mask > 0] for row, mask in zip(batch.returns, batch.mask, strict=True)]
    errors = [e.values - row for e, row in zip(evaluations, returns, strict=True)]
    report = actor.update_values(batch).metrics
    expected = 0.5 * float(np.square(np.concatenate(errors)).mean())
    assert report["value/loss"] == pytest.approx(expected, rel=1e-4)
    assert report["value/grad_norm"] > 0
