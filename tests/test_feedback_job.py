"""The annotation job for real: Ray Data, the openai client, a local server that fails on purpose.

The server knows the truth of the drawn scenes, so every label can be checked.
"""

import base64
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from fault_server import Answer, Faults, FaultServer, Http

from cluster.pipeline.annotate import annotate_responses
from fgaif.chat.limits import Usage
from fgaif.chat.store import ReplyStore
from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.data.scenes.captions import write_caption
from fgaif.data.scenes.facts import oracle, parse_facts
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.world import Scene
from fgaif.errors import ConfigError, ServiceError
from fgaif.feedback.store import label_store, response_store
from fgaif.scene_models.tokenizer import build_tokenizer
from fgaif.types import DEFAULT_KINDS, LabeledResponse, Prompt, Response

ROWS = 200
TOKENIZER = build_tokenizer()
_LINE = re.compile(r"^(\d+)\. (.*)$", re.MULTILINE)


class World:
    """Drawn scenes, captions about other scenes (so that some facts are false), and the truth."""

    def __init__(self, folder: Path, count: int = ROWS) -> None:
        write_split(folder, "test", count)
        self.scenes = read_scenes(folder / "scenes.jsonl")
        self.names = sorted(self.scenes)
        self.images = {name: image_ref(folder / "images" / f"{name}.png") for name in self.names}
        self.by_hash = {self.images[name].sha256: self.scenes[name] for name in self.names}

    def responses(self) -> list[Response]:
        return [self._response(index) for index in range(len(self.names))]

    def _response(self, index: int) -> Response:
        name, other = self.names[index], self.names[index - 1 if index % 2 else index]
        text = write_caption(self.scenes[other], random.Random(index))
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        return Response(
            prompt=Prompt(id=name, image=self.images[name], text="Describe this image."),
            sample=0,
            text=text,
            token_ids=np.array([*ids, TOKENIZER.eos_token_id]),
            rollout_logprobs=np.zeros(len(ids) + 1, dtype=np.float32),
            finish="stop",
            policy_version=0,
        )

    def answer(self, body: dict[str, Any]) -> Answer:
        """What a perfect model replies: facts of the numbered segments, or yes and no."""
        content = body["messages"][-1]["content"]
        if isinstance(content, str):
            return Answer(text=_facts(content))
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        text = next(part["text"] for part in content if part["type"] == "text")
        scene = self.by_hash[hashlib.sha256(base64.b64decode(url.split(",")[1])).hexdigest()]
        fact = text.removeprefix("Statement: ").removesuffix(" Is this right?")
        return _verdict(scene, fact)


def _facts(prompt: str) -> str:
    lines = _LINE.findall(prompt.rsplit("Description", 1)[-1])
    entries = []
    for _, text in lines:
        facts, _ = parse_facts(text, 0)
        entries.append({kind: [f.text for f in facts if f.kind == kind] for kind in DEFAULT_KINDS})
    return json.dumps({"segments": entries})


def _verdict(scene: Scene, fact: str) -> Answer:
    yes, no = ("yes", "no") if oracle(scene, fact) is not False else ("no", "yes")
    return Answer(text=yes.capitalize(), first_token=((f" {yes}", -0.05), (f" {no}", -3.02)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def settings(folder: Path, base_url: str, **endpoint: Any) -> Config:
    # Where nothing hangs, a machine that is busy must not make it look so.
    common = {"concurrency": 32, "timeout_s": 60.0, "backoff_s": 0.01, "attempts": 14}
    return parse_config(
        {
            "name": "job",
            "dir": str(folder),
            "segment": {"min_words": 4},
            "feedback": {"extractor": "api:local", "verifier": "api:local"},
            "endpoints": {"local": {"model": "truth", "base_url": base_url} | common | endpoint},
        }
    )


def prepare(config: Config, world: World) -> None:
    store = response_store(config.run_dir / "responses" / "responses.jsonl")
    store.append(world.responses())


def run(config: Config, seen: list[tuple[int, int, Usage | None]] | None = None) -> None:
    labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
    said = seen if seen is not None else []
    annotate_responses(config, labels, TOKENIZER, None, "", lambda *now: said.append(now))


def label_bytes(config: Config) -> bytes:
    return (config.run_dir / "feedback" / "labels.jsonl").read_bytes()


def judged(config: Config) -> list[tuple[Any, ...]]:
    """Everything that matters of the label table, without what was lost on the way to it."""
    return [_judged(item) for item in label_store(config.run_dir / "feedback" / "labels.jsonl")]


def _judged(item: LabeledResponse) -> tuple[Any, ...]:
    verdicts = {text: (v.answer, v.p_yes) for text, v in item.verdicts.items()}
    return (item.response.id, item.segments, item.facts, verdicts, item.labels.tolist())


@pytest.fixture(scope="module")
def undisturbed(
    world: World, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, FaultServer]:
    """A run in which nothing went wrong, and what its server saw."""
    with FaultServer(world.answer) as server:
        config = settings(tmp_path_factory.mktemp("quiet"), server.base_url)
        prepare(config, world)
        seen: list[tuple[int, int, Usage | None]] = []
        run(config, seen)
    assert seen[-1][:2] == (ROWS, ROWS)
    assert seen[-1][2].replies == sum(server.replies.values())
    return config, server


@pytest.mark.slow
def test_labels_are_the_truth_and_each_question_is_put_once(
    undisturbed: tuple[Config, FaultServer], world: World
) -> None:
    config, server = undisturbed
    assert set(server.requests.values()) == {1}
    assert sum(server.requests.values()) >= 1500
    found = set()
    for item in label_store(config.run_dir / "feedback" / "labels.jsonl"):
        scene = world.scenes[item.response.prompt.id]
        for text, verdict in item.verdicts.items():
            assert (verdict.answer == "yes") == (oracle(scene, text) is not False)
            assert verdict.p_yes == pytest.approx(0.951 if verdict.answer == "yes" else 0.049, 1e-2)
        found |= set(item.labels.ravel().tolist())
    assert found == {0, 1, 2}
    again = server.requests.total()
    run(config)  # nothing to do: no request, no row
    assert server.requests.total() == again
    folder = config.run_dir / "feedback"
    assert sum(log.stat().st_size for log in folder.glob("replies.sqlite-wal")) == 0


@pytest.mark.long
def test_a_third_of_all_requests_failing_changes_no_label(
    undisturbed: tuple[Config, FaultServer], world: World, tmp_path: Path
) -> None:
    faults = Faults(rate=0.3, seed=7)
    with FaultServer(world.answer, faults) as server:
        config = settings(tmp_path, server.base_url, timeout_s=2.0)
        prepare(config, world)
        run(config)
    assert set(server.faulty) == set(faults.kinds)  # every kind of fault happened
    assert server.requests.total() >= 2000
    assert server.faulty.total() / server.requests.total() == pytest.approx(0.3, abs=0.03)
    assert judged(config) == judged(undisturbed[0])
    with ReplyStore(config.run_dir / "feedback" / "replies.sqlite") as store:
        assert store.failures == 0


@pytest.mark.slow
def test_a_worker_killed_at_random_moments_pays_for_nothing_twice(
    undisturbed: tuple[Config, FaultServer], world: World, tmp_path: Path
) -> None:
    quiet, reference = undisturbed
    moments = sorted(random.Random(3).sample(range(50, reference.requests.total()), 4))
    with FaultServer(world.answer) as server:
        config = settings(tmp_path, server.base_url)
        prepare(config, world)
        killed: list[int] = []
        stop = threading.Event()
        killer = threading.Thread(target=kill_at, args=(config, server, moments, killed, stop))
        killer.start()
        try:
            run(config)
        finally:
            stop.set()
            killer.join()
    assert len(set(killed)) == len(moments)
    assert label_bytes(config) == label_bytes(quiet)
    assert set(server.requests) == set(reference.requests)
    # Only what was on its way when the worker died is asked again.
    assert server.requests.total() - len(server.requests) <= 128 * len(moments)


def kill_at(
    config: Config,
    server: FaultServer,
    moments: list[int],
    killed: list[int],
    stop: threading.Event,
) -> None:
    for moment in moments:
        while server.requests.total() < moment or (pid := worker(config)) in {None, *killed}:
            if stop.wait(0.002):
                return
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)


def worker(config: Config) -> int | None:
    path = config.run_dir / "feedback" / "progress.json"
    return json.loads(path.read_text())["pid"] if path.exists() else None


@pytest.mark.long
def test_a_job_killed_as_a_whole_ends_with_the_same_bytes(
    undisturbed: tuple[Config, FaultServer], world: World, tmp_path: Path
) -> None:
    quiet, reference = undisturbed
    share = random.Random(11).uniform(0.2, 0.8)
    with FaultServer(world.answer, latency_s=0.01) as server:
        config = settings(tmp_path, server.base_url)
        prepare(config, world)
        start = partial(subprocess.Popen, [sys.executable, __file__, config.model_dump_json()])
        job = start(start_new_session=True)
        while server.requests.total() < share * reference.requests.total():
            assert job.poll() is None, "the job ended before it was killed"
            time.sleep(0.005)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert start().wait() == 0
    assert label_bytes(config) == label_bytes(quiet)
    # What was asked, or answered and not yet on the disk; how much is up to the machine.
    assert server.requests.total() - len(server.requests) <= 128


def test_a_missing_key_is_said_before_anything_starts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("ray.data.from_items", None)
    config = settings(tmp_path, "https://api.example.com/v1")
    prepare(config, world)
    with pytest.raises(ConfigError, match=r"endpoints\.local: no key .* OPENAI_API_KEY"):
        run(config)


def test_a_wrong_key_stops_the_job_with_the_fix_and_keeps_what_was_paid(
    local_ray: None, world: World, tmp_path: Path
) -> None:
    def refuse_after_a_while(body: dict[str, Any]) -> Answer | Http:
        if server.replies.total() < 100:
            return world.answer(body)
        return Http(status=401, body={"error": {"message": "Incorrect API key provided: sk-x"}})

    with FaultServer(refuse_after_a_while) as server:
        config = settings(tmp_path, server.base_url)
        prepare(config, world)
        with pytest.raises(ServiceError, match="OPENAI_API_KEY"):
            run(config)
    with ReplyStore(config.run_dir / "feedback" / "replies.sqlite") as store:
        assert len(store) >= 100


def test_a_budget_stops_the_job_and_a_larger_one_goes_on(
    local_ray: None, world: World, tmp_path: Path
) -> None:
    prices = {"price_input": 1000.0, "price_output": 1000.0}  # 0.11 a reply
    with FaultServer(world.answer) as server:
        config = settings(tmp_path, server.base_url, **prices)
        prepare(config, world)
        low = config.model_copy(
            update={"feedback": config.feedback.model_copy(update={"max_cost": 20.0})}
        )
        with pytest.raises(ServiceError, match="max-cost"):
            run(low)
        paid = server.replies.total()
        assert paid <= 20.0 / 0.11
        with pytest.raises(ServiceError, match="max-cost"):
            run(low)  # what was spent before counts; what was only reserved may be spent now
        assert paid <= server.replies.total() <= 20.0 / 0.11


if __name__ == "__main__":  # the job of the test above, in a process of its own
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    run(parse_config(json.loads(sys.argv[1])))
