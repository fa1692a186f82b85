"""Kill random actors of a PPO run at random moments, by seed, and see what became of it.

    python tests/chaos/chaos.py --kills 100 --seed 0
    python tests/chaos/chaos.py --kills 5 --real runs/scenes
    python tests/chaos/chaos.py --kills 20 --layout shared

Driver, pools, placement, weight sync, replay and checkpoints are the product's. The actors are
``tests/light_actors.py``, or with ``--real`` those of a finished run, whose training is done again.
A run has survived if it ended with the policy and the metrics of a run that nothing disturbed, bit
by bit. The report says how long each role took to be back; engines are compared with engines that
join the same run in peace.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import light_actors  # noqa: E402
import nodes_job  # noqa: E402
import ray  # noqa: E402
from nodes import lasting, steps, write_whole  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cluster.launch import Cluster, connect  # noqa: E402
from cluster.pipeline.stages import Run  # noqa: E402
from fgaif.config import Config, load_config, parse_config  # noqa: E402
from fgaif.errors import FgaifError  # noqa: E402

STEPS = 20
STEP_TOKENS = 360  # sampling, scoring and training of a light step, one after the other
SLACK = 2.0  # time between kills, in plain starts
FEW_KILLS = 20  # for these, one plain start is enough
FIRST_KILL = 2  # steps in peace, in which plain starts are measured
_PATIENCE_S = 300.0
ROLES = nodes_job.ROLES
VICTIMS = (*ROLES, "shared")
CLASSES = {
    f"{prefix}{role.title()}{suffix}": role
    for role in VICTIMS
    for prefix, suffix in (("Light", ""), ("", "Actor"))
}
"""Role of each actor class; the board is none of them."""


@dataclass(slots=True, kw_only=True)
class Kill:
    """A kill: of whom, after how many steps, and the seconds until another was there."""

    role: str
    progress: float
    rejoin_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A run that ended in peace, and how to make it again."""

    peace: Path
    fire: Config
    train: Callable[[Cluster], None]
    plain_starts: int
    pace: Callable[[float], None] = lambda _: None
    """Told the seconds of a plain start, it makes the run last long enough for the kills."""


class Killer(threading.Thread):
    """Kills at moments drawn from the seed; the next only when the last victim is replaced."""

    def __init__(self, kills: int, seed: int, trial: Trial, resize: Callable[[int], None]) -> None:
        super().__init__(name="killer", daemon=True)
        rng, fire = random.Random(seed), trial.fire
        last = fire.ppo.steps - 1  # so that the last victim is back before the end
        moments = sorted(rng.uniform(min(FIRST_KILL, last / 2), last) for _ in range(kills))
        self._plan = [(moment, rng.random()) for moment in moments]
        self._progress = Progress(fire.run_dir)
        self._engines = fire.cluster.rollout.replicas
        self._resize = resize
        self._pace, self._plain_starts = trial.pace, trial.plain_starts
        self._over = threading.Event()
        self.plain: list[float] = []
        self.done: list[Kill] = []
        self.problem = ""

    def run(self) -> None:
        """Measure plain starts, then kill by plan until all is done or the run is over."""
        try:
            for _ in range(self._plain_starts):
                self.plain.append(self._plain_start())
            self._pace(statistics.median(self.plain))
            for moment, dice in self._plan:
                while self._progress.now() < moment and not self._over.is_set():
                    time.sleep(0.01)
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
        progress, start = self._progress.now(), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._joined(role, known)
        self.done.append(
            Kill(role=role, progress=progress, rejoin_s=time.monotonic() - start)
        )  # fmt: skip

    def _plain_start(self) -> float:
        known = {actor for actor, (role, _) in alive().items() if role == "rollout"}
        while len(known) < self._engines:
            known |= {self._joined("rollout", known)}
        while not self._progress.now() >= 1:  # until everyone works
            time.sleep(0.05)
        start = time.monotonic()
        self._resize(self._engines + 1)
        self._joined("rollout", known)
        seconds = time.monotonic() - start
        self._resize(self._engines)
        while sum(role == "rollout" for role, _ in alive().values()) > self._engines:
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


class Progress:
    """How far a run is, in steps; within a step by the shortest time that one took so far."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._steps, self._since, self._length = 0, time.monotonic(), 1.0

    def now(self) -> float:
        """Finished steps and the share of the one at work."""
        now, count = time.monotonic(), len(steps(self._run))
        if count > self._steps:
            self._length = now - self._since if count < 3 else min(self._length, now - self._since)
            self._steps, self._since = count, now
        return count + min(0.99, (now - self._since) / self._length)


def light(kills: int, seed: int, folder: Path, layout: str) -> Trial:
    """20 steps of light actors; checkpoints every 5, so that what was learnt is replayed too."""

    def settings(name: str) -> Config:
        overrides = [
            f"dir={folder}", f"name={name}", f"seed={seed}", f"ppo.steps={STEPS}",
            "ppo.rollout_batch=24", "ppo.minibatch=12", "ppo.checkpoint_every=5",
            "policy.max_new_tokens=24", "cluster.rollout.replicas=3", "cluster.rollout.chunk=2",
            "cluster.heartbeat_s=1", "cluster.local_cpus=16",
            f"cluster.layout={layout}",
        ]  # fmt: skip
        return load_config(None, overrides)

    def train(cluster: Cluster) -> None:
        nodes_job.train(fire, nodes_job.roles_on(cluster, fire))

    def pace(start_s: float) -> None:
        seconds = SLACK * start_s * kills / STEPS / STEP_TOKENS
        write_whole(fire.run_dir / "pace", str(max(seconds, light_actors.SECONDS_PER_TOKEN)))
        (fire.run_dir / "until").unlink()

    peace, fire = settings("peace"), settings("fire")
    for settled in (peace, fire):
        settled.run_dir.mkdir(parents=True)
    write_whole(peace.run_dir / "pace", "0")
    nodes_job.train(peace, light_actors.Here(peace).roles())
    write_whole(fire.run_dir / "until", str(FIRST_KILL))
    os.environ["PYTHONPATH"] = str(TESTS)  # of the actors' processes
    nodes_job.stand_in()
    starts = 3 if kills > FEW_KILLS else 1
    return Trial(peace=peace.run_dir, fire=fire, train=train, plain_starts=starts, pace=pace)


def real(run: Path, folder: Path, layout: str) -> Trial:
    """The training of a finished run once more; in another layout it ends with other roundings."""
    console = Console(stderr=True)
    found = load_config(run / "config.yaml", [f"cluster.layout={layout}"])
    tree = found.model_dump(mode="json") | {"dir": str(folder), "name": "fire"}
    fire = parse_config(tree)
    shutil.copytree(run, fire.run_dir, ignore=shutil.ignore_patterns("policy", "eval", "report"))
    train = lambda cluster: Run(fire, cluster, console).train()  # noqa: E731
    return Trial(peace=run, fire=fire, train=train, plain_starts=1)


def run(trial: Trial, kills: int, seed: int) -> dict[str, Any]:
    """Make the run under fire and compare it with the one in peace."""
    fire = trial.fire
    start, stopped_by, killer = time.monotonic(), "", None
    try:
        connect(fire)
        with Cluster(fire, ROLES, live=True) as cluster:
            killer = Killer(kills, seed, trial, cluster.rollouts().resize)
            killer.start()
            trial.train(cluster)
            killer.end()
    except FgaifError as error:
        stopped_by = str(error)
    finally:
        if killer is not None:
            killer.end()
        ray.shutdown()
    assert killer is not None
    return {
        "kills": len(killer.done),
        "planned": kills,
        "seed": seed,
        "seconds": time.monotonic() - start,
        "stopped_by": stopped_by or killer.problem,
        **compare(trial.peace, fire.run_dir),
        "plain_start_s": killer.plain,
        "rejoin": summary(killer.done),
        "victims": [asdict(kill) for kill in killer.done],
    }


def compare(peace: Path, fire: Path) -> dict[str, Any]:
    """What the run under fire lost: answers, bits of the policy, metrics."""
    wanted, got = _trained(peace), _trained(fire)
    policies = [_policy(run) for run in (peace, fire)]
    lines = [[lasting(row["metrics"]) for row in steps(run)] for run in (peace, fire)]
    same = {
        "policy_equal": bool(policies[0]) and policies[0] == policies[1],
        "metrics_equal": lines[0] == lines[1],
        "answers": got.total(),
        "answers_lost": (wanted - got).total(),
        "answers_twice": (got - wanted).total(),
    }
    return {"survived": same["policy_equal"] and same["metrics_equal"], **same}


def _policy(run: Path) -> dict[str, bytes]:
    files = [*(run / "policy" / "adapter").glob("*.safetensors")]
    files += (run / "policy" / "adapter").glob("policy.json")
    return {path.name: path.read_bytes() for path in files}


def _trained(run: Path) -> Counter[tuple[int, str, int]]:
    """Responses trained on, by update, id and version; light learners write them down."""
    return Counter(
        (int(file.stem), name, version)
        for file in (run / "trained").glob("*.json")
        for name, version in json.loads(file.read_text())
    )


def summary(kills: list[Kill]) -> dict[str, dict[str, float]]:
    """Kills and seconds to rejoin per role."""
    found = {}
    for role in VICTIMS:
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
    parser.add_argument("--real", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--layout", choices=("separate", "shared"), default="separate")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fgaif-chaos-"))
    kills, seed = arguments.kills, arguments.seed
    layout = arguments.layout
    if arguments.real:
        trial = real(arguments.real, folder, layout)
    else:
        trial = light(kills, seed, folder, layout)
    report = run(trial, kills, seed)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report, Console())
    return 0 if report["survived"] and report["kills"] == kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
