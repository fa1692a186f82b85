"""Layout, models, saving and loading of the reward models."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import reward_samples
import torch
from reward_samples import card_of, noisy_model
from safetensors.torch import load_file, save_file

from fgaif.config import LoraConfig
from fgaif.errors import CheckpointError, DataError
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import load_lvlm
from fgaif.reward.checkpoint import (
    load_reward_model,
    load_shared_reward_models,
    read_card,
)
from fgaif.reward.inputs import RewardEncoder, load_reward_encoder
from fgaif.reward.model import (
    SegmentModel,
    new_reward_model,
    segment_probs,
    trainable_state,
)
from fgaif.types import DEFAULT_KINDS, FloatArray, Response, Segment

PIECES = ["There is a dog, ", "a red star ", "left of it."]
CPU = torch.device("cpu")


@cache
def encoder_of(checkpoint: Path, policy: Path | None = None) -> RewardEncoder:
    return load_reward_encoder(checkpoint, policy or checkpoint, max_image_pixels=10**6)


def score(
    model: SegmentModel,
    checkpoint: Path,
    pairs: list[tuple[Response, tuple[Segment, ...]]],
    micro_batch: int = 4,
) -> list[FloatArray]:
    encoder = encoder_of(checkpoint)
    return segment_probs(
        model, encoder, FeatureCache(model.backbone, encoder.encoder),
        [r for r, _ in pairs], [s for _, s in pairs], micro_batch=micro_batch, device=CPU,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(
    tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Response, tuple[Segment, ...]]]:
    """Responses of different lengths on different images; the second has no segment."""
    pictures = reward_samples.images(tmp_path_factory.mktemp("images"), 5)
    texts = [PIECES, [], PIECES[:1], PIECES[::-1] * 2, ["Yes."]]
    return [
        reward_samples.response(tiny_llava_dir, picture, text, index=i)
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def saved(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model of each kind, the relation's with an MLP head."""
    return reward_samples.save_noisy(tiny_llava_dir, tmp_path_factory.mktemp("rewards"))


def test_layout_is_image_question_and_segments_each_closed_by_eos(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    encoder = encoder_of(tiny_llava_dir)
    tokenizer = encoder.encoder.tokenizer
    response, segments = pairs[0]
    ids, columns = encoder.row(response, segments)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<s>" + "<image>" * 4 + "\nPrompt: Describe this image in detail. \n"
        "There is a dog, </s>a red star </s>left of it.</s>"
    )
    assert [ids[c] for c in columns] == [tokenizer.eos_token_id] * 3
    assert columns[-1] == len(ids) - 1
    # The sampled ids are read as they are, and the policy's own EOS is not a separator.
    assert (
        ids[columns[0] + 1 : columns[1]]
        == response.token_ids[segments[1].token_start : segments[1].token_end].tolist()
    )
    assert ids.count(tokenizer.eos_token_id) == 3


def test_batch_is_padded_right_and_separators_are_rows_and_columns(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    encoder = encoder_of(tiny_llava_dir)
    batch = encoder.encode([pairs[2][0], pairs[0][0]], [pairs[2][1], pairs[0][1]], CPU)
    assert batch.separators[:, 0].tolist() == [0, 1, 1, 1]
    at = batch.input_ids[batch.separators[:, 0], batch.separators[:, 1]]
    assert set(at.tolist()) == {encoder.encoder.tokenizer.eos_token_id}
    assert (batch.input_ids[0, batch.separators[0, 1] + 1 :] == encoder.encoder.pad_id).all()


def test_question_comes_from_the_data_and_cannot_smuggle_an_image_token(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    encoder = encoder_of(tiny_llava_dir)
    response, segments = pairs[0]
    prompt = response.prompt.__class__(id="q", image=response.prompt.image, text="Is <image> red?")
    other = Response(
        prompt=prompt,
        sample=0,
        text=response.text,
        token_ids=response.token_ids,
        rollout_logprobs=response.rollout_logprobs,
        finish="stop",
        policy_version=0,
    )
    ids, _ = encoder.row(other, segments)
    assert "Prompt: Is image red?" in encoder.encoder.tokenizer.decode(ids)
    assert ids.count(encoder.encoder.image_token_id) == 4


def test_special_tokens_in_questions_and_texts_are_no_separators(
    tiny_llava_dir: Path,
    llava15_dir: Path,
    pairs: list[tuple[Response, tuple[Segment, ...]]],
) -> None:
    """Neither in the question, nor in an answer that another vocabulary reads as text."""
    first = pairs[0][0]
    question = replace(first.prompt, text="Is it red?</s><s> <<image>>")
    asked = replace(first, prompt=question)
    ids, columns = encoder_of(tiny_llava_dir).row(asked, pairs[0][1])
    eos = encoder_of(tiny_llava_dir).encoder.tokenizer.eos_token_id
    assert [column for column, token in enumerate(ids) if token == eos] == columns
    text = "A dog</s>, a <pad> cat."
    answer = replace(asked, text=text)  # of whose ids this backbone reads none
    piece = Segment(index=0, char_start=0, char_end=len(text), token_start=0, token_end=3)
    reader = encoder_of(llava15_dir, policy=tiny_llava_dir)
    ids, columns = reader.row(answer, [piece])
    tokenizer = reader.encoder.tokenizer
    assert [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id] == columns
    assert tokenizer.pad_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_another_vocabulary_makes_the_encoder_read_text(
    tiny_llava_dir: Path,
    llava15_dir: Path,
    pairs: list[tuple[Response, tuple[Segment, ...]]],
) -> None:
    assert encoder_of(tiny_llava_dir).reads_policy_ids
    encoder = encoder_of(llava15_dir, policy=tiny_llava_dir)
    assert not encoder.reads_policy_ids
    ids, columns = encoder.row(*pairs[0])
    assert len(columns) == 3
    start = columns[0] + 1
    assert encoder.encoder.tokenizer.decode(ids[start : columns[1]]).strip() == "a red star"


def test_sampled_image_placeholder_is_refused(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    encoder = encoder_of(tiny_llava_dir)
    response, segments = reward_samples.response(
        tiny_llava_dir, pairs[0][0].prompt.image, ["a <image> b"]
    )
    with pytest.raises(DataError, match="segment 0: holds the image placeholder"):
        encoder.row(response, segments)


def test_only_adapter_and_head_train_and_the_adapter_starts_as_identity(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    model = new_reward_model(
        load_lvlm(tiny_llava_dir, dtype="float32"), LoraConfig(r=4, alpha=8), "linear", 0
    )
    trainable = set(trainable_state(model))
    assert {name for name in trainable if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert all("language_model" in name for name in trainable if "lora_" in name)
    assert len(trainable) == 2 + 2 * 7 * 2  # A and B of 7 linear layers in 2 blocks
    assert not model.head.bias.any()
    adapted = score(model.eval(), tiny_llava_dir, pairs)
    model.backbone.disable_adapter_layers()
    assert np.allclose(adapted[0], score(model, tiny_llava_dir, pairs)[0])


def test_scores_do_not_depend_on_batching_or_order(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    model = noisy_model(tiny_llava_dir, "object")
    alone = score(model, tiny_llava_dir, pairs, micro_batch=1)
    together = score(model, tiny_llava_dir, pairs, micro_batch=8)
    backwards = score(model, tiny_llava_dir, pairs[::-1], micro_batch=2)[::-1]
    assert [p.shape for p in alone] == [(3, 3), (0, 3), (1, 3), (6, 3), (1, 3)]
    for a, b, c in zip(alone, together, backwards, strict=True):
        assert np.allclose(a, b, atol=1e-5)
        assert np.allclose(a, c, atol=1e-5)
        assert np.allclose(a.sum(-1), 1, atol=1e-5)


def test_a_segment_sees_what_came_before_and_not_what_follows(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    image = pairs[0][0].prompt.image
    model = noisy_model(tiny_llava_dir, "object")
    texts = [["A dog. ", "It sits."], ["A dog. ", "No cat."], ["A cat. ", "It sits."]]
    built = [reward_samples.response(tiny_llava_dir, image, text) for text in texts]
    first, second, third = score(model, tiny_llava_dir, built)
    assert np.allclose(first[0], second[0], atol=1e-5)
    assert not np.allclose(first[1], third[1], atol=1e-5)


def test_the_image_matters(
    tiny_llava_dir: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    model = noisy_model(tiny_llava_dir, "object")
    images = [pairs[0][0].prompt.image, pairs[1][0].prompt.image]
    built = [reward_samples.response(tiny_llava_dir, image, PIECES) for image in images]
    first, second = score(model, tiny_llava_dir, built)
    assert not np.allclose(first, second, atol=1e-5)


def test_merged_from_disk_equals_the_model_that_was_saved(
    tiny_llava_dir: Path, saved: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    for kind in DEFAULT_KINDS:
        head = "mlp" if kind == "relation" else "linear"
        expected = score(noisy_model(tiny_llava_dir, kind, head), tiny_llava_dir, pairs)
        model = load_reward_model(saved / kind, tiny_llava_dir, dtype="float32")
        assert not any("lora" in name for name, _ in model.named_parameters())
        for a, b in zip(expected, score(model, tiny_llava_dir, pairs), strict=True):
            assert np.allclose(a, b, atol=1e-5)


def test_shared_backbone_equals_three_separate_models(
    tiny_llava_dir: Path, saved: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    shared = load_shared_reward_models(saved, tiny_llava_dir, DEFAULT_KINDS, dtype="float32")
    together = score(shared, tiny_llava_dir, pairs)
    assert together[1].shape == (0, 3, 3)
    for k, kind in enumerate(DEFAULT_KINDS):
        model = load_reward_model(saved / kind, tiny_llava_dir, dtype="float32")
        separate = score(model, tiny_llava_dir, pairs)
        for a, b in zip(separate, together, strict=True):
            assert np.allclose(a, b[:, k], atol=1e-5)
    assert not np.allclose(together[0][:, 0], together[0][:, 1], atol=1e-3)


def test_a_shared_bfloat16_backbone_keeps_its_adapters_in_bfloat16(
    tiny_llava_dir: Path, saved: Path, pairs: list[tuple[Response, tuple[Segment, ...]]]
) -> None:
    """Scores are as near to those in float32 as the separate models'."""
    shared = load_shared_reward_models(saved, tiny_llava_dir, DEFAULT_KINDS, dtype="bfloat16")
    assert {value.dtype for value in shared.parameters()} == {torch.bfloat16}
    exact = load_shared_reward_models(saved, tiny_llava_dir, DEFAULT_KINDS, dtype="float32")
    truth = np.concatenate(score(exact, tiny_llava_dir, pairs))
    separate = [
        np.concatenate(
            score(
                load_reward_model(saved / kind, tiny_llava_dir, dtype="bfloat16"),
                tiny_llava_dir,
                pairs,
            )
        )
        for kind in DEFAULT_KINDS
    ]
    together = np.concatenate(score(shared, tiny_llava_dir, pairs))
    error = np.abs(together - truth).mean()
    assert 0 < error < 1.5 * np.abs(np.stack(separate, axis=1) - truth).mean() < 0.02


def test_card_round_trip(tiny_llava_dir: Path, saved: Path) -> None:
    assert read_card(saved / "object") == card_of(tiny_llava_dir, "object")
    names = {file.name for file in (saved / "object").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "reward_head.safetensors",
        "reward.json", "README.md",
    }  # fmt: skip


def _other_backbone(folder: Path, tiny: Path) -> Path:
    """The same architecture, one weight moved: a retrained checkpoint."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] + 0.01}, folder / "model.safetensors")
    return folder


def test_another_backbone_is_refused(tmp_path: Path, tiny_llava_dir: Path, saved: Path) -> None:
    other = _other_backbone(tmp_path / "other", tiny_llava_dir)
    with pytest.raises(CheckpointError, match=r"trained on .*set reward\.backbone"):
        load_reward_model(saved / "object", other, dtype="float32")
    with pytest.raises(CheckpointError, match="trained on"):
        load_shared_reward_models(saved, other, DEFAULT_KINDS, dtype="float32")


def test_folders_that_were_swapped_are_refused(
    tmp_path: Path, tiny_llava_dir: Path, saved: Path
) -> None:
    shutil.copytree(saved, tmp_path / "rewards")
    (tmp_path / "rewards" / "object").rename(tmp_path / "rewards" / "kept")
    (tmp_path / "rewards" / "relation").rename(tmp_path / "rewards" / "object")
    (tmp_path / "rewards" / "kept").rename(tmp_path / "rewards" / "relation")
    with pytest.raises(CheckpointError, match=r"object: holds .* kind 'relation'"):
        load_reward_model(tmp_path / "rewards" / "object", tiny_llava_dir, dtype="float32")
    with pytest.raises(CheckpointError, match=r"object: holds .* kind 'relation'"):
        load_shared_reward_models(
            tmp_path / "rewards", tiny_llava_dir, DEFAULT_KINDS, dtype="float32"
        )


@pytest.mark.parametrize("name", ["reward_head.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_llava_dir: Path, saved: Path, name: str, value: float
) -> None:
    shutil.copytree(saved, tmp_path / "rewards")
    file = tmp_path / "rewards" / "attribute" / name
    weights = load_file(file)
    first = min(weights)
    weights[first].view(-1)[-1] = value
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=rf"{name}: {first} holds NaN"):
        load_reward_model(file.parent, tiny_llava_dir, dtype="float32")
    with pytest.raises(CheckpointError, match=rf"{name}: {first} holds NaN"):
        load_shared_reward_models(
            tmp_path / "rewards", tiny_llava_dir, DEFAULT_KINDS, dtype="float32"
        )


def test_a_truncated_adapter_is_named_by_both_loaders(
    tmp_path: Path, tiny_llava_dir: Path, saved: Path
) -> None:
    shutil.copytree(saved, tmp_path / "rewards")
    file = tmp_path / "rewards" / "relation" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="where its header says"):
        load_reward_model(file.parent, tiny_llava_dir, dtype="float32")
    with pytest.raises(CheckpointError, match="where its header says"):
        load_shared_reward_models(
            tmp_path / "rewards", tiny_llava_dir, DEFAULT_KINDS, dtype="float32"
        )


def test_broken_reward_directories_say_what_is_wrong(
    tmp_path: Path, tiny_llava_dir: Path, saved: Path
) -> None:
    with pytest.raises(CheckpointError, match="fgaif train-reward"):
        read_card(tmp_path)
    broken = tmp_path / "object"
    shutil.copytree(saved / "object", broken)
    save_file({"weight": torch.zeros(2, 2)}, broken / "reward_head.safetensors")
    with pytest.raises(CheckpointError, match=r"reward_head\.safetensors: does not fit"):
        load_reward_model(broken, tiny_llava_dir, dtype="float32")
    card = json.loads((broken / "reward.json").read_text())
    (broken / "reward.json").write_text(json.dumps(card | {"classes": ["OK", "NONE", "HALLU"]}))
    with pytest.raises(CheckpointError, match="classes"):
        read_card(broken)
    (broken / "reward.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the card"):
        read_card(broken)
