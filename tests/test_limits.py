import asyncio
import time
from typing import Any

import pytest
from fault_server import Answer, Faults, FaultServer

from fgaif.chat.endpoint import Endpoint
from fgaif.chat.images import DataUris
from fgaif.chat.limits import Budget, Gate, Rate, Spend, Usage, estimate, price
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.config import EndpointConfig
from fgaif.errors import ConfigError, ServiceError
from fgaif.types import ImageRef

IMAGE = ImageRef(path="a.png", sha256="0" * 64)


def config(**fields: Any) -> EndpointConfig:
    return EndpointConfig.model_validate(
        {"model": "m", "base_url": "http://127.0.0.1:1/v1"} | fields
    )


def request(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest(prompt_version="v", subject=text, text=text, **fields)


def test_an_estimate_counts_texts_image_and_the_longest_reply() -> None:
    """400 + 100 bytes / 4 + 8 for the message + 1000 for the image; 64 out."""
    prices = config(price_input=2.0, price_output=8.0)
    asked = request("x" * 400, system="y" * 100, image=IMAGE, max_tokens=64)
    assert estimate(asked, prices) == price(prices, 125 + 8 + 1000, 64)
    assert price(prices, 500_000, 250_000).cost == pytest.approx(1.0 + 2.0)
    assert estimate(request("猫" * 4, max_tokens=1), prices).input_tokens == 3 + 8


def test_what_is_on_its_way_counts_and_waits_for_room() -> None:
    events: list[str] = []

    async def one(budget: Budget, name: str, used: int) -> None:
        await budget.reserve(Spend(output_tokens=60))
        events.append(f"{name} goes")
        await asyncio.sleep(0)
        budget.charge(Spend(output_tokens=used))
        budget.release(Spend(output_tokens=60))

    async def run() -> Budget:
        budget = Budget(max_tokens=100)
        await asyncio.gather(one(budget, "a", 30), one(budget, "b", 30))
        with pytest.raises(ServiceError, match=r"100 tokens reached: 60 used.*may use 60"):
            await budget.reserve(Spend(output_tokens=60))
        await budget.reserve(Spend(output_tokens=40))
        return budget

    assert asyncio.run(run()).usage().output_tokens == 60
    assert events == ["a goes", "b goes"]


@pytest.mark.parametrize("limits", [{"max_cost": 0.0105}, {"max_tokens": 1050}])
def test_a_budget_is_used_up_and_never_passed(limits: dict[str, Any]) -> None:
    """A reply costs 100 tokens (0.001); reserved are more; 10 replies fit, then the job stops."""
    budget = Budget(**limits)
    answer = Answer(text="yes", usage=(90, 10))
    with FaultServer(lambda body: answer, latency_s=0.005) as server:
        settings = config(base_url=server.base_url, price_input=10.0, price_output=10.0)
        model = Endpoint("api", settings, budget)
        asked = [request(f"{i:04}" + "x" * 364, max_tokens=20) for i in range(40)]

        async def run() -> list[Reply | BaseException]:
            return await asyncio.gather(*(model.ask(r) for r in asked), return_exceptions=True)

        replies = asyncio.run(run())
    errors = [reply for reply in replies if isinstance(reply, ServiceError)]
    answered = [reply for reply in replies if isinstance(reply, Reply)]
    # 368 bytes / 4 + 8 + 20 = 120 are reserved: the tenth fits beside 900 used, the next does not.
    assert (len(answered), len(errors)) == (10, 30)
    assert server.requests.total() == len(answered)
    usage = budget.usage()
    assert usage.input_tokens + usage.output_tokens == 100 * len(answered) <= 1050
    assert "reached" in str(errors[0])
    assert "replies so far are kept" in str(errors[0])
    assert len({str(error) for error in errors}) == 1


def test_replies_that_cannot_be_read_are_charged() -> None:
    budget = Budget()
    with FaultServer(lambda body: "yes", Faults(rate=1.0, kinds=("truncated",))) as server:
        model = Endpoint("api", config(base_url=server.base_url, attempts=2), budget)
        with pytest.raises(Exception, match="no whole JSON"):
            asyncio.run(model.ask(request("abcd", max_tokens=5)))
    usage = budget.usage()
    assert (usage.input_tokens, usage.output_tokens) == (2 * (1 + 8), 2 * 5)


def test_a_cost_limit_needs_prices() -> None:
    settings = EndpointConfig(model="m", base_url="https://api.example.com/v1")
    with pytest.raises(ConfigError, match=r"endpoints\.api: price_input and price_output are 0"):
        Endpoint("api", settings, Budget(max_cost=1.0))


def test_without_a_price_nothing_is_called_free() -> None:
    """Unless the server is on this machine."""
    budget = Budget()
    Endpoint("api", config(base_url="http://127.0.0.1:9/v1"), budget)
    assert "no price set" not in budget.usage().line()
    settings = config(base_url="https://api.example.com/v1", api_key_env="HOME")
    Endpoint("api", settings, budget)
    assert budget.usage().line() == "no price set, 0 replies, 0 tokens"


def test_usage_is_one_line() -> None:
    usage = Usage(
        requests=12,
        replies=1000,
        failed=1,
        retries={"timeout": 2, "HTTP 500": 3},
        input_tokens=5000,
        output_tokens=500,
        cost=0.25,
    )
    assert usage.line() == (
        "cost 0.25, 1,000 replies, 5 retries (3 HTTP 500, 2 timeout), 1 failed, 5,500 tokens"
    )


def test_a_rate_is_even_and_an_amount_above_its_share_passes_in_pieces() -> None:
    """6,000 a minute is 100 a second: of 130, 100 go at once and 30 after 0.3 s."""

    async def run() -> float:
        rate = Rate(6000)
        begin = time.monotonic()
        await rate.take(130)
        return time.monotonic() - begin

    assert asyncio.run(run()) >= 0.29


def test_a_slow_rate_lets_single_requests_through() -> None:
    async def run() -> None:
        rate = Rate(30)
        await rate.take(1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rate.take(1), 0.05)

    asyncio.run(run())


def test_a_gate_holds_as_many_as_its_places() -> None:
    inside = peak = 0

    async def enter(gate: Gate) -> None:
        nonlocal inside, peak
        async with gate.place(10):
            inside += 1
            peak = max(peak, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    async def run() -> None:
        gate = Gate(config(concurrency=3, requests_per_minute=1e6, tokens_per_minute=1e6))
        await asyncio.gather(*(enter(gate) for _ in range(12)))

    asyncio.run(run())
    assert peak == 3


def test_encoded_images_are_kept_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def encode(ref: ImageRef, side: int, pixels: int, *, original: bool) -> str:
        made.append(ref.path)
        return ref.path * 10

    monkeypatch.setattr("fgaif.chat.images.data_uri", encode)

    async def run() -> DataUris:
        uris = DataUris(64, max_bytes=20)
        for name in "abacaB":
            assert await uris.get(ImageRef(path=name, sha256=name)) == name * 10
        return uris

    uris = asyncio.run(run())
    # Room for two: c drives out b, which was used least recently, and B drives out c.
    assert made == ["a", "b", "c", "B"]
    assert uris.nbytes == 20
