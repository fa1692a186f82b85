"""Models by their names at the hub: against a server on loopback and a cache of one's own."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, online
from huggingface_hub import constants

from cluster.cli.main import _load
from fgaif.config import load_config
from fgaif.errors import CheckpointError
from fgaif.lvlm import hub
from fgaif.lvlm.adapters import read_adapter_config
from fgaif.lvlm.export import export_merged
from fgaif.lvlm.model import attach_lora, load_lvlm, resolve_checkpoint, split_model
from fgaif.reward.checkpoint import make_card

FIRST, SECOND = "1" * 40, "2" * 40
NAME = "someone/tiny-llava"


@pytest.fixture
def fake(tiny_llava_dir: Path, tmp_path: Path) -> FakeHub:
    """A hub with two commits of a model, and what else repositories hold beside the weights."""
    fake = FakeHub(NAME)
    for commit in (FIRST, SECOND):
        folder = tmp_path / "origin" / commit
        shutil.copytree(tiny_llava_dir, folder)
        (folder / "README.md").write_text(commit)
        for unsafe in ("modeling_llava.py", "pytorch_model.bin", "training_args.pt"):
            (folder / unsafe).write_bytes(b"no")
        (folder / "original").mkdir()
        (folder / "original" / "weights.safetensors").write_bytes(b"twice as large")
        fake.folders[commit] = folder
    fake.branches["main"] = FIRST
    return fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def connected(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with online(fake, cache, monkeypatch):
        yield fake


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llava-hf/llava-1.5-7b-hf@main", ("llava-hf/llava-1.5-7b-hf", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("checkpoints/llava-1.5-7b-hf", None),
        ("scenes:policy", None),
        ("../a/b@main", None),
        ("a/b@../../c", None),
        ("a@main", None),
        ("a/b/c@main", None),
    ],
)
def test_names_of_the_hub_have_a_revision(name: str, parts: tuple[str, str] | None) -> None:
    assert hub.split_name(name) == parts


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b@main").mkdir(parents=True)
    assert hub.split_name("a/b@main") is None


def test_only_weights_and_texts_are_taken(connected: FakeHub, cache: Path) -> None:
    folder = resolve_checkpoint(f"{NAME}@main")
    assert folder == cache / "models--someone--tiny-llava" / "snapshots" / FIRST
    taken = {file.name for file in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= taken
    assert not {"modeling_llava.py", "pytorch_model.bin", "training_args.pt", "original"} & taken
    assert not any(path.endswith((".py", ".bin", ".pt")) for path in connected.asked)
    assert hub.hub_name(folder) == (NAME, FIRST)
    assert hub.model_name(folder) == hub.reference(folder) == f"{NAME}@{FIRST}"


def test_a_branch_is_pinned_once_and_moves_for_the_next_run(connected: FakeHub) -> None:
    overrides = [f"policy.model={NAME}@main", f"feedback.verifier=[{NAME}@main, api:x]"]
    endpoint = ["endpoints.x={base_url: http://127.0.0.1:1/v1, model: m}"]
    config = load_config(None, [*overrides, *endpoint])
    run = hub.pin_models(config)
    assert run.policy.model == run.reward_backbone == f"{NAME}@{FIRST}"
    assert run.feedback.verifiers == (f"{NAME}@{FIRST}", "api:x")
    assert hub.pin_models(run) is run
    connected.branches["main"] = SECOND
    assert resolve_checkpoint(run.policy.model).name == FIRST
    assert hub.pin_models(config).policy.model == f"{NAME}@{SECOND}"


def test_what_is_in_the_cache_is_used_without_the_hub(
    connected: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_checkpoint(f"{NAME}@main")
    hub._folder.cache_clear()
    asked = len(connected.asked)
    assert resolve_checkpoint(f"{NAME}@{FIRST}") == folder
    assert len(connected.asked) == asked  # a commit never changes
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub._folder.cache_clear()
        assert resolve_checkpoint(f"{NAME}@main") == folder
        assert hub.pinned(f"{NAME}@main") == f"{NAME}@{FIRST}"
        with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set: .*`hf download .*`"):
            resolve_checkpoint(f"{NAME}@{SECOND}")
        (folder / "model.safetensors").unlink()
        hub._folder.cache_clear()
        with pytest.raises(CheckpointError, match="only some of its files"):
            resolve_checkpoint(f"{NAME}@main")


def test_the_download_that_is_advised_is_all_that_is_needed(
    connected: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as refused:
            resolve_checkpoint(f"{NAME}@main")
    program, *arguments = shlex.split(str(refused.value).split("`")[1])
    address = f"http://127.0.0.1:{connected.server.server_port}"
    where = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    subprocess.run(command, env=os.environ | where, check=True, capture_output=True, timeout=100)
    asked = len(connected.asked)
    assert resolve_checkpoint(f"{NAME}@{FIRST}").name == FIRST
    assert len(connected.asked) == asked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{NAME}@gone", f"no such branch, tag or commit; its newest is {NAME}@main"),
        ("someone/else@main", "no such repository, or it is private"),
        ("someone/gated@main", "asks for an agreement first: accept it at .*/someone/gated"),
        ("some--one/else@main", "no name of a repository"),
    ],
)
def test_what_the_hub_does_not_give_is_said(connected: FakeHub, name: str, said: str) -> None:
    for ask in (resolve_checkpoint, hub.pinned):
        with pytest.raises(CheckpointError, match=said):
            ask(name)


def test_a_model_that_is_no_llava_is_refused_as_in_a_folder(connected: FakeHub) -> None:
    (connected.folders[FIRST] / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'"):
        resolve_checkpoint(f"{NAME}@main")


def test_a_bare_name_says_how_one_of_the_hub_is_written() -> None:
    with pytest.raises(CheckpointError, match=r"as ORG/NAME@REVISION"):
        resolve_checkpoint("llava-hf/llava-1.5-7b-hf")


def test_the_command_line_pins_what_it_loads(connected: FakeHub) -> None:
    del connected
    assert _load(None, [f"policy.model={NAME}@main"]).policy.model == f"{NAME}@{FIRST}"


def test_cards_and_adapters_name_the_commit(connected: FakeHub, tmp_path: Path) -> None:
    del connected
    name = f"{NAME}@{FIRST}"
    folder, config = resolve_checkpoint(name), load_config(None, [f"policy.model={name}"])
    digests = dict.fromkeys(("backbone_digest", "tokenizer_digest", "input_digest"), "")
    data: Any = SimpleNamespace(flips=None)
    assert make_card("object", config, data, **digests, metrics={}).backbone == name
    policy = attach_lora(load_lvlm(folder), config.policy.lora, 0)
    for weight in (value for value in policy.parameters() if value.requires_grad):
        torch.nn.init.normal_(weight)
    hub.name_base(policy, name)
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    written = read_adapter_config(tmp_path / "adapter")
    assert (written.base_model_name_or_path, written.revision) == (NAME, FIRST)
    export_merged(folder, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"base checkpoint: `{name}`" in readme
    assert str(tmp_path) not in readme
    moved, adapter = resolve_checkpoint(f"{NAME}@{SECOND}"), tmp_path / "adapter"
    with pytest.raises(CheckpointError, match=f"give the base as {name}"):
        export_merged(moved, adapter, tmp_path / "other", dtype="float32")
    with pytest.raises(CheckpointError, match=f"give the base as {name}"):
        split_model(f"{NAME}@{SECOND}+{adapter}", "--model")
    assert split_model(f"{name}+{adapter}", "--model") == (folder, adapter)
