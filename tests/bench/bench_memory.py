"""Peak memory of every role against the memory plan, on random LLaVAs of three sizes, on the CPU.

    python tests/bench/bench_memory.py [--roles learner,reference] [--sizes 25M,300M]
                                       [--dtypes bfloat16] [--out memory.json]

Each role runs in a process of its own. It first does the work once with a tiny model, so that
libraries are loaded; what the process holds then is its constant (``process``), and what it holds
beyond that with the real model is compared with the plan's other parts. Held are anonymous pages
at their peak, and pages of the mapped checkpoint as long as they are used: pages of files that were
only read belong to the system's cache. Results of earlier calls in ``--out`` are kept.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import tiny
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster.memory.actors import MIB, PARTS, PROMPT_TEXT, actor_memory
from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.lvlm.inputs import Encoder, load_encoder
from fgaif.lvlm.sizes import read_facts
from fgaif.types import DEFAULT_KINDS as KINDS
from fgaif.types import LabeledResponse, Prompt, Response, Segment

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SIZES = {  # hidden, MLP, layers, vocabulary; vision hidden, layers
    "25M": (384, 1024, 8, 8192, 256, 6),
    "100M": (768, 2048, 10, 16384, 256, 6),
    "300M": (1024, 2816, 18, 32064, 384, 8),
}
DTYPES = ("float32", "bfloat16")
ROLES = ("rollout", "judge", "learner", "reference", "reward", "shared", "trainer")
"""``shared`` is the scorer of all kinds, ``reward`` that of one."""
IMAGE_SIZE, TOKENS, ROWS, IMAGES = 112, 192, 4, 4
KV_CACHE_MIB = 64
LONGEST = (IMAGE_SIZE // 14) ** 2 + PROMPT_TEXT + TOKENS + 1
"""Tokens of an engine's context: what a probe of the longest response takes."""
POLL_S = 0.002


def build(folder: Path, shape: Sequence[int], dtype: str) -> Path:
    """Write a random LLaVA in the dtype that it is run in."""
    from safetensors.torch import load_file, save_file
    from torch import bfloat16

    hidden, ffn, layers, vocabulary, vision, vision_layers = shape
    tokenizer = tiny.llama_tokenizer()
    config = tiny._config(tokenizer, vocabulary, width=64, image_size=IMAGE_SIZE, max_length=2048)
    text, tower = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, ffn, layers
    text.num_attention_heads = text.num_key_value_heads = hidden // 64
    text.head_dim, text.initializer_range = 64, 0.02
    tower.hidden_size, tower.intermediate_size, tower.projection_dim = vision, 4 * vision, vision
    tower.num_hidden_layers, tower.num_attention_heads = vision_layers, vision // 64
    tiny._save(folder, config, tokenizer, 0)
    if dtype == "bfloat16":
        file = folder / "model.safetensors"
        weights = {name: value.to(bfloat16) for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def configuration(model: Path, role: str, dtype: str, run_dir: Path) -> Config:
    """The settings of a run, with as many images as the benchmark shows."""
    lora = {"r": 16, "alpha": 16.0}
    return parse_config(
        {
            "dir": str(run_dir),
            "data": {"feedback_prompts": IMAGES, "ppo_prompts": IMAGES},
            "policy": {
                "model": str(model),
                "dtype": dtype,
                "lora": lora,
                "max_new_tokens": TOKENS,
                "gradient_checkpointing": dtype == "bfloat16",
            },
            "feedback": {"verifier": str(model)},
            "reward": {
                "lora": lora, "batch_size": ROWS, "micro_batch": ROWS, "epochs": 2, "evals": 1,
                "val_fraction": 0.3,
            },
            "ppo": {
                "rollout_batch": ROWS, "minibatch": ROWS, "micro_batch": ROWS, "epochs": 1,
                "value_lora": lora,
            },
            "cluster": {
                "reward": {"shared": role == "shared"},
                "engine": {
                    "max_num_seqs": ROWS, "max_model_len": LONGEST, "kv_cache_mib": KV_CACHE_MIB,
                },
            },
        }
    )  # fmt: skip


def encoder_of(model: Path) -> Encoder:
    """The encoder that the roles use."""
    return load_encoder(model, max_image_pixels=10**8)


def answers(model: Path, folder: Path) -> list[Response]:
    """Responses of the greatest length to prompts of the planned length, an image each."""
    rng = np.random.default_rng(0)
    encoder = encoder_of(model)
    text, length = "Describe this image", read_facts(model).image_tokens + PROMPT_TEXT
    blank = folder / "blank.png"
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(blank)
    asked = Prompt(id="blank", image=image_ref(blank), text=text)
    while len(encoder.prompt_ids(replace(asked, text=text + " image"))) <= length:
        text += " image"
    found = []
    for index in range(IMAGES):
        path = folder / f"{index}.png"
        pixels = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found.append(
            Response(
                prompt=Prompt(id=path.stem, image=image_ref(path), text=text),
                sample=0,
                text="",
                token_ids=rng.integers(10, 250, TOKENS),
                rollout_logprobs=np.zeros(TOKENS, np.float32),
                finish="length",
                policy_version=0,
            )
        )
    return found


def segments(config: Config) -> tuple[Segment, ...]:
    """As short as the configuration lets sub-sentences be."""
    size = config.segment.min_words
    return tuple(
        Segment(
            index=index, char_start=0, char_end=0, token_start=start, token_end=start + size
        )
        for index, start in enumerate(range(0, TOKENS - size + 1, size))
    )  # fmt: skip


Work = Callable[[Config, list[Response], Path], object]
"""Does all that a role does; returns what is to stay alive."""


def rollout(config: Config, responses: list[Response], folder: Path) -> object:
    """Sample, take a version of the weights, score a probe, sample again."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from actors.rollout import RolloutActor
    from fgaif.lvlm.model import attach_lora
    from fgaif.lvlm.weights import make_manifest
    from fgaif.types import GenerationRequest

    model = Path(config.policy.model)
    with torch.device("meta"):
        bare = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(model))
        adapter = attach_lora(bare, config.policy.lora, 0)
    tensors = {
        name: np.full(tuple(value.shape), 1e-3, np.float32)
        for name, value in adapter.named_parameters()
        if value.requires_grad
    }
    del bare, adapter
    engine = RolloutActor(model, config)
    asked = [
        GenerationRequest(prompt=response.prompt, seed=index, max_new_tokens=TOKENS)
        for index, response in enumerate(responses * 2)
    ]
    engine.generate(asked)
    manifest = make_manifest(tensors, scaling=1.0, version=1)
    del tensors  # the learner's; an engine has the version alone
    engine.load_weights(manifest, responses)
    engine.generate(asked)
    return engine


def judge(config: Config, responses: list[Response], folder: Path) -> object:
    """Answer yes/no questions."""
    from actors.judge import JudgeActor
    from fgaif.chat.messages import ChatRequest

    engine = JudgeActor(Path(config.policy.model), config)
    engine.answer(
        [
            ChatRequest(
                subject=f"q{index}", system="", text=response.prompt.text,
                image=response.prompt.image, yes_no=True, max_tokens=1, prompt_version="none",
            )
            for index, response in enumerate(responses * 8)
        ]
    )  # fmt: skip
    return engine


def learner(config: Config, responses: list[Response], folder: Path) -> object:
    """Log-probs and two updates, so that moments are there in the second."""
    from ppo_world import make_train_batch

    from actors.deepspeed_setup import free_port
    from actors.learner import LearnerActor

    actor = LearnerActor(config, 0, 1, "127.0.0.1", free_port())
    batch = make_train_batch(responses, actor.logprobs(responses))
    for _ in range(2):
        actor.update(batch, [])
    return actor


def reference(config: Config, responses: list[Response], folder: Path) -> object:
    """Reference log-probs, values, and two updates of the values."""
    from ppo_world import make_train_batch

    from actors.reference import ReferenceActor

    actor = ReferenceActor(config, folder)
    found = actor.evaluate(responses)
    batch = make_train_batch(responses, [row.reference_logprobs for row in found])
    for _ in range(2):
        actor.update_values(batch)
    return actor


def reward(config: Config, responses: list[Response], folder: Path) -> object:
    """Score every segment, twice."""
    from actors.reward import RewardActor, SharedRewardActor

    shared = config.cluster.reward.shared
    where = folder / "rewards"
    actor = SharedRewardActor(where, config) if shared else RewardActor(where / KINDS[0], config)
    for _ in range(2):
        actor.score(responses, [segments(config)] * len(responses))
    return actor


def trainer(config: Config, responses: list[Response], folder: Path) -> object:
    """Two steps and a validation of one reward model, as a Ray Train worker does them."""
    import torch

    from actors.deepspeed_setup import free_port
    from cluster.pipeline import reward_worker
    from cluster.pipeline.reward_task import RewardTask

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    worker: Any = reward_worker
    worker.get_device = lambda: torch.device("cpu")
    worker.ray = SimpleNamespace(
        get=lambda rows: rows,
        train=SimpleNamespace(get_context=lambda: alone, report=lambda figures: None),
    )
    pieces = segments(config)
    labels = np.arange(len(pieces) * len(KINDS)).reshape(-1, len(KINDS)) % 3
    rows = [
        LabeledResponse(
            response=response, kinds=KINDS, segments=pieces, facts=(), verdicts={}, labels=labels
        )
        for response in responses * 4
    ]
    task = RewardTask(
        kinds=(KINDS[0],),
        digests=dict.fromkeys(KINDS, "none"),
        backbone_digest="none",
        rows=rows,
        config=config,
        out_dir=folder / "trained",
        queue=SimpleNamespace(put=lambda figures: None),
    )
    loaded = []
    load = worker._load_backbone
    worker._load_backbone = lambda *arguments: loaded.append(load(*arguments)) or loaded[-1]
    worker.run_reward_task(task)
    return loaded


WORK: dict[str, Work] = {
    "rollout": rollout, "judge": judge, "learner": learner, "reference": reference,
    "reward": reward, "shared": reward, "trainer": trainer,
}  # fmt: skip


def write_rewards(model: Path, config: Config, folder: Path) -> None:
    """Fresh reward models of all kinds."""
    from fgaif.lvlm.model import load_lvlm
    from fgaif.reward.checkpoint import RewardCard, checkpoint_digest, save_reward_model
    from fgaif.reward.model import new_reward_model, trainable_state

    base = load_lvlm(model, dtype=config.policy.dtype)
    for kind in KINDS:
        fresh = new_reward_model(base, config.reward.lora, "linear", 0)
        card = RewardCard(
            kind=kind, head="linear", backbone=str(model), tokenizer_digest="", input_digest="",
            backbone_digest=checkpoint_digest(model), min_words=config.segment.min_words,
            metrics={},
        )  # fmt: skip
        save_reward_model(folder / "rewards" / kind, fresh, trainable_state(fresh), card)
        base = fresh.backbone.unload()


def status() -> dict[str, int]:
    """Resident bytes of this process by kind of page."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Rss"):
            name, value = line.split(":")
            found[name] = int(value.split()[0]) * 1024
    return found


def anonymous() -> int:
    """Resident bytes that belong to no file on disk."""
    found = status()
    return found["RssAnon"] + found["RssShmem"]


class Peak:
    """Polls the anonymous memory from a thread."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(POLL_S)

    def stop(self) -> int:
        """The most seen."""
        self._over.set()
        self._thread.join()
        return self.most


def measure(role: str, model: Path, small: Path, dtype: str, folder: Path) -> dict[str, float]:
    """In a fresh process: the constant, the peak beyond it, and what the plan says of both."""
    import torch

    torch.set_num_threads(1)
    small_run, run = folder / "small", folder / "real"
    for path in (small_run, run):
        path.mkdir(exist_ok=True)
    warm = configuration(small, role, dtype, small_run)
    config = configuration(model, role, dtype, run)
    if role in ("reward", "shared"):
        write_rewards(small, warm, small_run)
    WORK[role](warm, answers(small, small_run), small_run)
    responses = answers(model, run)
    trim()
    before = status()
    peak = Peak()
    started = time.perf_counter()
    kept = WORK[role](config, responses, run)
    most = peak.stop()
    seconds = time.perf_counter() - started
    read_weights()
    after = status()
    del kept
    files = max(0, after["RssFile"] - before["RssFile"])
    names: Any = "reward" if role == "shared" else role
    models = {str(model): read_facts(model)}
    plan = actor_memory(names, config, models, gpu=None, on_gpu=False)
    parts = {part: getattr(plan, part) / MIB for part in PARTS}
    held = most - before["RssAnon"] - before["RssShmem"] + files
    return {
        "parameters": models[str(model)].parameters,
        "measured": held / MIB,
        "planned": (plan.total - plan.process) / MIB,
        "mapped": files / MIB,
        "process": sum(before.values()) / MIB,
        "seconds": seconds,
    } | {f"plan.{part}": size for part, size in parts.items()}


def read_weights() -> None:
    """Read every page of mapped weights, as longer runs do: rows of rare tokens, the head."""
    from transformers import LlavaForConditionalGeneration

    found = [value for value in gc.get_objects() if type(value) is LlavaForConditionalGeneration]
    for model in found:
        for value in model.parameters():
            value.detach().reshape(-1)[::512].sum()


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def start(role: str, model: Path, small: Path, dtype: str) -> dict[str, float]:
    """Measure in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        work = Path(folder) / "work"
        work.mkdir()
        if role in ("reward", "shared"):  # outside the process that is measured
            write_rewards(model, configuration(model, role, dtype, work), work / "real")
        command = [sys.executable, __file__, "--measure", role, str(model), str(small), dtype]
        command.append(folder)
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"{role}, {model.name}: {done.stdout[-500:]}{done.stderr[-3000:]}")
        found: dict[str, float] = json.loads(out.read_text())
        return found


def show(results: dict[str, dict[str, float]]) -> None:
    """Print a row per measurement."""
    table = Table(title="MiB beyond the process's constant", title_justify="left")
    for name in ("role", "size", "dtype", "planned", "measured", "ratio", "process", "s"):
        table.add_column(name, justify="right" if name not in ("role", "dtype") else "left")
    for key, row in results.items():
        table.add_row(
            *key.split("/"),
            f"{row['planned']:.0f}", f"{row['measured']:.0f}",
            f"{row['planned'] / row['measured']:.2f}", f"{row['process']:.0f}",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Build the models, start a process per measurement, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--roles", default=",".join(ROLES))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        role, model, small, dtype, folder = arguments.measure
        work = Path(folder) / "work"
        found = measure(role, Path(model), Path(small), dtype, work)
        (Path(folder) / "found.json").write_text(json.dumps(found))
        return
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for dtype in arguments.dtypes.split(","):
        for size in arguments.sizes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                small = build(Path(folder) / "small", (64, 128, 2, 640, 64, 2), dtype)
                model = build(Path(folder) / size, SIZES[size], dtype)
                for role in arguments.roles.split(","):
                    key = f"{role}/{size}/{dtype}"
                    results[key] = start(role, model, small, dtype)
                    arguments.out.write_text(json.dumps(results, indent=1))
                    show({key: results[key]})
    show(results)


if __name__ == "__main__":
    main()
