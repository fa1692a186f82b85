"""The configurations for GPUs are what their headers say: our recipe, the paper's, the scripts'."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, LlavaConfig

from cluster.memory.actors import Models
from cluster.memory.devices import parse_assumed
from cluster.memory.plan import plan_memory
from fgaif.config import Config, load_config
from fgaif.lvlm.sizes import config_facts
from fgaif.reward.train import planned_steps

FOLDER = Path(__file__).parents[1] / "configs"
OURS = ["llava15_7b_4gpu", "llava15_7b_13brm_8gpu", "coco_api", "my_images"]
REFERENCES = ["paper/paper", "paper/reference_scripts"]
HARDWARE = {
    "my_images": ("one 80 GB GPU", "1x80"),
    "coco_api": ("four 80 GB GPUs", "4x80"),
    "llava15_7b_4gpu": ("four 80 GB GPUs", "4x80"),
    "llava15_7b_13brm_8gpu": ("eight 80 GB GPUs", "8x80"),
    "paper/paper": ("four 80 GB GPUs", "4x80"),
    "paper/reference_scripts": ("four 80 GB GPUs", "4x80"),
}

# What both references share: where the paper is silent its values are the scripts'.
SHARED: dict[str, Any] = {
    "data.feedback_prompts": 3500,
    "data.ppo_prompts": 14000,
    "policy.dtype": "bfloat16",
    "policy.max_new_tokens": 896,
    "policy.temperature": 1.0,
    "policy.gradient_checkpointing": True,
    "policy.lora.r": 64,
    "policy.lora.alpha": 16,
    "policy.lora.dropout": 0.0,
    "segment.min_words": 5,
    "feedback.extractor": "api:writer",
    "endpoints.writer.model": "gpt-3.5-turbo-0125",
    "reward.lora.r": 64,
    "reward.lora.alpha": 16,
    "reward.lora.dropout": 0.0,
    "reward.lr": 2e-5,
    "reward.micro_batch": 4,
    "reward.epochs": 100,
    "reward.warmup": 0.03,
    "reward.weight_decay": 0.0,
    "reward.max_grad_norm": 0.3,
    "reward.class_balance": False,
    "reward.head": "linear",
    "reward.val_fraction": 0.114,
    "ppo.rollout_batch": 512,
    "ppo.minibatch": 256,
    "ppo.micro_batch": 16,
    "ppo.epochs": 2,
    "ppo.lr": 1e-7,
    "ppo.value_lr": 1e-7,
    "ppo.value_init": "object",
    "ppo.weight_decay": 0.0,
    "ppo.adam_betas": [0.9, 0.999],
    "ppo.max_grad_norm": 1.0,
    "ppo.warmup_steps": 5,
    "ppo.schedule": "cosine",
    "ppo.gamma": 1.0,
    "ppo.lam": 1.0,
    "ppo.clip": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.kl.target": None,
    "ppo.shape.weights.object": 1.0,
    "ppo.shape.weights.attribute": 1.0,
    "ppo.shape.weights.relation": 1.0,
    "ppo.shape.values": "hard",
    "ppo.shape.value_none": 0.0,
    "ppo.shape.center": False,
    "ppo.shape.repeat_penalty": 0.0,
    "ppo.shape.no_stop_penalty": 0.0,
    "ppo.shape.length_penalty": 0.0,
    "ppo.shape.placement": "segment",
    "ppo.anchor.weight": 0.0,
    "cluster.engine.max_model_len": 2048,
}
THEIRS: dict[str, dict[str, Any]] = {
    "paper/paper": SHARED | {
        "reward.batch_size": 4,
        "ppo.kl.coef": 0.1,
        "ppo.shape.value_ok": 1.0,
        "ppo.shape.value_hallu": -1.0,
    },
    "paper/reference_scripts": SHARED | {
        "reward.batch_size": 32,  # 4 a device, 2 accumulated, 4 GPUs
        "reward.evals": 656,
        "ppo.steps": 109,  # floor(14,000 prompts x 4 epochs / 512)
        "ppo.kl.coef": 1.0,  # rewards and KL are multiplied by 10
        "ppo.shape.value_ok": 10.0,
        "ppo.shape.value_hallu": -10.0,
    },
}  # fmt: skip
# Keys that neither of them states: data that was not released, models in our layout, placing.
OPEN = re.compile(
    r"name|data\.(train|held_out|eval_prompts)|policy\.model|feedback\.(verifier|prompt)|"
    r"reward\.(backbone|evals|patience|gpus_per_worker|parallel)|ppo\.steps|cluster\..*"
)
SOURCES = {
    "paper/paper": r"paper|scripts|ours",
    "paper/reference_scripts": r"train_\w+\.sh|data|trainer|LLaVA-RLHF|ours",
}


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def header(name: str) -> str:
    lines = text(name).splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in head)


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


@pytest.mark.parametrize("name", REFERENCES)
def test_references_hold_the_values_of_their_source(name: str) -> None:
    """As written and as loaded, so that no default stands in for a value."""
    written = leaves(yaml.safe_load(text(name)))
    loaded = leaves(load(name).model_dump(mode="json"))
    for key, value in THEIRS[name].items():
        assert (key, written.get(key, "absent")) == (key, value)
        assert (key, loaded[key]) == (key, value)
    assert [key for key in written if key not in THEIRS[name] and not OPEN.fullmatch(key)] == []


@pytest.mark.parametrize("name", REFERENCES)
def test_every_key_of_a_reference_names_its_source(name: str) -> None:
    for line in text(name).splitlines():
        key, _, rest = line.partition(":")
        value, _, comment = rest.partition("  #")
        if line.startswith("#") or key == "name" or not value.strip():
            continue
        assert re.match(rf" ({SOURCES[name]})\b", comment), line


@pytest.mark.parametrize("name", REFERENCES)
def test_references_say_what_they_would_do_here(name: str) -> None:
    """Updates: steps x epochs x minibatches. Each moves B by at most the rate, whose cosine halves.

    |B| = rate x updates / 2; a product of r = 64 random terms, A uniform to 1 / sqrt(4,096), times
    alpha / r = 1/4, against weights of 0.02.
    """
    ppo = load(name).ppo
    updates = ppo.steps * ppo.epochs * (ppo.rollout_batch // ppo.minibatch)
    moved = 0.25 * 8 * (ppo.lr * updates / 2) / math.sqrt(3 * 4096) / 0.02
    size = f"{moved:.0e}".replace("e-0", "e-")
    assert f"in {updates} updates at 1e-7" in header(name)
    assert f"by {size} of their norm" in header(name)
    assert "do not expect this to align a model" in header(name)


@pytest.mark.parametrize("name", OURS)
def test_our_recipe_departs_where_it_says(name: str) -> None:
    """The list in the header of the four-GPU file, which the others point to."""
    ours, paper = load(name), load("paper/paper")
    for word in ("ppo.lr 3e-5, not 1e-7", "soft and centred with penalties", "0.95, not 1.0"):
        assert word in re.sub(r"\s+", " ", header("llava15_7b_4gpu"))
    assert "ur recipe" in header(name)
    assert "llava15_7b_4gpu.yaml" in header(name) or name == "llava15_7b_4gpu"
    assert (ours.ppo.lr, paper.ppo.lr) == (3e-5, 1e-7)
    assert (ours.ppo.lam, ours.ppo.adam_betas, ours.ppo.value_init) == (0.95, (0.9, 0.95), "policy")
    assert (ours.ppo.shape.values, ours.ppo.shape.center) == ("soft", True)
    assert min(ours.ppo.shape.repeat_penalty, ours.ppo.shape.no_stop_penalty) > 0
    assert (ours.reward.batch_size, ours.reward.class_balance) == (32, True)
    same = ("gamma", "clip", "value_clip", "kl", "rollout_batch", "minibatch", "epochs", "steps")
    for key in same:
        assert getattr(ours.ppo, key) == getattr(paper.ppo, key), key
    assert ours.policy.lora == paper.policy.lora


@pytest.mark.parametrize("name", [*OURS, "scenes", "scenes_study"])
def test_the_reward_models_rate_is_reached_before_the_first_validation(name: str) -> None:
    """So early stopping cannot end the training before. A tenth of 100 epochs was ten of them."""
    reward = load(name).reward
    steps = planned_steps(round(3500 * (1 - reward.val_fraction)), reward)
    assert round(reward.warmup * steps) < math.ceil(steps / reward.evals)


@pytest.fixture(scope="module")
def llava15() -> Models:
    """Facts of LLaVA-1.5-7B, and of 13B: 40 layers of 40 heads, 5,120 and 13,824 wide."""
    large = LlavaConfig().text_config.to_dict() | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128,
    }  # fmt: skip
    models = {
        "checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig()),
        "checkpoints/llava-1.5-13b-hf": config_facts(LlavaConfig(text_config=large)),
    }
    assert [round(m.parameters / 1e9, 1) for m in models.values()] == [7.1, 13.4]
    return models


@pytest.mark.parametrize("name", HARDWARE)
def test_it_fits_the_hardware_that_its_header_names(name: str, llava15: Models) -> None:
    words, devices = HARDWARE[name]
    assert words in header(name).lower().replace("gb gpu", "GB GPU")
    plan = plan_memory(load(name), devices=parse_assumed(devices), models=llava15)
    assert plan.problems == ()
    assert any(load.gpu is not None for load in plan.loads)


QWEN_TEXT = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
ONEVISION_SIDES = [384 * side for side in range(1, 7)]
# What the config.json files of the published checkpoints say of sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-7B-Instruct": QWEN_TEXT
    | {
        "model_type": "qwen2_5_vl", "max_position_embeddings": 128000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 3584,
        },
    },
    "Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 151936, "hidden_size": 4096,
            "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
            "rope_scaling": {
                "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "llava-onevision-qwen2-7b-ov-hf": {
        "model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[h, w] for h in ONEVISION_SIDES for w in ONEVISION_SIDES],
        "text_config": QWEN_TEXT
        | {"model_type": "qwen2", "vocab_size": 152000, "max_position_embeddings": 32768},
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384,
            "patch_size": 14, "vision_use_head": False,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "devices", "words", "billions", "tokens"),
    [
        ("qwen25vl_7b_4gpu", "4x80", "four 80 GB GPUs", 8.3, 1280),
        ("qwen25vl_7b_1gpu", "1x80", "one 80 GB GPU", 8.3, 640),
        ("qwen3vl_8b_4gpu", "4x80", "four 80 GB GPUs", 8.8, 1280),
        ("llava_onevision_7b_4gpu", "4x80", "four 80 GB GPUs", 8.0, 8829),
    ],
)
def test_other_families_fit_the_hardware_by_their_config_json_alone(
    name: str, devices: str, words: str, billions: float, tokens: int, tmp_path: Path
) -> None:
    config = load(name)
    assert words in header(name)
    assert "Nobody has run it on" in header(name)
    published = PUBLISHED[Path(config.policy.model).name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    facts = config_facts(AutoConfig.from_pretrained(tmp_path), config.data.image_pixels)
    assert round(facts.parameters / 1e9, 1) == billions
    assert facts.image_tokens == tokens
    models = {config.policy.model: facts}
    plan = plan_memory(config, devices=parse_assumed(devices), models=models)
    assert plan.problems == ()
    assert any(load.gpu is not None for load in plan.loads)
    assert config.cluster.engine.max_model_len >= config.policy.max_new_tokens + 640


def test_a_larger_verifier_fits_my_images_as_its_header_says(llava15: Models) -> None:
    setting = "cluster.engine.gpu_memory_utilization=0.45"
    assert f"annotate --config configs/my_images.yaml {setting}" in header("my_images")
    for overrides, fits in (([setting], True), ([], False)):
        larger = ["feedback.verifier=checkpoints/llava-1.5-13b-hf", *overrides]
        config = load_config(FOLDER / "my_images.yaml", larger)
        devices = parse_assumed("1x80")
        plan = plan_memory(config, {"rollout", "judge"}, devices, llava15)
        assert (plan.problems == ()) is fits, plan.problems
