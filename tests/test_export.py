"""Exported checkpoints: public names, both loaders, the same log-probs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import photo_prompts, response_to, rollout_actor
from safetensors import safe_open

from fgaif.config import LoraConfig
from fgaif.errors import CheckpointError
from fgaif.lvlm.export import export_merged, public_name
from fgaif.lvlm.inputs import Encoder, image_token_count
from fgaif.lvlm.logprobs import response_logprobs
from fgaif.lvlm.model import attach_lora, load_lvlm, load_processor
from fgaif.types import FloatArray, Response


@pytest.fixture(scope="module")
def probe(photos: Path) -> list[Response]:
    return [response_to(prompt, [40, 61, 17, 203, 9, 2]) for prompt in photo_prompts(photos)[:2]]


@torch.no_grad()
def logprobs(model: torch.nn.Module, path: Path, probe: list[Response]) -> FloatArray:
    count = image_token_count(model.config)
    encoder = Encoder(load_processor(path), image_tokens=count)
    batch = encoder.encode(probe, next(model.parameters()))
    return response_logprobs(model, batch, temperature=1.0).numpy()


@pytest.fixture(scope="module")
def adapted(
    tiny_llava_dir: Path, probe: list[Response], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FloatArray]:
    """A saved adapter far from zero, and the adapted model's log-probs of the probe."""
    model = attach_lora(load_lvlm(tiny_llava_dir, dtype="float32"), LoraConfig(r=4), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logprobs(model, tiny_llava_dir, probe)


@pytest.fixture(scope="module")
def exported(
    tiny_llava_dir: Path, adapted: tuple[Path, FloatArray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("export") / "aligned"
    export_merged(tiny_llava_dir, adapted[0], out, dtype="float32")
    return out


def test_transformers_loads_the_export(
    exported: Path, adapted: tuple[Path, FloatArray], probe: list[Response]
) -> None:
    found = logprobs(load_lvlm(exported, dtype="float32"), exported, probe)
    np.testing.assert_allclose(found, adapted[1], atol=1e-4)


def test_vllm_loads_the_export(
    exported: Path, adapted: tuple[Path, FloatArray], probe: list[Response]
) -> None:
    found = np.stack(rollout_actor(exported).probe_logprobs(probe))
    np.testing.assert_allclose(found, adapted[1], atol=1e-3)


def test_the_adapter_is_in_the_weights(
    exported: Path, tiny_llava_dir: Path, adapted: tuple[Path, FloatArray], probe: list[Response]
) -> None:
    base = logprobs(load_lvlm(tiny_llava_dir, dtype="float32"), tiny_llava_dir, probe)
    assert np.abs(base - adapted[1]).max() > 0.1
    assert "r = 4" in (exported / "README.md").read_text(encoding="utf-8")


def test_weights_have_the_public_names(exported: Path) -> None:
    with safe_open(exported / "model.safetensors", framework="np") as file:
        names = set(file.keys())
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert not any(name.startswith("model.") or "lora" in name for name in names)
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_an_export_does_not_overwrite(
    tiny_llava_dir: Path, adapted: tuple[Path, FloatArray], exported: Path
) -> None:
    with pytest.raises(CheckpointError, match="not empty"):
        export_merged(tiny_llava_dir, adapted[0], exported, dtype="float32")


def test_a_weight_of_no_part_of_llava_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'model\.audio_tower\.weight'"):
        public_name("model.audio_tower.weight")
