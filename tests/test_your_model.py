"""docs/your-model.md, read by a test: its commands, on a small model, and its table of GPUs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlavaConfig

from cluster.memory.devices import parse_assumed
from cluster.memory.plan import plan_memory
from cluster.placement import ROLES
from fgaif.config import load_config
from fgaif.lvlm.sizes import config_facts
from fgaif.types import Json

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^## (\d+)\. (.*?)$(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
ELSEWHERE = ("make install", ". .venv/bin/activate", "hf download")
"""Commands that need a network or another environment: what they bring is put in place."""
SMALL: Json = {
    "data": {"feedback_prompts": 6, "ppo_prompts": 6, "eval_prompts": 2},
    "policy": {"max_new_tokens": 16, "lora": {"r": 4}, "gradient_checkpointing": False},
    # A random model writes no JSON: whole segments are its facts.
    "feedback": {"extractor": "segment"},
    "segment": {"min_words": 2},
    "reward": {
        "lora": {"r": 4}, "batch_size": 4, "epochs": 1, "evals": 1, "patience": 1,
        "val_fraction": 0.4, "gpus_per_worker": 0,
    },
    "ppo": {"steps": 1, "rollout_batch": 2, "minibatch": 2, "epochs": 1, "warmup_steps": 0},
    "cluster": {
        "local_cpus": 2,
        **{role: {"cpus": 0.2, "gpus": 0} for role in ("rollout", "judge", "reference", "learner")},
        "reward": {"cpus": 0.1, "gpus": 0},
        # Four prompts of 590 tokens fit into one pass: vLLM cannot cut seeded ones on the CPU.
        "engine": {"max_num_seqs": 4, "max_model_len": 1024},
    },
}  # fmt: skip


def commands(text: str) -> list[str]:
    """Lines of the shell blocks without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_there_are_ten_steps_with_commands() -> None:
    assert [int(number) for number, _, _ in STEPS] == list(range(1, 11))
    assert all(commands(text) for _, _, text in STEPS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((docs/[\w.-]+\.md)", readme)
    assert links[0] == "docs/your-model.md"


def test_keys_that_the_page_names_exist() -> None:
    for key, value in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)=([^` ]+)`", PAGE):
        if not value.isupper() and "NAME" not in value:
            load_config(None, [f"{key}={value}"])


def table() -> list[list[str]]:
    """Rows of the table of GPUs: devices, configuration, overrides, whether it fits, GiB."""
    rows = re.findall(r"^\| (\d+x\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    return [[gpus, *(cell.strip(" `") for cell in rest.split("|"))] for gpus, rest in rows]


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_of_gpus_is_what_the_plan_says(row: list[str]) -> None:
    gpus, file, overrides, fits, most = row
    large = LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )
    models = {
        "checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig()),
        "checkpoints/llava-1.5-13b-hf": config_facts(LlavaConfig(text_config=large)),
    }
    config = load_config(ROOT / "configs" / file, overrides.split())
    plan = plan_memory(config, ROLES, parse_assumed(gpus), models)
    assert (fits == "yes") == (not plan.problems)
    peak = max(load.total for load in plan.loads if load.gpu is not None)
    assert most == f"{peak / 2**30:.0f} GiB"


def merged(tree: Json, over: Json) -> Json:
    """``over`` laid over ``tree``, mapping by mapping."""
    both: dict[str, Any] = dict(tree)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(value, dict) and old else value
    return both


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, llava15_dir: Path, photos: Path) -> Path:
    """A folder like a checkout with what the page's reader brings: a checkpoint and photographs."""
    root = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", root / "configs")
    file = root / "configs" / "my_images.yaml"
    file.write_text(yaml.safe_dump(merged(yaml.safe_load(file.read_text()), SMALL)))
    shutil.copytree(llava15_dir, root / "checkpoints" / "llava-1.5-7b-hf")
    images = root / "my_data" / "images"
    images.mkdir(parents=True)
    pictures = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]
    rng = np.random.default_rng(0)
    for index in range(90):
        picture = pictures[index % len(pictures)]
        left, top = (int(rng.integers(side // 2)) for side in picture.size)
        box = (left, top, left + picture.width // 2, top + picture.height // 2)
        picture.crop(box).resize((64, 64)).save(images / f"{index}.jpg")
    (root / "bin").mkdir()
    shim = root / "bin" / "fgaif"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fgaif "$@"\n')
    shim.chmod(0o755)
    return root


@pytest.mark.long
def test_every_step_does_what_it_says(place: Path) -> None:
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    printed: dict[int, str] = {}
    for number, _, text in STEPS:
        for command in commands(text):
            if command.startswith(ELSEWHERE):
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=place, env=environment, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            # The doctor speaks of this machine, which may lack what a run needs.
            if command != "fgaif doctor":
                said = f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
                assert done.returncode == 0, said
            printed[int(number)] = printed.get(int(number), "") + done.stdout + done.stderr
    assert "wrote my_data/train.jsonl: 81 prompts" in printed[3]
    assert "GPU" in printed[4]
    assert (place / "runs" / "rehearsal" / "report" / "report.html").is_file()
    assert (place / "runs" / "my_images" / "feedback" / "audit" / "audit.html").is_file()
    assert "annotate: up to date" in printed[7]
    assert "finished" in printed[8]
    assert "judged by the verifier llava-1.5-7b-hf" in printed[9]
    assert "/v1" in printed[10]
    assert (place / "my-llava" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForImageTextToText.from_pretrained(place / "my-llava")
    AutoProcessor.from_pretrained(place / "my-llava")
