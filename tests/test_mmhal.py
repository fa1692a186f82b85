"""MMHal-Bench: whose answer is rated, what the judge reads, and what its replies come to."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import Scripted

from fgaif.chat.messages import ChatRequest, RequestFailed
from fgaif.errors import ConfigError, DataError, ServiceError
from fgaif.eval.benchmarks.mmhal import (
    SIZE,
    TYPES,
    load_judge_prompt,
    read_items,
    read_rating,
    score_mmhal,
    with_answers,
)
from fgaif.eval.judge import in_parallel
from fgaif.eval.scored import Scored


def item(number: int, kind: str, answer: str = "It is red.") -> dict[str, Any]:
    return {
        "question_type": kind,
        "question_topic": "indoor",
        "image_id": f"img{number}",
        "image_src": f"https://images.test/a/{number}.jpg",
        "image_content": ["Cup", "Table"],
        "question": f"What colour is cup {number}?",
        "gt_answer": "It is red.",
        "model_answer": answer,
    }


def write(path: Path, items: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(list(items)), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(path: Path, judge: Scripted) -> Scored:
    return asyncio.run(score_mmhal(read_items(path), judge, load_judge_prompt()))


def cup(request: ChatRequest) -> int:
    """The number of the cup that a request asks about."""
    return int(request.subject.split("cup ")[1].rstrip("?"))


def test_ratings_are_averaged_overall_and_by_the_items_own_type(tmp_path: Path) -> None:
    """Ratings 6, 2, 0 | 4: the types are not in the order that the official scorer counts on."""
    kinds = ["other", "counting", "other", "counting"]
    path = write(tmp_path / "r.json", [item(n, kind) for n, kind in enumerate(kinds)])
    ratings = {0: 6, 1: 2, 2: 0, 3: 4}
    scored = score(path, Scripted(by=lambda request: f"Fine.\nRating: {ratings[cup(request)]}"))
    assert scored.metrics() == {
        "score": 3.0,
        "hallucination_rate": 0.5,
        "official_score": 3.0,
        "official_hallucination_rate": 0.5,
        "type/counting/score": 3.0,
        "type/counting/hallucination_rate": 0.5,
        "type/other/score": 3.0,
        "type/other/hallucination_rate": 0.5,
        "length": 3.0,
    }
    assert scored.badness is not None
    assert scored.badness.tolist() == [0, 4, 6, 2]
    assert scored.items[1]["rating"] == 2
    assert scored.items[1]["image"] == "1.jpg"
    assert scored.counts["items_missing"] == SIZE - 4
    assert scored.provenance["judge"] == "scripted"
    assert scored.provenance["prompt"] == load_judge_prompt().version


def test_an_unreadable_rating_is_asked_again_then_left_out(tmp_path: Path) -> None:
    """Item 0 says 5 at the second reading; item 1 never; item 2 gets no reply; item 3 says 1."""
    path = write(tmp_path / "r.json", [item(n, "holistic") for n in range(4)])

    def answer(request: ChatRequest) -> str | Exception:
        replies: dict[int, str | Exception] = {
            0: "Rating: 5" if request.attempt else "Rating: 5 or rating: 4",
            1: "I would say five.",
            2: RequestFailed("too long"),
            3: "RATING: 1",
        }
        return replies[cup(request)]

    judge = Scripted(by=answer)
    scored = score(path, judge)
    metrics = scored.metrics()
    assert metrics["score"] == 3.0
    assert metrics["hallucination_rate"] == 0.5
    assert metrics["official_score"] == 1.5
    assert metrics["official_hallucination_rate"] == 0.75
    assert scored.counts["judge_unreadable"] == 1
    assert scored.counts["judge_no_reply"] == 1
    assert [r.attempt for r in judge.asked if cup(r) == 1] == [0, 1, 2]
    assert [cup(r) for r in judge.asked].count(2) == 1
    assert scored.items[2]["failure"] == "no_reply"
    assert min(scored.badness) == -1  # type: ignore[type-var,arg-type]


def test_a_judge_that_cannot_be_asked_stops_the_benchmark(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", [item(n, "other") for n in range(3)])
    with pytest.raises(ServiceError, match="no key"):
        score(path, Scripted(by=lambda _: ServiceError("no key")))


def test_after_a_failure_nothing_new_starts() -> None:
    started: list[int] = []

    async def call(number: int) -> int:
        started.append(number)
        await asyncio.sleep(0)
        if number == 1:
            raise ServiceError("gone")
        return number

    with pytest.raises(ServiceError, match="gone"):
        asyncio.run(in_parallel(call, range(100), limit=2))
    assert max(started) < 4
    started.clear()
    seen: list[tuple[int, int]] = []
    found = asyncio.run(
        in_parallel(call, [2, 3], limit=64, progress=lambda a, b: seen.append((a, b)))
    )
    assert found == [2, 3]
    assert seen == [(1, 2), (2, 2)]


def test_the_judge_sees_contents_question_standard_answer_and_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", [item(7, "other", "A {question} in braces.")])
    judge = Scripted(by=lambda _: "Rating: 3")
    score(path, judge)
    text = judge.asked[0].text
    for part in ("Cup, Table", "What colour is cup 7?", "It is red.", "A {question} in braces."):
        assert part in text
    assert text.count("What colour is cup 7?") == 1


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("All good.\nRating: 6, very informative with reasoning, no hallucination", 6),
        ("rating: 0", 0),
        ("Rating: 3. As I said: rating: 3", 3),
        ("Rating: 2 (not rating: 5)", None),
        ("Rating 4", None),
        ("Rating: 7", None),
        ("Rating: 3.5", None),
        ("Rating: 4.0, fine", 4),
        ("Rating: 3. Good", 3),
        ("Rating: 10", None),
        ("Rating: 3.5, so rating: 3", None),
        ("", None),
    ],
)
def test_a_reply_holds_exactly_one_whole_rating(reply: str, rating: int | None) -> None:
    assert read_rating(reply) == rating


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_type": None}, r"item 2: key `question_type`: None"),
        ({"gt_answer": " "}, r"item 2: key `gt_answer`"),
        ({"image_content": [1]}, r"item 2: key `image_content`"),
        ({"model_answer": 3}, r"item 2: key `model_answer`"),
    ],
)
def test_a_wrong_item_is_named_with_its_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "r.json", [item(0, "other"), item(1, "other") | change])
    with pytest.raises(DataError, match=message):
        read_items(path)
    without = item(1, "other")
    del without[next(iter(change))]
    with pytest.raises(DataError, match=rf"item 2: no key `{next(iter(change))}`"):
        read_items(write(path, [item(0, "other"), without]))


def test_an_unfilled_template_is_an_error_and_a_double_item_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", [item(0, "other", ""), item(1, "other", "")])
    with pytest.raises(DataError, match="model_answer"):
        read_items(path)
    assert len(read_items(path, answered=False).items) == 2
    twice = read_items(write(path, [item(0, "other", "first"), item(0, "other", "second")]))
    assert [found.answer for found in twice.items] == ["first"]
    assert twice.counts["items_twice"] == 1


def test_answers_are_matched_by_id_or_image_never_by_order(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", [item(n, "other", "") for n in range(4)])
    bench = read_items(path, answered=False)
    rows = [
        {"question_id": 2, "prompt": "What colour is cup 2?\nBe brief.", "text": "two"},
        {"image_id": "img0", "question": "What colour is cup 0?", "model_answer": "zero"},
        {"question_id": "img1", "text": ""},
        {"question_id": 77, "text": "nobody's"},
    ]
    found = with_answers(bench, write_lines(tmp_path / "a.jsonl", rows))
    assert [(i.index, i.answer) for i in found.items] == [(0, "zero"), (1, ""), (2, "two")]
    assert found.counts["items_unanswered"] == 1
    assert found.counts["answers_unmatched"] == 1
    assert found.counts["answers_empty"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "prompt": "What colour is cup 0?", "text": "x"}], "a.jsonl:1: it ans"),
        ([{"question_id": n, "text": "x"} for n in (1, 2, 3)], "count from 1"),
        ([{"question_id": 0, "text": "x"}, {"image_id": "img0", "text": "y"}], "a.jsonl:2.*:1"),
        ([{"question_id": 0}], "a.jsonl:1: no key `text` or `model_answer`"),
        ([{"text": "x"}], "a.jsonl:1: no key `question_id` or `image_id`"),
        ([{"question_id": 9, "text": "x"}], "no row matches"),
    ],
)
def test_wrong_answers_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    path = write(tmp_path / "r.json", [item(n, "other", "") for n in range(3)])
    with pytest.raises(DataError, match=message):
        with_answers(read_items(path, answered=False), write_lines(tmp_path / "a.jsonl", rows))


def test_a_prompt_file_of_the_user_needs_every_slot_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{image_content} {question} {standard_answer} {model_answer} Rating: ?")
    assert load_judge_prompt(path).version.startswith("mine-")
    path.write_text("{image_content} {question} {model_answer}")
    with pytest.raises(ConfigError, match="standard_answer"):
        load_judge_prompt(path)


@pytest.mark.skipif("FGAIF_OFFICIAL_DATA" not in os.environ, reason="no official files")
def test_the_official_template_reads_whole() -> None:
    path = Path(os.environ["FGAIF_OFFICIAL_DATA"]) / "mmhal-bench_answer_template.json"
    bench = read_items(path, answered=False)
    assert len(bench.items) == SIZE
    assert bench.counts == {"items_missing": 0, "items_twice": 0, "answers_empty": 0}
    assert [found.type for found in bench.items] == list(TYPES) * 12
    assert len({found.image_id for found in bench.items}) == SIZE
    assert bench.items[0].image == "7206072054_c53d53b97d_o.jpg"
