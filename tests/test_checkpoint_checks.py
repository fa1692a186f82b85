"""Checkpoints whose processor and weights disagree get one clear line before anything starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_families import BUILDERS

from cluster.pipeline.inputs import wrong_inputs
from fgaif.config import load_config
from fgaif.data.images import load_image
from fgaif.errors import CheckpointError
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import check_head, load_processor


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("originals")

    def build(name: str) -> Path:
        if not (folder / name).exists():
            BUILDERS[name](folder / name)
        return folder / name

    return build


Change = Callable[[dict[str, Any]], None]


def changed(
    source: Path, folder: Path, file: str, change: Callable[[dict[str, Any]], None]
) -> Path:
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


PROCESSOR = "processor_config.json"
CASES = [
    ("llava", PROCESSOR, lambda c: c.update(patch_size=16), r"patch_size = 16, .* is 14"),
    ("llava", PROCESSOR, lambda c: c.pop("vision_feature_select_strategy"),
     r"vision_feature_select_strategy = None, but config.json has 'default'; set it to 'default'"),
    ("qwen2_5_vl", PROCESSOR, lambda c: c["image_processor"].update(patch_size=16),
     r"patch_size = 16, but .* is 14; set it to 14"),
    ("qwen2_5_vl", PROCESSOR, lambda c: c["image_processor"].update(merge_size=4),
     r"merge_size = 4, but .* is 2"),
    ("qwen2_5_vl", "config.json", lambda c: c.update(image_token_id=3),
     r"image token '<\|image_pad\|>' has id \d+ in the tokenizer but config.json says 3"),
    ("qwen2_5_vl", "config.json", lambda c: c["text_config"].update(vocab_size=100),
     r"a token of id \d+, but .* rows for 100"),
    ("llava_next", "config.json", lambda c: c.update(image_grid_pinpoints=[[28, 56]]),
     r"image_grid_pinpoints = .* but config.json has \[\[28, 56\]\]"),
    ("llava_onevision", "config.json", lambda c: c.update(vision_aspect_ratio="anyres_max_4"),
     r"vision_aspect_ratio = 'anyres_max_4'; vLLM counts .* for 'anyres_max_9' alone"),
    ("idefics3", PROCESSOR, lambda c: c.update(image_seq_len=9), r"image_seq_len = 9, .* make 4"),
    ("internvl", PROCESSOR, lambda c: c.update(image_seq_length=9),
     r"image_seq_length = 9, .* make 4"),
    ("gemma3", PROCESSOR, lambda c: c.update(image_seq_length=9),
     r"image_seq_length = 9, but mm_tokens_per_image in config.json is 4"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "file", "change", "words"), CASES)
def test_processor_and_weights_that_disagree(
    originals: Callable[[str], Path], tmp_path: Path, family: str, file: str,
    change: Change, words: str,
) -> None:  # fmt: skip
    path = changed(originals(family), tmp_path / "model", file, change)
    with pytest.raises(CheckpointError, match=words) as refused:
        load_processor(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_it_is_said_before_a_run_starts(originals: Callable[[str], Path], tmp_path: Path) -> None:
    path = changed(
        originals("qwen2_5_vl"), tmp_path / "model", PROCESSOR,
        lambda content: content["image_processor"].update(patch_size=16),
    )  # fmt: skip
    config = load_config(None, [f"policy.model={path}", f"dir={tmp_path}/runs"])
    found = wrong_inputs(config, ["train-reward"])
    assert set(found) == {"policy.model", "reward.backbone"}
    assert "patch_size = 16" in str(found["policy.model"])
    one = load_config(None, [f"policy.model={originals('qwen2_5_vl')}", f"dir={tmp_path}/runs"])
    assert wrong_inputs(one, ["train-reward"]) == {}


def test_what_engines_cannot_do_for_a_family_is_said_before_a_run_starts(
    originals: Callable[[str], Path], tmp_path: Path
) -> None:
    path = originals("llava_onevision")
    settings = [f"policy.model={path}", f"dir={tmp_path}/runs", "policy.train_projector=true"]
    unmerged = load_config(None, [*settings, "cluster.engine.adapters=unmerged"])
    said = str(wrong_inputs(unmerged, ["train-reward"])["policy.model"])
    assert "the projector of LLaVA-OneVision models stays frozen; set it to false" in said
    frozen = [*settings[:2], "cluster.engine.adapters=unmerged"]
    said = str(wrong_inputs(load_config(None, frozen), ["train-reward"])["policy.model"])
    assert "vLLM serves no adapters on LLaVA-OneVision models; set it to merged" in said
    merged = load_config(None, [*settings[:2], "cluster.engine.adapters=merged"])
    assert wrong_inputs(merged, ["train-reward"]) == {}


def test_a_padded_vocabulary_is_no_fault(llava15_dir: Path) -> None:
    processor = load_processor(llava15_dir)
    rows = json.loads((llava15_dir / "config.json").read_text())["text_config"]["vocab_size"]
    assert len(processor.tokenizer) < rows


def test_an_output_layer_that_is_not_what_config_json_says(
    originals: Callable[[str], Path], tmp_path: Path
) -> None:
    def tie(value: bool) -> Change:
        def change(content: dict[str, Any]) -> None:
            content["tie_word_embeddings"] = value
            content["text_config"]["tie_word_embeddings"] = value

        return change

    untied, tied = originals("qwen2_5_vl"), originals("qwen2_vl")
    for path in (untied, tied):
        check_head(path)
    wrong = changed(untied, tmp_path / "own", "config.json", tie(True))
    with pytest.raises(CheckpointError, match=r"differs from the embeddings and would not be load"):
        check_head(wrong)
    wrong = changed(tied, tmp_path / "none", "config.json", tie(False))
    with pytest.raises(CheckpointError, match=r"no output layer of their own .* set it to true"):
        check_head(wrong)
    same = shutil.copytree(tied, tmp_path / "same")  # written twice, as some tools do
    weights = load_file(same / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    check_head(same)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_processors_saved_as_fast_or_slow_give_the_same_pixels(
    originals: Callable[[str], Path], tmp_path: Path, photos: Path, family: str
) -> None:
    """Names of both kinds are in published checkpoints; there is one class of each today."""
    from engines import photo_prompts

    def fast(content: dict[str, Any]) -> None:
        settings = content["image_processor"]
        settings["image_processor_type"] = settings["image_processor_type"] + "Fast"

    path = changed(originals(family), tmp_path / "model", PROCESSOR, fast)
    one, other = load_encoder(originals(family)), load_encoder(path)
    prompt = photo_prompts(photos)[0]
    assert one.prompt_ids(prompt) == other.prompt_ids(prompt)
    assert load_image(prompt.image).size != (28, 28)
    for name, value in one.pixels(prompt.image).items():
        np.testing.assert_array_equal(other.pixels(prompt.image)[name], value)


def test_a_bound_on_pixels_is_kept_by_encoder_and_count(
    originals: Callable[[str], Path], photos: Path
) -> None:
    from engines import photo_prompts

    from fgaif.lvlm.sizes import read_facts

    for family, side in (("qwen2_5_vl", 28), ("qwen3_vl", 32)):
        pixels = 6 * side**2
        encoder = load_encoder(originals(family), image_pixels=pixels)
        assert read_facts(originals(family), pixels).image_tokens == 6
        for prompt in photo_prompts(photos):
            count = encoder.prompt_ids(prompt).count(encoder.image_token_id)
            assert 0 < count <= 6
            assert int(encoder.pixels(prompt.image)["image_grid_thw"].prod()) == 4 * count
