"""Seconds of a PPO step at several values of ``ppo.async_depth``, with the real actors of a run.

    python tests/bench/bench_async_real.py RUN [--depths 0 1] [--rounds 2] [--json FILE]

RUN is the folder of a finished run, of which responses, labels and reward models are used; PPO is
done again from the same start at each depth in turn. Steps count while the pipeline is full and no
checkpoint is written. On a machine whose cores one stage already fills, sampling ahead cannot gain
what ``bench_async.py`` shows for stages with cores of their own.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from bench_scale import machine
from rich.console import Console

from cluster.launch import Cluster
from cluster.pipeline.stages import Run
from cluster.placement import Role
from fgaif.config import load_config, parse_config
from fgaif.types import Json

STAGES = ("rollout", "score", "update", "sync", "total")
ROLES: tuple[Role, ...] = ("rollout", "reward", "reference", "learner")


def measure(run: Path, depth: int, steps: int) -> list[Json]:
    """Seconds per stage of each step that counts."""
    tree = load_config(run / "config.yaml").model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        tree |= {"dir": folder, "name": f"depth{depth}"}
        tree["ppo"] |= {"steps": steps, "async_depth": depth, "checkpoint_every": 1000}
        config = parse_config(tree)
        shutil.copytree(
            run, config.run_dir, ignore=shutil.ignore_patterns("policy", "eval", "report")
        )
        with Cluster(config, ROLES) as cluster:
            Run(config, cluster, Console(quiet=True)).train()
        lines = (config.run_dir / "policy" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    return [{s: row[f"seconds/{s}"] for s in STAGES} for row in rows[2 : steps - depth]]


def main() -> None:
    """Run the depths in turn, print a table of medians, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[int, list[Json]] = {depth: [] for depth in arguments.depths}
    print(json.dumps(machine()), flush=True)
    for turn in range(arguments.rounds):
        for depth in arguments.depths:
            rows = measure(arguments.run, depth, arguments.steps)
            found[depth] += rows
            median = statistics.median(row["total"] for row in rows)
            print(f"round {turn + 1}: depth {depth}: {median:.3f} s a step", flush=True)
    print("depth  " + "  ".join(f"{stage:>9}" for stage in STAGES) + "   (s, median)  steps")
    for depth, rows in found.items():
        medians = [statistics.median(row[stage] for row in rows) for stage in STAGES]
        print(f"{depth:5d}  " + "  ".join(f"{value:9.3f}" for value in medians), len(rows))
    if arguments.json:
        report = {"machine": machine(), "depths": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
