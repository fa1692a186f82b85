"""Caption metrics by hand, the oracle as judge, and one evaluation with a fake policy."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgaif.config import Config
from fgaif.data.scenes.world import Scene, Thing
from fgaif.errors import DataError
from fgaif.eval.captions import (
    JudgedCaption,
    any_hallucinated,
    caption_metrics,
    judged_by_scores,
    repeated_segments,
)
from fgaif.eval.policy import ask_pope, eval_requests, evaluate_policy
from fgaif.eval.run_results import ORACLE, read_eval, write_eval
from fgaif.eval.scenes import SceneJudge, scene_questions
from fgaif.types import (
    DEFAULT_KINDS,
    GenerationRequest,
    ImageRef,
    Prompt,
    Response,
    Segment,
    SegmentScores,
)

MOON_AND_TREE = Scene(
    seed=1,
    things=(
        Thing(noun="moon", colour="red", size="small", row=0, column=0),
        Thing(noun="tree", colour="blue", size="large", row=0, column=2),
    ),
)
TRUE_CAPTION = "There is a small red moon. There is a tree, from the moon the tree is right."
FALSE_CAPTION = "There is a blue moon. There is a star, from the moon the star is left."


def make_prompt(index: int = 0) -> Prompt:
    return Prompt(id=f"p{index}", image=ImageRef(path=f"{index}.png", sha256=f"{index}"), text="?")


def make_response(text: str, prompt: Prompt | None = None, sample: int = 0) -> Response:
    ids = np.arange(len(text.split()) + 1, dtype=np.int64)
    return Response(
        prompt=prompt or make_prompt(),
        sample=sample,
        text=text,
        token_ids=ids,
        rollout_logprobs=np.zeros(len(ids), np.float32),
        finish="stop",
        policy_version=0,
    )


def split(response: Response) -> list[Segment]:
    """One segment per piece that ends with a comma or a stop."""
    return [
        Segment(index=i, char_start=m.start(), char_end=m.end(), token_start=i, token_end=i + 1)
        for i, m in enumerate(re.finditer(r"[^,.]+[,.]?", response.text))
    ]


def judge_one(text: str) -> JudgedCaption:
    return SceneJudge(lambda _: MOON_AND_TREE, split)([make_response(text)])[0]


def test_the_oracle_finds_no_fault_in_a_true_caption() -> None:
    metrics = caption_metrics([judge_one(TRUE_CAPTION)], DEFAULT_KINDS)
    assert ({**metrics.kinds, "any": metrics.any}) == dict.fromkeys([*DEFAULT_KINDS, "any"], 0)
    assert (metrics.chair_s, metrics.chair_i, metrics.recall) == (0, 0, 1)
    assert metrics.true_facts == 5  # moon, small moon, red moon, tree, relation
    assert metrics.specificity == 1  # small and red; moon and tree
    assert metrics.length == 17
    assert (metrics.repetition, metrics.malformed) == (0, 0)


def test_each_kind_of_error_is_counted_over_the_segments_with_facts_of_the_kind() -> None:
    """Blue moon: object OK, attribute HALLU. Star: object HALLU. Star left of the moon: object
    HALLU, the relation void without its star. Mentions: moon, star, moon, star."""
    caption = judge_one(FALSE_CAPTION)
    metrics = caption_metrics([caption], DEFAULT_KINDS)
    assert caption.labeled.labels.tolist() == [[1, 2, 0], [2, 0, 0], [2, 0, 0]]
    assert metrics.kinds == {"object": 2 / 3, "attribute": 1, "relation": None}
    assert metrics.any == 1
    assert (metrics.chair_s, metrics.chair_i, metrics.recall) == (1, 0.5, 0.5)
    assert metrics.true_facts == 1


def test_a_true_fact_counts_once_per_caption_however_often_it_is_said() -> None:
    metrics = caption_metrics(
        [judge_one("There is a moon. There is a moon. There is a moon.")], DEFAULT_KINDS
    )
    assert metrics.true_facts == 1
    assert metrics.repetition == 2 / 3


def test_malformed_counts_segments_and_an_empty_caption_counts_as_one() -> None:
    bad = judge_one("There is a moon. moon moon.")
    assert bad.malformed == (False, True)
    assert caption_metrics([bad, judge_one("")], DEFAULT_KINDS).malformed == 2 / 3
    assert caption_metrics([judge_one("")], DEFAULT_KINDS).kinds["object"] is None


def test_repetition_ignores_case_space_and_final_marks() -> None:
    assert repeated_segments(["A moon.", " a  MOON,", "A moon and", "", ""]) == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_any_leaves_out_segments_that_cannot_be_decided() -> None:
    """HALLU decides even beside unknown; OK beside unknown does not; all NONE is no fact."""
    labels = np.array([[2, -1, 0], [1, -1, 0], [0, 0, 0], [1, 0, 1]])
    assert any_hallucinated(labels) == 0.5
    assert any_hallucinated(labels[1:3]) is None


def test_reward_models_as_judge_leave_unknown_figures_out() -> None:
    response = make_response("One piece. Another piece.")
    probs = np.full((2, 3, 3), 0.2, np.float32)
    probs[0, 0, 2] = probs[1, 0, 1] = probs[:, 1:, 0] = 0.6
    caption = judged_by_scores(response, split(response), SegmentScores(probs=probs), DEFAULT_KINDS)
    metrics = caption_metrics([caption], DEFAULT_KINDS)
    assert caption.labeled.labels.tolist() == [[2, 0, 0], [1, 0, 0]]
    assert (metrics.kinds["object"], metrics.kinds["attribute"], metrics.any) == (0.5, None, 0.5)
    assert (metrics.chair_s, metrics.recall, metrics.true_facts, metrics.malformed) == (None,) * 4
    assert metrics.length == 4


class FakePolicy:
    """Tells the truth when greedy, lies when sampled, and says yes to everything."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.questions: list[Prompt] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        self.requests += requests
        return [
            make_response(TRUE_CAPTION if r.temperature == 0 else FALSE_CAPTION, r.prompt, r.sample)
            for r in requests
        ]

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        self.questions += prompts
        return [0.9 for _ in prompts]


PROMPTS = [make_prompt(i) for i in range(3)]


def run_evaluation(policy: FakePolicy, config: Config):  # type: ignore[no-untyped-def]
    questions = scene_questions(PROMPTS, scene_with, per_image=6, seed=1)
    return evaluate_policy(
        policy.generate,
        policy.p_yes,
        PROMPTS,
        judge=SceneJudge(lambda _: MOON_AND_TREE, split),
        judge_name=ORACLE,
        questions=questions,
        config=config,
    )


def scene_with(prompt: Prompt) -> Scene:
    others = {"p0": "star", "p1": "house", "p2": "heart"}
    things = (MOON_AND_TREE.things[0], replace(MOON_AND_TREE.things[1], noun=others[prompt.id]))
    return Scene(seed=1, things=things)


def test_an_evaluation_keeps_greedy_and_sampled_apart() -> None:
    policy = FakePolicy()
    report, captions, _ = run_evaluation(policy, Config())
    assert report.greedy.any == 0
    assert report.sampled.any == 1
    assert report.pope is not None
    assert report.pope.yes_ratio == 1
    assert report.pope.f1 == pytest.approx(2 / 3)
    assert set(report.pope_by_strategy) == {"random", "popular", "adversarial"}
    assert len(captions.greedy) == len(captions.sampled) == 3
    asked = [(prompt.image.sha256, prompt.text) for prompt in policy.questions]
    assert len(asked) == len(set(asked))


def test_requests_depend_on_prompts_and_eval_seed_alone() -> None:
    one, other = FakePolicy(), FakePolicy()
    run_evaluation(one, Config(seed=1))
    run_evaluation(other, Config(seed=2))
    assert one.requests == other.requests
    assert len({request.seed for request in eval_requests(PROMPTS, "sampled", Config())}) == 3
    assert eval_requests(PROMPTS, "greedy", Config())[0].temperature == 0


def test_a_lost_response_is_an_error() -> None:
    with pytest.raises(DataError, match="asked for 6 captions and got 5"):
        evaluate_policy(
            lambda requests: FakePolicy().generate(requests)[:-1],
            FakePolicy().p_yes,
            PROMPTS,
            judge=SceneJudge(lambda _: MOON_AND_TREE, split),
            config=Config(),
        )


def test_without_prompts_there_is_no_evaluation() -> None:
    with pytest.raises(DataError, match="no held-out prompts"):
        evaluate_policy(
            FakePolicy().generate, FakePolicy().p_yes, [], judge=lambda r: [], config=Config()
        )


def test_a_question_without_an_answer_is_no_no() -> None:
    questions = scene_questions(PROMPTS, lambda _: MOON_AND_TREE, per_image=2, seed=0)
    with pytest.raises(DataError, match=r"yes/no questions got no answer, the first about"):
        ask_pope(lambda prompts: [float("nan"), *[1.0] * (len(prompts) - 1)], questions)


def test_without_questions_there_is_no_pope() -> None:
    assert ask_pope(FakePolicy().p_yes, []) == []


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    report, captions, answers = run_evaluation(FakePolicy(), Config())
    write_eval(tmp_path / "eval", "before", report, captions, answers)
    assert read_eval(tmp_path / "eval", "before") == report
    rows = (tmp_path / "eval" / "before_captions.jsonl").read_text().splitlines()
    row = json.loads(rows[3])
    assert len(rows) == 6
    assert row["mode"] == "sampled"
    assert row["segments"][0]["labels"] == {
        "object": "OK",
        "attribute": "HALLU",
        "relation": "NONE",
    }
    assert row["segments"][0]["facts"][1] == {
        "kind": "attribute",
        "text": "There is a blue moon.",
        "verdict": "no",
    }
    assert not list((tmp_path / "eval").glob("*.tmp"))


def test_a_broken_evaluation_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "after.json").write_text('{"greedy": {}}')
    with pytest.raises(DataError, match=r"after\.json.*fgaif eval run"):
        read_eval(tmp_path, "after")
