"""LLaVA's original layout to that of transformers: names and shapes of the public files, and a
checkpoint made in the original layout."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny
import torch
from engines import photo_prompts, response_to, rollout_actor
from fake_hub import FakeHub, online
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from PIL import Image
from ppo_world import hf_logprobs
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
)

from cluster.cli.main import main
from fgaif.errors import CheckpointError
from fgaif.lvlm.convert import check_shapes, convert, new_name
from fgaif.lvlm.model import (
    image_features,
    load_adapter,
    load_lvlm,
    load_processor,
    resolve_checkpoint,
)

Shapes = dict[str, tuple[int, ...]]
TOTAL_SIZE = 13_518_798_848  # of liuhaotian/llava-v1.5-7b, by its pytorch_model.bin.index.json
HIDDEN, FFN, LAYERS, WORDS, VISION = 64, 96, 2, 420, 48


def original_shapes(hidden: int, ffn: int, layers: int, words: int, vision: int) -> Shapes:
    """Names and shapes in a checkpoint of LLaVA's authors."""
    shapes: Shapes = {
        "lm_head.weight": (words, hidden), "model.embed_tokens.weight": (words, hidden),
        "model.norm.weight": (hidden,),
        "model.mm_projector.0.weight": (hidden, vision), "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
                "self_attn.q_proj.weight": (hidden, hidden),
                "self_attn.k_proj.weight": (hidden, hidden),
                "self_attn.v_proj.weight": (hidden, hidden),
                "self_attn.o_proj.weight": (hidden, hidden),
                "self_attn.rotary_emb.inv_freq": (64,),
                "mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden),
                "mlp.down_proj.weight": (hidden, ffn),
            }.items()
        }  # fmt: skip
    return shapes


def clip_shapes(config: CLIPVisionConfig) -> Shapes:
    """Names and shapes of the tower in CLIP's own repository."""
    h, ffn, patches = config.hidden_size, config.intermediate_size, config.image_size // 14
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (h,),
        "vision_model.embeddings.position_ids": (1, patches**2 + 1),
        "vision_model.embeddings.patch_embedding.weight": (h, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (patches**2 + 1, h),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(config.num_hidden_layers):
        place = f"encoder.layers.{layer}"
        norms += [f"{place}.layer_norm1", f"{place}.layer_norm2"]
        linears = {f"self_attn.{name}_proj": (h, h) for name in ("q", "k", "v", "out")}
        for name, shape in (linears | {"mlp.fc1": (ffn, h), "mlp.fc2": (h, ffn)}).items():
            shapes[f"vision_model.{place}.{name}.weight"] = shape
            shapes[f"vision_model.{place}.{name}.bias"] = shape[:1]
    for norm in norms:
        shapes |= {f"vision_model.{norm}.{part}": (h,) for part in ("weight", "bias")}
    return shapes


def test_names_and_shapes_are_those_of_the_public_7b() -> None:
    """All tensors of the index add up to its total size, in float16 but for the frequencies; after
    renaming they are llava-hf's 7,063,427,072 weights, no more and no fewer."""
    original = original_shapes(4096, 11008, 32, 32000, 1024)
    sizes = {name: math.prod(shape) for name, shape in original.items()}
    width = {name: 4 if name.endswith("inv_freq") else 2 for name in sizes}
    assert sum(sizes[name] * width[name] for name in sizes) == TOTAL_SIZE
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096))
    both = original | clip_shapes(config.vision_config)
    renamed = {new: shape for name, shape in both.items() if (new := new_name(name))}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        renamed[name] = (32064, 4096)
    check_shapes(config, renamed)
    assert sum(map(math.prod, renamed.values())) == 7_063_427_072


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA and its CLIP, each as its authors publish it: pickled, a sentencepiece tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    clip, llava = folder / "clip", folder / "llava-v1.5-tiny"
    torch.manual_seed(0)
    clip_config().save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(clip)
    torch.save(CLIPModel(clip_config()).state_dict(), clip / "pytorch_model.bin")
    llava.mkdir()
    shapes = original_shapes(HIDDEN, FFN, LAYERS, WORDS, VISION)
    weights = {name: (0.2 * torch.randn(shape)).half() for name, shape in shapes.items()}
    parts = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    places = {name: parts[index % 2] for index, name in enumerate(sorted(weights))}
    for part in parts:
        torch.save({n: v for n, v in weights.items() if places[n] == part}, llava / part)
    write_json(llava / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    write_json(llava / "config.json", settings(str(clip)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES * 3), model_prefix=str(llava / "tokenizer"),
        vocab_size=WORDS, model_type="bpe", byte_fallback=True, pad_id=-1, unk_id=0, bos_id=1,
        eos_id=2, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        llava / "tokenizer_config.json",
        special | {"tokenizer_class": "LlamaTokenizer", "legacy": False, "padding_side": "right"},
    )
    write_json(llava / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    return llava


def clip_config() -> CLIPConfig:
    """A small CLIP; of its text half nothing is used."""
    tower = {
        "hidden_size": VISION, "intermediate_size": 2 * VISION, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = tower | {"vocab_size": 50, "max_position_embeddings": 16}
    return CLIPConfig(vision_config=tower, text_config=text)


def read(source: Path) -> dict[str, torch.Tensor]:
    """The original weights in float32."""
    parts = [torch.load(file, weights_only=True) for file in sorted(source.glob("*.bin"))]
    return {name: value.float() for part in parts for name, value in part.items()}


def settings(tower: str, **changed: Any) -> dict[str, Any]:
    """The config.json of liuhaotian/llava-v1.5-7b but for the sizes."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": HIDDEN, "image_aspect_ratio": "pad",
        "intermediate_size": FFN, "max_position_embeddings": 512, "mm_hidden_size": VISION,
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": tower, "model_type": "llava",
        "num_attention_heads": 2, "num_hidden_layers": LAYERS, "num_key_value_heads": 2,
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": WORDS,
        **changed,
    }  # fmt: skip


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "llava"
    assert convert(str(source), out) == "checkpoint"
    return out


def copy(source: Path, folder: Path, **changed: Any) -> Path:
    shutil.copytree(source, folder)
    write_json(folder / "config.json", settings(str(source.parent / "clip"), **changed))
    return folder


def test_the_language_model_is_the_same(source: Path, converted: Path) -> None:
    """Logits of a text under plain Llama with the original names, and under the new model."""
    original = json.loads((source / "config.json").read_text())
    llama = LlamaForCausalLM(LlamaConfig(**original)).eval()
    beside = ("mm_projector", "inv_freq")
    own = {n: v for n, v in read(source).items() if not any(part in n for part in beside)}
    llama.load_state_dict(own, strict=True)
    ids = torch.arange(3, 40)[None]
    model = load_lvlm(resolve_checkpoint(str(converted)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits[..., :WORDS], llama(input_ids=ids).logits)
    assert logits.shape[-1] == 448  # 420 words and two tokens, to a multiple of 64


@torch.no_grad()
def test_image_features_are_those_of_clip_through_the_projector(
    source: Path, converted: Path
) -> None:
    tower = torch.load(source.parent / "clip" / "pytorch_model.bin", weights_only=True)
    clip = CLIPModel(clip_config()).eval()
    clip.load_state_dict(tower)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    hidden = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    weights = {name.removeprefix("model.mm_projector."): w for name, w in read(source).items()}
    first = nn.functional.linear(hidden, weights["0.weight"], weights["0.bias"])
    wanted = nn.functional.linear(nn.functional.gelu(first), weights["2.weight"], weights["2.bias"])
    found = image_features(load_lvlm(converted), [{"pixel_values": each[None]} for each in pixels])
    torch.testing.assert_close(torch.stack([each.rows for each in found]), wanted)


@pytest.mark.long
def test_vllm_and_transformers_agree_on_it(converted: Path, photos: Path) -> None:
    """On photographs that are not square, padded by the processor that was written."""
    probe = [response_to(prompt, [40, 61, 17, 203, 9, 2]) for prompt in photo_prompts(photos)[:2]]
    wanted = hf_logprobs(load_lvlm(converted), converted, probe).numpy()
    found = np.stack(rollout_actor(converted).probe_logprobs(probe))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_prompt_is_the_one_of_training_and_images_are_padded(converted: Path) -> None:
    processor = load_processor(converted)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    told = processor.apply_chat_template(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": "Sure?"},
        ],
        add_generation_prompt=True,
    )
    assert told == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions. USER: <image>\n"
        "What is it? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT:"
    )
    assert "You look. USER: x" in processor.apply_chat_template(
        [{"role": "system", "content": "You look."}, {"role": "user", "content": "x"}]
    )
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [WORDS, WORDS + 1]
    pixels = processor.image_processor(Image.new("RGB", (56, 28)), return_tensors="pt")
    edge = pixels["pixel_values"][0, :, 0]  # what was added has the mean colour
    assert edge.abs().max() < 0.02
    assert pixels["pixel_values"][0, :, 14].abs().min() > 1


def test_an_adapter_of_the_original_layout_loads_on_the_converted_model(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    original = json.loads((source / "config.json").read_text())
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = PeftLoraConfig(r=4, lora_alpha=16, target_modules=leaves, bias="none")
    llama = get_peft_model(LlamaForCausalLM(LlamaConfig(**original)), lora)
    for name, value in llama.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    llama.save_pretrained(tmp_path / "old", save_embedding_layers=False)
    pickled = torch.load(repickled(tmp_path / "old"), weights_only=True)
    assert convert(str(tmp_path / "old"), tmp_path / "new") == "adapter"
    model = load_adapter(load_lvlm(converted), tmp_path / "new")
    held = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(held) == len(pickled)
    name = "model.layers.1.mlp.up_proj.lora_B"
    torch.testing.assert_close(
        next(value for key, value in held.items() if "layers.1.mlp.up_proj.lora_B" in key).data,
        pickled[f"base_model.model.{name}.weight"],
    )


def repickled(folder: Path) -> Path:
    """The adapter's weights as PEFT wrote them in 2023."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    return folder / "adapter_model.bin"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"image_aspect_ratio": "anyres"}, "other versions of LLaVA are not converted"),
        ({"hidden_size": 128}, "has another shape"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
        ({"mm_vision_tower": "/nowhere"}, "with --vision"),
    ],
)
def test_what_is_no_llava_15_is_refused(
    source: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    folder = copy(source, tmp_path / "other", **changed)
    vision = str(source.parent / "none") if "mm_vision_tower" in changed else None
    with pytest.raises(CheckpointError, match=said):
        convert(str(folder), tmp_path / "out", vision)
    assert not (tmp_path / "out").exists()


def test_a_file_that_runs_something_is_not_opened(source: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    folder = copy(source, tmp_path / "evil")
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "done").exists()


def test_the_refusal_names_the_command_and_it_works_from_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"someone/llava@{'1' * 40}"
    fake = FakeHub("someone/llava")
    fake.folders["1" * 40] = source
    with online(fake, tmp_path / "cache", monkeypatch):
        with pytest.raises(CheckpointError, match="original layout") as refused:
            resolve_checkpoint(name)
        command = str(refused.value).partition("`fgaif ")[2].partition("`")[0]
        assert command == f"convert {name} OUT"
        out = tmp_path / "llava"
        monkeypatch.setattr(sys, "argv", ["fgaif", "convert", name, str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said.err
    assert f"policy.model={out}" in said.out
    assert resolve_checkpoint(str(out)) == out
    assert f"`{name}`" in (out / "README.md").read_text()
