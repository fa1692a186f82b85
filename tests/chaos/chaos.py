"""Kill random actors of a PPO run at random moments, by seed, and see what became of it.

    python tests/chaos/chaos.py --kills 100 --seed 0

The run is a real one over the light actors of ``tests/light_actors.py``: driver, pools, placement,
weight sync, replay and checkpoints are the product's. It has survived if it ended with the policy
and the metrics of a run that nothing disturbed, bit by bit. The report says how long each role took
to be back at work; engines are compared with engines that join the same run in peace.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import light_actors  # noqa: E402
import nodes_job  # noqa: E402
import ray  # noqa: E402
from nodes import lasting, steps  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cluster.launch import Cluster, connect  # noqa: E402
from fgaif.config import Config, load_config  # noqa: E402
from fgaif.errors import FgaifError  # noqa: E402

ENGINES = 3
STEPS = 20
KILLS_PER_RUN = 10  # that the light actors' speed is made for: more kills, slower actors
PLAIN_STARTS = 3
FIRST_KILL = 2  # steps in peace, in which plain starts are measured
_PATIENCE_S = 60.0
CLASSES = {
    "LightRollout": "rollout",
    "LightReward": "reward",
    "LightReference": "reference",
    "LightLearner": "learner",
}


@dataclass(slots=True, kw_only=True)
class Kill:
    """A kill: of whom, after how many steps, and the seconds until another was there."""

    role: str
    progress: float
    rejoin_s: float


class Killer(threading.Thread):
    """Kills at moments drawn from the seed; the next only when the last victim is replaced."""

    def __init__(self, kills: int, seed: int, progress: Callable[[], float]) -> None:
        super().__init__(name="killer", daemon=True)
        rng = random.Random(seed)
        moments = sorted(rng.uniform(FIRST_KILL, STEPS - 0.5) for _ in range(kills))
        self._plan = [(moment, rng.random()) for moment in moments]
        self._progress = progress
        self._over = threading.Event()
        self.resize: Callable[[int], None]
        self.plain: list[float] = []
        self.done: list[Kill] = []
        self.problem = ""

    def run(self) -> None:
        """Measure plain starts, then kill by plan until all is done or the run is over."""
        try:
            for _ in range(PLAIN_STARTS):
                self.plain.append(self._plain_start())
            for moment, dice in self._plan:
                while self._progress() < moment and not self._over.is_set():
                    time.sleep(0.005)
                if self._over.is_set():
                    return
                self._kill(dice)
        except (TimeoutError, ProcessLookupError, ray.exceptions.RayError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """Stop killing."""
        self._over.set()
        self.join(_PATIENCE_S)

    def _kill(self, dice: float) -> None:
        victims = sorted(alive().items(), key=lambda item: (item[1][0], item[1][1]))
        _, (role, pid) = victims[int(dice * len(victims))]
        known = {actor for actor, (other, _) in victims if other == role}
        progress, start = self._progress(), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._joined(role, known)
        self.done.append(
            Kill(role=role, progress=progress, rejoin_s=time.monotonic() - start)
        )  # fmt: skip

    def _plain_start(self) -> float:
        known = {actor for actor, (role, _) in alive().items() if role == "rollout"}
        while len(known) < ENGINES:
            known |= {self._joined("rollout", known)}
        start = time.monotonic()
        self.resize(ENGINES + 1)
        self._joined("rollout", known)
        seconds = time.monotonic() - start
        self.resize(ENGINES)
        while sum(role == "rollout" for role, _ in alive().values()) > ENGINES:
            time.sleep(0.05)
        return seconds

    def _joined(self, role: str, known: set[str]) -> str:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and not self._over.is_set():
            for actor, (other, _) in alive().items():
                if other == role and actor not in known:
                    return actor
            time.sleep(0.02)
        raise TimeoutError(f"no new {role} within {_PATIENCE_S:g} s, or before the run's end")


def alive() -> dict[str, tuple[str, int]]:
    """Role and process of every living actor that is not the board, by its id."""
    table = ray._private.state.actors(actor_state_name="ALIVE")
    return {
        actor: (CLASSES[facts["ActorClassName"]], facts["Pid"])
        for actor, facts in table.items()
        if facts["ActorClassName"] in CLASSES
    }


def settings(folder: Path, seed: int) -> Config:
    """A run of 20 steps with checkpoints every 5, so that what was learnt is replayed too."""
    return load_config(
        None,
        [
            f"dir={folder}", "name=light", f"seed={seed}", f"ppo.steps={STEPS}",
            "ppo.rollout_batch=24", "ppo.minibatch=12", "ppo.checkpoint_every=5",
            "policy.max_new_tokens=24", f"cluster.rollout.replicas={ENGINES}",
            "cluster.rollout.chunk=2", "cluster.heartbeat_s=1", "cluster.local_cpus=16",
        ],
    )  # fmt: skip


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Make the run in peace and the run under fire, and compare them."""
    peace = settings(folder / "peace", seed)
    slowly, light_actors.SECONDS_PER_TOKEN = light_actors.SECONDS_PER_TOKEN, 0.0
    nodes_job.train(peace, light_actors.Here(peace).roles())
    light_actors.SECONDS_PER_TOKEN = slowly * max(1.0, kills / KILLS_PER_RUN)
    os.environ["LIGHT_SECONDS_PER_TOKEN"] = str(light_actors.SECONDS_PER_TOKEN)
    os.environ["PYTHONPATH"] = str(TESTS)  # the actors' processes read both when they start
    fire = settings(folder / "fire", seed)
    fire.run_dir.mkdir(parents=True)
    watched = _Watched()
    killer = Killer(kills, seed, watched.progress)
    start, stopped_by = time.monotonic(), ""
    try:
        nodes_job.stand_in()
        connect(fire)
        with Cluster(fire, nodes_job.ROLES) as cluster:
            roles = nodes_job.roles_on(cluster, fire)
            killer.resize = cluster.rollouts().resize
            killer.start()
            nodes_job.train(fire, roles, on_step=watched.step)
            killer.end()
    except FgaifError as error:
        stopped_by = str(error)
    finally:
        killer.end()
        ray.shutdown()
    return {
        "kills": len(killer.done),
        "planned": kills,
        "seed": seed,
        "seconds": time.monotonic() - start,
        "stopped_by": stopped_by or killer.problem,
        **compare(peace, fire),
        "plain_start_s": killer.plain,
        "rejoin": summary(killer.done),
        "victims": [asdict(kill) for kill in killer.done],
    }


class _Watched:
    """How far the run is, in steps; within a step by the time that steps take."""

    def __init__(self) -> None:
        self._steps, self._since, self._length = 0, time.monotonic(), 1.0

    def step(self, number: int) -> None:
        now = time.monotonic()
        if self._steps:
            self._length = min(self._length, now - self._since)
        self._steps, self._since = number, now

    def progress(self) -> float:
        return self._steps + min(0.99, (time.monotonic() - self._since) / self._length)


def compare(peace: Config, fire: Config) -> dict[str, Any]:
    """What the run under fire lost: answers, bits of the policy, metrics."""
    wanted, got = _trained(peace), _trained(fire)
    policies = [c.run_dir / "policy" / "adapter" / "policy.json" for c in (peace, fire)]
    same = all(path.exists() for path in policies) and len({p.read_text() for p in policies}) == 1
    lines = [[lasting(row["metrics"]) for row in steps(c.run_dir)] for c in (peace, fire)]
    return {
        "survived": same and lines[0] == lines[1],
        "policy_equal": same,
        "metrics_equal": lines[0] == lines[1],
        "answers": got.total(),
        "answers_lost": (wanted - got).total(),
        "answers_twice": (got - wanted).total(),
    }


def _trained(config: Config) -> Counter[tuple[int, str, int]]:
    """Responses trained on, by update, id and version of the weights that sampled them."""
    files = sorted((config.run_dir / "trained").glob("*.json"))
    rows: Iterator[tuple[int, str, int]] = (
        (int(file.stem), name, version)
        for file in files
        for name, version in json.loads(file.read_text())
    )
    return Counter(rows)


def summary(kills: list[Kill]) -> dict[str, dict[str, float]]:
    """Kills and seconds to rejoin per role."""
    found = {}
    for role in dict.fromkeys(CLASSES.values()):
        seconds = [kill.rejoin_s for kill in kills if kill.role == role]
        if seconds:
            found[role] = {
                "kills": len(seconds),
                "median_s": statistics.median(seconds),
                "max_s": max(seconds),
            }
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table."""
    plain = statistics.median(report["plain_start_s"]) if report["plain_start_s"] else float("nan")
    table = Table(title=f"{report['kills']} kills, seed {report['seed']}", title_justify="left")
    for column in ("role", "kills", "rejoin (s, median)", "(s, max)"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, row in report["rejoin"].items():
        table.add_row(
            role, f"{row['kills']:.0f}", f"{row['median_s']:.2f}", f"{row['max_s']:.2f}"
        )  # fmt: skip
    console.print(table)
    console.print(
        f"survived: {'yes' if report['survived'] else 'NO'}; answers {report['answers']}, lost "
        f"{report['answers_lost']}, twice {report['answers_twice']}; an engine's plain start takes "
        f"{plain:.2f} s; the run took {report['seconds']:.0f} s"
    )
    if report["stopped_by"]:
        console.print(report["stopped_by"], style="red", markup=False)


def main() -> int:
    """Run, print, and fail unless every planned kill was made and survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fgaif-chaos-"))
    report = run(arguments.kills, arguments.seed, folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report, Console())
    return 0 if report["survived"] and report["kills"] == arguments.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
