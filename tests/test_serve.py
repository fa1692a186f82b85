"""The service on Ray Serve over HTTP: equal to the PPO actors, whole under load and reloads."""

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import ray
import reward_samples
import serving_samples
from ray import serve
from serving_samples import TEXT, data_uri, png
from websockets.sync.client import connect

from actors.reward import RewardActor
from cluster.serving.deployments import API, ServeArgs, deploy
from cluster.serving.request_heads import CALLBACK, LimitedHeads
from fgaif.config import Config, RewardShapeConfig, with_overrides
from fgaif.data.images import image_bytes
from fgaif.feedback.external import given_response
from fgaif.feedback.segment import segment_response
from fgaif.lvlm.model import load_processor
from fgaif.reward.dense import uncentered_values
from fgaif.types import DEFAULT_KINDS, FloatArray, Prompt

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-tests-0123456789"
AUTH = {"Authorization": f"Bearer {KEY}"}
PROMPT = "Describe this image in detail."
SMALL = ["serve.replicas.cpus=0.1", "serve.ingress_cpus=0.1", "serve.drain_s=5"]


SHAPE = RewardShapeConfig(values="hard", value_hallu=-3.0, repeat_penalty=0.25)


@dataclass(frozen=True)
class Served:
    """A running Serve with both forms of the service, and what they serve."""

    url: str
    rewards: Path
    checkpoint: Path
    config: Config


@pytest.fixture(scope="module")
def served(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    rewards = serving_samples.write_rewards(tiny_llava_dir, folder / "rewards", shape=SHAPE)
    config = with_overrides(reward_samples.settings(tiny_llava_dir), SMALL)
    os.environ["FGAIF_SERVE_KEY"] = KEY
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(CALLBACK)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deploy(config, ServeArgs(rewards=rewards)), name="fgaif", route_prefix="/")
        yield Served(f"http://127.0.0.1:{port}", rewards, tiny_llava_dir, config)
    finally:
        serve.shutdown()
        ray.shutdown()
        for name in ("FGAIF_SERVE_KEY", *CALLBACK):
            del os.environ[name]


def expected(served: Served, kind_dir: Path, content: bytes, text: str) -> FloatArray:
    """Class probabilities (S, K, C) by the three PPO actors."""
    tokenizer = load_processor(served.checkpoint).tokenizer
    prompt = Prompt(id="0", image=image_bytes(content, "test"), text=PROMPT)
    response = given_response("test", prompt, text, tokenizer)
    pair = (response, segment_response(response, tokenizer, 5))
    rows = [
        RewardActor(kind_dir / kind, served.config).score_pairs([pair])[0] for kind in DEFAULT_KINDS
    ]
    return np.stack(rows, axis=1)


def probs(result: dict[str, Any]) -> FloatArray:
    return np.array(
        [
            [[s["kinds"][kind][c] for c in ("none", "ok", "hallu")] for kind in DEFAULT_KINDS]
            for s in result["segments"]
        ]
    )


def score(url: str, content: bytes, text: str | list[str], **more: Any) -> httpx2.Response:
    body = {"image": data_uri(content), "text": text, "prompt": PROMPT}
    return httpx2.post(f"{url}/v1/score", json=body, headers=AUTH, timeout=60, **more)


def test_scores_over_http_equal_the_ppo_actors(served: Served) -> None:
    answer = score(served.url, png(), TEXT)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    assert "".join(segment["text"] for segment in result["segments"]) == TEXT
    assert [s["end"] for s in result["segments"]] == [45, 107, 174, len(TEXT)]
    wanted = expected(served, served.rewards, png(), TEXT)
    assert np.abs(probs(result) - wanted).max() < 1e-5
    values = uncentered_values(wanted, SHAPE, DEFAULT_KINDS)  # all weights are 1
    penalty = SHAPE.repeat_penalty * len(result["segments"])  # no text of the embedded world
    assert result["total"] == pytest.approx(values.sum() - penalty, abs=1e-4)
    for k, kind in enumerate(DEFAULT_KINDS):
        assert result["rewards"][kind] == pytest.approx(values[:, k].sum(), abs=1e-4)


def test_concurrent_requests_batch_without_changing_anything(served: Served) -> None:
    texts = [TEXT[i:] for i in range(0, 40, 2)]
    alone = [probs(score(served.url, png(7), text).json()["results"][0]) for text in texts[:4]]

    async def every() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(headers=AUTH, timeout=60) as client:
            calls = [
                client.post(
                    f"{served.url}/v1/score",
                    json={"image": data_uri(png(7)), "text": text, "prompt": PROMPT},
                )
                for text in texts
            ]
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(every())
    assert {answer.status_code for answer in answers} == {200}
    for answer, single in zip(answers, alone, strict=False):
        assert np.abs(probs(answer.json()["results"][0]) - single).max() < 1e-5
    together = score(served.url, png(7), texts[:4]).json()["results"]
    for result, single in zip(together, alone, strict=True):
        assert np.abs(probs(result) - single).max() < 1e-5


def test_health_models_and_metrics(served: Served) -> None:
    health = httpx2.get(f"{served.url}/healthz", timeout=30)
    assert (health.status_code, health.json()["ready"]) == (200, True)
    (model,) = httpx2.get(f"{served.url}/v1/models", headers=AUTH).json()["models"]
    assert model["version"] == health.json()["version"]
    assert (model["placement"], set(model["cards"])) == ("shared", set(DEFAULT_KINDS))
    assert (model["shape"], model["shape_from"]) == (
        SHAPE.resolved(DEFAULT_KINDS).model_dump(mode="json"),
        "card",
    )
    assert str(served.checkpoint.parent) not in json.dumps(model)  # names, no paths
    assert "fgaif_requests_total" in httpx2.get(f"{served.url}/metrics", headers=AUTH).text


def test_the_key_is_wanted_over_http_and_websocket(served: Served) -> None:
    assert httpx2.get(f"{served.url}/v1/models").status_code == 401
    wrong = {"Authorization": "Bearer no"}
    refused = httpx2.post(f"{served.url}/v1/score", json={}, headers=wrong)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
    with connect(f"ws{served.url[4:]}/v1/score/stream") as stream:
        stream.send(json.dumps({"image": data_uri(png())}))
        assert json.loads(stream.recv(timeout=30))["error"]["type"] == "unauthorized"


def test_a_head_without_end_is_cut_off_and_the_proxy_tells_its_routes(served: Served) -> None:
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as endless:
        endless.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: " + b"a" * (2 * LimitedHeads.head_bytes))
        with suppress(ConnectionResetError):
            assert endless.recv(100) == b""
    # Ray's own, which no key guards: nothing of ours in them but the prefix of our routes.
    routes = httpx2.get(f"{served.url}/-/routes", timeout=30)
    assert (routes.status_code, routes.json()) == (200, {"/": "fgaif"})
    assert httpx2.get(f"{served.url}/-/healthz", timeout=30).text == "success"


def test_a_stream_over_a_websocket_ends_with_the_score(served: Served) -> None:
    whole = score(served.url, png(), TEXT).json()["results"][0]
    with connect(
        f"ws{served.url[4:]}/v1/score/stream", additional_headers=AUTH, open_timeout=30
    ) as stream:
        stream.send(json.dumps({"image": data_uri(png()), "prompt": PROMPT}))
        assert json.loads(stream.recv(timeout=30))["ready"]
        for start in range(0, len(TEXT), 9):
            stream.send(json.dumps({"delta": TEXT[start : start + 9]}))
        stream.send('{"end": true}')
        answers = [json.loads(message) for message in stream]
    *segments, last = answers
    assert np.abs(probs(last["result"]) - probs(whole)).max() < 1e-5
    assert [s["segment"]["text"] for s in segments] == [s["text"] for s in whole["segments"]]
    told = probs({"segments": [s["segment"] for s in segments]})
    assert np.abs(told - probs(whole)).max() < 1e-5


def test_errors_over_http(served: Served) -> None:
    cases = [
        ({"text": "", "image": "x"}, 422, "text"),
        ({"text": "a", "image": "x"}, 422, "image"),
        ({"text": "a </s> b", "image": data_uri(png())}, 422, "text"),
        ({"text": "a " * 3000, "image": data_uri(png())}, 422, "text"),
    ]
    for body, status, field in cases:
        answer = httpx2.post(f"{served.url}/v1/score", json=body, headers=AUTH, timeout=30)
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)
    huge = b"x" * (33 * 2**20)
    answer = httpx2.post(f"{served.url}/v1/score", content=huge, headers=AUTH, timeout=30)
    assert answer.status_code == 413


def test_a_reload_under_load_drops_no_request(served: Served, tmp_path: Path) -> None:
    """Requests before are of the old version, after of the new one, none is of neither."""
    fresh = serving_samples.write_rewards(served.checkpoint, tmp_path / "new", seed=1, shape=SHAPE)
    old = score(served.url, png(), TEXT).json()["model"]["version"]
    seen: list[tuple[int, str]] = []

    async def load(client: httpx2.AsyncClient, stop: asyncio.Event) -> None:
        body = {"image": data_uri(png()), "text": TEXT, "prompt": PROMPT}
        while not stop.is_set():
            answer = await client.post(f"{served.url}/v1/score", json=body)
            seen.append((answer.status_code, answer.json().get("model", {}).get("version")))

    async def scenario() -> Any:
        stop = asyncio.Event()
        async with httpx2.AsyncClient(headers=AUTH, timeout=60) as client:
            users = [asyncio.create_task(load(client, stop)) for _ in range(4)]
            while not seen:
                await asyncio.sleep(0.01)
            for kind in DEFAULT_KINDS:
                shutil.rmtree(served.rewards / kind)
                shutil.copytree(fresh / kind, served.rewards / kind)
            wrong = await client.post(
                f"{served.url}/v1/models/reload", json={"version": "0123456789abcdef"}
            )
            answer = await client.post(f"{served.url}/v1/models/reload", json={})
            before = len(seen)
            while len(seen) <= before + len(users):  # more than were on their way
                await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*users)
        return wrong, answer.json()

    wrong, reloaded = asyncio.run(scenario())
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "version")
    assert (reloaded["previous"], reloaded["replicas"]) == (old, 1)
    assert {status for status, _ in seen} == {200}
    versions = [version for _, version in seen]
    assert set(versions) == {old, reloaded["version"]}
    assert versions[-1] == reloaded["version"]
    result = score(served.url, png(), TEXT).json()["results"][0]
    assert np.abs(probs(result) - expected(served, fresh, png(), TEXT)).max() < 1e-5
    again = httpx2.post(f"{served.url}/v1/models/reload", json={}, headers=AUTH, timeout=60).json()
    assert again["previous"] == again["version"] == reloaded["version"]


def test_a_damaged_folder_is_not_loaded_and_service_goes_on(served: Served) -> None:
    head = served.rewards / "relation" / "reward_head.safetensors"
    content = head.read_bytes()
    head.write_bytes(b"damaged")
    answer = httpx2.post(f"{served.url}/v1/models/reload", json={}, headers=AUTH, timeout=60)
    head.write_bytes(content)
    assert answer.status_code == 422
    assert str(served.rewards) not in answer.text
    assert score(served.url, png(), TEXT).status_code == 200


def test_separate_scorers_equal_the_ppo_actors_and_refuse_what_is_too_much(
    served: Served,
) -> None:
    """Last, because it replaces the application: one deployment per kind, a queue of two."""
    overrides = ["serve.placement=separate", "serve.queue=2", "serve.batch.size=1"]
    config = with_overrides(served.config, overrides)
    serve.run(deploy(config, ServeArgs(rewards=served.rewards)), name="fgaif", route_prefix="/")
    answer = score(served.url, png(), TEXT)
    wanted = expected(served, served.rewards, png(), TEXT)
    assert np.abs(probs(answer.json()["results"][0]) - wanted).max() < 1e-5

    async def flood() -> list[httpx2.Response]:
        body = {"image": data_uri(png()), "text": [TEXT] * 32, "prompt": PROMPT}
        async with httpx2.AsyncClient(headers=AUTH, timeout=60) as client:
            calls = [client.post(f"{served.url}/v1/score", json=body) for _ in range(12)]
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(flood())
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "overloaded"
    assert sum(serve.get_deployment_handle(API, "fgaif").broadcast("drain").results()) == 0
    assert score(served.url, png(), TEXT).status_code == 503
