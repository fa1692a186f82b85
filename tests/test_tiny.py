"""The checkpoints that other tests stand on are what they claim to be."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration


@pytest.fixture(params=["tiny_llava_dir", "llava15_dir"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_public_weight_names(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {name.split(".")[0] for name in names} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    assert "language_model.model.layers.1.mlp.down_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight" in names


def test_forward_on_a_photograph(checkpoint: Path, photos: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = "USER: <image>\nDescribe this image in detail. ASSISTANT:"
    with Image.open(photos / "coffee.jpg") as picture:
        inputs = processor(images=picture, text=text, return_tensors="pt")
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == {28: 4, 336: 576}[model.config.vision_config.image_size]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_chat_template_is_the_public_one(checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.mark.parametrize("text", ["A dog, and a cat.", "Zürich – 東京 🐈", "two  spaces\nline"])
def test_tokenizer_round_trip(checkpoint: Path, text: str) -> None:
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_llava15_has_a_llama_tokenizer_and_spare_rows(llava15_dir: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(llava15_dir).tokenizer
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokenizer.tokenize("the 猫") == ["▁the", "▁", "<0xE7>", "<0x8C>", "<0xAB>"]
    config = json.loads((llava15_dir / "config.json").read_text())
    assert config["text_config"]["vocab_size"] > len(tokenizer)


def test_photos_are_photographs(photos: Path) -> None:
    rows = [json.loads(line) for line in (photos / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        with Image.open(photos / row["image"]) as picture:
            assert min(picture.size) >= 300
