import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgaif.errors import DataError
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.segment import segment_response
from fgaif.feedback.store import (
    JsonlStore,
    decode_response,
    encode_response,
    label_store,
    response_store,
)
from fgaif.scene_models.tokenizer import build_tokenizer
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    FactQuery,
    ImageRef,
    LabeledResponse,
    Prompt,
    Response,
    Verdict,
)

TOKENIZER = build_tokenizer()
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


def labeled_response(text: str = TEXT, name: str = "p") -> LabeledResponse:
    response = respond(text, name)
    segments = segment_response(response, TOKENIZER, 4)
    facts = SceneFacts().parse(response, segments).facts
    image = response.prompt.image
    verdicts = {
        fact.text: Verdict(
            query=FactQuery(image=image, text=fact.text),
            answer="unknown",
            p_yes=0.1 * number,
            problem="unreadable" if number else "",
            votes=("yes", "no"),
        )
        for number, fact in enumerate(facts)
    }
    return LabeledResponse(
        response=response,
        kinds=DEFAULT_KINDS,
        segments=segments,
        facts=facts,
        verdicts=verdicts,
        labels=np.full((len(segments), len(DEFAULT_KINDS)), UNKNOWN),
        provenance={"verifier": "none"},
    )


def same_response(first: Response, second: Response) -> bool:
    arrays = ("token_ids", "rollout_logprobs")
    plain = {name: np.zeros(0) for name in arrays}
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        and getattr(first, name).dtype == getattr(second, name).dtype
        for name in arrays
    ) and str(replace(first, **plain)) == str(replace(second, **plain))


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
    labeled = [labeled_response(), labeled_response("", name="empty")]
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
    assert list(store) == [1, 2]
    assert f"{path}:3: dropped the last line" in caplog.text
    assert path.read_text().endswith("33")  # reading changes nothing
    store.append([4])
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 4}\n'


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (4, 2), (20, 9), (5, 10)])
def test_chunks_cover_the_rows_from_any_start(tmp_path: Path, every: int, start: int) -> None:
    store = numbers(tmp_path / "n.jsonl")
    store.append([10**n for n in range(10)])
    chunks = list(store.offsets(every, start))
    read = [n for position, count in chunks for n in store.read(position, count)]
    assert read == list(store)[start:]
    assert all(count == every for _, count in chunks[:-1])


def test_a_malformed_line_in_a_later_chunk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": "x"}\n')
    store = numbers(path)
    position = [begin for begin, _ in store.offsets(2)][1]
    with pytest.raises(DataError, match=r"n\.jsonl:3: malformed"):
        list(store.read(position, 1))


@pytest.mark.parametrize("line", ["{", "[1]", '{"m": 1}', '{"n": "x"}', "3", ""])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n{{"n": 2}}\n')
    with pytest.raises(DataError, match=r"n\.jsonl:2: malformed"):
        list(numbers(path))


def test_a_response_with_other_lengths_is_named(tmp_path: Path) -> None:
    row = encode_response(respond())
    row["token_ids"] = row["token_ids"][1:]
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"responses\.jsonl:1: .*log-probabilities"):
        list(response_store(path))
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
    assert list(numbers(path)) == list(store) == [1, 4]


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
    assert list(store)[: complete * 50] == [n for n in range(complete) for _ in range(50)]
    store.append([-1])
    assert list(numbers(path))[-1] == -1


def test_a_prompts_answer_is_kept_and_none_leaves_rows_as_they_were() -> None:
    plain = respond()
    assert set(encode_response(plain)["prompt"]) == {"id", "image", "text"}
    asked = replace(plain, prompt=replace(plain.prompt, answer="yes"))
    again = decode_response(json.loads(json.dumps(encode_response(asked))))
    assert again.prompt == asked.prompt
