"""Who judges captions of images whose truth is unknown: not the models that PPO has optimised."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_eval import make_response, split

from actors.judge import _yes_no
from cluster.pipeline.dry_run import stage_roles
from cluster.pipeline.evaluate import CaptionJudges, judging_engines, truth_known, verifier_judges
from cluster.pipeline.inputs import wrong_inputs
from cluster.placement import plan_roles
from fgaif.chat.messages import ChatRequest
from fgaif.config import Config, load_config
from fgaif.data.images import image_ref
from fgaif.data.prompts import PromptSet
from fgaif.data.sources import Source
from fgaif.errors import ConfigError
from fgaif.eval.run_results import ORACLE, REWARDS
from fgaif.pending import Ready, Then
from fgaif.types import Prompt, Response, SegmentScores

TEXT = "A red moon stands in the sky. A green cow sits on it."


class FakeCluster:
    """Engines that call everything with a given word a hallucination; what was done, in order."""

    def __init__(self, false: dict[str, str]) -> None:
        self.done: list[str] = []
        self.asked: list[ChatRequest] = []
        self._false = false
        self._model = ""

    def judges(self, checkpoint: Path) -> "FakeCluster":
        self._model = checkpoint.name
        self.done.append(f"judge {checkpoint.name}")
        return self

    def rewards(self, _: Path) -> "FakeCluster":
        self.done.append("rewards")
        return self

    def stop(self, name: str) -> None:
        self.done.append(f"stop {name}")

    def answer(self, requests: Sequence[ChatRequest]) -> Then[Any]:
        self.asked += requests
        word = self._false[self._model]
        return Ready([_yes_no(0.1 if word in request.text else 0.9) for request in requests])

    def score(self, responses: Sequence[Response], segments: Sequence[Any]) -> Then[Any]:
        """All is well, say those who were optimised."""
        fine = np.tile(np.array([0.1, 0.8, 0.1], np.float32), (3, 1))
        return Ready([SegmentScores(probs=np.stack([fine] * len(found))) for found in segments])


@pytest.fixture
def config(tmp_path: Path, photos: Path) -> Config:
    return load_config(
        None,
        [
            f"dir={tmp_path}", f"data.held_out={photos}/prompts.jsonl",
            "feedback.verifier=scenes:verifier", "feedback.extractor=segment",
        ],
    )  # fmt: skip


def prompts(photos: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in (photos / "prompts.jsonl").read_text().splitlines()]
    return [
        Prompt(id=str(i), image=image_ref(photos / row["image"]), text=row["prompt"])
        for i, row in enumerate(rows[:3])
    ]


def judges(config: Config, cluster: FakeCluster) -> CaptionJudges:
    source = Source(prompts=PromptSet(source="", prompts=()))
    pieces = lambda r: tuple(split(r))  # noqa: E731
    return CaptionJudges(config, cluster, source, pieces, pieces)  # type: ignore[arg-type]


def test_the_verifier_judges_and_the_reward_models_stand_beside(
    config: Config, photos: Path
) -> None:
    """The reward models see no error; the verifier sees the cow in every caption."""
    cluster = FakeCluster({"verifier": "cow"})
    found = judges(config, cluster)
    name, judge = found.judge()
    assert name == "the verifier verifier"
    responses = [make_response(TEXT, prompt) for prompt in prompts(photos)]
    judged = judge(responses)
    assert [caption.labeled.labels.tolist() for caption in judged] == [[[1] * 3, [2] * 3]] * 3
    assert list(found.others()) == [REWARDS]
    optimised = found.others()[REWARDS](judged)
    assert [caption.labeled.labels.tolist() for caption in optimised] == [[[1] * 3, [1] * 3]] * 3
    training = ["stop learner", "stop reference", "stop reward"]
    assert cluster.done == [*training, "judge verifier", "stop judge", "rewards"]
    distinct = len({(r.image.sha256, r.text) for r in cluster.asked if r.image})
    assert found.judging["requests"] == len(cluster.asked) == distinct
    assert found.judging["cost"] == 0


def test_what_was_asked_once_is_not_asked_after_training(config: Config, photos: Path) -> None:
    cluster = FakeCluster({"verifier": "cow"})
    responses = [make_response(TEXT, prompt) for prompt in prompts(photos)]
    first = judges(config, cluster).judge()[1](responses)
    asked = len(cluster.asked)
    again = judges(config, cluster)
    second = again.judge()[1](responses)
    assert len(cluster.asked) == asked
    assert again.judging["requests"] == 0
    assert [c.labeled.labels.tolist() for c in first] == [c.labeled.labels.tolist() for c in second]


def test_a_second_verifier_checks_the_same_facts(
    config: Config, photos: Path, tmp_path: Path
) -> None:
    config = load_config(
        None,
        [
            f"dir={tmp_path}", f"data.held_out={photos}/prompts.jsonl",
            "feedback.verifier=scenes:verifier", "feedback.extractor=segment",
            "eval.second_verifier=scenes:policy",
        ],
    )  # fmt: skip
    assert judging_engines(config) == ["scenes:verifier", "scenes:policy"]
    assert "judge" in stage_roles(config, ["eval-after"])
    assert any(bundle.role == "judge" for bundle in plan_roles(config))
    cluster = FakeCluster({"verifier": "cow", "policy": "moon"})
    found = judges(config, cluster)
    judged = found.judge()[1]([make_response(TEXT, prompt) for prompt in prompts(photos)])
    assert list(found.others()) == ["the second verifier policy", REWARDS]
    second = found.others()["the second verifier policy"](judged)
    assert [caption.labeled.labels.tolist() for caption in second] == [[[2] * 3, [1] * 3]] * 3
    assert [c.labeled.facts for c in second] == [c.labeled.facts for c in judged]


def test_who_judges_follows_from_the_configuration(config: Config) -> None:
    assert truth_known(Config())
    assert judges(Config(), FakeCluster({})).judge()[0] == ORACLE
    assert not verifier_judges(Config())
    assert judging_engines(Config()) == []
    scenes = load_config(None, ["data.held_out=mine.jsonl"])
    assert not verifier_judges(scenes)  # its English is not the embedded world's
    assert judges(scenes, FakeCluster({})).judge()[0] == REWARDS
    asked = load_config(None, ["data.held_out=mine.jsonl", "eval.judge=verifier"])
    assert verifier_judges(asked)
    chosen = config.model_copy(update={"eval": config.eval.model_copy(update={"judge": "rewards"})})
    assert judges(chosen, FakeCluster({})).judge()[0] == REWARDS
    assert judges(chosen, FakeCluster({})).others() == {}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["eval.judge=rewards", "eval.second_verifier=x"], "set eval.judge=verifier"),
        (["feedback.verifier=x", "eval.second_verifier=x"], "name another model"),
        (["eval.second_verifier=api:gpt"], "no such entry of endpoints"),
    ],
)
def test_second_verifiers_that_are_none_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)


def test_judges_are_looked_for_before_hours_of_training(config: Config, tmp_path: Path) -> None:
    gone = load_config(
        None,
        ["data.held_out=mine.jsonl", "eval.judge=verifier", f"feedback.verifier={tmp_path}/gone"],
    )
    assert "feedback.verifier" in wrong_inputs(gone, ["eval-after"])
