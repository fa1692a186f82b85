"""Inputs, log-probs, LoRA and features of a LLaVA, on the tiny checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from ppo_world import make_responses, questions
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from fgaif.config import LoraConfig
from fgaif.data.prompts import load_prompts
from fgaif.data.scenes.questions import DESCRIBE, pope_question, verify_question
from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import join_features
from fgaif.lvlm.families.llava import image_token_count
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.inputs import Encoder, load_encoder
from fgaif.lvlm.logprobs import chunked_logprobs, next_token_logprobs, response_logprobs
from fgaif.lvlm.model import (
    attach_lora,
    image_features,
    load_adapter,
    load_lvlm,
    load_processor,
    project,
    resolve_checkpoint,
    vision_features,
)
from fgaif.lvlm.weights import manifest_from_adapter, tensor_name
from fgaif.types import ImageRef, Prompt


@pytest.fixture
def model(tiny_llava_dir):
    return load_lvlm(tiny_llava_dir, dtype="float32")


@pytest.fixture
def encoder(tiny_llava_dir, model):
    return load_encoder(tiny_llava_dir)


@torch.no_grad()
def score(model, encoder, responses):
    batch = encoder.encode(responses, model.get_input_embeddings().weight)
    features = FeatureCache(model, encoder)([response.prompt.image for response in responses])
    return response_logprobs(model, batch, temperature=1.0, features=features)


def test_padding_and_company_do_not_change_logprobs(model, encoder, tmp_path):
    responses = make_responses(tmp_path, 5)
    together = score(model, encoder, responses)
    for response, row in zip(responses, together, strict=True):
        length = len(response.token_ids)
        alone = score(model, encoder, [response])
        torch.testing.assert_close(row[:length], alone[0], atol=1e-5, rtol=0)
        assert (row[length:] == 0).all()
    backwards = score(model, encoder, responses[::-1])
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-5, rtol=0)


def test_encoded_positions_point_before_each_response_token(model, encoder, tmp_path):
    responses = make_responses(tmp_path, 3)
    batch = encoder.encode(responses, model.get_input_embeddings().weight)
    for row, response in enumerate(responses):
        length = len(response.token_ids)
        assert batch.mask[row].sum() == length
        following = batch.input_ids[row, batch.positions[row, :length] + 1]
        assert following.tolist() == response.token_ids.tolist()
        assert batch.targets[row, :length].tolist() == response.token_ids.tolist()
    assert (batch.input_ids == encoder.image_token_id).sum() == 3 * 4


def test_chunks_give_the_same_logprobs_and_gradients():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False)
    hidden, targets = torch.randn(10, 6, requires_grad=True), torch.randint(11, (10,))
    expected = (head(hidden) / 0.5).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    for chunk in (3, 100):
        found = chunked_logprobs(hidden, head, targets, temperature=0.5, chunk=chunk)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), hidden)[0], gradient)


def test_a_fresh_adapter_changes_nothing_and_disabling_restores_the_base(model, encoder, tmp_path):
    responses = make_responses(tmp_path, 3)
    plain = score(model, encoder, responses)
    adapted = attach_lora(model, LoraConfig(r=4), seed=0)
    assert torch.equal(score(adapted, encoder, responses), plain)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (score(adapted, encoder, responses) - plain).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(score(adapted, encoder, responses), plain)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)


def test_saved_adapter_is_a_manifest(model, tmp_path):
    adapted = attach_lora(model, LoraConfig(r=4, alpha=2.0), seed=0)
    adapted.save_pretrained(tmp_path / "adapter")
    manifest = manifest_from_adapter(tmp_path / "adapter", version=3)
    assert (manifest.version, manifest.scaling) == (3, 0.5)
    name = "model.language_model.layers.1.self_attn.v_proj"
    weight = adapted.get_base_model().get_submodule(name).lora_A["default"].weight
    np.testing.assert_array_equal(manifest.tensors[f"{name}.lora_A"], weight.detach().numpy())
    assert tensor_name(f"base_model.model.{name}.lora_B.default.weight") == f"{name}.lora_B"
    with pytest.raises(CheckpointError, match="belongs to no part"):
        tensor_name("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match="give the folder of a PEFT adapter"):
        manifest_from_adapter(tmp_path, version=0)


def test_cached_features_equal_fresh_ones(model, encoder, tmp_path):
    images = [response.prompt.image for response in make_responses(tmp_path, 6)]
    like = model.get_input_embeddings().weight
    each = image_features(model, [encoder.tensors(image, like) for image in images])
    fresh, turned = join_features(each).rows, join_features(each[::-1]).rows
    cache = FeatureCache(model, encoder)
    torch.testing.assert_close(cache(images).rows, fresh)
    torch.testing.assert_close(cache(images[::-1]).rows, turned)
    small = FeatureCache(model, encoder, limit_bytes=each[0].rows.nbytes)
    torch.testing.assert_close(small(images).rows, fresh)
    torch.testing.assert_close(small(images).rows, fresh)
    assert len(small) == 1
    assert len(cache) == 3
    unprojected = FeatureCache(model, encoder, projected=False)(images)
    with torch.no_grad():
        torch.testing.assert_close(project(model, unprojected).rows, fresh)


def test_features_in_bfloat16_do_not_depend_on_what_was_kept_before(tmp_path):
    """A resumed run has kept nothing; on the embedded policy one image alone is rounded otherwise
    than in company."""
    path = resolve_checkpoint("scenes:policy")
    model = load_lvlm(path, dtype="bfloat16")
    encoder = load_encoder(path)
    images = [
        prompt.image for prompt in load_prompts("scenes:val", limit=4, cache=tmp_path).prompts
    ]
    straight, resumed = FeatureCache(model, encoder), FeatureCache(model, encoder)
    with torch.no_grad():
        straight(images[:3])
        assert torch.equal(straight(images).rows, resumed(images).rows)


def test_next_token_logprobs_do_not_depend_on_padding(model, encoder, tmp_path):
    prompts = questions(make_responses(tmp_path, 4))
    like = model.get_input_embeddings().weight
    features = FeatureCache(model, encoder)

    def ask(asked):
        ids, last = encoder.encode_prompts(asked, like)
        with torch.no_grad():
            return next_token_logprobs(
                model, ids, last, features([prompt.image for prompt in asked])
            )

    together = ask(prompts)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(4))
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(row, ask([prompt])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("What is <image>?", "What is ?"),
        ("<image>\nDescribe.", "Describe."),
        ("Describe.\n<image>", "Describe."),
        ("<<image>>", "<>"),
        ("<<image>image>Describe.", "Describe."),
    ],
)
def test_image_tokens_in_the_users_text_are_removed(encoder, text, same_as):
    """The image comes anyway, and what is left may not form the token again."""
    ids = prompt_ids(encoder, text)
    assert ids.count(encoder.image_token_id) == 4
    assert ids == prompt_ids(encoder, same_as)
    assert encoder.text_ids(text) == encoder.text_ids(same_as)


def prompt_ids(encoder, text):
    """Of a prompt whose image need not exist: LLaVA's are all of one size."""
    return encoder.prompt_ids(Prompt(id="", image=ImageRef(path="", sha256=""), text=text))


@pytest.fixture(params=["scenes:policy", "scenes:verifier", "tiny", "llava15"])
def any_encoder(request, tiny_llava_dir, llava15_dir):
    paths = {"tiny": str(tiny_llava_dir), "llava15": str(llava15_dir)}
    path = resolve_checkpoint(paths.get(request.param, request.param))
    return load_encoder(path)


def test_special_tokens_in_the_users_text_reach_the_model_as_text(any_encoder):
    tokenizer = any_encoder.tokenizer
    specials = set(tokenizer.all_special_tokens) - {any_encoder.image_token}
    assert {"<s>", "</s>", "<pad>", "<unk>"} <= specials
    written = " ".join(sorted(specials))
    nested = "".join(f"{token[:2]}{token}{token[2:]}" for token in sorted(specials))
    for text in (written, nested, "<<image>/s>"):
        for ids, plain in (
            (prompt_ids(any_encoder, f"Say {text}."), prompt_ids(any_encoder, "Say so.")),
            (any_encoder.text_ids(f"Say {text}."), any_encoder.text_ids("Say so.")),
        ):
            for token in specials:
                number = tokenizer.convert_tokens_to_ids(token)
                assert ids.count(number) == plain.count(number), (text, token)
    assert any_encoder.plain("</s> <s>") == "< /s> < s>"


@pytest.mark.parametrize(
    "text",
    [
        *(DESCRIBE, pope_question("dog"), verify_question("There is a cup.")),
        *("Is 2 < 3 > 1?", "I <3 it", "</ s>", "s> <S> [/INST]", "a|b\n\n"),
    ],
)
def test_ordinary_text_has_the_ids_that_it_always_had(any_encoder, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    rendered = any_encoder.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = any_encoder.tokenizer(rendered)["input_ids"]
    at, image = ids.index(any_encoder.image_token_id), any_encoder.image_token_id
    count = image_token_count(any_encoder.config)
    assert prompt_ids(any_encoder, text) == [*ids[:at], *[image] * count, *ids[at + 1 :]]


def test_markers_of_any_chat_template_and_single_characters_become_text(tiny_llava_dir):
    processor = load_processor(tiny_llava_dir)
    markers = ["<|im_start|>", "[INST]", "§"]
    processor.tokenizer.add_tokens(markers, special_tokens=True)
    encoder = Encoder(processor, AutoConfig.from_pretrained(tiny_llava_dir))
    text = "<|im_start|>system [INST]§§"
    assert encoder.plain(text) == "< |im_start|>system [ INST]  "
    special = processor.tokenizer.convert_tokens_to_ids(markers)
    assert not set(prompt_ids(encoder, text)) & set(special)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_image_tokens_are_counted_as_the_model_makes_them(tower, strategy):
    """SigLIP's tower has no [CLS]: "full" leaves nothing out, "default" the first patch."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**sizes)
    text = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_select_strategy=strategy
    )
    with torch.random.fork_rng():
        model = LlavaForConditionalGeneration(config).eval()
    image = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    for compute in (image_features, vision_features):
        (found,) = compute(model, [image])
        assert len(found.rows) == image_token_count(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "llava_llama", "mm_vision_tower": "clip"},
            "original layout: `fgaif convert .*-hf",
        ),
        ({"vision_config": None}, "original layout"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
    ],
)
def test_checkpoints_of_another_form_are_named(tiny_llava_dir, tmp_path, changes, words):
    config = json.loads((tiny_llava_dir / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(str(tmp_path))


def test_checkpoints_that_are_none(tiny_llava_dir, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    other = tmp_path / "other"
    shutil.copytree(tiny_llava_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="supported are LLaVA"):
        resolve_checkpoint(str(other))
    (other / "config.json").write_text(json.dumps(config | {"image_token_id": 3}))
    with pytest.raises(CheckpointError, match=r"image token .* has id"):
        load_processor(other)
    with pytest.raises(CheckpointError, match="give the folder of a PEFT adapter"):
        load_adapter(load_lvlm(tiny_llava_dir, dtype="float32"), tmp_path)
