"""The embedded world: what is drawn, said, parsed and true agree; the shipped models see."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgaif.data.scenes.captions import BROAD, CLEAN, FILLERS, POLICY, write_caption
from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.facts import oracle, oracle_classes, parse_facts
from fgaif.data.scenes.files import MODELS, read_scenes, scene_images, write_split
from fgaif.data.scenes.questions import (
    DESCRIBE,
    ask,
    pope_pair,
    sample_claim,
    verify_question,
)
from fgaif.data.scenes.world import (
    NOUNS,
    OPPOSITE,
    PARTNER,
    SPLIT_SIZE,
    SPLITS,
    Scene,
    Thing,
    relation_holds,
    scene_at,
    split_seed,
)
from fgaif.feedback.segment import split_offsets
from fgaif.lvlm.families.llava import LLAVA
from fgaif.scene_models.measure import (
    caption,
    caption_report,
    fact_accuracy,
    pieces,
    pope_accuracy,
    prompt_ids,
    scene_features,
    scene_pixels,
)
from fgaif.scene_models.model import load_checkpoint, random_model, save_checkpoint
from fgaif.scene_models.rows import RowWriter
from fgaif.scene_models.targets import annotate
from fgaif.scene_models.tokenizer import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    build_processor,
    build_tokenizer,
    chat_prompt,
)
from fgaif.types import DEFAULT_KINDS, SegmentClass

MIN_WORDS = 4  # the splitter's setting in configs/scenes.yaml
NONE, OK, HALLU = SegmentClass.NONE, SegmentClass.OK, SegmentClass.HALLU

SCENE = Scene(
    seed=7,
    things=(
        Thing(noun="moon", colour="red", size="small", row=0, column=0),
        Thing(noun="house", colour="blue", size="large", row=2, column=1),
    ),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def noisy_captions(count: int):
    rng = random.Random(5)
    for index in range(count):
        scene = scene_at("val", index)
        yield scene, write_caption(scene, rng, (CLEAN, BROAD, POLICY)[index % 3])


# --- scenes and splits


def test_scenes_are_the_same_every_time_and_differ_between_splits():
    assert scene_at("val", 12) == scene_at("val", 12)
    assert draw_scene(SCENE).tobytes() == draw_scene(SCENE).tobytes()
    assert len({scene_at(split, 12) for split in SPLITS}) == 3
    seeds = [range(split_seed(s, 0), split_seed(s, SPLIT_SIZE - 1) + 1) for s in SPLITS]
    assert all(a[-1] < b[0] for a, b in pairwise(seeds))


@pytest.mark.parametrize(("split", "index"), [("train", -1), ("train", SPLIT_SIZE), ("dev", 0)])
def test_a_scene_outside_its_split_is_refused(split, index):
    with pytest.raises(ValueError, match=split):
        scene_at(split, index)


def test_scenes_keep_to_the_grid_with_distinct_nouns_and_cells():
    for index in range(300):
        things = scene_at("train", index).things
        assert 2 <= len(things) <= 5
        assert len({thing.noun for thing in things}) == len(things)
        assert len({(thing.row, thing.column) for thing in things}) == len(things)
        assert all(0 <= thing.row < 3 and 0 <= thing.column < 3 for thing in things)


def test_a_thing_is_drawn_in_its_own_cell_and_nowhere_else():
    image = torch.tensor(list(draw_scene(SCENE).tobytes())).view(72, 72, 3)
    background = image[71, 0]
    drawn = (image != background).any(-1).view(3, 24, 3, 24).any(3).any(1)
    assert drawn.nonzero().tolist() == [[0, 0], [2, 1]]


def test_relations_are_strict_and_mirrored():
    moon, house = SCENE.things
    assert relation_holds(moon, "left", house)
    assert relation_holds(moon, "above", house)
    for relation, opposite in OPPOSITE.items():
        assert relation_holds(moon, relation, house) == relation_holds(house, opposite, moon)
        assert not relation_holds(moon, relation, moon)


def test_writing_a_split_twice_gives_the_same_files(tmp_path: Path):
    prompts = write_split(tmp_path, "test", 3, start=4)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert prompts.read_text().splitlines()[0] == (
        '{"id": "test-000004", "image": "images/test-000004.png", '
        '"prompt": "Describe this image in detail."}'
    )
    write_split(tmp_path, "test", 3, start=4)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert read_scenes(tmp_path / "scenes.jsonl") == dict(scene_images("test", 4, 7))


# --- English, facts, truth


def test_facts_of_a_caption_by_hand():
    text = "There is a small red moon, from the house the moon is left."
    facts, wellformed = parse_facts(text, segment=3)
    assert wellformed
    assert [(f.kind, f.text, f.requires) for f in facts] == [
        ("object", "There is a moon.", ()),
        ("attribute", "There is a small moon.", ("There is a moon.",)),
        ("attribute", "There is a red moon.", ("There is a moon.",)),
        ("object", "There is a house.", ()),
        (
            "relation",
            "From the house the moon is left.",
            ("There is a house.", "There is a moon."),
        ),
    ]
    assert {f.segment for f in facts} == {3}


@pytest.mark.parametrize(
    ("fact", "truth"),
    [
        ("There is a moon.", True),
        ("There is a star.", False),
        ("There is a red moon.", True),
        ("There is a large moon.", False),
        ("There is a red star.", None),
        ("From the house the moon is left.", True),
        ("From the house the moon is below.", False),
        ("From the star the moon is left.", None),
    ],
)
def test_the_oracle_looks_facts_up(fact, truth):
    assert oracle(SCENE, fact) is truth


@pytest.mark.parametrize("text", ["", "A moon.", "There is a small red moon.", "There is a moon"])
def test_the_oracle_refuses_what_is_not_one_fact(text):
    with pytest.raises(ValueError, match="not an atomic fact"):
        oracle(SCENE, text)


@pytest.mark.parametrize(
    ("piece", "classes"),
    [
        ("There is a moon.", (OK, NONE, NONE)),
        ("There is a star,", (HALLU, NONE, NONE)),
        ("There is a small blue moon.", (OK, HALLU, NONE)),
        ("There is a red star.", (HALLU, NONE, NONE)),
        ("from the house the moon is right.", (OK, NONE, HALLU)),
        ("from the star the moon is left.", (HALLU, NONE, NONE)),
        ("The background is plain.", (NONE, NONE, NONE)),
    ],
)
def test_classes_of_a_piece(piece, classes):
    assert oracle_classes(SCENE, [piece]) == [classes]


@pytest.mark.parametrize(
    "text",
    [
        "There is a moon",
        "There is a red small moon.",
        "There is moon.",
        "from the moon the moon is left.",
        "There is a moon,, there is a star.",
        "Hello.",
        "",
    ],
)
def test_malformed_text_is_said_to_be(text):
    assert not parse_facts(text)[1]


@given(st.text(max_size=60))
def test_any_text_can_be_parsed(text):
    facts, _ = parse_facts(text)
    for fact in facts:
        oracle(SCENE, fact)


def test_clean_captions_hold_and_policy_captions_err_at_their_rates():
    wrong: Counter[tuple[str, str]] = Counter()
    rng = random.Random(0)
    for index in range(600):
        scene = scene_at("train", index)
        for name, noise in (("clean", CLEAN), ("policy", POLICY)):
            text = write_caption(scene, rng, noise)
            assert parse_facts(text)[1], text
            for classes in oracle_classes(scene, pieces(text)):
                for kind, label in zip(DEFAULT_KINDS, classes, strict=True):
                    wrong[name, kind] += label is HALLU
                    wrong["all " + name, kind] += label is not NONE
    assert all(wrong["clean", kind] == 0 for kind in DEFAULT_KINDS)
    for kind in DEFAULT_KINDS:
        assert 0.1 < wrong["policy", kind] / wrong["all policy", kind] < 0.45


def test_captions_split_into_the_pieces_they_are_made_of():
    for _, text in noisy_captions(300):
        offsets = split_offsets(text, MIN_WORDS)
        split = [text[a:b].strip() for a, b in pairwise(offsets)]
        assert split == [piece.strip() for piece in pieces(text)]
        assert all(
            piece.rstrip(".") + "." in FILLERS or piece.startswith(("There is a", "from the"))
            for piece in split
        )


def test_dense_targets_say_what_parser_and_oracle_say(tokenizer):
    for scene, text in noisy_captions(300):
        words = [
            tokenizer.decode([i]).strip()
            for i in tokenizer.encode(f" {text}", add_special_tokens=False)
        ]
        targets = annotate(words, scene)
        truth = [[int(label) for label in c] for c in oracle_classes(scene, pieces(text))]
        assert [classes for _, classes in targets.ends] == truth
        assert [words[position] for position, _ in targets.ends] == [
            piece[-1] for piece in pieces(text)
        ]
        assert all(words[position] in NOUNS for position, _ in targets.nouns)


# --- questions


def test_questions_are_balanced_and_answered_by_the_oracle():
    rng, answers = random.Random(1), Counter[tuple[str, str]]()
    for index in range(1500):
        scene, kind = scene_at("train", index), DEFAULT_KINDS[index % 3]
        claim = sample_claim(scene, kind, rng)
        answers[kind, ask(claim, scene, rng).answer] += 1
        assert oracle(scene, claim.text) is (ask(claim, scene, rng).answer == "yes")
    for kind in DEFAULT_KINDS:
        assert 0.4 < answers[kind, "yes"] / 500 < 0.6


def test_pope_pairs_follow_their_strategy():
    for index in range(100):
        scene = scene_at("val", index)
        yes, no = pope_pair(scene, "adversarial", random.Random(index)) or (None, None)
        if yes and no:
            named = [next(n for n in NOUNS if f" {n} " in q.text) for q in (yes, no)]
            assert named[0] in scene
            assert named[1] not in scene
            assert PARTNER[named[1]] in scene
            assert (yes.answer, no.answer) == ("yes", "no")


# --- tokenizer, processor, rows


def test_every_word_said_of_a_scene_is_one_token(tokenizer):
    for scene, text in noisy_captions(100):
        fact = sample_claim(scene, "relation", random.Random(0)).text
        for said in (f" {text}", chat_prompt(DESCRIBE), chat_prompt(verify_question(fact))):
            apart = said.replace("<image>\n", "").replace(":", " :")
            for mark in ",.?":
                apart = apart.replace(mark, f" {mark}")
            image_tokens = 3 if "<image>" in said else 0  # the space before it, itself, line break
            assert len(tokenizer.tokenize(said)) == len(apart.split()) + image_tokens


@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = _shared_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text


_TOKENIZER = None


def _shared_tokenizer():
    global _TOKENIZER
    _TOKENIZER = _TOKENIZER or build_tokenizer()
    return _TOKENIZER


def test_processor_and_training_agree_on_pixels_and_prompt(tokenizer):
    processor = build_processor()
    scene = scene_at("val", 0)
    batch = processor(images=draw_scene(scene), text=chat_prompt(DESCRIBE), return_tensors="pt")
    assert batch["input_ids"][0].tolist() == prompt_ids(tokenizer, chat_prompt(DESCRIBE))
    assert batch["input_ids"][0, 0] == BOS_ID
    assert (batch["input_ids"] == IMAGE_ID).sum() == 9
    torch.testing.assert_close(batch["pixel_values"], scene_pixels([scene]))


@pytest.mark.parametrize(
    "content",
    [
        f"<image>\n{DESCRIBE}",
        [{"type": "image"}, {"type": "text", "text": DESCRIBE}],
        [{"type": "text", "text": DESCRIBE}, {"type": "image"}],
    ],
)
def test_chat_template_writes_the_prompt(content):
    messages = [{"role": "user", "content": content}]
    assert build_processor().apply_chat_template(messages) == chat_prompt(DESCRIBE)


def test_rows_judge_each_piece_at_its_separator(tokenizer):
    row = RowWriter(tokenizer).judged(SCENE, random.Random(0), BROAD)
    separators = [i for i, token in enumerate(row.ids) if token == EOS_ID]
    judged = dict(row.targets.ends)
    assert set(separators) <= set(judged)
    assert all(judged[i] == judged[i - 1] for i in separators)
    assert row.ids[:10] == [BOS_ID] + [IMAGE_ID] * 9
    assert not any(row.predicted)


# --- checkpoints


def test_checkpoints_round_trip_under_public_names(tmp_path: Path):
    model = random_model(len(build_tokenizer()), seed=1)
    save_checkpoint(model, build_processor(), tmp_path)
    loaded, processor = load_checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.half().float())
    assert processor.tokenizer.encode("There is a moon.")[0] == BOS_ID
    assert LLAVA.public_name("lm_head.weight") == "language_model.lm_head.weight"
    with pytest.raises(ValueError, match=r"head\.weight"):
        LLAVA.public_name("head.weight")


@pytest.fixture(scope="module")
def shipped():
    """Each shipped model with its tokenizer, as transformers loads it."""
    return {name: load_checkpoint(MODELS / name) for name in ("policy", "verifier")}


def test_shipped_models_are_small():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_shipped_files_are_what_the_package_builds(shipped, tokenizer):
    for _, processor in shipped.values():
        assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert processor.chat_template == build_processor().chat_template
        assert processor.patch_size == 24


def test_shipped_policy_hallucinates_sampled_and_greedy_but_sees(shipped):
    policy, processor = shipped["policy"]
    scenes = [scene_at("val", index) for index in range(64)]
    features = scene_features(policy, scenes)
    reports = {
        temperature: caption_report(
            scenes,
            caption(policy, processor.tokenizer, features, temperature=temperature),
            processor.tokenizer,
        )
        for temperature in (0.0, 1.0)
    }
    assert reports[0.0].any_wrong > 0.15
    assert all(0.1 < reports[1.0].wrong[kind] < 0.5 for kind in DEFAULT_KINDS)
    for report in reports.values():
        assert report.recall > 0.75
        assert report.malformed < 0.03
        assert report.repeated < 0.03
    assert sum(pope_accuracy(policy, processor.tokenizer, features, scenes).values()) / 3 > 0.65


def test_shipped_verifier_is_good_but_not_perfect_about_what_policies_say(shipped):
    verifier, processor = shipped["verifier"]
    rng = random.Random(0)
    scenes = [scene_at("val", index) for index in range(200)]
    texts = [write_caption(scene, rng, POLICY) for scene in scenes]
    features = scene_features(verifier, scenes)
    accuracy = fact_accuracy(verifier, processor.tokenizer, features, scenes, texts)
    assert all(0.83 < accuracy[kind] < 0.97 for kind in DEFAULT_KINDS)
