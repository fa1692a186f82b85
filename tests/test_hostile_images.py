"""Hostile images among the requests of 32 clients: every other request is answered as if alone."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from hostile_images import NUMBER_OF_KINDS, hostile_image
from serving_samples import TEXT, StubBackend, data_uri, png

from fgaif.config import load_config
from fgaif.serving.app import create_app

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]
GOOD = [data_uri(png(shade)) for shade in range(0, 80, 10)]


def item(image: str, number: int) -> dict[str, Any]:
    return {"image": image, "text": TEXT[: 40 + number % 100]}


def asked(work: Callable[[Ask], Awaitable[Any]]) -> Any:
    """Run work that asks the application, which has as many requests at once as it likes."""
    app = create_app(StubBackend(), load_config(None, []), key=None)

    async def run() -> Any:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://fgaif") as client:

            async def ask(path: str, body: dict[str, Any]) -> Any:
                return await client.post(path, json=body)

            return await work(ask)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", range(NUMBER_OF_KINDS))
def test_each_is_refused_or_answered_and_never_a_failure(kind: int) -> None:
    async def work(ask: Ask) -> Any:
        return await ask("/v1/score", item(hostile_image(kind), 0))

    answer = asked(work)
    assert answer.status_code in (200, 413, 422), answer.text
    assert len(answer.text) < 5000


def test_no_neighbour_is_harmed() -> None:
    """32 clients, every 11th image hostile, in requests of one and of four."""

    async def work(ask: Ask) -> tuple[list[Any], list[Any]]:
        alone = [(await ask("/v1/score", item(image, i))).json() for i, image in enumerate(GOOD)]
        results: list[Any] = []

        async def one(client: int) -> None:
            for turn in range(4):
                first = 16 * client + 4 * turn
                numbers = range(first, first + 4)
                images = [hostile_image(n // 11) if n % 11 == 0 else GOOD[n % 8] for n in numbers]
                items = [item(image, n % 8) for image, n in zip(images, numbers, strict=True)]
                if turn % 2:
                    answer = (await ask("/v1/score/batch", {"items": items})).json()
                    results.extend(zip(numbers, answer["responses"], strict=True))
                    continue
                answers = await asyncio.gather(*(ask("/v1/score", one) for one in items))
                results.extend((n, a.json()) for n, a in zip(numbers, answers, strict=True))

        await asyncio.gather(*map(one, range(32)))
        return alone, results

    alone, results = asked(work)
    neighbours = [(n, answer) for n, answer in results if n % 11]
    assert len(results) == 512
    assert len(neighbours) == 465
    for number, answer in neighbours:
        assert answer["results"] == alone[number % 8]["results"]
    refused = [answer for n, answer in results if n % 11 == 0 and "error" in answer]
    assert len(refused) > 20
    assert {answer["error"]["type"] for answer in refused} <= {"invalid_request", "too_large"}
