"""Iteration time at ``ppo.async_depth`` 0, 1 and 2 against the slowest stage, on a real Ray.

    python tests/bench/bench_async.py [--chunk 0.5] [--score 0.35] [--update 0.6] [--json FILE]

The driver, groups, pool and placement are the product's; the actors sleep for the given seconds, so
that each stage has cores of its own whatever the machine. Stages are sampling, and scoring +
training + sync, which depth 1 runs side by side. How long each takes by itself is measured at
depth 0. Steps count while the pipeline is full; a stage's seconds are the median time that the
driver spends in it. CPU per sample is that of the driver's process, Ray's threads included, without
segmenting, which ``bench_scale.py`` has.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from functools import partial

import light_actors
import nodes_job
from bench_scale import machine

from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import check_resumable
from fgaif.config import Config, load_config
from fgaif.types import (
    Evaluation,
    FloatArray,
    GenerationRequest,
    Json,
    Prompt,
    Response,
    Segment,
    StepReport,
    TrainBatch,
    UpdateReport,
)

BATCH, CHUNK, ENGINES = 64, 16, 2
SECONDS = {"chunk": 0.5, "score": 0.35, "update": 0.6}
"""Of a chunk, of scoring (rewards, reference and learner alike), of an update."""


class Rollout(light_actors.LightRollout):
    """An engine to which a chunk takes its seconds."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        if len(requests) > 1:  # not the probe of the first sync
            time.sleep(SECONDS["chunk"])
        return super().generate(requests)


class Reward(light_actors.LightReward):
    """A reward model that takes its seconds."""

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        time.sleep(SECONDS["score"])
        return super().score_pairs(pairs)


class Reference(light_actors.LightReference):
    """A reference and value model that takes its seconds."""

    def evaluate(self, responses: Sequence[Response]) -> list[Evaluation]:
        time.sleep(SECONDS["score"])
        return super().evaluate(responses)

    def update_values(self, batch: TrainBatch) -> UpdateReport:
        time.sleep(SECONDS["update"])
        return super().update_values(batch)


class Learner(light_actors.LightLearner):
    """A learner that takes its seconds."""

    def logprobs(self, responses: Sequence[Response]) -> list[FloatArray]:
        if len(responses) > 1:  # not the probe of a sync
            time.sleep(SECONDS["score"])
        return super().logprobs(responses)

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> UpdateReport:
        time.sleep(SECONDS["update"])
        return super().update(batch, anchors)


def stand_in() -> None:
    """Put the sleeping actors in the place of those that ``Cluster`` imports."""
    for role, actor in zip(nodes_job.ROLES, (Rollout, Reward, Reference, Learner), strict=True):
        module = sys.modules[f"actors.{role}"] = ModuleType(role)
        setattr(module, f"{role.capitalize()}Actor", actor)


def config(folder: str, depth: int, steps: int) -> Config:
    """Two engines, and one checkpoint at the end."""
    return load_config(
        None,
        [
            f"dir={folder}", f"name=depth{depth}", f"ppo.steps={steps}", "seed=0",
            f"ppo.rollout_batch={BATCH}", f"ppo.minibatch={BATCH}", "ppo.checkpoint_every=1000",
            f"ppo.async_depth={depth}", "policy.max_new_tokens=128",
            f"cluster.rollout.replicas={ENGINES}", f"cluster.rollout.chunk={CHUNK}",
            *(f"cluster.{role}.cpus=0.1" for role in nodes_job.ROLES),
        ],
    )  # fmt: skip


def measure(depth: int, steps: int) -> Json:
    """Median seconds of the steps and of their stages."""
    process = psutil.Process()
    reports: list[StepReport] = []
    ends: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, depth, steps)
        settings.run_dir.mkdir()
        (settings.run_dir / "pace").write_text("0")  # no seconds per token of their own
        with Cluster(settings, nodes_job.ROLES) as cluster:
            roles = nodes_job.roles_on(cluster, settings)
            data = PpoData(
                prompts=nodes_job.make_prompts(1000),
                anchors=[],
                digest="bench",
                settings=stage_values(settings, "train"),
                check_resumable=partial(check_resumable, settings),
            )
            driver = PpoDriver(settings, roles, data, light_actors.segments, lambda *_: ())
            for report in driver.run():
                reports.append(report)
                used = process.cpu_times()
                ends.append((time.perf_counter(), used.user + used.system))
    full = slice(2, steps - depth)  # filled, and still sampling ahead

    def median(name: str) -> float:
        return statistics.median(report.metrics[f"seconds/{name}"] for report in reports[full])

    (begin, cpu_begin), (end, cpu_end) = ends[1], ends[steps - depth - 1]
    counted = steps - depth - 2
    return {
        "depth": depth,
        "iteration_s": (end - begin) / counted,
        "rollout_s": median("rollout"),
        "second_stage_s": median("score") + median("update") + median("sync"),
        "driver_cpu_ms": 1e3 * (cpu_end - cpu_begin) / counted / BATCH,
    }


def main() -> None:
    """Run the three depths, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SECONDS.items():
        parser.add_argument(f"--{name}", type=float, default=value, help="seconds")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    SECONDS.update({name: getattr(arguments, name) for name in SECONDS})
    stand_in()
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here
    )
    report: Json = {"machine": machine(), "seconds": SECONDS}
    print(json.dumps(report), flush=True)
    print("depth  iteration s  sampling  scoring + training + sync  iteration / slowest stage  "
          "driver CPU ms/sample")  # fmt: skip
    rows = []
    for depth in (0, 1, 2):
        rows.append(row := measure(depth, arguments.steps))
        slowest = max(rows[0]["rollout_s"], rows[0]["second_stage_s"])
        print(f"{depth:5d} {row['iteration_s']:12.3f} {row['rollout_s']:9.3f} "
              f"{row['second_stage_s']:26.3f} {row['iteration_s'] / slowest:26.3f} "
              f"{row['driver_cpu_ms']:21.3f}", flush=True)  # fmt: skip
    ray.shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"depths": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
