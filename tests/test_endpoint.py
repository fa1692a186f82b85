import asyncio
import base64
import io
import logging
import math
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, Faults, FaultServer, Http, question
from PIL import Image

from fgaif.chat.endpoint import Endpoint
from fgaif.chat.failures import retry_after
from fgaif.chat.limits import Budget
from fgaif.chat.messages import ChatRequest, Reply, RequestFailed
from fgaif.chat.secrets import redact
from fgaif.config import EndpointConfig
from fgaif.data.images import image_ref
from fgaif.errors import ConfigError, ServiceError
from fgaif.types import ImageRef

KEY = "topsecret-0123456789"
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
YES_NO = (("Yes", math.log(0.75)), ("No", math.log(0.25)))


class Time:
    """A clock that only sleeping moves, ``lag`` real seconds later: others may go meanwhile."""

    def __init__(self, lag: float = 0.0) -> None:
        self.now = 1.0
        self.lag = lag
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        until = self.now + seconds
        await asyncio.sleep(self.lag)
        self.now = max(self.now, until)


def request(text: str = "Is there a cat?", **fields: Any) -> ChatRequest:
    return ChatRequest(
        **({"prompt_version": "v", "subject": text, "text": text, "max_tokens": 8} | fields)
    )


def endpoint(
    server: FaultServer, budget: Budget | None = None, time: Time | None = None, **fields: Any
) -> Endpoint:
    settings = {"model": "judge", "base_url": server.base_url, "backoff_s": 0.001, "timeout_s": 10}
    times = {"sleep": time.sleep, "clock": time.clock} if time else {}
    config = EndpointConfig.model_validate(settings | fields)
    return Endpoint("api", config, budget or Budget(), **times)


def ask(model: Endpoint, *requests: ChatRequest) -> list[Reply | BaseException]:
    """All replies or errors, of requests put at the same time."""

    async def run() -> list[Reply | BaseException]:
        asked = (model.ask(r) for r in requests or [request()])
        replies = await asyncio.gather(*asked, return_exceptions=True)
        await model.close()
        return replies

    return asyncio.run(run())


def ask_in_turn(model: Endpoint, requests: Sequence[ChatRequest]) -> list[Reply | Exception]:
    async def run() -> list[Reply | Exception]:
        replies: list[Reply | Exception] = []
        for item in requests:
            try:
                replies.append(await model.ask(item))
            except (RequestFailed, ServiceError) as error:
                replies.append(error)
        await model.close()
        return replies

    return asyncio.run(run())


def first(*replies: Http) -> Callable[[dict[str, Any]], str | Http]:
    """These replies, one per request, then right ones."""
    left = list(replies)
    return lambda body: left.pop(0) if left else "yes"


def error(status: int, message: str = "no", **fields: Any) -> Http:
    headers = fields.pop("headers", {})
    return Http(status=status, body={"error": {"message": message} | fields}, headers=headers)


def test_a_reply_has_text_tokens_and_the_first_tokens_log_probs() -> None:
    answer = Answer(text="Yes", first_token=YES_NO, usage=(120, 2))
    budget = Budget()
    with FaultServer(lambda body: answer, keep=True) as server:
        model = endpoint(server, budget, price_input=2.0, price_output=10.0)
        replies = ask(model, request(yes_no=True, system="Be strict."))
    assert replies == [Reply(text="Yes", first_token=YES_NO, input_tokens=120, output_tokens=2)]
    assert server.bodies == [
        {
            "model": "judge",
            "messages": [
                {"role": "system", "content": "Be strict."},
                {"role": "user", "content": "Is there a cat?"},
            ],
            "max_tokens": 8,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ]
    usage = budget.usage()
    assert (usage.requests, usage.replies, usage.input_tokens, usage.output_tokens) == (
        1,
        1,
        120,
        2,
    )
    assert usage.cost == pytest.approx(120 * 2e-6 + 2 * 10e-6)
    assert model.name == "judge@127.0.0.1[json_schema,side=1024,logprobs=True]"


def test_a_question_put_again_is_sampled_with_another_seed() -> None:
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask_in_turn(endpoint(server), [request(attempt=n) for n in range(3)])
    sent = [(body["temperature"], body.get("seed")) for body in server.bodies]
    assert sent == [(0.0, None), (0.7, 1), (0.7, 2)]


def test_a_cut_reply_and_a_refusal_are_replies() -> None:
    answers = [Answer(text="{", finish="length"), Answer(text=None), Answer(text="a", usage=None)]
    with FaultServer(lambda body: answers[int(body["messages"][0]["content"])]) as server:
        cut, refused, uncounted = ask(endpoint(server), *(request(str(i)) for i in range(3)))
    assert cut == Reply(text="{", cut=True, input_tokens=100, output_tokens=10)
    assert refused == Reply(text="", input_tokens=100, output_tokens=10)
    # Nothing was counted for it, so that the estimate stands: 1 byte // 4 + 8, 1 byte // 4 + 1.
    assert uncounted == Reply(text="a", input_tokens=8, output_tokens=1)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("429", "rate limit"),
        ("500", "HTTP 500"),
        ("hang", "timeout"),
        ("truncated", "unreadable"),
        ("no_choices", "unreadable"),
        ("reset", "connection"),
    ],
)
def test_each_fault_is_tried_again_until_the_reply_is_there(kind: str, cause: str) -> None:
    faults = Faults(rate=0.5, kinds=(kind,), seed=3)
    budget = Budget()
    with FaultServer(question, faults) as server:
        model = endpoint(server, budget, timeout_s=0.5 if kind == "hang" else 10, attempts=20)
        asked = [request(f"q{i}") for i in range(8)]
        replies = ask(model, *asked)
    assert [reply.text for reply in replies] == [r.text for r in asked]  # type: ignore[union-attr]
    usage = budget.usage()
    assert server.faulty[kind] > 0
    assert usage.retries == {cause: server.faulty[kind]}
    assert (usage.replies, usage.failed) == (8, 0)
    assert usage.requests == 8 + server.faulty[kind]


def test_hundreds_of_requests_at_a_fault_rate_of_30_percent_are_answered_rightly() -> None:
    """What is off topic is put again with the next attempt, as readers of replies do."""
    faults = Faults(rate=0.3, seed=1, hang_s=60)

    async def insist(model: Endpoint, text: str) -> str:
        for attempt in range(10):
            reply = await model.ask(request(text, attempt=attempt))
            if "teapot" not in reply.text:
                return reply.text
        raise AssertionError(text)

    async def run(model: Endpoint) -> list[str]:
        return await asyncio.gather(*(insist(model, f"q{i}") for i in range(300)))

    with FaultServer(question, faults) as server:
        replies = asyncio.run(run(endpoint(server, timeout_s=1.0, concurrency=32, attempts=12)))
    assert replies == [f"q{i}" for i in range(300)]
    assert set(server.faulty) == set(faults.kinds)
    # No question that was answered was put again.
    assert server.replies == {f"q{i}": 1 for i in range(300)}


def test_no_more_requests_are_on_their_way_than_allowed() -> None:
    with FaultServer(lambda body: "yes", latency_s=0.01) as server:
        ask(endpoint(server, concurrency=3), *(request(str(i)) for i in range(12)))
    assert server.peak == 3


def test_a_request_fails_after_its_attempts_with_the_reason_and_the_others_go_on() -> None:
    def answer(body: dict[str, Any]) -> str | Http:
        return error(503, "overloaded") if question(body) == "bad" else "yes"

    budget = Budget()
    with FaultServer(answer) as server:
        model = endpoint(server, budget, attempts=3)
        bad, good = ask(model, request("bad"), request("good"))
    assert isinstance(bad, RequestFailed)
    assert str(bad).endswith("HTTP 503: overloaded (tries: 3)")
    assert isinstance(good, Reply)
    assert server.requests == {"bad": 3, "good": 1}
    assert budget.usage().failed == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(status: int) -> None:
    with FaultServer(first(error(status, "context too long,\nplease reduce max_tokens"))) as server:
        failed, good = ask_in_turn(endpoint(server), [request(), request("next")])
    assert isinstance(failed, RequestFailed)
    assert f"HTTP {status}: context too long, please reduce max_tokens" in str(failed)
    assert isinstance(good, Reply)
    assert server.requests.total() == 2


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error(401, "bad key"), ["HTTP 401: bad key", "MY_KEY"]),
        (error(403, "no access"), ["HTTP 403: no access", "'judge'"]),
        (error(404, "no such model"), ["HTTP 404: no such model", "'judge'", "127.0.0.1"]),
        (error(402, "pay"), ["quota is spent", "MY_KEY"]),
        (error(429, "pay", code="insufficient_quota"), ["quota is spent", "MY_KEY"]),
        (error(429, "pay", type="insufficient_quota"), ["quota is spent"]),
        (error(429, "tomorrow", headers={"Retry-After": "86400"}), ["wait 86,400 s"]),
    ],
)
def test_what_no_retry_cures_stops_at_once_and_for_good(
    reply: Http, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with FaultServer(first(reply)) as server:
        model = endpoint(server, api_key_env="MY_KEY")
        errors = ask_in_turn(model, [request("a"), request("b")])
    assert [type(e) for e in errors] == [ServiceError, ServiceError]
    assert str(errors[0]) == str(errors[1])
    for word in words:
        assert word in str(errors[0])
    assert server.requests.total() == 1


def test_failures_in_a_row_stop_the_job_and_a_reply_begins_the_row_anew() -> None:
    fine = {3, 7}
    with FaultServer(lambda body: "yes" if int(question(body)) in fine else error(500)) as server:
        model = endpoint(server, attempts=1, breaker=4, concurrency=1)
        replies = ask_in_turn(model, [request(str(i)) for i in range(20)])
    # 0 1 2 fail, 3 is answered, 4 5 6 fail, 7 is answered, 8 to 11 fail: the fourth in a row.
    kinds = [type(reply) for reply in replies]
    three = [RequestFailed] * 3
    assert kinds == [*three, Reply, *three, Reply, *three, *[ServiceError] * 9]
    assert "4 failures in a row, the last: HTTP 500" in str(replies[-1])
    assert server.requests.total() == 12


def test_a_server_that_is_not_there_stops_the_job() -> None:
    with FaultServer(lambda body: "yes") as server:
        pass
    model = endpoint(server, attempts=50, breaker=3, concurrency=1)
    (stopped,) = ask(model)
    assert isinstance(stopped, ServiceError)
    assert "3 failures in a row" in str(stopped)
    assert "Connect" in str(stopped)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        (
            {
                "retry-after": "Fri, 02 Jan 2026 10:00:30 GMT",
                "date": "Fri, 02 Jan 2026 10:00:00 GMT",
            },
            30.0,
        ),
        ({"retry-after": "Fri, 02 Jan 2015 10:00:30 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_rate_limit_pauses_every_request_as_long_as_the_server_says() -> None:
    time = Time(lag=0.1)
    left = [error(429, headers={"Retry-After": "7"})]
    sent_at: list[float] = []

    def answer(body: dict[str, Any]) -> str | Http:
        sent_at.append(time.now)
        return left.pop() if left else "yes"

    with FaultServer(answer) as server:
        model = endpoint(server, time=time, concurrency=1)
        replies = ask(model, *(request(str(i)) for i in range(3)))
    assert [type(reply) for reply in replies] == [Reply] * 3
    # The clock stands at 1 for the first; whoever comes next waits for 8, nobody goes before.
    assert sent_at[0] == 1.0
    assert min(sent_at[1:]) >= 8.0
    assert max(time.slept) == 7.0


def test_pauses_double_with_jitter_up_to_a_minute() -> None:
    time = Time()
    with FaultServer(lambda body: error(500)) as server:
        ask(endpoint(server, time=time, backoff_s=1.0, attempts=10, breaker=100))
    assert len(time.slept) == 9
    for n, slept in enumerate(time.slept):
        assert min(60, 2**n) <= slept <= min(60, 2**n + 1)


def test_a_wave_of_rate_limits_is_no_row_of_failures() -> None:
    """16 requests meet the limit at once, three times over: more than 30 failures, but 3 waves."""
    time = Time()
    waves = [16, 16, 16]

    def answer(body: dict[str, Any]) -> str | Http:
        if waves and waves[0]:
            waves[0] -= 1
            return error(429)
        if waves:
            waves.pop(0)
            return answer(body)
        return "yes"

    with FaultServer(answer) as server:
        model = endpoint(server, time=time, concurrency=16, breaker=30, backoff_s=1.0)
        replies = ask(model, *(request(str(i)) for i in range(16)))
    assert [type(reply) for reply in replies] == [Reply] * 16


def test_log_probs_are_asked_for_as_the_endpoint_takes_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(body: dict[str, Any]) -> Answer | Http:
        if body.get("top_logprobs", 0) > 5:
            return error(400, "top_logprobs must be at most 5", param="top_logprobs")
        return Answer(text="Yes", first_token=YES_NO)

    with FaultServer(answer, keep=True) as server:
        model = endpoint(server, concurrency=1)
        replies = ask_in_turn(model, [request(str(i), yes_no=True) for i in range(3)])
    assert [reply.first_token for reply in replies] == [YES_NO] * 3  # type: ignore[union-attr]
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5, 5]
    assert len([r for r in caplog.records if r.name == "fgaif.chat.endpoint"]) == 1


def test_an_endpoint_without_json_formats_and_log_probs_and_with_new_names_still_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(body: dict[str, Any]) -> Answer | Http:
        for name in ("logprobs", "response_format", "seed"):
            if name in body:
                return error(422, f"extra field not permitted: '{name}'")
        if "max_tokens" in body:
            return error(
                400,
                "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                param="max_tokens",
            )
        if "temperature" in body:
            return error(400, "Only the default (1) is supported.", param="temperature")
        return Answer(text="{}", first_token=YES_NO)

    with FaultServer(answer, keep=True) as server:
        model = endpoint(server)
        asked = request(schema=SCHEMA, yes_no=True, attempt=1)
        replies = ask(model, *[asked] * 4)
    assert [reply.text for reply in replies] == ["{}"] * 4  # type: ignore[union-attr]
    last = server.bodies[-1]
    assert set(last) == {"model", "messages", "max_completion_tokens"}
    # Four at once find out together, and each thing once: json_schema, json_object; 20, 5; seed,
    # max_tokens, temperature.
    assert len(server.bodies) <= 4 * 8
    assert len([r for r in caplog.records if r.name == "fgaif.chat.endpoint"]) == 7


@pytest.mark.parametrize(
    "message",
    [
        "Logprobs is not supported for the current model.",
        "LOGPROBS are unavailable",
        "Log probabilities cannot be returned by this model",
    ],
)
def test_log_probs_are_given_up_however_the_refusal_is_worded(message: str) -> None:
    def answer(body: dict[str, Any]) -> Answer | Http:
        return error(400, message) if "logprobs" in body else Answer(text="Yes")

    with FaultServer(answer, keep=True) as server:
        replies = ask_in_turn(endpoint(server), [request(str(i), yes_no=True) for i in range(2)])
    assert [reply.text for reply in replies] == ["Yes"] * 2  # type: ignore[union-attr]
    assert ["logprobs" in body for body in server.bodies] == [True, True, False, False]


@pytest.mark.parametrize("name", ["seed", "temperature"])
@pytest.mark.parametrize(
    "message",
    [
        "Unrecognized request argument supplied: {}",
        "Unsupported parameter {} for this model",
        "this model does not accept it: {} is not supported",
        "Extra inputs are not permitted: '{}'",
    ],
)
def test_parameters_are_given_up_however_the_refusal_is_worded(name: str, message: str) -> None:
    def answer(body: dict[str, Any]) -> str | Http:
        return error(400, message.format(name)) if name in body else "fine"

    with FaultServer(answer, keep=True) as server:
        (reply,) = ask(endpoint(server), request(attempt=1))
    assert reply.text == "fine"  # type: ignore[union-attr]
    assert [name in body for body in server.bodies] == [True, False]


def test_refusals_in_a_row_stop_the_job_with_the_settings_to_change() -> None:
    with FaultServer(lambda body: error(400, "this is not to be had here")) as server:
        model = endpoint(server, concurrency=1, breaker=2)
        replies = ask_in_turn(model, [request(str(i)) for i in range(3)])
    assert isinstance(replies[-1], ServiceError)
    assert "endpoints.api.logprobs=false" in str(replies[-1])


@pytest.mark.parametrize(
    ("content", "text", "said"),
    [
        ("<think>Is there a dog? I see one.</think>\n\nYes", "Yes", False),
        ("I see one.</think>No", "No", False),
        ("<think>Is there a", "<think>Is there a", True),
        ("", "", True),
        ("Yes", "Yes", False),
    ],
)
def test_reasoning_is_left_out_and_said_once_where_it_takes_all(
    content: str, text: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultServer(lambda body: Answer(text=content, finish="length")) as server:
        replies = ask_in_turn(endpoint(server), [request(str(i), yes_no=True) for i in range(3)])
    assert [reply.text for reply in replies] == [text] * 3  # type: ignore[union-attr]
    warned = [r for r in caplog.records if "holds reasoning or nothing" in r.getMessage()]
    assert len(warned) == said


def test_the_json_format_falls_back_one_step_at_a_time() -> None:
    def answer(body: dict[str, Any]) -> str | Http:
        if body["response_format"]["type"] == "json_schema":
            return error(400, "This response_format type is unavailable now")
        return "{}"

    with FaultServer(answer, keep=True) as server:
        ask_in_turn(endpoint(server), [request("a", schema=SCHEMA), request("b", schema=SCHEMA)])
    formats = [body["response_format"] for body in server.bodies]
    assert formats[0]["json_schema"] == {"name": "reply", "schema": SCHEMA, "strict": True}
    assert formats[1:] == [{"type": "json_object"}] * 2


def test_words_of_the_question_in_a_refusal_do_not_change_the_parameters() -> None:
    message = "flagged: the temperature is high; logprobs; response_format"
    with FaultServer(first(error(400, message)), keep=True) as server:
        failed, _ = ask_in_turn(endpoint(server), [request("a"), request("b")])
    assert isinstance(failed, RequestFailed)
    assert server.bodies[1]["temperature"] == 0.0


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"choices": 5},
        {"choices": ["x"]},
        {"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]},
        {"choices": [{"message": {}}]},
        {"error": {"message": "upstream failed", "code": 502}},
        b"<html>hello</html>",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_body_that_is_no_completion_is_asked_for_again(body: Any) -> None:
    budget = Budget()
    with FaultServer(first(Http(status=200, body=body))) as server:
        (reply,) = ask(endpoint(server, budget))
    assert isinstance(reply, Reply)
    assert budget.usage().retries == {"unreadable": 1}


@pytest.mark.parametrize("logprobs", [{}, {"content": []}, {"content": [{"token": "a"}]}, [1]])
def test_log_probs_in_another_form_are_none(logprobs: Any) -> None:
    choice = {"message": {"content": "Yes"}, "finish_reason": "stop", "logprobs": logprobs}
    with FaultServer(first(Http(status=200, body={"choices": [choice]}))) as server:
        (reply,) = ask(endpoint(server), request(yes_no=True))
    assert isinstance(reply, Reply)
    assert (reply.text, reply.first_token) == ("Yes", ())


def test_a_text_that_cannot_be_sent_fails_alone() -> None:
    with FaultServer(lambda body: "yes") as server:
        failed, good = ask_in_turn(endpoint(server), [request("\ud83d"), request("ok")])
    assert isinstance(failed, RequestFailed)
    assert "lone surrogate" in str(failed)
    assert isinstance(good, Reply)


# Keys


def test_a_key_is_needed_and_both_places_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    config = EndpointConfig(model="m", base_url="https://api.example.com/v1", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match=r"variable MY_KEY, or endpoints\.api\.api_key_file"):
        Endpoint("api", config, Budget())


def test_a_server_on_this_machine_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server))
    assert server.headers[0]["Authorization"] == "Bearer none"
    assert redact("none of it") == "none of it"


def test_the_key_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    (tmp_path / "key").write_text("from-the-file\n")
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server, api_key_file=tmp_path / "key"))
        with pytest.raises(ConfigError, match="No such file"):
            endpoint(server, api_key_file=tmp_path / "gone")
        (tmp_path / "key").write_text("two words")
        with pytest.raises(ConfigError, match="holds no key") as caught:
            endpoint(server, api_key_file=tmp_path / "key")
    assert "two words" not in str(caught.value)
    assert server.headers[0]["Authorization"] == "Bearer from-the-file"


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_error_and_no_log(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that sends the Authorization header back, in the body and in a header."""
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = FaultServer(lambda body: echo, keep=True)
    echo = Http(
        status=status,
        body={"error": {"message": f"got Authorization: Bearer {KEY} and sk-proj-abcdefgh1234"}},
        headers={"X-Echo": KEY},
    )
    with server:
        model = endpoint(server, api_key_env="MY_KEY", attempts=2)
        (failed,) = ask(model)
        logging.getLogger("openai").error("the key is %s", KEY)
        try:
            raise ValueError(KEY)
        except ValueError:
            logging.getLogger("httpx2").exception("with a traceback")
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert isinstance(failed, RequestFailed | ServiceError)
    shown = "".join(_chain(failed)) + caplog.text + repr(vars(model)) + redact(f"x{KEY}y")
    assert "got Authorization: Bearer [key] and [key]" in shown
    assert "the key is [key]" in caplog.text
    assert KEY not in shown
    assert "sk-proj" not in shown


def _chain(failed: BaseException | None) -> list[str]:
    texts = []
    while failed is not None:
        texts += [str(failed), repr(failed), str(pickle.loads(pickle.dumps(failed)))]
        failed = failed.__cause__ or failed.__context__
    return texts


# Images


def write(path: Path, size: tuple[int, int], **options: Any) -> ImageRef:
    Image.effect_noise(size, 50).convert("RGB").save(path, **options)
    return image_ref(path)


def sent_images(server: FaultServer) -> list[tuple[str, bytes]]:
    """Media type and bytes of each request's image, and that it comes before the text."""
    images = []
    for body in server.bodies:
        image, text = body["messages"][0]["content"]
        assert text["type"] == "text"
        head, data = image["image_url"]["url"].split(";base64,")
        images.append((head.removeprefix("data:"), base64.b64decode(data, validate=True)))
    return images


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp")]
)
def test_a_small_image_can_be_sent_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    ref = write(tmp_path / name, (60, 40))
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server, max_image_side=64, original_images=True), request(image=ref))
    assert sent_images(server) == [(f"image/{kind}", (tmp_path / name).read_bytes())]


@pytest.mark.parametrize(
    ("name", "size", "kind", "sent"),
    [
        ("a.png", (600, 300), "png", (100, 50)),
        ("a.jpg", (300, 600), "jpeg", (50, 100)),
        ("a.bmp", (60, 30), "jpeg", (60, 30)),
    ],
)
def test_a_large_or_unusual_image_is_sent_smaller(
    tmp_path: Path, name: str, size: tuple[int, int], kind: str, sent: tuple[int, int]
) -> None:
    ref = write(tmp_path / name, size)
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server, max_image_side=100), request(image=ref))
    ((media, data),) = sent_images(server)
    assert media == f"image/{kind}"
    assert Image.open(io.BytesIO(data)).size == sent


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_no_metadata_of_a_photograph_leaves_the_machine(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    exif[0x010F] = "Camera of Ada"
    Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / name, exif=exif)
    assert b"Ada" in (tmp_path / name).read_bytes()
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server, max_image_side=64), request(image=image_ref(tmp_path / name)))
    ((_, data),) = sent_images(server)
    assert b"Ada" not in data
    assert not Image.open(io.BytesIO(data)).getexif()


def test_a_rotated_photograph_is_sent_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = write(tmp_path / "a.jpg", (60, 40), exif=exif)
    with FaultServer(lambda body: "yes", keep=True) as server:
        ask(endpoint(server), request(image=ref))
    assert Image.open(io.BytesIO(sent_images(server)[0][1])).size == (40, 60)


def test_the_facts_of_an_image_encode_it_once(tmp_path: Path) -> None:
    refs = [write(tmp_path / f"{i}.png", (60, 40)) for i in range(2)]
    with FaultServer(lambda body: "yes") as server:
        model = endpoint(server)
        ask(model, *(request(f"{i}", image=refs[i % 2]) for i in range(20)))
    assert server.requests.total() == 20
    assert model._uris.made == 2


def test_images_that_cannot_be_sent_fail_alone(tmp_path: Path) -> None:
    changed = write(tmp_path / "changed.png", (60, 40))
    write(tmp_path / "changed.png", (60, 41))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    broken = image_ref(tmp_path / "broken.png")
    gone = write(tmp_path / "gone.png", (60, 40))
    (tmp_path / "gone.png").unlink()
    bomb = write(tmp_path / "bomb.png", (300, 300))
    good = write(tmp_path / "good.png", (60, 40))
    with FaultServer(lambda body: "yes") as server:
        config = EndpointConfig(model="m", base_url=server.base_url)
        model = Endpoint("api", config, Budget(), max_image_pixels=89_999)
        replies = ask(model, *(request(image=i) for i in (changed, broken, gone, bomb, good)))
    reasons = [
        "changed since it was listed",
        "cannot be decoded",
        "no such file",
        "90000|300 x 300",
    ]
    for reply, reason in zip(replies, reasons, strict=False):
        with pytest.raises(RequestFailed, match=reason):
            raise reply  # type: ignore[misc]
    assert isinstance(replies[4], Reply)
    assert server.requests.total() == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_names_the_address(tmp_path: Path, status: int) -> None:
    """The client of the API would follow it, with the photograph."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    with FaultServer(lambda body: "yes", keep=True) as other:
        moved = error(status, headers={"Location": f"{other.base_url}/chat/completions?key=1"})
        with FaultServer(lambda body: moved) as server:
            replies = ask(endpoint(server), request(image=image_ref(photo)), request("Again?"))
        assert all(isinstance(reply, ServiceError) for reply in replies)
        assert "images and keys go only to" in str(replies[0])
        assert not other.bodies
        told = re.search(r"redirects to (\S+), .*set base_url to it", str(replies[0]))
        assert told is not None
        assert told[1] == other.base_url
        (reply,) = ask(endpoint(server, base_url=told[1]))  # the advice, followed
        assert isinstance(reply, Reply)
        assert reply.text == "yes"
