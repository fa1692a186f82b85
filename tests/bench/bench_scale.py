"""One driver and 1 to 256 rollout actors, 14,000 to 10 million prompts, in virtual time.

    python tests/bench/bench_scale.py [--json FILE] [--plot docs/scale.png]

Runs the real driver, pool, segmenter and batch code over roles that only take time
(``tests/simulated.py``); the driver's CPU time passes on the virtual clock too. Every actor gets
``PER_ACTOR`` responses per step in chunks of ``CHUNK``; lengths are lognormal, so some chunks take
twice as long as others. Learner, reference and reward models are taken to grow with the batch:
their seconds per step stay the same. A step's slowest stage is sampling, as it takes without
waiting for anything, or scoring + driver + training. Ray's own cost is not in these figures:
``bench_async.py`` has it.

Then 200 steps each over 14,000 to 10 million prompts: CPU per sample of the driver, median of the
steps, what the first step costs more, and how much the process grows.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from simulated import Affine, Sampler, Seconds, Simulation, Step

from fgaif.config import Config, load_config
from fgaif.eval.plots import INK, STYLE, save_png
from fgaif.types import Json

ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS = (14_000, 100_000, 1_000_000, 10_000_000)
DEPTHS = (0, 1, 2)
PER_ACTOR, CHUNK = 32, 8
STEPS = 4  # counted ones
SEED = 0
MEDIAN_TOKENS, SPREAD, LONGEST = 110, 0.4, 256  # of a detailed LLaVA caption, about
SECONDS = Seconds(
    start=60.0, load=1.0, prefill=0.5, token=0.02, publish=0.5,
    score=Affine(1.0), evaluate=Affine(1.5), logprobs=Affine(1.5),
    update=Affine(11.0), update_values=Affine(6.0),
)  # fmt: skip
TRAINING = 1.5 + 11.0 + 0.5
LOOKS: dict[int, Json] = {  # depths 1 and 2 nearly coincide
    2: {"color": "#d97706", "alpha": 0.4, "linewidth": 5, "label": "2"},
    1: {"color": "#2a78d6", "marker": "o", "markersize": 3, "label": "1"},
    0: {"color": "#9aa3b2", "marker": "o", "markersize": 3, "label": "0"},
}


def config(folder: str, actors: int, depth: int, batch: int, steps: int) -> Config:
    """A run that writes one checkpoint, at its end."""
    return load_config(
        None,
        [
            f"dir={folder}", f"seed={SEED}", f"ppo.steps={steps}", f"ppo.rollout_batch={batch}",
            f"ppo.minibatch={batch}", f"ppo.async_depth={depth}", "ppo.checkpoint_every=1000000",
            f"cluster.rollout.replicas={actors}", f"cluster.rollout.chunk={CHUNK}",
        ],
    )  # fmt: skip


def run(sampler: Sampler, actors: int, depth: int, batch: int, steps: int, prompts: int) -> Any:
    """Simulate; an iterator of steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, actors, depth, batch, steps)
        simulation = Simulation(settings, SECONDS, sampler, prompts=prompts, charge=True)
        yield from simulation.run()


def per_sample(steps: Sequence[Step], whose: str, batch: int) -> float:
    """Milliseconds of CPU per sample, median of the steps after the first."""
    used = [after.cpu[whose] - before.cpu[whose] for before, after in pairwise(steps)]
    return 1e3 * statistics.median(used) / batch


def scale(sampler: Sampler, actors: int, depth: int) -> Json:
    """Iteration time, utilisation and CPU per sample of one size."""
    batch = PER_ACTOR * actors
    steps = list(run(sampler, actors, depth, batch, STEPS + 2 * depth + 1, 1_000_000))
    counted = steps[depth:][: STEPS + 1]  # filled, and still with batches to sample ahead
    first, last = counted[0], counted[-1]
    elapsed, busy = last.now - first.now, last.busy - first.busy
    driver = per_sample(counted, "driver", batch)
    return {
        "actors": actors,
        "depth": depth,
        "iteration_s": elapsed / STEPS,
        "sampling_s": busy / actors / STEPS,
        "second_stage_s": TRAINING + driver * batch / 1e3,
        "utilisation": busy / elapsed / actors,
        "driver_ms": driver,
        "pool_ms": per_sample(counted, "pool", batch),
    }


def endure(sampler: Sampler, prompts: int) -> Json:
    """200 steps of 128 responses: CPU per sample and growth of the process."""
    batch, process = 128, psutil.Process()
    steps: list[Step] = []
    resident: list[float] = []
    for step in run(sampler, 8, 1, batch, 200, prompts):
        steps.append(step)
        resident.append(process.memory_info().rss / 2**20)
    return {
        "prompts": prompts,
        "driver_ms": per_sample(steps, "driver", batch),
        "first_step_ms": 1e3 * steps[0].cpu["driver"] / batch,
        "rss_mib": {"step 20": resident[19], "step 200": resident[-1]},
    }


def draw(scaled: Sequence[Json], endured: Sequence[Json]) -> Figure:
    """Utilisation, iteration time over slowest stage, CPU per sample by actors and by prompts."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        used, paced, by_actors, by_prompts = figure.subplots(1, 4)
        for depth, look in LOOKS.items():
            rows = [row for row in scaled if row["depth"] == depth]
            actors = [row["actors"] for row in rows]
            used.plot(actors, [row["utilisation"] for row in rows], **look)
            slowest = [max(row["sampling_s"], row["second_stage_s"]) for row in rows]
            ratios = [row["iteration_s"] / slow for row, slow in zip(rows, slowest, strict=True)]
            paced.plot(actors, ratios, **look)
        used.set(title="share of time that engines sample", ylim=(0, 1))
        paced.set(title="iteration time / slowest stage", ylim=(0.9, 2.4))
        paced.axhline(
            1.15, color=INK, alpha=0.5, linewidth=1, linestyle="--", label="allowed: 1.15"
        )
        paced.legend(title="ppo.async_depth", title_fontsize=8)
        rows = [row for row in scaled if row["depth"] == 1]
        dots: Json = {"marker": "o", "markersize": 3}
        for name, colour in (("driver", "#2a78d6"), ("pool", "#8b5cf6")):
            costs = [row[f"{name}_ms"] for row in rows]
            by_actors.plot([row["actors"] for row in rows], costs, color=colour, label=name, **dots)
        by_actors.set(title="CPU ms per sample")
        by_actors.legend(loc="center left")
        costs = [row["driver_ms"] for row in endured]
        by_prompts.plot([row["prompts"] for row in endured], costs, color="#2a78d6", **dots)
        by_prompts.set(title="CPU ms per sample", xscale="log", xlabel="prompts")
        for axes in (by_actors, by_prompts):
            axes.set_ylim(0, 1)
        for axes in (used, paced, by_actors):
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
            axes.set_xlabel("rollout actors")
        return figure


def machine() -> Json:
    """What the figures were measured on."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "seed": SEED,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Run, print tables, write JSON and plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=ACTORS[-1], help="largest number of actors")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report: Json = {"machine": machine(), "scale": [], "prompts": []}
    print(json.dumps(report["machine"]))
    sampler = Sampler(MEDIAN_TOKENS, SPREAD, LONGEST)
    print("prompts     driver ms/sample  first step  RSS MiB at step 20, 200")
    for prompts in PROMPTS:
        row = endure(sampler, prompts)
        report["prompts"].append(row)
        before, after = row["rss_mib"].values()
        print(f"{prompts:10,d} {row['driver_ms']:12.3f} {row['first_step_ms']:15.3f} "
              f"{before:12.1f} {after:8.1f}", flush=True)  # fmt: skip
    print("actors depth  iteration  sampling  second stage  utilisation  driver, pool ms/sample")
    for actors in (number for number in ACTORS if number <= arguments.most):
        for depth in DEPTHS:
            row = scale(sampler, actors, depth)
            report["scale"].append(row)
            print(f"{actors:6d} {depth:5d} {row['iteration_s']:10.2f} {row['sampling_s']:9.2f} "
                  f"{row['second_stage_s']:13.2f} {row['utilisation']:12.3f} "
                  f"{row['driver_ms']:10.3f} {row['pool_ms']:8.4f}", flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        save_png(draw(report["scale"], report["prompts"]), arguments.plot)


if __name__ == "__main__":
    main()
