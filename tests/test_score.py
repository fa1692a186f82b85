"""``load_rewards(...).score``: PPO's numbers, any form of image, and how scores show themselves."""

import io
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import reward_samples
import serving_samples
import torch
from PIL import Image

import fgaif
from actors.reward import RewardActor, SharedRewardActor
from actors.scorer import ScoringActor
from fgaif.config import Config, RewardShapeConfig
from fgaif.data.images import as_image, image_bytes
from fgaif.errors import CheckpointError, ConfigError, DataError
from fgaif.reward.checkpoint import RewardCard, read_cards
from fgaif.reward.dense import RewardCenters, dense_rewards
from fgaif.serving.rewards import Rewards, TextScores, load_rewards
from fgaif.serving.scoring import ScoreInput, ScoreOutput
from fgaif.types import DEFAULT_KINDS, SegmentClass, SegmentScores

TEXTS = (serving_samples.TEXT, "There is a dog. There is a dog.", "A moon.")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other make small models slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_samples.write_rewards(tiny_llava_dir, tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="module")
def rewards(folder: Path) -> Rewards:
    return load_rewards(folder)


def config_of(checkpoint: Path) -> Config:
    return reward_samples.settings(checkpoint)


def test_scores_are_the_scoring_actors_to_the_bit(
    folder: Path, rewards: Rewards, tiny_llava_dir: Path
) -> None:
    actor = ScoringActor(folder, config_of(tiny_llava_dir))
    content = serving_samples.png()
    item = ScoreInput(image=image_bytes(content, "p"), prompt="What is it?", texts=TEXTS)
    (answer,) = actor.score([item])
    assert isinstance(answer, ScoreOutput)
    scores = rewards.score(content, list(TEXTS), "What is it?")
    assert rewards.version == answer.version
    for mine, theirs in zip(scores, answer.texts, strict=True):
        assert mine.segments == theirs.segments
        assert np.array_equal(mine.probs, theirs.probs)


def test_the_shape_is_that_of_the_training_unless_another_is_given(
    folder: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    trained, other = RewardShapeConfig(values="hard"), RewardShapeConfig(value_hallu=-2.0)
    shaped = serving_samples.write_rewards(tiny_llava_dir, tmp_path, shape=trained)
    assert load_rewards(shaped).shape == trained
    assert load_rewards(shaped, shape=other).shape == other
    assert load_rewards(folder).shape == RewardShapeConfig()  # of a version that stored none


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("values", ["soft", "hard"])
def test_rewards_are_ppos(folder: Path, tiny_llava_dir: Path, shared: bool, values: str) -> None:
    """The reward actors' probabilities through ``dense_rewards``, centred by a run's means."""
    shape = RewardShapeConfig(
        values=values, value_hallu=-3, repeat_penalty=0.25, weights={"object": 2, "relation": 0.5}
    )
    loaded = load_rewards(folder, shared=shared, shape=shape)
    plain = loaded.score(serving_samples.png(), list(TEXTS))
    responses = [one.response for one in plain]
    segments = [one.segments for one in plain]
    config = config_of(tiny_llava_dir)
    if shared:
        scores = SharedRewardActor(folder, config).score(responses, segments)
    else:
        by_kind = [
            RewardActor(folder / kind, config).score(responses, segments) for kind in DEFAULT_KINDS
        ]
        scores = [SegmentScores(probs=np.stack(rows, 1)) for rows in zip(*by_kind, strict=True)]
    before = RewardCenters(means=(0.5, None, -0.25))
    ppo = dense_rewards(responses, segments, scores, [()] * 3, shape, before)
    centred = loaded.score(serving_samples.png(), list(TEXTS), centers=ppo.centers)
    for one, probs, value, tokens in zip(centred, scores, ppo.values, ppo.tokens, strict=True):
        assert np.array_equal(one.probs, probs.probs)
        assert np.array_equal(one.values, value)
        ends = [segment.token_end - 1 for segment in one.segments]
        assert np.array_equal(one.rewards, tokens[ends])
        assert one.total == pytest.approx(float(tokens.sum()), abs=1e-6)
    assert any((a.values != b.values).any() for a, b in zip(plain, centred, strict=True))


def test_the_second_of_two_equal_segments_is_penalised(rewards: Rewards) -> None:
    scores = rewards.score(serving_samples.png(), TEXTS[1])
    free = scores.values.sum(axis=1)
    assert (free - scores.rewards).tolist() == pytest.approx([0, rewards.shape.repeat_penalty])


def test_an_image_is_a_path_bytes_or_a_picture(rewards: Rewards, tmp_path: Path) -> None:
    content = serving_samples.png()
    file = tmp_path / "a.png"
    file.write_bytes(content)
    picture = Image.open(io.BytesIO(content))
    forms = [str(file), file, content, picture, as_image(file)]
    probs = [rewards.score(form, TEXTS[0]).probs for form in forms]
    assert all(np.array_equal(other, probs[0]) for other in probs)
    other = rewards.score(serving_samples.png(200), TEXTS[0]).probs
    assert not np.array_equal(other, probs[0])


def test_a_picture_is_seen_upright_and_on_white_like_its_file() -> None:
    """EXIF's orientation 6 turns a file by 90 degrees; a palette may hold transparency."""
    picture = Image.new("RGB", (4, 2), (9, 9, 9))
    picture.putpixel((0, 0), (250, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(file.getvalue()))
    seen = as_image(opened)
    with Image.open(io.BytesIO(seen.content)) as upright:  # type: ignore[attr-defined]
        assert upright.size == (2, 4)
        assert upright.getpixel((1, 0)) == (250, 0, 0)
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    with Image.open(io.BytesIO(as_image(clear).content)) as white:  # type: ignore[attr-defined]
        assert white.getpixel((0, 0)) == (255, 255, 255)


def test_one_text_gives_scores_and_several_a_list(rewards: Rewards) -> None:
    alone = rewards.score(serving_samples.png(), TEXTS[0])
    together = rewards.score(serving_samples.png(), list(TEXTS))
    assert isinstance(alone, TextScores)
    assert [one.text for one in together] == list(TEXTS)
    assert "".join(alone.pieces) == TEXTS[0]
    assert np.allclose(alone.probs, together[0].probs, atol=1e-5)
    assert rewards.score(serving_samples.png(), []) == []
    empty = rewards.score(serving_samples.png(), "")
    assert (empty.probs.shape, empty.total) == ((0, len(DEFAULT_KINDS), 3), 0.0)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ("missing.png", "A dog.", "no such file"),
        (b"no image", "A dog.", "cannot be decoded"),
        (serving_samples.png(), "A dog.<image>", "take special tokens"),
        (serving_samples.png(), "A dog. " * 2000, "tokens with image and prompt"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    rewards: Rewards, image: str | bytes, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rewards.score(image, text)


def test_a_folder_that_lacks_a_model_or_its_backbone_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"object/reward\.json: No such file"):
        load_rewards(tmp_path)
    card = (folder / "object" / "reward.json").read_text(encoding="utf-8")
    moved = tmp_path / "rewards"
    for kind in DEFAULT_KINDS:
        (moved / kind).mkdir(parents=True)
        for file in (folder / kind).iterdir():
            (moved / kind / file.name).write_bytes(file.read_bytes())
    backbone = load_card_backbone(card)
    gone = card.replace(backbone, str(tmp_path / "gone"))
    (moved / "object" / "reward.json").write_text(gone, encoding="utf-8")
    with pytest.raises(CheckpointError, match="gone, which is not there; give backbone="):
        load_rewards(moved)
    assert load_rewards(moved, backbone=backbone).kinds == DEFAULT_KINDS
    with pytest.raises(CheckpointError, match="has digest"):
        load_rewards(folder, backbone="scenes:policy")


def test_numbers_that_are_not_finite_are_no_scores(
    rewards: Rewards, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = np.full((1, len(DEFAULT_KINDS), 3), np.nan, np.float32)
    monkeypatch.setattr("fgaif.serving.rewards.segment_probs", lambda *_, **__: [lost])
    with pytest.raises(CheckpointError, match="not finite"):
        rewards.score(serving_samples.png(), "There is a dog.")


def load_card_backbone(card: str) -> str:
    return RewardCard.model_validate_json(card).backbone


def scored(probs: Sequence[Sequence[Sequence[float]]], text: str) -> TextScores:
    """Scores of a text of one-word segments, made by hand."""
    words = text.split(" ")
    ends = np.cumsum([len(word) + 1 for word in words])
    ends[-1] -= 1
    tokenizer = fgaif.load_processor("scenes:policy").tokenizer
    response = fgaif.make_response(serving_samples.png(), "There is a dog.", tokenizer)
    segments = tuple(
        fgaif.Segment(index=i, char_start=start, char_end=end, token_start=i, token_end=i + 1)
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    )
    values = np.array(probs, np.float32)
    return TextScores(
        response=_with_text(response, text),
        segments=segments,
        kinds=DEFAULT_KINDS,
        probs=values,
        values=values[..., 1] - values[..., 2],
        rewards=(values[..., 1] - values[..., 2]).sum(1),
    )


def _with_text(response: fgaif.Response, text: str) -> fgaif.Response:
    return fgaif.Response(
        prompt=response.prompt,
        sample=0,
        text=text,
        token_ids=response.token_ids,
        rollout_logprobs=response.rollout_logprobs,
        finish="stop",
        policy_version=0,
    )


NONE, OK, HALLU = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.125, 0.875)


class Spans(HTMLParser):
    """Outer spans of the shown text with their titles, and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if "title" in found:
            self.titles.append(found["title"] or "")
            self.styles.append(found["style"] or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_scores_print_plainly() -> None:
    scores = scored([[OK, NONE, NONE], [NONE, HALLU, OK]], "Dogs moons")
    assert repr(scores) == (
        "+1.00  Dogs\n+0.25  moons  attribute hallucinated (0.88)\n+1.25  in all"
    )
    assert scores.classes()[1]["attribute"] == SegmentClass.HALLU


def test_scores_show_themselves_coloured_and_escaped() -> None:
    text = "<script>alert(1)</script> &amp; plain"
    scores = scored([[HALLU, OK, NONE], [NONE, OK, NONE], [NONE, NONE, NONE]], text)
    shown = scores._repr_html_()
    assert "<script" not in shown
    page = Spans()
    page.feed(shown)
    assert page.tags == {"div", "span"}
    assert "".join(page.texts).startswith("<script>alert(1)</script>")
    assert "&amp;" in "".join(page.texts)  # once unescaped, as it was written
    wrong, right, nothing = page.styles
    assert len({wrong, right, nothing}) == 3
    assert "background" not in nothing
    assert page.titles[0].splitlines()[1] == "object: none 0.00, ok 0.12, hallu 0.88"


def test_models_trained_here_are_loaded_and_tell_right_from_wrong(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    pictures = reward_samples.images(tmp_path, 12)
    rows = reward_samples.labelled(tiny_llava_dir, pictures, 100)
    config = reward_samples.settings(tiny_llava_dir, epochs=6, batch_size=8, evals=1)
    told: list[str] = []
    metrics = fgaif.train_rewards(
        rows, tmp_path / "rewards", config, report=lambda kind, *_: told.append(kind)
    )
    assert list(metrics) == list(DEFAULT_KINDS)
    assert set(told) == set(DEFAULT_KINDS)
    loaded = load_rewards(tmp_path / "rewards")
    answers = loaded.score(pictures[0], ["a dog small above. ", "the couch red left. "])
    assert [one.probs[0].argmax(-1).tolist() for one in answers] == [[1, 1, 1], [2, 2, 2]]
    assert answers[0].total > 0 > answers[1].total


def test_a_card_of_a_model_trained_here_tells_of_label_noise(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    rows = reward_samples.labelled(tiny_llava_dir, reward_samples.images(tmp_path, 4), 8)
    config = reward_samples.settings(
        tiny_llava_dir, epochs=0.5, batch_size=8, evals=1, noise={"object": {"flip": 0.5}}
    )
    fgaif.train_rewards(rows, tmp_path / "rewards", config)
    cards = read_cards(tmp_path / "rewards", DEFAULT_KINDS)
    assert [kind for kind, card in cards.items() if card.noise is not None] == ["object"]


def test_plain_adamw_is_kept_from_bfloat16(tiny_llava_dir: Path, tmp_path: Path) -> None:
    config = reward_samples.settings(tiny_llava_dir)
    policy = config.policy.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"policy\.dtype = 'bfloat16'"):
        fgaif.train_rewards([], tmp_path / "no", config.model_copy(update={"policy": policy}))
