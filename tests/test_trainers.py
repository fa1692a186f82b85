"""Reward functions for verl, EasyR1 and ms-swift, called as their newest releases call them.

The stand-ins have the signatures of verl 0.9.1 (its reward loop's naive manager), ms-swift 4.6.0
(`swift/rl_core/grpo_algorithm.py`) and EasyR1 (`verl/workers/reward/function.py`).
"""

import asyncio
import inspect
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_client import Stub

from fgaif.client import RewardClient, easyr1_reward, swift_reward, verl_reward
from fgaif.errors import DataError
from fgaif.types import Json


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def verl_calls(raw_fn: Callable[..., Any], ground_truth: Any, text: str, extra_info: Json) -> float:
    """verl's loader wraps the function with keyword arguments; its manager runs it in a thread."""
    assert not inspect.iscoroutinefunction(raw_fn)
    compute_score = partial(lambda fn, own, **given: fn(**{**given, **own}), raw_fn, {})

    async def run_single() -> float:
        result = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: compute_score(
                data_source="photos",
                solution_str=text,
                ground_truth=ground_truth,
                extra_info=extra_info | {"num_turns": None, "rollout_reward_scores": {}},
            ),
        )
        score: float = result["score"] if isinstance(result, dict) else result
        return score

    return asyncio.run(run_single())


def test_verl_gets_a_score_with_the_image_as_ground_truth_or_extra(stub: Stub, image: Path) -> None:
    with RewardClient(stub.url) as client:
        reward = verl_reward(client)
        assert verl_calls(reward, str(image), "A dog runs.", {}) == 3.0
        extra = {"image": str(image), "prompt": "What runs?"}
        assert verl_calls(reward, "not an image", "A dog.", extra) == 2.0
        assert stub.bodies[1]["items"][0]["prompt"] == "What runs?"
        found = reward(data_source="", solution_str="A dog.", ground_truth=str(image))
        assert found == {
            "score": 2.0, "object": 2.0, "attribute": 0.5, "relation": -0.5, "refused": 0.0
        }  # fmt: skip
        assert verl_calls(reward, str(image), "  ", {}) == 0.0
        refused = reward(data_source="", solution_str="bad", ground_truth=str(image))
        assert refused == {"score": 0.0, "refused": 1.0}
        assert verl_calls(verl_reward(client, "relation"), str(image), "A dog.", {}) == -0.5


def easyr1_calls(reward_fn: Callable[..., Any], rows: Sequence[tuple[str, str]]) -> list[Json]:
    """EasyR1's batched manager: one list in, one list of dictionaries of numbers out."""
    inputs = [
        {"response": text, "response_length": len(text.split()), "ground_truth": truth}
        for text, truth in rows
    ]
    scores = partial(reward_fn)(inputs)
    assert all(isinstance(value, float) for score in scores for value in score.values())
    assert len({tuple(score) for score in scores}) == 1  # metrics are collected by key
    return [dict(score) for score in scores]


def test_easyr1_gets_an_overall_score_and_the_kinds(stub: Stub, image: Path) -> None:
    truth = json.dumps({"image": str(image), "prompt": "What is it?"})
    with RewardClient(stub.url) as client:
        reward = easyr1_reward(client)
        scores = easyr1_calls(reward, [("A dog.", str(image)), ("bad", truth), ("One.", truth)])
        assert [score["overall"] for score in scores] == [2.0, 0.0, 1.0]
        assert scores[0]["attribute"] == 0.5
        assert [item["prompt"] for item in stub.bodies[0]["items"]][1:] == ["What is it?"] * 2
        one = reward({"response": "A dog.", "response_length": 2, "ground_truth": str(image)})
        assert one["overall"] == 2.0  # the sequential manager gives one mapping


def swift_calls(
    make: Callable[..., Any], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """swift makes the function with its arguments, then calls it with every column of the batch."""
    reward_func = make(args=object())
    assert not inspect.iscoroutinefunction(reward_func)
    rows = len(completions)
    given: list[float | None] = reward_func(
        list(completions),
        trainer_state=None,
        prompt_id=["p"] * rows,
        request_id=["r"] * rows,
        finish_reason=["stop"] * rows,
        is_truncated=[False] * rows,
        rollout_infos=[{}] * rows,
        response_token_ids=[[1, 2]] * rows,
        **columns,
    )
    return given


def test_swift_gets_a_list_with_the_images_of_its_rows(stub: Stub, image: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "A dog."},
    ]
    as_bytes = [{"bytes": image.read_bytes(), "path": None}]
    with RewardClient(stub.url) as client:
        make = swift_reward(client)
        texts, pictures = ["A dog.", "bad", ""], [str(image), as_bytes, [str(image)]]
        given = swift_calls(make, texts, images=pictures, messages=[messages] * 3)
        assert given == [2.0, None, 0.0]
        assert {item["prompt"] for item in stub.bodies[0]["items"]} == {"What is it?"}
        with pytest.raises(DataError, match="row 1 of the batch: 2 images"):
            swift_calls(make, ["A.", "B."], images=[str(image), [str(image)] * 2])
        with pytest.raises(DataError, match="row 0 of the batch: 0 images"):
            swift_calls(make, ["A."])


def test_reward_functions_can_be_pickled(stub: Stub, image: Path) -> None:
    """Ray sends them to workers."""
    with RewardClient(stub.url) as client:
        copy = pickle.loads(pickle.dumps(verl_reward(client, "object")))
    assert verl_calls(copy, str(image), "A dog.", {}) == 2.0
    copy.client.close()


def test_swift_itself_calls_the_function(stub: Stub, image: Path) -> None:
    algorithm = pytest.importorskip("swift.rl_core.grpo_algorithm")
    import torch

    class Sample:
        messages = ({"role": "user", "content": "<image>?"}, {"role": "x", "content": "A dog."})

        def to_reward_row(self) -> Json:
            return {"messages": list(self.messages), "images": [str(image)]}

    with RewardClient(stub.url) as client:
        found = algorithm.compute_rewards_per_func(
            [Sample()], [swift_reward(client)()], [None], torch.device("cpu")
        )
    assert found.tolist() == [[2.0]]
