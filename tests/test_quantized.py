"""A frozen base in 4 bits under all roles, through bitsandbytes on the CPU.

Rows are longer than its blocks of 64: on CPUs it unpacks shorter ones wrongly.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import reward_samples
import torch
from ppo_world import make_responses, make_train_batch, questions, tiny_config
from transformers import LlavaConfig

from actors.shared import SharedActor
from cluster.memory.actors import actor_memory
from cluster.memory.devices import parse_assumed
from cluster.memory.plan import check_memory
from fgaif.config import Config, load_config, with_overrides
from fgaif.errors import CheckpointError, ConfigError
from fgaif.lvlm.model import base_of, load_lvlm
from fgaif.lvlm.sizes import config_facts

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra quantize")

ALL = ("learner", "reference", "reward")
RECIPE = Path(__file__).parents[1] / "configs" / "one_gpu_24gb.yaml"


@pytest.fixture(scope="module")
def rewards(wide_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_samples.save_noisy(wide_llava_dir, tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def config(wide_llava_dir: Path, tmp_path: Path) -> Config:
    overrides = ["policy.quantization=nf4", "cluster.reward.shared=true", "ppo.zero_stage=1"]
    return with_overrides(tiny_config(wide_llava_dir, tmp_path), overrides)


def test_all_roles_work_on_one_base_in_four_bits(
    config: Config, rewards: Path, tmp_path: Path, wide_llava_dir: Path
) -> None:
    """The fresh policy is the reference, an update moves it alone, and training resumes."""
    actors = [SharedActor(config, ALL, rewards, 0, 1, "", 0) for _ in range(2)]
    learner, reference, reward = (actors[0]._roles[role] for role in ALL)
    bases = [base_of(m) for m in (learner._engine.model, reference._model, reward._model.backbone)]
    projections = [
        {n: p for n, p in base.named_parameters() if ".q_proj.base_layer" in n} for base in bases
    ]
    assert all(p.dtype == torch.uint8 for p in projections[0].values())
    assert all(
        projections[0][name] is projections[1][name] is projections[2][name]
        for name in projections[0]
    )
    responses = make_responses(tmp_path, 8)
    before = np.concatenate(learner.logprobs(responses))
    found = np.concatenate([e.reference_logprobs for e in reference.evaluate(responses)])
    np.testing.assert_allclose(before, found, atol=1e-5)
    exact = dict(load_lvlm(wide_llava_dir).named_parameters())
    for name, packed in projections[0].items():
        weight = exact[name.replace(".base_layer", "")]
        whole = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        error = (whole - weight).norm() / weight.norm()
        assert 0.02 < error < 0.15, "as rounding to 4 bits does"

    batch = make_train_batch(responses, learner.logprobs(responses))
    learner.update(batch, questions(responses))
    reference.update_values(batch)
    after = np.concatenate(learner.logprobs(responses))
    assert np.abs(after - before).max() > 1e-3
    again = np.concatenate([e.reference_logprobs for e in reference.evaluate(responses)])
    np.testing.assert_array_equal(found, again)
    learner.save(tmp_path / "saved")
    other = actors[1]._roles["learner"]
    other.restore(tmp_path / "saved")
    np.testing.assert_array_equal(after, np.concatenate(other.logprobs(responses)))
    text = reward_samples.response(
        wide_llava_dir, responses[0].prompt.image, ["There is a dog. "], index=0
    )
    (scores,) = reward.score_pairs([text])
    np.testing.assert_allclose(scores.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.reward.shared=false", r"set cluster\.reward\.shared=true"),
        ("ppo.zero_stage=3", r"set ppo\.zero_stage=2"),
        ("reward.zero_stage=3", r"set reward\.zero_stage=2"),
    ],
)
def test_what_does_not_go_with_four_bits_is_refused(
    config: Config, override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        with_overrides(config, [override])


def test_without_bitsandbytes_the_package_is_named(
    wide_llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available",
                        lambda: False, raising=False)  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match="pip install bitsandbytes"):
        load_lvlm(wide_llava_dir, quantization="nf4")


def test_a_7b_fits_24_gb_by_the_plan_in_four_bits_alone() -> None:
    config = load_config(RECIPE)
    models = {config.policy.model: config_facts(LlavaConfig())}
    check_memory(config, devices=parse_assumed("1x24"), models=models)
    whole = with_overrides(config, ["policy.quantization=none"])
    with pytest.raises(ConfigError, match="GPU 0 would hold"):
        check_memory(whole, devices=parse_assumed("1x24"), models=models)
    sizes = [
        actor_memory("learner", each, models, gpu=None, on_gpu=True).weights
        for each in (config, whole)
    ]
    assert 0.28 < sizes[0] / sizes[1] < 0.35
