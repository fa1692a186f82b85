"""Exported checkpoints: public names, both loaders, the same log-probs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import photo_prompts, response_to, rollout_actor
from ppo_world import hf_logprobs
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fgaif.config import LoraConfig
from fgaif.errors import CheckpointError
from fgaif.lvlm.adapters import ADAPTER_FILES
from fgaif.lvlm.export import export_adapter, export_merged, save_model
from fgaif.lvlm.families.llava import LLAVA
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import attach_lora, load_lvlm, load_processor, resolve_checkpoint
from fgaif.lvlm.weights import manifest_from_adapter
from fgaif.types import FloatArray, ImageRef, Prompt, Response


@pytest.fixture(scope="module")
def probe(photos: Path) -> list[Response]:
    return [response_to(prompt, [40, 61, 17, 203, 9, 2]) for prompt in photo_prompts(photos)[:2]]


def logprobs(model: torch.nn.Module, path: Path, probe: list[Response]) -> FloatArray:
    return hf_logprobs(model, path, probe).numpy()


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
        LLAVA.public_name("model.audio_tower.weight")


def small_update(tiny_llava_dir: Path, folder: Path, scale: float) -> Path:
    model = attach_lora(load_lvlm(tiny_llava_dir, dtype="float32"), LoraConfig(r=4), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    # As a learner in bfloat16 saves it.
    adapter = {n: p.bfloat16() for n, p in model.named_parameters() if "lora_" in n}
    model.save_pretrained(folder, state_dict=adapter)
    return folder


def test_an_export_that_would_be_the_base_is_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """The tiny model keeps its weights in float32, so its rounding is not that of a small update:
    a base that is in bfloat16 already shows it."""
    base = tmp_path / "base"
    save_model(
        load_lvlm(tiny_llava_dir, dtype="float32"),
        load_processor(tiny_llava_dir),
        base,
        dtype=torch.bfloat16,
    )
    adapter = small_update(base, tmp_path / "adapter", 1e-5)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"rounding to bfloat16 keeps \d\.\d% of the update"):
        export_merged(base, adapter, out, dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    kept = export_merged(base, adapter, out, dtype="bfloat16", least=0.0)
    assert kept.share < 0.1
    assert f"{kept.share:.1%} of the adapter" in (out / "README.md").read_text(encoding="utf-8")
    whole = export_merged(base, adapter, tmp_path / "whole", dtype="float32")
    assert whole.share == pytest.approx(1, abs=1e-3)
    assert whole.weakest == pytest.approx(1, abs=1e-2)


def test_the_adapter_is_offered_beside_the_export_and_alone(
    exported: Path, adapted: tuple[Path, FloatArray], tmp_path: Path
) -> None:
    export_adapter(adapted[0], tmp_path / "alone")
    for name in ADAPTER_FILES:
        for copy in (exported / "adapter", tmp_path / "alone"):
            assert (copy / name).read_bytes() == (adapted[0] / name).read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        export_adapter(adapted[0], tmp_path / "alone")


def test_an_adapter_in_bfloat16_is_read(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = small_update(tiny_llava_dir, tmp_path / "adapter", 0.1)
    manifest = manifest_from_adapter(adapter, version=1)
    assert manifest.scaling == LoraConfig(r=4).scaling
    assert all(array.dtype == np.float32 for array in manifest.tensors.values())
    name = "model.language_model.layers.0.self_attn.q_proj.lora_B"
    assert 0.05 < np.abs(manifest.tensors[name]).mean() < 0.2


@pytest.mark.parametrize(
    ("option", "value"), [("use_dora", True), ("alpha_pattern", {"q_proj": 64})]
)
def test_an_adapter_with_options_that_engines_ignore_is_refused(
    option: str, value: object, adapted: tuple[Path, FloatArray], tmp_path: Path
) -> None:
    shutil.copytree(adapted[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(CheckpointError, match=f"{option} is set"):
        manifest_from_adapter(tmp_path / "adapter", version=1)


def test_a_rank_stabilised_adapter_has_its_own_scaling(
    adapted: tuple[Path, FloatArray], tmp_path: Path
) -> None:
    shutil.copytree(adapted[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    manifest = manifest_from_adapter(tmp_path / "adapter", version=1)
    assert manifest.scaling == pytest.approx(16 / 2)


Tensors = dict[str, torch.Tensor]


def half(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if ".layers.0." in name}


def lonely(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if "lora_A" in name}


def of_the_bare_language_model(tensors: Tensors) -> Tensors:
    return {name.replace(".language_model", ""): value for name, value in tensors.items()}


def with_nan(tensors: Tensors) -> Tensors:
    first = next(name for name in tensors if "lora_B" in name)
    return tensors | {first: tensors[first] * float("nan")}


def of_another_rank(tensors: Tensors) -> Tensors:
    return {
        name: value[:2] if "lora_A" in name else value[:, :2] for name, value in tensors.items()
    }


def with_more(tensors: Tensors) -> Tensors:
    more = {n.replace(".layers.0.", ".layers.77."): v for n, v in half(tensors).items()}
    return {name: value.contiguous().clone() for name, value in (tensors | more).items()}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (half, "lacks"),
        (lonely, "is there and"),
        (of_the_bare_language_model, "belongs to no part"),
        (with_nan, "NaN or infinity"),
        (of_another_rank, "adapter_config.json says r = 4"),
        (with_more, "no place for"),
        (lambda tensors: {}, "no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_tensor_by_tensor_is_refused(
    fault: Callable[[Tensors], Tensors],
    words: str,
    adapted: tuple[Path, FloatArray],
    tiny_llava_dir: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(adapted[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    broken = {name: value.contiguous() for name, value in fault(load_file(file)).items()}
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        export_merged(tiny_llava_dir, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_names_of_earlier_transformers_are_read_alike_by_engine_and_export(
    adapted: tuple[Path, FloatArray], tiny_llava_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapted[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    old = {
        name.replace("model.model.language_model.", "model.language_model.model."): value
        for name, value in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    new = manifest_from_adapter(adapted[0], version=1)
    assert manifest_from_adapter(tmp_path / "adapter", version=1).digest == new.digest
    export_merged(tiny_llava_dir, tmp_path / "adapter", tmp_path / "old", dtype="float32")
    export_merged(tiny_llava_dir, adapted[0], tmp_path / "new", dtype="float32")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("old", "new"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        ("model.safetensors", b"", "no whole safetensors"),
        ("model.safetensors", b"\xff" * 64, "no whole safetensors"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        ("config.json", b'{"model_type": ', "not valid JSON"),
        ("config.json", b"[1]", "no JSON object"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "is missing"),
    ],
)
def test_damaged_files_of_a_checkpoint_are_named_before_anything_starts(
    tiny_llava_dir: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(str(tmp_path / "model"))


def test_truncated_weights_are_named(tiny_llava_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="where its header says"):
        resolve_checkpoint(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}",  # for text alone
        "{% for m in messages %}USER: <image>{% endfor %}",
        "{{ raise_exception('no images') }}",
        "{% if %}",
    ],
)
def test_a_template_that_writes_no_image_is_refused(
    tiny_llava_dir: Path, tmp_path: Path, template: str
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="chat template"):
        load_processor(tmp_path / "model")


def test_a_start_token_that_the_template_writes_is_not_doubled(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    plain = load_encoder(tmp_path / "model")
    file.write_text("{{ bos_token }}" + file.read_text())
    with_start = load_encoder(tmp_path / "model")
    asked = Prompt(id="", image=ImageRef(path="", sha256=""), text="What?")
    assert with_start.prompt_ids(asked) == plain.prompt_ids(asked)
    assert with_start.text_ids("What?") == plain.text_ids("What?")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    error: Exception, adapted: tuple[Path, FloatArray], tiny_llava_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fgaif.lvlm.export.save_torch_state_dict", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_merged(tiny_llava_dir, adapted[0], tmp_path / "out", dtype="float32")
    assert list(tmp_path.iterdir()) == []
