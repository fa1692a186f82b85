"""Seconds of a PPO step in both layouts beside TRL's GRPO step, in turn on the same machine.

    python tests/bench/bench_step.py RUN [--rounds 2] [--steps 6] [--json FILE]
    python tests/bench/bench_step.py --random 25M [--random 100M] [--tokens 48]

needs the extra ``baselines``. RUN is the folder of a finished run of the demo, of which the reward
models are used; ``--random`` takes random checkpoints of so many parameters, with random reward
models, in its place. Each turn is a process of its own: TRL's, then ours by layout, again as often
as ``--rounds`` says. All get 64 responses of the same prompts a step, the same LoRA, two passes
over minibatches of 32, float32 and two threads. TRL's GRPOTrainer samples with Hugging Face, has a
reward that counts words and neither reference nor value model; ours has three reward models,
reference and critic. Prints medians of the steps after the first two, and ours over TRL's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_scale import machine
from rich.console import Console
from rich.table import Table

from fgaif.config import Config, load_config, parse_config
from fgaif.types import Json

STAGES = ("rollout", "score", "update", "sync", "total")
SKIPPED = 2
"""Steps that are not counted: caches fill, memory grows."""
PROMPTS = 256
THREADS = 2
SHARED = ("cluster.layout=shared", "ppo.micro_tokens=1000")
LAYOUTS: dict[str, tuple[str, ...]] = {"separate": (), "shared": SHARED}


def random_run(size: str, tokens: int, folder: Path) -> Path:
    """A run folder of a random checkpoint with reward models that give noise."""
    from bench_memory import SIZES, build
    from reward_samples import save_noisy

    model = build(folder / f"model-{size}", SIZES[size], "float32")
    run = folder / f"random-{size}"
    save_noisy(model, run / "rewards")
    settings = [
        f"policy.model={model}", f"dir={folder}", f"name={run.name}", "ppo.anchor.weight=0",
        f"policy.max_new_tokens={tokens}", "feedback.extractor=model",
        "cluster.engine={max_num_seqs: 64, max_model_len: 512, kv_cache_mib: 512}",
    ]  # fmt: skip
    config = load_config(None, settings)
    (run / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return run


def step_config(run: Path, steps: int, overrides: tuple[str, ...], folder: Path) -> Config:
    """The run's settings for training from the start in another folder."""
    tree = load_config(run / "config.yaml", list(overrides)).model_dump(mode="json")
    tree |= {"dir": str(folder), "name": "bench"}
    tree["ppo"] |= {"steps": steps, "checkpoint_every": 1000, "schedule": "constant"}
    return parse_config(tree)


def ours(run: Path, steps: int, overrides: tuple[str, ...]) -> list[Json]:
    """Seconds per stage of each step of ours."""
    from cluster.launch import Cluster
    from cluster.pipeline.stages import Run

    with tempfile.TemporaryDirectory() as folder:
        config = step_config(run, steps, overrides, Path(folder))
        config.run_dir.mkdir()
        (config.run_dir / "rewards").symlink_to((run / "rewards").resolve())
        with Cluster(config, ("rollout", "reward", "reference", "learner")) as cluster:
            Run(config, cluster, Console(quiet=True)).train()
        lines = (config.run_dir / "policy" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    return [
        {stage: row[f"seconds/{stage}"] for stage in STAGES} | {"tokens": row["length/tokens"]}
        for row in rows
    ]


def trl(run: Path, steps: int) -> list[Json]:
    """Seconds per stage of each of TRL's steps: sampling, and the passes."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from fgaif.data.images import load_image
    from fgaif.data.sources import open_source, split_prompts
    from fgaif.lvlm.families import family_of
    from fgaif.lvlm.model import load_processor, resolve_checkpoint

    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        config = step_config(run, steps, (), Path(folder))
        path = resolve_checkpoint(config.policy.model)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        source = open_source(config.data.train, config, config.data.feedback_prompts + PROMPTS)
        prompts = split_prompts(source, config)[1][:PROMPTS]
        rows = [
            {
                "prompt": [{"role": "user", "content": prompt.text}],
                "image": load_image(prompt.image, config.data.max_image_pixels),
            }
            for prompt in prompts
        ]
        ppo, lora, passes = config.ppo, config.policy.lora, config.ppo.epochs
        slices = ppo.rollout_batch // ppo.minibatch
        clock = _Clock(passes * slices)

        class Told(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.stepped()

        class Timed(GRPOTrainer):
            def _generate(self, *arguments: Any, **named: Any) -> Any:
                with clock.sampling():
                    return super()._generate(*arguments, **named)

        trainer = Timed(
            model=model,
            processing_class=load_processor(path).__class__.from_pretrained(path),
            reward_funcs=lambda completions, **_: [float(len(str(each))) for each in completions],
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, target_modules=family_of(model.config).lora_targets
            ),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=ppo.minibatch,
                steps_per_generation=slices, num_iterations=passes, num_generations=8,
                max_completion_length=config.policy.max_new_tokens,
                temperature=config.policy.temperature, learning_rate=ppo.lr, beta=0.0,
                max_steps=steps * passes * slices, logging_steps=10**6, save_strategy="no",
                report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                dataloader_pin_memory=False, disable_tqdm=True, seed=config.seed,
            ),
            callbacks=[Told()],
        )  # fmt: skip
        clock.start()
        trainer.train()
    return clock.rows


class _Clock:
    """Seconds of each step of so many optimiser steps, and of the sampling in it."""

    def __init__(self, optimiser_steps: int) -> None:
        self._each, self._count, self._sampled = optimiser_steps, 0, 0.0
        self.rows: list[Json] = []

    def start(self) -> None:
        self._began = time.perf_counter()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._sampled += time.perf_counter() - begun

    def stepped(self) -> None:
        self._count += 1
        if self._count % self._each == 0:
            now = time.perf_counter()
            total = now - self._began
            self.rows.append(
                {"rollout": self._sampled, "update": total - self._sampled, "total": total}
            )
            self._began, self._sampled = now, 0.0


def turn(kind: str, run: Path, steps: int) -> list[Json]:
    """A turn in a process of its own; steps that count."""
    command = [sys.executable, __file__, str(run), "--turn", kind, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{kind}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    rows: list[Json] = json.loads(done.stdout.splitlines()[-1])
    return rows[SKIPPED:]


def medians(rows: list[Json]) -> dict[str, float]:
    """The median step: of each stage by itself."""
    return {key: statistics.median(float(row[key]) for row in rows) for key in rows[0]}


def compare(run: Path, rounds: int, steps: int, console: Console) -> dict[str, dict[str, float]]:
    """All kinds in turn; the table of medians."""
    kinds = ("trl", *LAYOUTS)
    found: dict[str, list[Json]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds:
            rows = turn(kind, run, steps)
            found[kind] += rows
            console.print(f"round {number + 1}: {kind}: {medians(rows)['total']:.2f} s a step")
    summary = {kind: medians(rows) for kind, rows in found.items()}
    table = Table(title=f"{run.name}: seconds a step, medians", title_justify="left")
    for column in ("", *STAGES, "over TRL"):
        table.add_column(column, justify="right" if column else "left")
    for kind, row in summary.items():
        cells = [f"{row[stage]:.2f}" if stage in row else "" for stage in STAGES]
        table.add_row(kind, *cells, f"{row['total'] / summary['trl']['total']:.2f}")
    console.print(table)
    return summary


def main() -> None:
    """Run the turns, print the ratio, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--random", action="append", default=[], metavar="SIZE")
    parser.add_argument("--tokens", type=int, default=48, help="of a random policy's responses")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", choices=("trl", *LAYOUTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        run, steps = arguments.run, arguments.steps
        rows = (
            trl(run, steps)
            if arguments.turn == "trl"
            else ours(run, steps, LAYOUTS[arguments.turn])
        )
        print(json.dumps(rows))
        return
    console, found = Console(), {}
    console.print(machine())
    with tempfile.TemporaryDirectory() as folder:
        runs = [arguments.run] if arguments.run else []
        runs += [random_run(size, arguments.tokens, Path(folder)) for size in arguments.random]
        for run in runs:
            found[run.name] = compare(run, arguments.rounds, arguments.steps, console)
    if arguments.json:
        report = {"machine": machine(), "seconds": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
