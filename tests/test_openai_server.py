"""vLLM's real OpenAI server on loopback, the real client, and the same labels as our own actors."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import DirectChat, judge_actor
from test_feedback_job import TOKENIZER, World

from actors.deepspeed_setup import free_port
from actors.openai_server import server_command, server_environment
from fgaif.chat.messages import ChatModel, ChatRequest, gather_all
from fgaif.chat.store import ReplyStore
from fgaif.config import Config, load_config
from fgaif.errors import ConfigError
from fgaif.feedback.models import FeedbackModels
from fgaif.feedback.segment import segment_response
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.types import LabeledResponse

SCENES = Path(__file__).parents[1] / "configs" / "scenes.yaml"
ROWS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``fgaif openai-server scenes:verifier`` in a process of its own."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "fgaif", "openai-server", "scenes:verifier"]
    command += ["--name", "eyes", "--port", str(port), "cluster.engine.max_model_len=512"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def settings(*overrides: str) -> Config:
    return load_config(SCENES, ["cluster.engine.max_model_len=512", *overrides])


def label(config: Config, world: World, local: ChatModel | None, store: Path) -> list[Any]:
    async def job() -> list[LabeledResponse]:
        with ReplyStore(store) as replies:
            annotator = FeedbackModels(config, replies, local).annotator()
            responses = world.responses()[:ROWS]
            return await gather_all(
                annotator.annotate(response, segment_response(response, TOKENIZER, 4))
                for response in responses
            )

    return asyncio.run(job())


@pytest.mark.long
def test_api_and_own_actors_give_the_same_labels(server: str, tmp_path: Path) -> None:
    world = World(tmp_path / "scenes", ROWS)
    api = settings(
        "endpoints.eyes.model=eyes",
        f"endpoints.eyes.base_url={server}",
        "feedback.verifier=api:eyes",
    )
    served = label(api, world, None, tmp_path / "served.sqlite")
    judge = judge_actor(resolve_checkpoint("scenes:verifier"), 512)
    own = label(settings(), world, DirectChat(judge), tmp_path / "own.sqlite")
    for first, second in zip(served, own, strict=True):
        assert first.labels.tolist() == second.labels.tolist()
        for text, verdict in first.verdicts.items():
            assert verdict.problem == ""
            assert verdict.p_yes == pytest.approx(second.verdicts[text].p_yes, abs=1e-3)
    assert {v.answer for item in served for v in item.verdicts.values()} == {"yes", "no"}
    check_written_json(api, tmp_path)


def check_written_json(api: Config, folder: Path) -> None:
    """The server holds a reply to the schema that is asked for."""
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["object", "relation"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    request = ChatRequest(
        prompt_version="test", subject="x", text="Which kind?", schema=schema, max_tokens=60
    )

    async def ask() -> str:
        with ReplyStore(folder / "json.sqlite") as store:
            return (await FeedbackModels(api, store, None)._chat("api:eyes").ask(request)).text

    assert asyncio.run(ask()) in ('{"kind":"object"}', '{"kind":"relation"}')


def test_the_command_has_the_engine_settings_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    model = resolve_checkpoint("scenes:verifier")
    command = server_command(model, "eyes", settings(), "0.0.0.0", 8123)
    joined = " ".join(command)
    assert "--served-model-name eyes --host 0.0.0.0 --port 8123" in joined
    assert f"--model {model}" in joined
    assert "secret-key" not in joined
    assert server_environment()["VLLM_API_KEY"] == "secret-key"


def test_an_address_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    model = resolve_checkpoint("scenes:verifier")
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: .*VLLM_API_KEY"):
        server_command(model, "eyes", settings(), "0.0.0.0", 8123)
