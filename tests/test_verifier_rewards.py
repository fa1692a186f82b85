"""The verifier's verdicts as rewards: labels as scores, failures, what is counted and planned."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fakes import prompts, response, two_segments

from cluster.memory.devices import parse_assumed
from cluster.memory.plan import plan_memory
from cluster.pipeline.dry_run import stage_roles
from cluster.pipeline.keys import kind_of
from cluster.pipeline.verifier_rewards import VerifierRewards, one_hot
from cluster.placement import check_fits, phases, plan_roles
from fgaif.config import load_config
from fgaif.errors import ConfigError, ServiceError
from fgaif.feedback.annotate import Annotator
from fgaif.feedback.facts import ExtractedFacts
from fgaif.types import DEFAULT_KINDS, UNKNOWN, Fact, FactQuery, Response, Verdict

VERIFIER = ["ppo.reward_source=verifier"]


class States:
    """Facts of the test's two segments, of the kinds given."""

    name = "states"

    async def extract(self, response: Response, segments: object) -> ExtractedFacts:
        return ExtractedFacts(
            facts=(
                Fact(kind="object", text="There is a dog.", segment=0),
                Fact(kind="object", text="There is a moon.", segment=1),
                Fact(kind="attribute", text="There is a red dog.", segment=1),
            )
        )


class Answers:
    """Says no to moons, fails at colours, and counts."""

    name, prompt_version = "answers", "1"

    def __init__(self) -> None:
        self.asked = 0
        self.broken = False

    async def verify(self, query: FactQuery) -> Verdict:
        await asyncio.sleep(0)
        if self.broken:
            raise ServiceError("the key is wrong")
        self.asked += 1
        if "red" in query.text:
            return Verdict(query=query, answer="unknown", problem="failed")
        return Verdict(query=query, answer="no" if "moon" in query.text else "yes")


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def rewards(answers: Answers):
    annotator = Annotator(States(), answers, 5, DEFAULT_KINDS)
    found = VerifierRewards(annotator, lambda: answers.asked)
    yield found
    found.close()


def test_verdicts_are_scores_and_a_failure_is_no_fact(
    answers: Answers, rewards: VerifierRewards
) -> None:
    responses = [response(prompt) for prompt in prompts(3)]
    segments = [two_segments(one) for one in responses]
    scores = rewards.score(responses, segments).result()
    expected = np.zeros((2, 3, 3), np.float32)
    expected[0, 0, 1] = 1  # a dog: OK
    expected[1, 0, 2] = 1  # a moon: HALLU
    expected[0, 1, 0] = expected[1, 1, 0] = 1  # no attribute, and one that could not be judged
    expected[:, 2, 0] = 1
    for score in scores:
        np.testing.assert_array_equal(score.probs, expected)
    found = rewards.metrics()
    assert found["verifier/questions"] == answers.asked == 9
    assert found["verifier/seconds"] > 0
    assert rewards.metrics() == {"verifier/questions": 0.0, "verifier/seconds": 0.0}


def test_a_model_that_cannot_be_asked_stops_the_step(
    answers: Answers, rewards: VerifierRewards
) -> None:
    answers.broken = True
    one = response(prompts(1)[0])
    with pytest.raises(ServiceError, match="the key is wrong"):
        rewards.score([one], [two_segments(one)]).result()
    answers.broken = False
    assert len(rewards.score([one], [two_segments(one)]).result()) == 1  # it can be asked again


def test_no_segments_have_no_scores() -> None:
    assert one_hot(np.zeros((0, 3), np.int64)).shape == (0, 3, 3)
    assert one_hot(np.array([[UNKNOWN]])).tolist() == [[[1, 0, 0]]]


def test_ppo_has_judges_in_the_place_of_reward_models(tmp_path: Path) -> None:
    config = load_config(None, VERIFIER)
    assert stage_roles(config, ["train"]) == {"rollout", "judge", "reference", "learner"}
    assert "reward" in stage_roles(load_config(None, []), ["train"])
    assert phases(config)["PPO"] == ("rollout", "judge", "learner", "reference", "shared")
    bundles = plan_roles(config, stage_roles(config, ["train"]))
    need = sum(bundle.cpus for bundle in bundles)
    check_fits(bundles, {"CPU": need}, phases=phases(config))
    with pytest.raises(ConfigError, match="rollout, reference, learner, judge"):
        check_fits(bundles, {"CPU": need - 0.1}, phases=phases(config))


def test_the_memory_plan_counts_the_judge_in_ppo(tiny_llava_dir: Path) -> None:
    base = [f"policy.model={tiny_llava_dir}", f"feedback.verifier={tiny_llava_dir}"]
    for overrides, wanted in ((VERIFIER, {"judge"}), ([], {"reward"})):
        config = load_config(None, [*base, *overrides])
        plan = plan_memory(config, stage_roles(config, ["train"]), parse_assumed("1x24"))
        (load,) = [load for load in plan.loads if load.phase == "PPO"]
        roles = {actor.bundle.role for actor in load.actors}
        assert roles == {"rollout", "learner", "reference", *wanted}


def test_another_source_of_rewards_is_another_training() -> None:
    assert kind_of(load_config(None, []), "train", "ppo.reward_source") == "result"
    assert kind_of(load_config(None, []), "train-reward", "ppo.reward_source") == "execution"
