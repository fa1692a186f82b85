"""Fact-RLHF's reward model: pairs, captions, loss, training on truth and lies, the actor."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from test_pairs import labelled

from actors.preference import PreferenceActor
from cluster.groups.role_groups import PreferenceGroup
from cluster.pipeline import preference_worker
from cluster.pipeline.contents import Contents
from cluster.pipeline.preference_worker import PreferenceTask, run_preference_task
from cluster.pipeline.train_preference import choices_digest, open_choices
from fgaif.baselines.choices import choices_of_labels, read_choices
from fgaif.config import Config, RewardShapeConfig, parse_config, with_overrides
from fgaif.data.captions import ImageCaptions
from fgaif.data.images import image_ref
from fgaif.data.scenes.captions import BROAD, write_caption
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import CheckpointError, ConfigError, DataError
from fgaif.feedback.external import given_response
from fgaif.feedback.segment import segment_response
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.pending import Ready
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.reward.dense import RewardCenters, dense_rewards
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.preference import Choice, preference_loss, split_choices
from fgaif.reward.preference_model import (
    JUDGE,
    PREFERENCE,
    PreferenceEncoder,
    read_preference_card,
)
from fgaif.serving.rewards import load_rewards
from fgaif.types import Prompt, Response, SegmentScores

POLICY = resolve_checkpoint("scenes:policy")
TOKENIZER = load_processor(POLICY).tokenizer
SCENES = 48


def settings(**reward: object) -> Config:
    chosen = {
        "form": "preference", "lr": 5e-3, "batch_size": 16, "micro_batch": 16, "epochs": 4,
        "evals": 2, "val_fraction": 0.2, "lora": {"r": 8, "alpha": 16}, **reward,
    }  # fmt: skip
    return parse_config({"policy": {"model": "scenes:policy"}, "reward": chosen})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scenes")
    write_split(made, "train", SCENES)
    return made


@pytest.fixture(scope="module")
def choices(folder: Path) -> list[Choice]:
    """Of each scene a caption that is right and one that is not."""
    found = []
    for name, scene in read_scenes(folder / "scenes.jsonl").items():
        prompt = Prompt(id=name, image=image_ref(folder / "images" / f"{name}.png"), text=DESCRIBE)
        rng = random.Random(name)
        texts = (write_caption(scene, rng), write_caption(scene, rng, BROAD))
        better, worse = (given_response("x", prompt, f" {t}", TOKENIZER) for t in texts)
        if texts[0] != texts[1]:
            found.append(Choice(better=better, worse=replace(worse, sample=1)))
    return found


def encoder(captions: ImageCaptions | None) -> PreferenceEncoder:
    shared = load_reward_encoder(POLICY, POLICY, max_image_pixels=10**6)
    return PreferenceEncoder(shared, captions)


def test_the_loss_is_bradley_terry_and_keeps_the_mean_at_zero() -> None:
    better, worse = torch.tensor([1.0, -0.5]), torch.tensor([0.0, 2.0])
    likelihood = [np.log1p(np.exp(-1.0)), np.log1p(np.exp(2.5))]
    squares = [(1.0 + 0.0) ** 2, (-0.5 + 2.0) ** 2]
    expected = np.mean(likelihood) + 0.1 * np.mean(squares)
    assert float(preference_loss(better, worse, 0.1)) == pytest.approx(expected, rel=1e-6)
    shifted = preference_loss(better + 5, worse + 5, 0.0)
    assert float(shifted) == pytest.approx(float(preference_loss(better, worse, 0.0)), rel=1e-5)
    assert float(preference_loss(better + 5, worse + 5)) > float(preference_loss(better, worse))


def test_an_answer_is_read_after_its_prompt_and_before_the_judging_prompt(
    choices: list[Choice],
) -> None:
    answer = choices[0].better
    plain, augmented = encoder(None), encoder(ImageCaptions("scenes"))
    prompt = plain.encoder.prompt_ids(answer.prompt)
    row, longer = plain.row(answer), augmented.row(answer)
    said = answer.token_ids[:-1].tolist()
    assert row[: len(prompt)] == prompt
    assert row[len(prompt) : len(prompt) + len(said)] == said
    assert row[-1] == TOKENIZER.eos_token_id
    assert row.count(TOKENIZER.eos_token_id) == 1
    judged = TOKENIZER.decode(row[len(prompt) + len(said) : -1])
    assert judged == JUDGE
    read = TOKENIZER.decode(longer[len(prompt) + len(said) : -1])
    for caption in ImageCaptions("scenes").of(answer.prompt.image) or ():
        assert caption in read
    batch = augmented.encode([answer, choices[1].worse], torch.device("cpu"))
    ends = [batch.input_ids[i, j].item() for i, j in batch.separators.tolist()]
    assert ends == [TOKENIZER.eos_token_id] * 2
    shorter = {"token_ids": answer.token_ids[:-1], "rollout_logprobs": np.zeros(len(said))}
    cut = replace(answer, finish="length", **shorter)
    assert plain.row(cut) == row  # nothing of it is taken off


def test_captions_come_from_scenes_rows_and_coco(folder: Path, tmp_path: Path) -> None:
    image = image_ref(folder / "images" / "train-000000.png")
    (caption, *_) = ImageCaptions("scenes").of(image) or ()
    assert caption.startswith("There is a ")
    rows = tmp_path / "captions.jsonl"
    rows.write_text(
        json.dumps({"image": "a/train-000000.png", "captions": ["One.", "Two."]}) + "\n"
        + json.dumps({"image": "train-000001.png", "caption": "Three."}) + "\n"
    )  # fmt: skip
    assert ImageCaptions(str(rows)).of(image) == ("One.", "Two.")
    coco = tmp_path / "captions_train.json"
    tree = {
        "images": [{"id": 5, "file_name": "train-000000.png"}],
        "annotations": [{"image_id": 5, "caption": " One. "}, {"image_id": 5, "caption": "Two."}],
    }
    coco.write_text(json.dumps(tree))
    found = ImageCaptions(str(coco))
    assert found.of(image) == ("One.", "Two.")
    other = image_ref(folder / "images" / "train-000001.png")
    found.require([image])
    with pytest.raises(DataError, match=r"no captions of 1 of 2 images.*train-000001\.png"):
        found.require([image, other, image])
    for content in ("{}", '{"images": 3, "annotations": []}', "no"):
        coco.write_text(content)
        with pytest.raises(DataError, match=r"captions_train\.json"):
            ImageCaptions(str(coco))
    rows.write_text('{"image": "a.png", "captions": ["x", 3]}\n')
    with pytest.raises(DataError, match=r"captions\.jsonl:1"):
        ImageCaptions(str(rows))


def test_peoples_choices_are_read_in_the_form_of_llava_rlhf(folder: Path, tmp_path: Path) -> None:
    good = {
        "image": str(folder / "images" / "train-000000.png"),
        "conversations": [{"from": "human", "value": "What is there?"}],
        "output_1": {"from": "llava", "value": "There is a red moon."},
        "output_2": {"from": "llava", "value": "There is a blue house."},
        "preference": 2,
    }
    ours = {
        "images": [good["image"]], "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "There is a moon."}], "rejected": "No.",
    }  # fmt: skip
    same = {**good, "output_2": good["output_1"]}
    bad = [{**good, "preference": 3}, same, {**good, "image": "gone.png"}, {**good, "output_1": 5}]
    file = tmp_path / "choices.json"
    file.write_text(json.dumps([good, ours, *bad]))
    found = read_choices(file, TOKENIZER, root=folder, max_pixels=10**6)
    texts = [(one.better.text, one.worse.text, one.better.prompt.text) for one in found.rows]
    assert texts == [
        ("There is a blue house.", "There is a red moon.", "What is there?"),
        ("There is a moon.", "No.", "What?"),
    ]
    assert found.counts() == {"pairs": 2, "skipped": 4}
    assert "expected 1 or 2" in found.warning()
    file.write_text(json.dumps(bad))
    with pytest.raises(DataError, match="choices"):
        read_choices(file, TOKENIZER, root=folder, max_pixels=10**6)


def test_labels_make_choices_and_ties_are_refused() -> None:
    good, bad = labelled("good"), labelled("bad")
    found = choices_of_labels([good, bad], RewardShapeConfig())
    (choice,) = found.rows
    assert choice.better is good.response
    assert choice.worse is bad.response
    assert found.counts()["pairs"] == 1
    again = replace(good, response=replace(good.response, text=good.response.text + "!"))
    with pytest.raises(DataError, match=r"no pairs.*1 with equal scores.*samples_per_prompt=4"):
        open_choices(settings(), [good, again])
    with pytest.raises(DataError, match="at least 2"):
        split_choices(found.rows, val_fraction=0.1, seed=0)


def test_captions_let_the_model_tell_truth_from_lies(
    tmp_path: Path, choices: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a Ray Train worker does, with the scene graph beside the answer; then the actor."""
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setattr(preference_worker, "get_device", lambda: torch.device("cpu"))
    told: list[int] = []

    class Progress:
        def put(self, item: tuple[str, int, int, dict[str, float]]) -> None:
            told.append(item[1])

    config = settings(captions="scenes")
    run_preference_task(
        PreferenceTask(
            choices=choices, counts={"pairs": len(choices)}, input_digest="digest",
            backbone_digest=checkpoint_digest(POLICY), config=config, out_dir=tmp_path,
            queue=Progress(),
        )
    )  # fmt: skip
    card = read_preference_card(tmp_path / PREFERENCE)
    assert card.metrics["val_loss"] < 0.9 * np.log(2)
    assert card.metrics["accuracy"] > 0.6
    assert card.pairs["train"] + card.pairs["val"] == card.pairs["pairs"] == len(choices)
    assert told == list(range(1, len(told) + 1))
    train, val = split_choices(choices, val_fraction=0.2, seed=0)
    assert not {c.better.prompt.id for c in train} & {c.better.prompt.id for c in val}
    actor = PreferenceActor(tmp_path, config)
    better, worse = (
        np.array(actor.score_pairs([(answer, ()) for answer in answers]))
        for answers in ([c.better for c in val], [c.worse for c in val])
    )
    assert (better > worse).mean() == pytest.approx(card.metrics["accuracy"])
    assert (better - worse).mean() == pytest.approx(card.metrics["margin"], rel=1e-3)
    with pytest.raises(CheckpointError, match=r"reward\.captions = None"):
        PreferenceActor(tmp_path, settings())
    with pytest.raises(CheckpointError, match="fgaif train-reward --form preference"):
        PreferenceActor(tmp_path / "empty", config)


def test_ppo_is_paid_at_the_last_token(choices: list[Choice]) -> None:
    answers = [choices[0].better, choices[0].worse]
    segments = [segment_response(answer, TOKENIZER, 4) for answer in answers]

    class Handle:
        def score_pairs(self, pairs: list[tuple[Response, object]]) -> list[float]:
            return [1.5 - 4 * response.sample for response, _ in pairs]

    group = PreferenceGroup.__new__(PreferenceGroup)
    group._kinds = 3

    class Replicas:
        def spread(self, method: object, items: list[object], costs: list[float]) -> Ready[object]:
            return Ready(Handle().score_pairs(items))  # type: ignore[arg-type]

    group._group = Replicas()  # type: ignore[assignment]
    scores = group.score(answers, segments).result()
    assert [score.reward for score in scores] == [1.5, -2.5]
    shape = RewardShapeConfig(repeat_penalty=0.0)
    found = dense_rewards(answers, segments, scores, [(), ()], shape, RewardCenters.empty())
    for answer, reward, tokens in zip(answers, (1.5, -2.5), found.tokens, strict=True):
        assert tokens[len(answer.token_ids) - 1] == reward
        assert not tokens[:-1].any()
    assert found.centers.means == (None, None, None)
    plain = SegmentScores(probs=scores[0].probs)
    assert plain.reward == 0.0


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["reward.captions=scenes"], "reward.form=preference"),
        (["reward.pairs=a.jsonl"], "reward.form=preference"),
        (["reward.form=preference", "reward.workers=2"], "one worker"),
        (["reward.form=preference", "reward.head=mlp"], "linear"),
        (["reward.form=preference", "ppo.value_init=object"], "ppo.value_init=policy"),
        (["reward.form=preference", "cluster.layout=shared"], "cluster.shared_roles="),
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_overrides(Config(), overrides)


def test_edited_captions_and_choices_are_seen(tmp_path: Path) -> None:
    for name in ("pairs.json", "captions.json"):
        (tmp_path / name).write_text("[]")
    given = settings(pairs=tmp_path / "pairs.json", captions=str(tmp_path / "captions.json"))
    made = with_overrides(given, [f"dir={tmp_path}"])
    before = Contents(made).of("train-reward")
    assert {"reward.pairs", "reward.captions"} <= before.keys()
    (tmp_path / "captions.json").write_text("[1]")
    (change,) = Contents(made).edits("train-reward", before)
    assert change.key == "reward.captions"
    scenes = settings(captions="scenes")
    assert "reward.captions" not in Contents(scenes).of("train-reward")


def test_a_service_of_sub_sentences_refuses_it(tmp_path: Path) -> None:
    (tmp_path / PREFERENCE).mkdir()
    (tmp_path / PREFERENCE / "preference.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"scores no sub-sentences.*--form segment"):
        load_rewards(tmp_path)


def test_equal_inputs_need_no_second_training(choices: list[Choice]) -> None:
    base = choices_digest(choices, settings(), "b")
    assert base == choices_digest(choices, settings(micro_batch=4), "b")
    assert base != choices_digest(choices, settings(lr=1.0), "b")
    assert base != choices_digest(choices[1:], settings(), "b")
    assert base != choices_digest(choices, settings(captions="scenes"), "b")
