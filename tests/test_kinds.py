"""A fourth kind, counting ("There are two stars."), as a user adds it: a configuration and a model
that states and checks such facts. Every part of the method takes it; no file of fgaif names it.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import serving_samples
from chats import Scripted
from counting_world import ALL, COLOUR, KINDS, CountingWorld
from rich.console import Console
from starlette.testclient import TestClient

import fgaif
from actors.reward import RewardActor, SharedRewardActor
from cluster.cli.replay import heading, segment_style
from cluster.driver import PpoData, PpoDriver
from cluster.pipeline.feedback_report import write_summary
from cluster.pipeline.keys import changes, stage_values
from cluster.pipeline.stage_status import check_resumable
from cluster.pipeline.stages import run_stages
from cluster.placement import plan_roles
from fgaif.chat.store import ReplyStore
from fgaif.checkpoint import read_state
from fgaif.config import Config, dump_config, parse_config, with_overrides
from fgaif.data.scenes.world import scene_at
from fgaif.errors import CheckpointError, ConfigError, DataError
from fgaif.eval.benchmarks.faithscore import BENCHMARK
from fgaif.eval.captions import JudgedCaption, caption_metrics, judged_by_scores
from fgaif.eval.figures import find_figure
from fgaif.eval.policy import Captions
from fgaif.eval.report import build_report
from fgaif.eval.run_results import REWARDS, read_eval, write_eval
from fgaif.eval.scenes import SceneJudge
from fgaif.feedback.extract import load_facts_prompt
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.models import FeedbackModels
from fgaif.feedback.parquet import read_labels, write_labels
from fgaif.feedback.store import label_store
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.ppo.rollout_dump import read_dump
from fgaif.reward.checkpoint import load_shared_reward_models, read_card
from fgaif.reward.dense import RewardCenters
from fgaif.serving.app import create_app
from fgaif.tracking import explain
from fgaif.types import DEFAULT_KINDS, CaptionMetrics, EvalReport, LabeledResponse, SegmentScores

PAGE = Path(fgaif.__path__[0]) / "serving" / "page"
SETTINGS: dict[str, Any] = {
    "name": "counted",
    "kinds": KINDS,
    "segment": {"min_words": 4},
    # The verifier checkpoint states the facts too; a scripted model stands in for it here.
    "feedback": {"extractor": "model"},
    "reward": {"lora": {"r": 4, "alpha": 8}, "lr": 2e-3, "batch_size": 8, "epochs": 1, "evals": 1},
    "ppo": {"steps": 2, "rollout_batch": 4, "minibatch": 2, "checkpoint_every": 1},
    "tracking": {"rollouts": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return parse_config({**SETTINGS, "dir": str(tmp_path_factory.mktemp("runs"))})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> CountingWorld:
    return CountingWorld(tmp_path_factory.mktemp("scenes"), 16)


@pytest.fixture(scope="module")
def labeled(
    config: Config, world: CountingWorld, tmp_path_factory: pytest.TempPathFactory
) -> list[LabeledResponse]:
    """Step 1 with the configured extractor and verifier."""
    with ReplyStore(tmp_path_factory.mktemp("replies") / "replies.sqlite") as store:
        annotator = FeedbackModels(config, store, Scripted(by=world.answer)).annotator()

        async def annotate(response: fgaif.Response) -> LabeledResponse:
            segments = fgaif.segment_response(response, world.tokenizer, config.segment.min_words)
            return await annotator.annotate(response, segments)

        return [asyncio.run(annotate(response)) for response in world.responses]


@pytest.fixture(scope="module")
def rewards(config: Config, labeled: list[LabeledResponse]) -> Path:
    """Step 2 in this process."""
    folder = config.run_dir / "rewards"
    metrics = fgaif.train_rewards(labeled, folder, config)
    assert list(metrics) == list(ALL)
    return folder


def test_facts_and_labels_have_the_kind(
    labeled: list[LabeledResponse], world: CountingWorld
) -> None:
    for item, right in zip(labeled, world.truths, strict=True):
        assert item.kinds == ALL
        assert item.labels[:, :3].tolist() == [[1, 1, 0], [0, 0, 0]]
        assert item.of_kind("counting").tolist() == [0, 1 if right else 2]
        assert item.facts[-1].kind == "counting"
        assert "counting: counting-" in item.provenance["prompt_version"]


def test_label_files_name_the_kinds_and_refuse_others(
    labeled: list[LabeledResponse], config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "labels.jsonl"
    label_store(path, config.kind_names).append(labeled)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["kinds"] == list(ALL)
    assert np.array_equal(next(iter(label_store(path, ALL))).labels, labeled[0].labels)
    with pytest.raises(DataError, match=r"attribute, relation, counting, but .* relation: set"):
        label_store(path, DEFAULT_KINDS)
    write_labels(labeled, tmp_path / "labels.parquet")
    assert next(read_labels(tmp_path / "labels.parquet")).kinds == ALL
    # A file of an earlier version names none and is of the three.
    row = rows[0] | {"labels": [codes[:3] for codes in rows[0]["labels"]]}
    row["facts"] = [fact for fact in row["facts"] if fact["kind"] != "counting"]
    del row["kinds"]
    path.write_text(json.dumps(row) + "\n")
    assert [item.kinds for item in label_store(path, DEFAULT_KINDS)] == [DEFAULT_KINDS]
    with pytest.raises(DataError, match="made for the kinds object, attribute, relation, but"):
        label_store(path, ALL)


def test_the_summary_counts_the_kind(labeled: list[LabeledResponse], tmp_path: Path) -> None:
    write_summary(tmp_path, labeled, ALL, None, 0, Console(quiet=True))
    classes = json.loads((tmp_path / "summary.json").read_text())["classes"]
    assert classes["counting"] == {"none": 16, "ok": 8, "hallu": 8, "unknown": 0}


def test_reward_models_name_the_kinds_and_score_them(
    rewards: Path, config: Config, labeled: list[LabeledResponse], tmp_path: Path
) -> None:
    assert read_card(rewards / "object").kinds == ALL
    responses = [item.response for item in labeled[:2]]
    segments = [item.segments for item in labeled[:2]]
    shared = SharedRewardActor(rewards, config).score(responses, segments)
    alone = RewardActor(rewards / "counting", config).score(responses, segments)
    assert [scores.probs.shape for scores in shared] == [(2, 4, 3)] * 2
    assert shared[0].probs[:, 3] == pytest.approx(alone[0], abs=1e-5)
    scores = fgaif.load_rewards(rewards).score(responses[0].prompt.image, responses[0].text)
    assert scores.kinds == ALL
    assert scores.probs == pytest.approx(shared[0].probs, abs=1e-5)
    three = with_overrides(config, ["kinds=[object,attribute,relation]"])
    backbone = resolve_checkpoint("scenes:policy")
    with pytest.raises(CheckpointError, match=r"relation, counting, but the kinds here are object"):
        RewardActor(rewards / "object", three)
    with pytest.raises(CheckpointError, match=r"relation, counting, but the kinds here are object"):
        load_shared_reward_models(rewards, backbone, DEFAULT_KINDS, dtype="float32")


class FourKinds(fakes.World):
    """The fake roles with reward models of four kinds: objects wrong in the first segment."""

    def score(self, responses: Any, segments: Any) -> Any:
        probs = np.tile(np.array([0.0, 0.75, 0.25], np.float32), (2, 4, 1))
        probs[0, 0] = [0.0, 0.25, 0.75]
        return fakes.Ready([SegmentScores(probs=probs) for _ in responses])


def driver(settings: Config) -> PpoDriver:
    data = PpoData(
        prompts=fakes.prompts(10),
        anchors=[],
        digest="d",
        settings=stage_values(settings, "train"),
        check_resumable=partial(check_resumable, settings),
    )
    return PpoDriver(settings, FourKinds().roles(), data, fakes.two_segments, lambda *_: ())


def test_ppo_has_rewards_metrics_rollouts_and_checkpoints_of_the_kind(
    config: Config, tmp_path: Path
) -> None:
    settings = with_overrides(
        config, [f"dir={tmp_path}", "ppo.shape.order=[object,counting]", "ppo.shape.center=false"]
    )
    first, second = driver(settings).run()
    assert first.metrics["hallu/counting"] == second.metrics["hallu/counting"] == 0
    # 0.5 for each segment, but where an object is wrong counting does not count.
    assert first.metrics["reward/counting"] == pytest.approx(0.5)
    assert first.metrics["reward/relation"] == pytest.approx(1.0)
    assert explain("reward/counting") == explain("reward/object") != explain("reward/total")
    dump = read_dump(tmp_path / "counted" / "policy" / "rollouts" / "step_000001.jsonl")
    assert dump.header.centers.kinds == ALL
    assert dump.rows[0].segment_values[0, 3] == 0
    assert "counting hallucinated" in heading(dump).plain
    assert segment_style(dump.rows[0].probs[0], ["#010101", "", "", ""]) == "#010101"
    state = read_state(tmp_path / "counted" / "policy" / "checkpoints" / "step_000002")
    assert state["centers"]["kinds"] == list(ALL)


def test_a_checkpoint_that_names_no_kinds_is_of_the_three(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_overrides(config, [f"dir={tmp_path}"])
    # As earlier versions wrote it.
    monkeypatch.setattr(RewardCenters, "to_json", lambda _: {"means": [None] * 3})
    list(driver(settings).run())
    again = with_overrides(settings, ["ppo.resume=latest", "ppo.steps=3"])
    with pytest.raises(CheckpointError, match=r"object, attribute, relation, but .* counting"):
        list(driver(again).run())


@pytest.fixture
def run_dir(config: Config, rewards: Path, labeled: list[LabeledResponse], tmp_path: Path) -> Path:
    """A run's folder with evaluations by the reward models."""
    (tmp_path / "config.yaml").write_text(dump_config(config))
    responses = [item.response for item in labeled]
    segments = [item.segments for item in labeled]
    scores = SharedRewardActor(rewards, config).score(responses, segments)
    captions = tuple(
        judged_by_scores(*item, config.kind_names)
        for item in zip(responses, segments, scores, strict=True)
    )
    metrics = figures(captions, config)
    report = EvalReport(greedy=metrics, sampled=metrics, judge=REWARDS)
    for phase in ("before", "after"):
        write_eval(tmp_path / "eval", phase, report, Captions(greedy=captions, sampled=captions))  # type: ignore[arg-type]
        assert read_eval(tmp_path / "eval", phase) == report  # type: ignore[arg-type]
    (tmp_path / "rewards").symlink_to(rewards)
    return tmp_path


def figures(captions: Sequence[JudgedCaption], config: Config) -> CaptionMetrics:
    found = caption_metrics(captions, config.kind_names)
    assert list(found.kinds) == list(ALL)
    labels = np.concatenate([caption.labeled.of_kind("counting") for caption in captions])
    facts = labels != 0
    assert found.kinds["counting"] == (
        pytest.approx((labels == 2).sum() / facts.sum()) if facts.any() else None
    )
    return found


def test_evaluation_and_report_show_the_kind_in_its_colour(run_dir: Path) -> None:
    tree = json.loads((run_dir / "eval" / "after.json").read_text())
    assert tree["kinds"] == list(ALL)
    assert list(tree["sampled"])[:5] == [*ALL, "any"]
    page = build_report(run_dir).read_text()
    assert "counting errors" in page
    assert COLOUR in page
    report = json.loads((run_dir / "report" / "report.json").read_text())
    assert list(report["rewards"]) == report["kinds"] == list(ALL)
    assert find_figure(BENCHMARK.figures, "counting").title == "counting facts"
    (run_dir / "config.yaml").write_text("name: counted\n")
    with pytest.raises(DataError, match=r"counting, but the kinds here are object, attribute"):
        build_report(run_dir)


def test_the_service_and_its_page_show_the_kind(rewards: Path, config: Config) -> None:
    backend = serving_samples.LocalBackend(rewards, config)
    client = TestClient(create_app(backend, config, key=None))
    (model,) = client.get("/v1/models").json()["models"]
    assert model["kinds"] == list(model["cards"]) == list(ALL)
    assert model["colours"] == {"counting": COLOUR}
    assert model["meanings"]["counting"] == "how many of one shape there are"
    assert model["shape"]["weights"] == dict.fromkeys(ALL, 1.0)
    image = serving_samples.data_uri(serving_samples.png())
    body = {"text": "There are two stars.", "image": image}
    (result,) = client.post("/v1/score", json=body).json()["results"]
    assert list(result["rewards"]) == list(result["segments"][0]["kinds"]) == list(ALL)
    parts = sum(result["rewards"].values()) - result["penalty"]
    assert result["total"] == pytest.approx(parts, abs=1e-5)
    query = {"query": ["Q There are two stars."], "prompts": ["Q"], "images": [image]}
    logs = client.post("/get_reward", json=query).json()["extra_logs"]
    assert {*ALL} <= logs.keys()
    page = "".join((PAGE / name).read_text() for name in ("index.html", "page.js", "page.css"))
    for kind in DEFAULT_KINDS:
        assert not re.search(rf"""["'.#-]{kind}\b""", page), kind


def test_actors_are_planned_for_the_kind(config: Config) -> None:
    names = [bundle.name for bundle in plan_roles(config) if bundle.role == "reward"]
    assert names == [f"reward-{kind}-0" for kind in ALL]


def test_another_list_of_kinds_makes_labels_anew_another_colour_nothing(config: Config) -> None:
    made = stage_values(config, "annotate")
    three = with_overrides(config, ["kinds=[object,attribute,relation]"])
    assert next(change.key for change in changes(three, "annotate", made)) == "kinds"
    kinds = [*DEFAULT_KINDS, {**KINDS[3], "colour": "#000000"}]
    painted = parse_config({**SETTINGS, "kinds": kinds})
    assert changes(painted, "annotate", made) == ()
    # What earlier versions stored, without the key, is of the three.
    stored = stage_values(three, "train")
    del stored["kinds"]
    assert changes(three, "train", stored) == ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": []}, "kinds"),
        ({"kinds": ["object", "object"]}, "'object' is there twice"),
        ({"kinds": ["dog", "dogs"]}, "once more in the plural"),
        ({"kinds": ["Object"]}, "kinds.0.name"),
        ({"kinds": ["recall"]}, "stands for something else"),
        ({"kinds": [{"name": "x", "colour": "red"}]}, "kinds.0.colour"),
        ({"kinds": ["x"], "reward": {"parallel": 2}}, "there are only 1 kinds"),
        ({"ppo": {"shape": {"weights": {"counting": 1}}}}, r"ppo\.shape\.weights\.counting: no"),
        ({"ppo": {"shape": {"order": ["counting"]}}}, r"ppo\.shape\.order\.counting: no such kind"),
        ({"ppo": {"shape": {"order": ["object", "object"]}}}, "name each kind once"),
        ({"ppo": {"value_init": "counting"}}, r"ppo\.value_init\.counting: no such kind"),
    ],
)
def test_kinds_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(settings)


def test_kinds_are_dumped_as_they_were_written(config: Config) -> None:
    assert parse_config({}).model_dump(mode="json")["kinds"] == list(DEFAULT_KINDS)
    assert config.model_dump(mode="json")["kinds"] == KINDS
    assert with_overrides(config, []).kinds == config.kinds


def test_the_embedded_world_says_which_kinds_it_knows(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"kinds has counting: set feedback\.extractor"):
        SceneFacts(config.kind_names)
    with pytest.raises(ConfigError, match="does not know the truth of counting"):
        SceneJudge(lambda _: scene_at("test", 0), lambda _: (), config.kind_names)


def test_prompts_of_the_three_are_those_of_earlier_versions() -> None:
    """Their digests name stored replies that were paid for."""
    versions = [
        load_facts_prompt(parse_config({}).kinds, per, text_form=text).version
        for per in ("response", "segment")
        for text in (False, True)
    ]  # fmt: skip
    assert versions == [
        "facts-0374c274",
        "facts_text-f5b67f84",
        "facts_segment-f2858dda",
        "facts_segment_text-d3a97018",
    ]


def test_a_kind_without_words_for_the_prompt_is_refused(tmp_path: Path) -> None:
    kinds = parse_config({"kinds": ["object", "counting"]}).kinds
    with pytest.raises(ConfigError, match="description of counting: none is given"):
        load_facts_prompt(kinds, "response")
    (tmp_path / "facts.txt").write_text("List what {segments} says.")
    with pytest.raises(ConfigError, match="says nothing of the kind 'counting'"):
        load_facts_prompt(kinds, "response", folder=tmp_path)
    (tmp_path / "facts.txt").write_text("Kinds: object, counting.\n{segments}")
    assert load_facts_prompt(kinds, "response", folder=tmp_path).text.startswith("Kinds: object")


def test_what_a_kind_lacks_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    silent = Console(quiet=True)
    common = {"name": "x", "dir": str(tmp_path), "kinds": ["object", "counting"]}
    for feedback, words in (
        ({"extractor": "scenes"}, r"kinds has counting: set feedback\.extractor"),
        ({"extractor": "model"}, "description of counting: none is given"),
    ):
        config = parse_config({**common, "feedback": feedback})
        with pytest.raises(ConfigError, match=words):
            run_stages(config, ("sample", "annotate"), False, silent)
    assert not (tmp_path / "x" / "config.yaml").exists()
