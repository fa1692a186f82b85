"""The service on Ray Serve over HTTP: equal to the PPO actors, whole under load and reloads."""

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import ray
import reward_samples
import serving_samples
from ray import serve
from serving_samples import TEXT, data_uri, png

from actors.reward import RewardActor
from cluster.serve import ServeArgs, deploy
from fgaif.config import Config, with_overrides
from fgaif.data.images import image_bytes
from fgaif.feedback.given import given_response
from fgaif.feedback.segment import segment_response
from fgaif.lvlm.model import load_processor
from fgaif.types import KINDS, FloatArray, Prompt

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-tests-0123456789"
AUTH = {"Authorization": f"Bearer {KEY}"}
PROMPT = "Describe this image in detail."
SMALL = ["serve.replicas.cpus=0.1", "serve.ingress_cpus=0.1", "serve.drain_s=5"]


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
    rewards = serving_samples.write_rewards(tiny_llava_dir, folder / "rewards")
    shutil.copytree(rewards, folder / "separate")
    config = with_overrides(reward_samples.settings(tiny_llava_dir), SMALL)
    os.environ["FGAIF_SERVE_KEY"] = KEY
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deploy(config, ServeArgs(rewards=rewards)), name="fgaif", route_prefix="/")
        yield Served(f"http://127.0.0.1:{port}", rewards, tiny_llava_dir, config)
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ["FGAIF_SERVE_KEY"]


def expected(served: Served, kind_dir: Path, content: bytes, text: str) -> FloatArray:
    """Class probabilities (S, K, C) by the three PPO actors."""
    tokenizer = load_processor(served.checkpoint).tokenizer
    prompt = Prompt(id="0", image=image_bytes(content, "test"), text=PROMPT)
    response = given_response("test", prompt, text, tokenizer)
    pair = (response, segment_response(response, tokenizer, 5))
    rows = [RewardActor(kind_dir / kind, served.config).score_pairs([pair])[0] for kind in KINDS]
    return np.stack(rows, axis=1)


def probs(result: dict[str, Any]) -> FloatArray:
    return np.array(
        [
            [[s["kinds"][kind][c] for c in ("none", "ok", "hallu")] for kind in KINDS]
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
    values = wanted[..., 1] - wanted[..., 2]  # all weights are 1
    assert result["total"] == pytest.approx(values.sum(), abs=1e-4)
    for k, kind in enumerate(KINDS):
        assert result["rewards"][kind] == pytest.approx(values[:, k].sum(), abs=1e-4)
