"""The web application without Ray: limits, key, errors, forms, trainers, streams, page."""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from serving_samples import (
    TEXT,
    StubBackend,
    StubScorer,
    call,
    data_uri,
    png,
    sampled,
    text_scorer,
)
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fgaif.config import RewardShapeConfig, load_config
from fgaif.data.images import image_bytes
from fgaif.errors import ConfigError
from fgaif.serving.access import read_serve_key
from fgaif.serving.app import create_app
from fgaif.serving.middleware import foreign
from fgaif.serving.scoring import Refused, Sampled, SampleInput, ScoreInput, ScoreOutput

KEY = "a-key-of-the-tests-0123456789"
URI = data_uri(png())
JSON = {"Content-Type": "application/json"}


def client(*overrides: str, key: str | None = None, backend: Any = None) -> TestClient:
    app = create_app(backend or StubBackend(), load_config(None, overrides), key=key)
    return TestClient(app, raise_server_exceptions=False)


def error(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    return body["error"]


def test_segments_cover_the_text_and_sums_add_up() -> None:
    shape = RewardShapeConfig(weights={"object": 1.0, "attribute": 0.0, "relation": 2.0})
    service = client(backend=StubBackend(shape=shape))
    answer = service.post("/v1/score", json={"text": ["x", TEXT], "image": URI}).json()
    assert [result["text"] for result in answer["results"]] == ["x", TEXT]
    result = answer["results"][1]
    assert "".join(segment["text"] for segment in result["segments"]) == TEXT
    for segment in result["segments"]:
        kinds = segment["kinds"]
        assert TEXT[segment["start"] : segment["end"]] == segment["text"]
        gain = kinds["object"]["ok"] - kinds["object"]["hallu"]
        assert kinds["object"]["reward"] == pytest.approx(gain)
        assert kinds["attribute"]["reward"] == 0
        assert kinds["relation"]["reward"] == 2 * kinds["object"]["reward"]
        # No sentence of the embedded world, hence malformed.
        assert segment["penalty"] == shape.repeat_penalty
        assert segment["reward"] == pytest.approx(3 * gain - segment["penalty"])
        assert segment["facts"] is None
    total = sum(segment["reward"] for segment in result["segments"])
    assert result["total"] == pytest.approx(total)
    assert total == pytest.approx(sum(result["rewards"].values()) - result["penalty"])
    assert answer["model"] == {"name": "scenes", "version": "stub"}
    assert 0 < answer["timing_ms"]["score"] <= answer["timing_ms"]["total"]


def test_a_form_answers_like_json_and_facts_are_told_when_asked_for() -> None:
    text = "There is a red moon."
    asked = {"text": text, "image": URI, "facts": True, "min_words": 3, "prompt": "What?"}
    by_json = client().post("/v1/score", json=asked).json()
    form = {"text": text, "facts": "true", "min_words": "3", "prompt": "What?"}
    by_form = client().post("/v1/score", data=form, files={"image": ("a.png", png())}).json()
    assert by_form["results"] == by_json["results"]
    facts = by_json["results"][0]["segments"][0]["facts"]
    assert {"kind": "object", "text": "There is a moon."} in facts


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"image": URI}, "text", "required"),
        ({"text": "a dog"}, "image", "required"),
        ({"text": "", "image": URI}, "text", "at least 1"),
        ({"text": " \n", "image": URI}, "text", "white space"),
        ({"text": "\x85\x1c", "image": URI}, "text", "white space"),
        ({"text": ["a", ""], "image": URI}, "text.1", "at least 1"),
        ({"text": [], "image": URI}, "text", "at least 1"),
        ({"text": "a" * 20_001, "image": URI}, "text", "at most 20000"),
        ({"text": ["a"] * 65, "image": URI}, "text", "at most 64"),
        ({"text": 5, "image": URI}, "text", "string"),
        ({"text": "a dog", "image": "no image"}, "image", "base64"),
        ({"text": "a dog", "image": data_uri(b"no image")}, "image", "cannot be decoded;"),
        ({"text": "a dog", "image": data_uri(png(size=200))}, "image", "serve.max_image_pixels"),
        ({"text": "a dog", "image": "https://a.example/x.png"}, "image", "not fetched here"),
        ({"text": "a dog", "image": "/etc/passwd"}, "image", "base64"),
        ({"text": "a </s> dog", "image": URI}, "text", "special tokens"),
        ({"text": ["a", "<image>"], "image": URI}, "text.1", "special tokens"),
        ({"text": "a dog " * 200, "image": URI}, "text", "reads at most 512"),
        ({"text": "a dog", "image": URI, "promt": ""}, "promt", "not permitted"),
        ({"text": "a dog", "image": URI, "min_words": 0}, "min_words", "greater"),
        ({"text": "a dog", "image": URI, "facts": "yes"}, "facts", "boolean"),
    ],
)
def test_errors_name_the_field(body: Any, field: str, words: str) -> None:
    answer = client("serve.max_image_pixels=1000").post("/v1/score", json=body)
    assert answer.status_code == 422
    told = error(answer)
    assert (told["type"], told["field"]) == ("invalid_request", field)
    assert words in told["message"]
    assert "0x" not in told["message"]  # no address of an object


def test_bodies_that_are_no_json_and_unknown_routes_are_refused() -> None:
    service = client()
    assert service.post("/v1/score", content=b"{", headers=JSON).status_code == 400
    assert (
        service.post("/v1/score", content=b"a", headers={"Content-Type": "a/b"}).status_code == 400
    )
    assert error(service.get("/nowhere"))["type"] == "invalid_request"
    wrong = service.get("/v1/score")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_a_batch_keeps_the_answers_of_the_good_items() -> None:
    items = [{"text": "a dog", "image": "x"}, {"text": "a dog", "image": URI}]
    bad, good = client().post("/v1/score/batch", json={"items": items}).json()["responses"]
    assert bad["error"]["field"] == "items.0.image"
    assert good["results"][0]["text"] == "a dog"
    texts = [{"text": ["a"] * 64, "image": URI}] * 9
    answer = client().post("/v1/score/batch", json={"items": texts})
    assert (answer.status_code, error(answer)["message"]) == (
        422,
        "576 texts in one request; send at most 512",
    )


def test_openrlhf_gets_a_reward_for_every_query() -> None:
    service = client()
    single = service.post("/v1/score", json={"text": TEXT, "image": URI, "prompt": "Q"}).json()
    body = {
        "query": [f"Q{TEXT}</s>", "Q</s><pad>", "Pa dog"],
        "prompts": ["Q", "Q", "P"],
        "labels": [URI, URI, data_uri(png(7))],
    }
    answer = service.post("/get_reward", json=body).json()
    assert answer["rewards"][0] == pytest.approx(single["results"][0]["total"])
    assert answer["rewards"][1] == 0  # an empty response is no error to a trainer
    assert answer["scores"][:2] == [1.0, 1.0]
    assert answer["extra_logs"]["segments"] == [4, 0, 1]
    logs = {name: values[0] for name, values in answer["extra_logs"].items()}
    assert logs["penalty"] == 4 * 0.5
    assert logs["object"] + logs["attribute"] + logs["relation"] - logs["penalty"] == (
        pytest.approx(answer["rewards"][0])
    )
    for change, field in [
        ({"query": ["x", "Q", "P"]}, "query.0"),
        ({"query": ["Q", "Qa<image>b", "P"]}, "query.1"),
        ({"labels": [URI, URI, 3]}, "labels.2"),
        ({"labels": [URI, URI, "x"]}, "images.2"),
        ({"prompts": ["Q"]}, "prompts"),
        ({"labels": None}, "images"),
    ]:
        answer = service.post("/get_reward", json=body | change)
        assert (answer.status_code, error(answer)["field"]) == (422, field)


def test_every_path_but_the_page_and_health_wants_the_key() -> None:
    service = client(key=KEY)
    paths = service.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            answer = service.request(method, path)
            if path == "/healthz":
                assert answer.status_code == 200
            else:
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error(answer)["type"] == "unauthorized"
    for header in ("Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"):
        headers = {"Authorization": header.encode()}
        assert service.get("/v1/models", headers=headers).status_code == 401
    assert service.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).is_success


def test_large_bodies_are_refused_before_they_are_read() -> None:
    app = create_app(StubBackend(), load_config(None, ["serve.max_body_mib=0.001"]), key=None)
    read: list[bytes] = []

    async def ask(headers: dict[str, str]) -> Any:
        chunks = [b"x" * 500] * 10
        return await call(app, "/v1/score", chunks=chunks, headers=headers, read=read)

    answer = asyncio.run(ask({"Content-Length": "5000"}))
    assert (answer.status, answer.json["error"]["type"], read) == (413, "too_large", [])
    answer = asyncio.run(ask({}))  # chunked: nothing is declared
    assert (answer.status, len(read)) == (413, 3)
    assert asyncio.run(ask({"Content-Length": "9" * 50})).status == 413


def test_the_queue_is_bounded_and_slow_answers_end() -> None:
    settings = load_config(None, ["serve.queue=2", "serve.timeout_s=0.3"])
    app = create_app(StubBackend(delay=0.1), settings, key=None)
    body = [json.dumps({"text": "a dog", "image": URI}).encode()]

    async def many(count: int) -> list[Any]:
        calls = [call(app, "/v1/score", chunks=body, headers=JSON) for _ in range(count)]
        return list(await asyncio.gather(*calls))

    answers = asyncio.run(many(5))
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json["error"]["type"] == "overloaded"
    app = create_app(StubBackend(delay=5), settings, key=None)
    assert [answer.status for answer in asyncio.run(many(1))] == [504]


class Broken(StubBackend):
    async def score(self, item: Any) -> Any:
        raise RuntimeError(item.texts[0])


def test_answers_to_failures_hold_no_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    service = client(backend=Broken())
    answer = service.post("/v1/score", json={"text": "a secret dog", "image": URI})
    assert answer.status_code == 500
    assert error(answer) == {"type": "internal", "message": "the server failed", "field": None}
    client().post("/v1/score", json={"text": "a secret dog </s>", "image": URI})
    ours = [record.getMessage() for record in caplog.records if record.name == "fgaif.serve"]
    assert any("POST /v1/score 500" in line for line in ours)
    assert any("RuntimeError" in line and "in score" in line for line in ours)
    assert "secret" not in "".join(ours)


class NanForLong(StubScorer):
    """Probabilities that are not finite for texts of several segments."""

    def probs(self, responses: Any, segments: Any) -> Any:
        rows = super().probs(responses, segments)
        return [row * np.float32("nan") if len(row) > 1 else row for row in rows]


def test_probabilities_that_are_not_finite_are_a_failure_and_harm_no_neighbour(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = client(backend=StubBackend(scorer=NanForLong()))
    answer = service.post("/v1/score", json={"text": TEXT, "image": URI})
    assert (answer.status_code, error(answer)["type"]) == (500, "internal")
    items = [{"text": TEXT, "image": URI}, {"text": "a dog", "image": URI}]
    bad, good = service.post("/v1/score/batch", json={"items": items}).json()["responses"]
    assert bad["error"]["type"] == "internal"
    assert len(good["results"]) == 1
    body = {"query": [f"Q{TEXT}"], "prompts": ["Q"], "labels": [URI]}
    assert service.post("/get_reward", json=body).status_code == 500
    assert stream(service, {"image": URI}, pieces(TEXT, 1000))[-1]["error"]["type"] == "internal"
    assert any("not finite" in record.getMessage() for record in caplog.records)
    # Items of one batch of the models, too.
    scorer = text_scorer(NanForLong())
    picture = image_bytes(png(), "test")
    inputs = [ScoreInput(image=picture, prompt="Q", texts=(text,)) for text in (TEXT, "a dog")]
    failed, fine = scorer.score(inputs)
    assert isinstance(failed, Refused)
    assert isinstance(fine, ScoreOutput)


def test_answers_carry_security_headers_and_no_foreign_site_is_let_in() -> None:
    service = client()
    for answer in (service.get("/"), service.get("/nowhere"), service.get("/healthz")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in service.options("/v1/score", headers=origin).headers
    friendly = client("serve.cors=['https://a.example']", key=KEY)
    allowed = friendly.options("/v1/score", headers=origin)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = {**origin, "Origin": "https://b.example"}
    assert "access-control-allow-origin" not in friendly.options("/v1/score", headers=other).headers


@pytest.mark.parametrize(
    ("origin", "host", "expected"),
    [
        (None, "localhost:8000", False),
        ("http://localhost:8000", "localhost:8000", False),
        ("https://evil.example", "localhost:8000", True),
        ("http://localhost:9000", "localhost:8000", True),
        ("https://good.example", "localhost:8000", False),
        ("null", "localhost:8000", True),
    ],
)
def test_origins_of_streams(origin: str | None, host: str, expected: bool) -> None:
    assert foreign(origin, host, ["https://good.example"]) is expected


def stream(service: TestClient, start: Any, messages: list[Any], **more: Any) -> list[Any]:
    """All answers of a stream."""
    answers = []
    with service.websocket_connect("/v1/score/stream", **more) as socket:
        for message in (start, *messages):
            socket.send_json(message)
        try:
            while True:
                answers.append(socket.receive_json())
        except WebSocketDisconnect:
            return answers


def pieces(text: str, size: int) -> list[Any]:
    deltas = [{"delta": text[i : i + size]} for i in range(0, len(text), size)]
    return [*deltas, {"end": True}]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_ends_with_what_a_score_says(size: int) -> None:
    service = client()
    whole = service.post("/v1/score", json={"text": TEXT, "image": URI}).json()
    ready, *segments, last = stream(service, {"image": URI}, pieces(TEXT, size))
    assert ready == {"ready": True, "model": whole["model"]}
    assert last["result"] == whole["results"][0]
    assert [answer["segment"] for answer in segments] == last["result"]["segments"]


def test_a_segment_comes_before_the_text_ends() -> None:
    with client().websocket_connect("/v1/score/stream") as socket:
        socket.send_json({"image": URI})
        assert socket.receive_json()["ready"]
        socket.send_json({"delta": "There is a dog on it. The "})
        assert socket.receive_json()["segment"]["text"] == "There is a dog on it. "


@pytest.mark.parametrize(
    ("start", "messages", "field", "type_"),
    [
        ({"image": "x"}, [], "image", "invalid_request"),
        ({}, [], "image", "invalid_request"),
        ({"image": URI}, [{"delta": 3}], "delta", "invalid_request"),
        ({"image": URI}, [{"end": True}], "delta", "invalid_request"),
        ({"image": URI}, [{"delta": "a </s> dog."}, {"end": True}], "text", "invalid_request"),
        ({"image": URI}, [{"delta": "a" * 15_000}] * 2, "delta", "invalid_request"),
    ],
)
def test_streams_tell_what_is_wrong(start: Any, messages: Any, field: str, type_: str) -> None:
    told = stream(client(), start, messages)[-1]["error"]
    assert (told["field"], told["type"]) == (field, type_)


def test_streams_want_the_key_too() -> None:
    service, texts = client(key=KEY), pieces("A dog.", 9)
    assert stream(service, {"image": URI}, texts)[0]["error"]["type"] == "unauthorized"
    assert stream(service, {"image": URI, "key": "x"}, texts)[0]["error"]["type"] == "unauthorized"
    assert "result" in stream(service, {"image": URI, "key": KEY}, texts)[-1]
    header = {"Authorization": f"Bearer {KEY}"}
    assert "result" in stream(service, {"image": URI}, texts, headers=header)[-1]
    with pytest.raises(WebSocketDisconnect):
        stream(service, {"image": URI}, texts, headers={"Origin": "https://evil.example"})


def test_streams_without_a_key_take_no_place_of_those_with_one() -> None:
    service = client("serve.streams=1", "serve.streams_without_key=1", key=KEY)
    header, texts = {"Authorization": f"Bearer {KEY}"}, pieces("A dog.", 9)
    with service.websocket_connect("/v1/score/stream") as silent:
        (refused,) = stream(service, {"image": URI, "key": KEY}, texts)
        assert refused["error"]["type"] == "overloaded"
        # A wrong header is told at once, before any message.
        with service.websocket_connect(
            "/v1/score/stream", headers={"Authorization": "Bearer wrong"}
        ) as wrong:
            assert wrong.receive_json()["error"]["type"] == "unauthorized"
        assert "result" in stream(service, {"image": URI}, texts, headers=header)[-1]
        silent.send_json({"image": URI, "key": KEY})
        assert silent.receive_json()["ready"]
        # It has left its place for another, and taken one of those with a key.
        (refused,) = stream(service, {"image": URI, "key": KEY}, texts)
        assert refused["error"]["type"] == "overloaded"
        (refused,) = stream(service, {"image": URI, "key": "wrong"}, texts)
        assert refused["error"]["type"] == "unauthorized"


@pytest.mark.parametrize("key", [None, KEY])
def test_a_stream_that_sends_no_first_message_ends_soon(key: str | None) -> None:
    service = client("serve.start_timeout_s=0.1", key=key)
    with service.websocket_connect("/v1/score/stream") as silent:
        assert silent.receive_json()["error"]["type"] == "timeout"


def test_a_silent_stream_ends_and_streams_are_bounded() -> None:
    service = client("serve.timeout_s=0.2", "serve.streams=1")
    with service.websocket_connect("/v1/score/stream") as first:
        first.send_json({"image": URI})
        assert first.receive_json()["ready"]
        (refused,) = stream(service, {"image": URI}, [])
        assert refused["error"]["type"] == "overloaded"
        assert first.receive_json()["error"]["type"] == "timeout"


class Unready(StubBackend):
    async def probe(self) -> str:
        raise TimeoutError


def test_health_and_metrics() -> None:
    service = client()
    assert service.get("/healthz").json() == {"status": "ok", "ready": True, "version": "stub"}
    unready = client(backend=Unready()).get("/healthz")
    assert (unready.status_code, unready.json()["ready"]) == (503, False)
    service.post("/v1/score", json={"text": TEXT, "image": URI})
    service.post("/v1/score", json={})
    text = service.get("/metrics").text
    assert 'fgaif_requests_total{path="/v1/score",status="200"} 1.0' in text
    assert 'fgaif_requests_total{path="/v1/score",status="422"} 1.0' in text
    assert "fgaif_segments_total 4.0" in text


def test_the_key_comes_from_a_file_or_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Callable[..., Any] = lambda *items: load_config(None, items).serve  # noqa: E731
    monkeypatch.delenv("FGAIF_SERVE_KEY", raising=False)
    assert read_serve_key(settings()) is None
    monkeypatch.setenv("FGAIF_SERVE_KEY", KEY)
    assert read_serve_key(settings()) == KEY
    file = tmp_path / "key"
    file.write_text("another-key-of-the-tests\n")
    assert read_serve_key(settings(f"serve.key_file={file}")) == "another-key-of-the-tests"
    for wrong in ("short", "a key with blanks in it", "schlüssel-schlüssel"):
        monkeypatch.setenv("FGAIF_SERVE_KEY", wrong)
        with pytest.raises(ConfigError, match="FGAIF_SERVE_KEY: holds no usable key"):
            read_serve_key(settings())
    with pytest.raises(ConfigError, match="key_file"):
        read_serve_key(settings("serve.key_file=/nowhere/key"))


def test_texts_are_ranked_by_what_ppo_pays_for_them() -> None:
    texts = ["a dog", "a dog on the couch and a cat", "a dog on it"]
    service = client()
    answer = service.post("/v1/rank", json={"image": URI, "texts": texts}).json()
    totals = [result["total"] for result in answer["results"]]
    assert [result["text"] for result in answer["results"]] == texts
    assert answer["order"] == sorted(range(3), key=lambda at: -totals[at])
    assert len(set(totals)) == 3
    assert answer["model"]["version"] == "stub"
    same = service.post("/v1/rank", json={"image": URI, "texts": ["a dog"] * 3}).json()
    assert same["order"] == [0, 1, 2]
    one = service.post("/v1/rank", json={"image": URI, "texts": ["a dog"]})
    assert error(one)["field"] == "texts"


def test_the_policy_answers_alone_without_being_scored() -> None:
    backend = StubBackend()
    answer = client(backend=backend).post("/v1/generate", json={"image": URI, "seed": 3}).json()
    assert answer["text"] == TEXT
    assert answer["rewards"] is answer["result"] is answer["resampled"] is None
    (asked,) = backend.asked
    assert (asked.temperature, asked.seed, asked.prefix) == (0.0, 3, ())


def test_the_best_of_several_answers_is_given() -> None:
    backend = StubBackend()
    backend.answers = ["a dog", "a dog on the couch and a cat", "a dog on it"]
    asked = {"image": URI, "best_of": 3, "seed": 3, "max_new_tokens": 40}
    answer = client(backend=backend).post("/v1/generate", json=asked).json()
    assert len(answer["rewards"]) == 3
    assert answer["text"] == backend.answers[1]
    assert answer["result"]["total"] == pytest.approx(max(answer["rewards"]))
    assert answer["model"]["version"] == "stub"
    assert len({item.seed for item in backend.asked}) == 3
    assert backend.asked[0].seed == 3
    assert {item.temperature for item in backend.asked} == {1.0}


def test_an_answer_that_never_ended_loses_what_ppo_takes_for_it() -> None:
    class Endless(StubBackend):
        async def generate(self, item: SampleInput) -> Sampled:
            answer = await super().generate(item)
            long = answer.text == self.answers[0]
            return replace(answer, finish="length" if long else "stop")

    backend = Endless(shape=RewardShapeConfig(no_stop_penalty=50.0))
    backend.answers = ["a dog on the couch and a cat", "a dog"]
    answer = client(backend=backend).post("/v1/generate", json={"image": URI, "best_of": 2}).json()
    assert answer["text"] == "a dog"
    assert answer["rewards"][0] < answer["rewards"][1] - 40


def test_a_guarded_answer_goes_on_from_what_was_accepted() -> None:
    """Short segments are at risk, see StubScorer: the first answer's second one is."""
    good = "The image features a dog sitting on a couch with a cat. "
    backend = StubBackend()
    backend.answers = [f"{good}A dog.", f"{good}A dog sits on the couch beside a small red cat."]
    guard = {"threshold": 0.2, "tries": 2}
    asked = {"image": URI, "guard": guard, "max_new_tokens": 100}
    answer = client(backend=backend).post("/v1/generate", json=asked).json()
    assert answer["text"] == backend.answers[1]
    assert (answer["resampled"], answer["finish"], answer["unsafe"]) == (1, "stop", False)
    first, second = backend.asked
    assert first.prefix == ()
    assert 0 < len(second.prefix) < len(sampled(good).token_ids) + 1
    assert second.max_new_tokens == 100 - len(second.prefix)
    assert second.seed != first.seed
    backend = StubBackend()
    backend.answers = [f"{good}A dog."]
    answer = client(backend=backend).post("/v1/generate", json=asked).json()
    assert answer["text"].strip() == good.strip()
    assert (answer["resampled"], answer["finish"]) == (3, "cut")
    assert len(backend.asked) == 3


def test_a_policy_of_another_vocabulary_is_refused() -> None:
    class Foreign(StubBackend):
        async def generate(self, item: SampleInput) -> Sampled:
            return replace(await super().generate(item), token_ids=(7, 8, 9))

    told = client(backend=Foreign()).post("/v1/generate", json={"image": URI, "best_of": 2})
    assert told.status_code == 422
    assert "vocabulary" in error(told)["message"]
