"""Two judges on the same answers: bias, agreement, the line between them, and what it is worth."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_calls import eval_command
from fault_server import FaultServer

from fgaif.errors import DataError
from fgaif.eval.rejudge import converted, converted_lines, rejudge_lines, rejudged
from fgaif.eval.scored import Scored
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def scored(ratings: list[float], judge: str = "old", prompt: str = "p-1") -> Scored:
    """Answers about images of their own, of two categories in turn."""
    ids = tuple(map(str, range(len(ratings))))
    return Scored(
        benchmark="mmhal",
        ids=ids,
        units=ids,
        stats=np.array([[1.0, rating] for rating in ratings]),
        figures=lambda sums: {"score": sums[..., 1] / sums[..., 0]},
        items=tuple({"type": ("even", "odd")[i % 2]} for i in range(len(ratings))),
        provenance={"judge": judge, "prompt": prompt},
    )


def test_a_milder_judge_is_seen_by_category_and_put_on_a_line() -> None:
    """The new judge gives 2 + rating / 2: bias 2 - rating / 2 of mean 1; old = 2 new - 4."""
    old = [0.0, 1.0, 2.0, 3.0, 4.0, 2.0]
    found = rejudged(scored(old), scored([2 + r / 2 for r in old], "new"))
    row = found["figures"]["score"]
    assert (row["old"], row["new"], row["bias"]) == (2, 3, 1)
    assert row["bias_interval"][0] < 1 < row["bias_interval"][1]
    assert row["equal"] == 1 / 6
    assert row["correlation"] == pytest.approx(1)
    assert row["by_category"] == {
        "even": {"bias": 1, "answers": 3}, "odd": {"bias": 1, "answers": 3},
    }  # fmt: skip
    assert row["conversion"]["slope"] == pytest.approx(2)
    value, low, high = converted(row["conversion"], 3.0)
    assert (value, low, high) == pytest.approx((2, 2, 2))
    assert "old = -4 + 2 new; 3 is 2 [2, 2]" in "\n".join(rejudge_lines(found))


def test_a_noisy_judge_has_a_wide_line_and_a_blind_one_none() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 7, 60).astype(float).tolist()
    noisy = [r + e for r, e in zip(old, rng.normal(0, 2, 60).tolist(), strict=True)]
    row = rejudged(scored(old), scored(noisy, "new"))["figures"]["score"]
    value, low, high = converted(row["conversion"], row["new"])
    assert value == pytest.approx(row["old"])
    assert low < value - 0.2
    assert high > value + 0.2
    blind = rejudged(scored(old), scored([3.0] * 60, "new"))["figures"]["score"]
    assert (blind["conversion"], blind["correlation"]) == (None, None)


def test_answers_that_one_of_them_could_not_judge_count_for_nothing() -> None:
    old = scored([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    new = scored([0.0, 1.0, 2.0, 3.0, 4.0], "new")
    assert rejudged(old, new)["answers"] == 5
    with pytest.raises(DataError, match=r"1 answers were judged by both; .* needs 5"):
        rejudged(old, scored([1.0], "new"))


def test_a_calibration_is_of_one_judge_and_prompt(tmp_path: Path) -> None:
    old = [0.0, 1.0, 2.0, 3.0, 4.0]
    path = tmp_path / "rejudge.json"
    found = rejudged(scored(old), scored([r + 1 for r in old], "new"))
    path.write_text(json.dumps({"mmhal": found}))
    later = scored([2.0, 4.0], "new")
    assert converted_lines(path, later) == {"converted score at old": "2 [2, 2]"}
    with pytest.raises(DataError, match=r"is about the judge .*new.*, and this result is by"):
        converted_lines(path, scored([2.0], "new", prompt="p-2"))
    with pytest.raises(DataError, match="no calibration of chair"):
        converted_lines(path, replace(later, benchmark="chair"))


def test_the_command_asks_both_judges_and_applies_the_line(run: Run, tmp_path: Path) -> None:
    """The old judge rates by the number in the answer, the new one a point higher."""
    items: list[Json] = [
        {
            "question_type": "attribute", "image_id": f"i{n}", "image_src": f"{n}.jpg",
            "image_content": ["Cup"], "question": f"What is {n}?", "gt_answer": "It is.",
            "model_answer": f"It is a {n}.",
        }
        for n in range(5)
    ]  # fmt: skip
    given = tmp_path / "r.json"
    given.write_text(json.dumps(items))

    def reply(body: Json) -> str:
        text = str(body["messages"])
        number = next(n for n in range(5) if f"It is a {n}." in text)
        return f"Rating: {number + (body['model'] == 'm2')}"

    with FaultServer(reply) as server:
        config = tmp_path / "judges.yaml"
        config.write_text(
            "endpoints:\n"
            + "".join(
                f"  {name}: {{model: {model}, base_url: '{server.base_url}'}}\n"
                for name, model in (("one", "m1"), ("two", "m2"))
            )
        )
        call = ("mmhal", "--answers", given, "--config", config, "--json")
        code, out, err = run(*call, "--judge", "one", "--rejudge", "two", "--out", "o")
        assert code == 0, err
        row = json.loads(out)["rejudged"]["figures"]["score"]
        assert (row["old"], row["new"], row["bias"]) == (2, 3, 1)
        assert (
            json.loads(Path("o/rejudge.json").read_text())["mmhal"]["new"]["judge"]
            != (json.loads(out)["provenance"]["judge"])
        )
        code, out, err = run(
            *call, "--judge", "two", "--calibration", "o/rejudge.json", "--out", "p"
        )
        assert code == 0, err
        about = json.loads(out)["provenance"]
        assert [v for k, v in about.items() if k.startswith("converted score at ")] == ["2 [2, 2]"]
        code, _, err = run(*call, "--judge", "one", "--rejudge", "three")
        assert (code, "--judge three: no such entry" in err) == (2, True)
