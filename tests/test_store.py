import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgaif.data.scenes.facts import oracle
from fgaif.data.scenes.tokenizer import build_tokenizer
from fgaif.data.scenes.world import scene_at
from fgaif.errors import ActorError, DataError
from fgaif.feedback.annotate import annotate
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.store import (
    JsonlStore,
    VerdictStore,
    decode_response,
    encode_response,
    label_store,
    response_store,
)
from fgaif.types import FactQuery, ImageRef, LabeledResponse, Prompt, Response, Verdict

TOKENIZER = build_tokenizer()
SCENE = scene_at("val", 0)
TEXT = "There is a red moon, from the house the moon is left. There is a large moon. This is odd."


def respond(text: str = TEXT, name: str = "p", sha256: str = "a" * 64) -> Response:
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_id]
    logprobs = np.random.default_rng(0).normal(size=len(ids)).astype(np.float32)
    return Response(
        prompt=Prompt(id=name, image=ImageRef(path=f"/{name}.png", sha256=sha256), text="Say."),
        sample=1,
        text=text,
        token_ids=np.array(ids, dtype=np.int64),
        rollout_logprobs=logprobs,
        finish="stop",
        policy_version=3,
    )


def same_response(first: Response, second: Response) -> bool:
    arrays = ("token_ids", "rollout_logprobs")
    plain = {name: np.zeros(0) for name in arrays}
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        and getattr(first, name).dtype == getattr(second, name).dtype
        for name in arrays
    ) and str(replace(first, **plain)) == str(replace(second, **plain))


class Verifier:
    """Answers from the scene's truth; fails on texts in ``broken``; keeps what it was asked."""

    name = "truth"
    prompt_version = "v1"

    def __init__(self, broken: Sequence[str] = (), dies_after: float = math.inf) -> None:
        self.broken, self.dies_after = broken, dies_after
        self.asked: list[tuple[str, str]] = []

    def verify(self, queries: Sequence[FactQuery]) -> list[Verdict]:
        if len(self.asked) >= self.dies_after:
            raise ActorError("the judge died")
        self.asked += [(query.image.sha256, query.text) for query in queries]
        return [self.answer(query) for query in queries]

    def answer(self, query: FactQuery) -> Verdict:
        if query.text in self.broken:
            return Verdict(query=query, answer="unknown")
        p_yes = 0.9 if oracle(SCENE, query.text) else 0.1
        return Verdict(query=query, answer="yes" if p_yes > 0.5 else "no", p_yes=p_yes)


def run(responses: Sequence[Response], verifier: Verifier, path: Path) -> list[LabeledResponse]:
    store = VerdictStore(path)
    return annotate(responses, TOKENIZER, SceneFacts(), verifier, store, min_words=4, batch_size=2)


def test_responses_round_trip_exactly(tmp_path: Path) -> None:
    odd = respond("There is a \N{REPLACEMENT CHARACTER} \r\n\u2028 café 😀.", name='"\\')
    odd = replace(odd, rollout_logprobs=np.full(len(odd.token_ids), -np.inf, dtype=np.float32))
    store = response_store(tmp_path / "deep" / "responses.jsonl")
    store.append([respond()])
    store.append([odd])
    read = response_store(store.path)
    assert len(read) == 2
    assert all(same_response(a, b) for a, b in zip(read, [respond(), odd], strict=True))


def test_labels_round_trip_exactly(tmp_path: Path) -> None:
    labeled = run([respond(), respond("", name="empty")], Verifier(), tmp_path / "verdicts.jsonl")
    store = label_store(tmp_path / "labels.jsonl")
    store.append(labeled)
    read = label_store(store.path)
    for first, second in zip(read, labeled, strict=True):
        assert same_response(first.response, second.response)
        assert np.array_equal(first.labels, second.labels)
        assert (first.segments, first.facts) == (second.segments, second.facts)
        assert (first.verdicts, first.provenance) == (second.verdicts, second.provenance)


def numbers(path: Path) -> JsonlStore[int]:
    return JsonlStore(path, lambda value: {"n": value}, lambda row: int(row["n"]))


def test_a_torn_last_line_is_dropped_said_and_overwritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "n.jsonl"
    numbers(path).append([1, 2])
    with path.open("a") as file:
        file.write('{"n": 33')
    store = numbers(path)
    assert store.items == [1, 2]
    assert f"{path}:3: dropped the last line" in caplog.text
    assert path.read_text().endswith("33")  # reading changes nothing
    store.append([4])
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 4}\n'


@pytest.mark.parametrize("line", ["{", "[1]", '{"m": 1}', '{"n": "x"}', "3", ""])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n{{"n": 2}}\n')
    with pytest.raises(DataError, match=r"n\.jsonl:2: malformed"):
        numbers(path)


def test_a_response_with_other_lengths_is_named(tmp_path: Path) -> None:
    row = encode_response(respond())
    row["token_ids"] = row["token_ids"][1:]
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"responses\.jsonl:1: .*log-probabilities"):
        response_store(path)
    with pytest.raises(ValueError, match="finish = 'maybe'"):
        decode_response({**encode_response(respond()), "finish": "maybe"})


def test_a_full_disk_loses_nothing_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.jsonl"
    store = numbers(path)
    store.append([1])
    real_write = os.write

    def write_some(descriptor: int, content: memoryview) -> int:
        if len(content) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, content[:4])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        with pytest.raises(DataError, match=r"n\.jsonl: No space left on device; .*1 records"):
            store.append([2, 3])
    assert path.read_text() == '{"n": 1}\n'
    store.append([4])
    assert numbers(path).items == store.items == [1, 4]


def test_a_killed_writer_leaves_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    code = (
        "import itertools, sys; from pathlib import Path\n"
        "from fgaif.feedback.store import JsonlStore\n"
        "store = JsonlStore(Path(sys.argv[1]), lambda n: {'n': n}, lambda row: row['n'])\n"
        "for n in itertools.count(): store.append([n] * 50)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not (path.exists() and path.stat().st_size > 5000):
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store = numbers(path)
    complete = len(store) // 50
    assert complete >= 10
    assert store.items[: complete * 50] == [n for n in range(complete) for _ in range(50)]
    store.append([-1])
    assert numbers(path).items[-1] == -1


def test_annotate_asks_each_question_once_even_over_responses_of_one_image(tmp_path: Path) -> None:
    verifier = Verifier()
    responses = [respond(), respond(name="q"), respond(name="other", sha256="b" * 64)]
    labeled = run(responses, verifier, tmp_path / "verdicts.jsonl")
    assert len(verifier.asked) == len(set(verifier.asked)) == 10  # five facts, two images
    assert [item.response.id for item in labeled] == ["p#1", "q#1", "other#1"]
    assert labeled[1].verdicts["There is a moon."].query.image.path == "/q.png"
    assert labeled[0].labels.shape == (4, 3)
    assert labeled[0].labels[3].tolist() == [-1, -1, -1]
    assert labeled[0].provenance == {
        "extractor": "scenes",
        "verifier": "truth",
        "prompt_version": "v1",
        "min_words": "4",
        "policy_version": "3",
        "image_sha256": "a" * 64,
        "malformed": "3",
    }


def test_annotate_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, responses = tmp_path / "verdicts.jsonl", [respond(), respond(sha256="b" * 64)]
    first, second = Verifier(dies_after=4), Verifier()
    with pytest.raises(ActorError, match="the judge died"):
        run(responses, first, path)
    labeled = run(responses, second, path)
    assert len(first.asked) == 4
    assert len(second.asked) == 6
    assert not set(first.asked) & set(second.asked)
    fresh = run(responses, Verifier(), tmp_path / "fresh.jsonl")
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(labeled, fresh, strict=True))
    assert [a.verdicts for a in labeled] == [b.verdicts for b in fresh]


def test_failed_questions_are_unknown_now_and_asked_again(tmp_path: Path) -> None:
    path, broken = tmp_path / "verdicts.jsonl", ["There is a moon."]
    labeled = run([respond()], Verifier(broken=broken), path)[0]
    assert labeled.labels[0].tolist() == [-1, -1, 0]
    again = Verifier()
    assert run([respond()], again, path)[0].verdicts["There is a moon."].answer != "unknown"
    assert again.asked == [("a" * 64, "There is a moon.")]


def test_another_prompt_or_verifier_asks_anew(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    run([respond()], Verifier(), path)
    for name in ("name", "prompt_version"):
        other = Verifier()
        setattr(other, name, "another")
        run([respond()], other, path)
        assert len(other.asked) == 5


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    class Confused(Verifier):
        def verify(self, queries: Sequence[FactQuery]) -> list[Verdict]:
            return super().verify(queries)[::-1]

    with pytest.raises(ActorError, match="do not match"):
        run([respond()], Confused(), tmp_path / "verdicts.jsonl")


def test_progress_counts_facts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = VerdictStore(tmp_path / "verdicts.jsonl")
    annotate(
        *([respond()], TOKENIZER, SceneFacts(), Verifier(), store),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
