"""Client of the scoring service, against a stub that speaks its protocol and counts words."""

import asyncio
import base64
import io
import json
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from aiohttp import WSMsgType, web
from PIL import Image

from fgaif.client import (
    AsyncRewardClient,
    RewardClient,
    ScoreItem,
    ScoringError,
    ScoringRefused,
    trl_reward,
)
from fgaif.errors import ConfigError, DataError, FgaifError
from fgaif.serving.schema import SegmentOut, TextResult
from fgaif.types import Json

KEY = "sk-the-very-secret-key"
MODEL = {"name": "stub", "version": "v1"}
Reply = web.Response | str
Ask = Callable[..., Any]


def scored(text: str) -> Json:
    """One segment per sentence; the reward of kind object is the number of words."""
    segments: list[Json] = []
    for piece in text.split(". "):
        words = float(len(piece.split()))
        start = segments[-1]["end"] if segments else 0
        end = min(len(text), start + len(piece) + 2)
        kinds = {
            kind: {"none": 0.25, "ok": 0.5, "hallu": 0.25, "reward": value}
            for kind, value in (("object", words), ("attribute", 0.5), ("relation", -0.5))
        }
        segments.append(
            {"index": len(segments), "start": start, "end": end, "text": text[start:end]}
            | {"kinds": kinds, "reward": words, "facts": None}
        )
    total = float(len(text.split()))
    rewards = {"object": total, "attribute": 0.5 * len(segments), "relation": -0.5 * len(segments)}
    return {"text": text, "segments": segments, "rewards": rewards, "total": total}


def answer(body: Json) -> Json:
    """What the service says to a score request; a text with "bad" in it is refused."""
    texts = [body["text"]] if isinstance(body["text"], str) else body["text"]
    if any("bad" in text for text in texts):
        return error("invalid_request", "a special token", "text")
    timing = {"total": 1.0, "score": 0.5}
    return {"results": [scored(text) for text in texts], "model": MODEL, "timing_ms": timing}


def judged(body: Json) -> Json:
    """What the service says to OpenRLHF's request: the number of words of each response."""
    pairs = zip(body["query"], body["prompts"], strict=True)
    words = [float(len(query.removeprefix(prompt).split())) for query, prompt in pairs]
    return {"rewards": words, "scores": [1.0] * len(words), "extra_logs": {"object": words}}


def error(type: str, message: str = "no", field: str | None = None) -> Json:
    return {"error": {"type": type, "message": message, "field": field}}


def fails(status: int, body: Json | str = "", **headers: str) -> web.Response:
    text = body if isinstance(body, str) else json.dumps(body)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(status=status, text=text, headers=names)


class Stub:
    """The service in a thread; ``replies`` go out first, "hang" and "reset" among them."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.busy_items: list[int] = []
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.sent: list[Json] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/score/stream", self._stream)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.headers.append(dict(request.headers))
        self.bodies.append(json.loads(raw) if raw else {})
        body = self.bodies[-1]
        if self.replies:
            reply = self.replies.pop(0)
            if isinstance(reply, web.Response):
                return reply
            if reply == "reset":
                assert request.transport is not None
                request.transport.abort()
            else:
                await asyncio.sleep(60)
        if request.path == "/v1/models":
            return web.json_response({"models": [], "generates": False})
        if request.path == "/v1/score/batch":
            items = [answer(item) for item in body["items"]]
            for index in self.busy_items:
                items[index] = error("overloaded", "queue full")
            self.busy_items = []
            return web.json_response({"responses": items})
        if request.path == "/get_reward":
            return web.json_response(judged(body))
        assert request.path == "/v1/score"
        found = answer(body)
        return web.json_response(found, status=400 if "error" in found else 200)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        if self.replies:
            reply = self.replies.pop(0)
            assert isinstance(reply, web.Response)
            return reply
        socket, text = web.WebSocketResponse(), ""
        await socket.prepare(request)
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            said = json.loads(message.data)
            self.sent.append(said)
            if "image" in said:
                await socket.send_json({"ready": True, "model": MODEL})
            elif "end" in said:
                await socket.send_json({"result": scored(text)})
                break
            elif said["delta"] == "bad":
                await socket.send_json(error("invalid_request", "a special token", "delta"))
                break
            elif said["delta"] == "break":
                assert request.transport is not None
                request.transport.abort()
            else:
                text += said["delta"]
                if text.endswith(". "):
                    await socket.send_json({"segment": scored(text[:-2])["segments"][-1]})
        await socket.close()
        return socket


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture(params=[RewardClient, AsyncRewardClient])
def ask(request: pytest.FixtureRequest, stub: Stub) -> Ask:
    """``ask("score", ..., **settings)`` on a new client of either sort."""

    def call(method: str, *args: Any, settings: Json | None = None, **options: Any) -> Any:
        client = request.param(stub.url, **({"backoff_s": 0.001} | (settings or {})))
        if isinstance(client, RewardClient):
            with client:
                return getattr(client, method)(*args, **options)

        async def run() -> Any:
            async with client:
                return await getattr(client, method)(*args, **options)

        return asyncio.run(run())

    return call


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the sync client, which does not make them."""
    made: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=made.append))
    return made


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_score_is_typed_and_in_the_order_of_the_texts(ask: Ask, stub: Stub) -> None:
    found = ask("score", png(), ["A dog sleeps. It is red.", "Cat."], prompt="What is it?")
    assert [result.total for result in found.results] == [6.0, 1.0]
    first = found.results[0].segments[0]
    assert (first.start, first.end, first.text) == (0, 14, "A dog sleeps. ")
    assert first.kinds["object"].reward == 3.0
    assert found.model.version == "v1"
    assert stub.bodies[0]["prompt"] == "What is it?"
    assert "Authorization" not in stub.headers[0]


def test_images_arrive_as_the_bytes_of_their_files(ask: Ask, stub: Stub, tmp_path: Path) -> None:
    file, content = tmp_path / "a.png", png()
    file.write_bytes(content)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for image in (content, file, str(file), uri):
        ask("score", image, "A dog.")
    assert {base64.b64decode(body["image"].split(",")[-1]) for body in stub.bodies} == {content}
    assert stub.bodies[3]["image"] == uri
    ask("score", Image.new("RGB", (4, 4), "red"), "A dog.")
    sent = Image.open(io.BytesIO(base64.b64decode(stub.bodies[4]["image"])))
    assert (sent.size, sent.getpixel((0, 0))) == ((4, 4), (255, 0, 0))
    ask("score", "https://images.test/a.png", "A dog.")
    assert stub.bodies[5]["image"] == "https://images.test/a.png"


def test_what_cannot_be_sent_is_refused_here(ask: Ask, stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: No such file"):
        ask("score", tmp_path / "none.png", "A dog.")
    with pytest.raises(DataError, match="lone surrogate"):
        ask("score", png(), "half \ud83d")
    assert stub.bodies == []


def test_a_busy_or_restarting_service_is_asked_again(ask: Ask, stub: Stub) -> None:
    stub.replies = [
        fails(429, error("overloaded"), Retry_After="0"),
        fails(503, error("overloaded")),
        fails(500, "Internal Server Error"),
        "reset",
        fails(502, "<html>bad gateway</html>"),
    ]
    assert ask("score", png(), "A dog.").results[0].total == 2.0
    assert len(stub.bodies) == 6
    assert all(body == stub.bodies[0] for body in stub.bodies)


def test_the_pause_is_the_one_asked_for_or_doubles(stub: Stub, pauses: list[float]) -> None:
    busy, plain = fails(429, error("overloaded"), Retry_After="7"), fails(503)
    stub.replies = [busy, plain, fails(503), fails(503)]
    with RewardClient(stub.url, backoff_s=1.0) as client:
        client.score(png(), "A dog.")
    assert pauses[0] == 7.0
    for pause, doubled in zip(pauses[1:], (2.0, 4.0, 8.0), strict=True):
        assert doubled <= pause <= doubled + 1.0  # backoff_s of jitter


def test_attempts_are_counted_and_the_last_error_is_raised(ask: Ask, stub: Stub) -> None:
    stub.replies = [fails(503, error("overloaded", "draining")) for _ in range(3)]
    with pytest.raises(ScoringError, match="503 overloaded: draining") as caught:
        ask("score", png(), "A dog.", settings={"attempts": 3})
    assert (caught.value.status, caught.value.type) == (503, "overloaded")
    assert not isinstance(caught.value, ScoringRefused)
    assert isinstance(caught.value, FgaifError)
    assert len(stub.bodies) == 3
    stub.replies = [fails(429, error("overloaded"), Retry_After="3600")]
    with pytest.raises(ScoringError) as caught:
        ask("score", png(), "A dog.")
    assert caught.value.retry_after == 3600
    assert len(stub.bodies) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refused_request_is_not_repeated(ask: Ask, stub: Stub, status: int) -> None:
    type = {401: "unauthorized", 413: "too_large"}.get(status, "invalid_request")
    stub.replies = [fails(status, error(type, "not  an\nimage", "items.0.image"))]
    with pytest.raises(ScoringRefused, match=r"items\.0\.image: not an image") as caught:
        ask("score", png(), "A dog.")
    assert (caught.value.status, caught.value.field) == (status, "items.0.image")
    assert ("FGAIF_SERVE_KEY" in str(caught.value)) == (status == 401)
    assert len(stub.bodies) == 1


def test_no_answer_in_time_and_no_service_at_all(ask: Ask, stub: Stub) -> None:
    stub.replies = ["hang", "hang"]
    with pytest.raises(ScoringError, match=r"no answer within 0\.3 s") as caught:
        ask("score", png(), "A dog.", settings={"timeout_s": 0.3, "attempts": 2})
    assert caught.value.type == "timeout"
    assert len(stub.bodies) == 2
    with (
        RewardClient("http://127.0.0.1:9", attempts=2, backoff_s=0.001) as client,
        pytest.raises(ScoringError, match=r"127\.0\.0\.1:9/v1/score: ConnectError"),
    ):
        client.score(png(), "A dog.")


def test_answers_that_are_not_the_services_are_cut_short(ask: Ask, stub: Stub) -> None:
    stub.replies = [fails(500, "Traceback:\n" + "x" * 5000)]
    with pytest.raises(ScoringError, match="500 HTTP 500: Traceback: x") as caught:
        ask("score", png(), "A dog.", settings={"attempts": 1})
    assert len(str(caught.value)) < 400
    stub.replies = [web.json_response({"results": [{"text": "A dog."}]})]
    with pytest.raises(ScoringError, match=r"results\.0\.segments: Field required.*same version"):
        ask("score", png(), "A dog.")


def test_the_key_is_sent_and_shown_nowhere(
    ask: Ask, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("score", png(), "A dog.", settings={"key": KEY})
    monkeypatch.setenv("FGAIF_SERVE_KEY", f"{KEY}\n")
    ask("models")
    assert [headers["Authorization"] for headers in stub.headers] == [f"Bearer {KEY}"] * 2
    stub.replies = [fails(401, error("unauthorized", f"wrong: Bearer {KEY}"))]
    with pytest.raises(ScoringRefused) as caught:
        ask("score", png(), "A dog.")
    assert KEY not in str(caught.value)
    client = RewardClient(stub.url)
    assert KEY not in f"{client!r} {client._settings!r}"
    for bad in ("two words\u00e9", "line\nbreak", "a b"):
        with pytest.raises(ConfigError, match="FGAIF_SERVE_KEY") as refused:
            RewardClient(stub.url, key=bad)
        assert bad not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://user:pass@host", "http://host?key=1"]
)
def test_addresses_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        RewardClient(url)
    assert "pass@" not in str(caught.value)
    assert "key=1" not in str(caught.value)


def test_errors_of_a_batch_stand_in_the_place_of_their_items(ask: Ask) -> None:
    items = [ScoreItem(image=png(), text=text) for text in ("A dog.", "bad", "Red.")]
    first, second, third = ask("score_batch", items)
    assert (first.results[0].total, third.results[0].total) == (2.0, 1.0)
    assert isinstance(second, ScoringRefused)
    assert "items.1: invalid_request: text: a special token" in str(second)


def test_only_the_items_that_were_too_many_are_sent_again(ask: Ask, stub: Stub) -> None:
    stub.busy_items = [0, 2]
    items = [ScoreItem(image=png(), text=text) for text in ("A dog.", "A b.", "One.", "bad")]
    found = ask("score_batch", items)
    assert [answer.results[0].total for answer in found[:3]] == [2.0, 2.0, 1.0]
    assert isinstance(found[3], ScoringRefused)
    sent = [[item["text"] for item in body["items"]] for body in stub.bodies]
    assert sent == [["A dog.", "A b.", "One.", "bad"], ["A dog.", "One."]]
    stub.busy_items = [1]
    found = ask("score_batch", items[:2], settings={"attempts": 1})
    assert found[0].results[0].total == 2.0
    assert isinstance(found[1], ScoringError)
    assert found[1].type == "overloaded"


def test_rewards_are_one_number_per_text(ask: Ask) -> None:
    items = [ScoreItem(image=png(), text=["A dog.", "One."]), ScoreItem(image=png(), text="A b c.")]
    assert ask("reward", items) == [2.0, 1.0, 3.0]
    assert ask("reward", items, kind="relation") == [-0.5] * 3
    with pytest.raises(ConfigError, match="the service scores object, attribute, relation"):
        ask("reward", items, kind="counting")
    with pytest.raises(ScoringRefused, match=r"items\.2"):
        ask("reward", [*items, ScoreItem(image=png(), text="bad")])


def test_openrlhf_queries_go_with_their_images(ask: Ask, stub: Stub) -> None:
    stub.replies = [fails(503)]
    images = [png(), png("blue")]
    found = ask("get_reward", ["Q: A dog.", "Q: One."], ["Q:"] * 2, images, question="What?")
    assert (found.rewards, found.extra_logs["object"]) == ([2.0, 1.0], [2.0, 1.0])
    assert stub.bodies[1]["question"] == "What?"
    assert [base64.b64decode(image) for image in stub.bodies[1]["images"]] == images


PIECES = ("There is ", "a dog. ", "It is red", ".")


async def later(*pieces: str) -> AsyncIterator[str]:
    for piece in pieces:
        yield piece


def stream(client: RewardClient | AsyncRewardClient, *pieces: str) -> list[SegmentOut | TextResult]:
    """All that a stream yields; the client is closed."""
    if isinstance(client, RewardClient):
        with client:
            return list(client.stream(png(), pieces, prompt="What?"))

    async def run() -> list[SegmentOut | TextResult]:
        async with client:
            return [event async for event in client.stream(png(), later(*pieces), prompt="What?")]

    return asyncio.run(run())


@pytest.mark.parametrize("sort", [RewardClient, AsyncRewardClient])
def test_a_stream_yields_sub_sentences_and_at_last_the_text(stub: Stub, sort: type) -> None:
    stub.replies = [fails(503, error("overloaded"), Retry_After="0")]
    events = stream(sort(stub.url, key=KEY), *PIECES)
    assert [type(event) for event in events] == [SegmentOut, TextResult]
    assert events[0].text == "There is a dog"
    assert events[1].total == 7.0
    assert stub.sent[0] == {"image": base64.b64encode(png()).decode(), "prompt": "What?"}
    assert stub.sent[1:] == [*({"delta": piece} for piece in PIECES), {"end": True}]
    assert [headers["Authorization"] for headers in stub.headers] == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize("sort", [RewardClient, AsyncRewardClient])
def test_streams_that_fail_say_why(stub: Stub, sort: type) -> None:
    with pytest.raises(ScoringRefused, match="delta: a special token"):
        stream(sort(stub.url), "A dog. ", "bad", *PIECES)
    with pytest.raises(ScoringError, match=r"ConnectionClosedError.*see that the service runs"):
        stream(sort(stub.url), "break", *PIECES)
    stub.replies = [fails(403, "")]
    with pytest.raises(ScoringRefused) as caught:
        stream(sort(stub.url), *PIECES)
    assert caught.value.status == 403
    with pytest.raises(ScoringError, match=r"127\.0\.0\.1:9"):
        stream(sort("http://127.0.0.1:9", attempts=2, backoff_s=0.001), *PIECES)


def test_nothing_is_sent_where_a_redirect_leads(ask: Ask, stub: Stub) -> None:
    with Stub() as elsewhere:
        stub.replies = [fails(307, Location=f"{elsewhere.url}/v1/score")]
        with pytest.raises(ScoringError, match="redirects") as caught:
            ask("score", png(), "A dog.", settings={"key": KEY})
        told = re.search(r"redirects to (\S+), .* give it as base_url", str(caught.value))
        assert told is not None
        assert told[1] == elsewhere.url
        assert not caught.value.passing
        assert elsewhere.bodies == elsewhere.headers == []
        with RewardClient(told[1]) as client:  # the advice, followed
            assert client.score(png(), "A dog.").results[0].total == 2.0


@pytest.mark.parametrize("sort", [RewardClient, AsyncRewardClient])
def test_no_stream_is_opened_where_a_redirect_leads(stub: Stub, sort: type) -> None:
    with Stub() as elsewhere:
        stub.replies = [fails(302, Location=f"{elsewhere.url}/v1/score/stream")]
        with pytest.raises(ScoringError, match=f"302: redirects to {elsewhere.url}, where nothing"):
            stream(sort(stub.url, key=KEY), *PIECES)
        assert elsewhere.headers == elsewhere.sent == []


def test_scores_arrive_before_the_text_ends(stub: Stub) -> None:
    """The second piece is written only after the first one's score is there."""

    async def run() -> list[str]:
        heard, order = asyncio.Event(), []

        async def pieces() -> AsyncIterator[str]:
            yield "There is a dog. "
            await asyncio.wait_for(heard.wait(), 10)
            order.append("second piece")
            yield "It is red."

        async with AsyncRewardClient(stub.url) as client:
            async for event in client.stream(png(), pieces()):
                order.append(type(event).__name__)
                heard.set()
        return order

    assert asyncio.run(run()) == ["SegmentOut", "second piece", "TextResult"]


def test_an_error_of_the_texts_source_is_raised(stub: Stub) -> None:
    async def broken() -> AsyncIterator[str]:
        yield "A dog. "
        raise LookupError("the model died")

    async def run() -> None:
        async with AsyncRewardClient(stub.url) as client:
            async for _ in client.stream(png(), broken()):
                pass

    with pytest.raises(LookupError, match="the model died"):
        asyncio.run(run())


def trl_call(reward: Any, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
    """As ``GRPOTrainer._calculate_rewards`` of TRL 1.16 calls a reward function."""
    return reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1, 2]] * len(prompts),
        **columns,
        trainer_state=SimpleNamespace(global_step=3),
        log_extra=lambda column, values: None,
        log_metric=columns.pop("metrics", {}).__setitem__,
    )


def test_trl_rewards_of_a_vision_data_set(stub: Stub) -> None:
    """With a column of images TRL puts them into the prompts, as conversations of parts."""
    image = Image.new("RGB", (4, 4), "blue")
    asked = {"type": "text", "text": "What do you see?"}
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": image}, asked]},
    ]
    completions = [[{"role": "assistant", "content": text}] for text in ("A dog.", "  ", "A b c.")]
    with RewardClient(stub.url) as client:
        reward = trl_reward(client)
        given = trl_call(reward, [prompt] * 3, completions, images=[[image]] * 3)
        assert given == [2.0, 0.0, 3.0]
        assert trl_call(reward, [prompt] * 3, completions) == given
        relation = trl_reward(client, "relation")
        assert trl_call(relation, [prompt], completions[:1], image=[image]) == [-0.5]
    assert (reward.__name__, relation.__name__) == ("fgaif_total", "fgaif_relation")
    items = stub.bodies[0]["items"]
    assert [item["text"] for item in items] == ["A dog.", "A b c."]
    assert {item["prompt"] for item in items} == {"What do you see?"}
    sent = Image.open(io.BytesIO(base64.b64decode(items[0]["image"])))
    assert sent.getpixel((0, 0)) == (0, 0, 255)


def test_trl_completions_that_are_refused_get_none_and_are_counted(
    stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    metrics: dict[str, float] = {}
    texts = ["A dog."] * 16 + ["bad", "One."]
    with RewardClient(stub.url) as client:
        given = trl_call(
            trl_reward(client), ["What?"] * 18, texts, image=[png()] * 18, metrics=metrics
        )
    assert given == [2.0] * 16 + [None, 1.0]
    assert [len(body["items"]) for body in stub.bodies] == [16, 2]
    assert metrics == {"fgaif_total/refused": 1.0}
    assert "1 of 18 completions have no reward" in caplog.text
    assert "a special token" in caplog.text


def test_trl_rows_need_one_image_and_failures_are_raised(stub: Stub) -> None:
    with RewardClient(stub.url, attempts=1) as client:
        reward = trl_reward(client)
        with pytest.raises(DataError, match="row 1 of the batch: 2 images"):
            trl_call(reward, ["?"] * 2, ["A."] * 2, images=[[png()], [png(), png()]])
        with pytest.raises(DataError, match="row 0 of the batch: 0 images"):
            trl_call(reward, ["?"], ["A."])
        stub.replies = [fails(401, error("unauthorized"))]
        with pytest.raises(ScoringRefused):
            trl_call(reward, ["?"], ["A."], image=[png()])
        stub.busy_items = [0]
        with pytest.raises(ScoringError, match="overloaded"):
            trl_call(reward, ["?"], ["A."], image=[png()])


def test_a_reward_function_can_be_pickled(stub: Stub) -> None:
    with RewardClient(stub.url, key=KEY) as client:
        copy = pickle.loads(pickle.dumps(trl_reward(client, "object")))
    assert trl_call(copy, ["?"], ["A dog."], image=[png()]) == [2.0]
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    copy.client.close()


def test_the_client_imports_no_framework() -> None:
    code = "import sys, fgaif.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    heavy = {"torch", "ray", "transformers", "fastapi", "openai", "PIL", "fgaif.config"}
    assert heavy & set(loaded.decode().split()) == set()


class FakeTrainer:
    """Calls its reward functions as TRL's GRPOTrainer does, with a row whose image is a file."""

    def __init__(self, model: str, reward_funcs: list[Any], train_dataset: list[Json]) -> None:
        self.functions, self.rows = reward_funcs, train_dataset

    def train(self) -> None:
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in self.rows]
        said = [[{"role": "assistant", "content": "A dog."}]] * len(prompts)
        images = [row["image"] for row in self.rows]
        self.rewards = [trl_call(f, prompts, said, image=images) for f in self.functions]


def test_the_examples_of_the_documentation_run(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "What?", "image": "photo.png"}]
    loads = SimpleNamespace(load_dataset=lambda *_, **__: rows)
    monkeypatch.setitem(sys.modules, "datasets", loads)
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOTrainer=FakeTrainer))
    monkeypatch.setitem(sys.modules, "swift", SimpleNamespace())
    orms: dict[str, object] = {}
    monkeypatch.setitem(sys.modules, "swift.rewards", SimpleNamespace(orms=orms))
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(png())
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    spaces = []
    for block in blocks:
        spaces.append({"__name__": "example"})
        exec(block.replace("http://127.0.0.1:8000", stub.url), spaces[-1])
    shown = capsys.readouterr().out
    assert "0.25 object    There is a red circle. " in shown
    assert "total 10.0" in shown
    (trained,) = [space for space in spaces if "trainer" in space]
    assert trained["trainer"].rewards == [[2.0], [0.5], [-0.5]]
    (openrlhf,) = [space for space in spaces if "reward_func" in space]
    rewards = openrlhf["reward_func"](["Q: A dog."], ["Q:"], ["photo.png"])
    assert rewards["rewards"].tolist() == [2.0]
    assert "fgaif" in orms
    for space in (trained, openrlhf):
        space["client"].close()
