"""A living run on a local Ray: heartbeats, `fgaif status` and `scale`, metrics of the node."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
from beater import Beater
from rich.console import Console
from typer.testing import CliRunner, Result

import cluster.monitoring.heartbeat
from actors.deepspeed_setup import free_port
from actors.pool import Replica, State
from cluster.cli import runs
from cluster.cli.main import app
from cluster.monitoring.heartbeat import (
    NAMESPACE,
    HeartbeatMonitor,
    heartbeat_sender,
    start_heartbeat_store,
    store_name,
    with_heartbeats,
)
from cluster.monitoring.metrics import METRICS, MetricsExporter
from cluster.monitoring.status import ActorStatus, RunStatus, StatusPublisher, write_run_address
from fgaif.config import Config, load_config
from fgaif.errors import ActorError, DataError
from fgaif.types import StepReport

METRICS_PORT = free_port()


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import Beater
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "300")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=here,
            _metrics_export_port=METRICS_PORT,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(
        None,
        [
            f"dir={tmp_path_factory.mktemp('runs')}",
            "name=mine",
            "ppo.steps=9",
            "cluster.heartbeat_s=0.2",
            "cluster.heartbeat_timeout_s=2",
            "cluster.stall_timeout_s=3",
        ],
    )


@pytest.fixture(scope="module")
def store(config: Config) -> Iterator[Any]:
    """The run's heartbeat store, with ``live.json`` as the driver writes it."""
    handle = start_heartbeat_store(config)
    address = ray.get_runtime_context().gcs_address
    write_run_address(
        config, address=address, namespace=NAMESPACE, store=store_name(config), job="01"
    )
    yield handle
    ray.kill(handle)


@pytest.fixture
def publisher(config: Config, store: Any) -> StatusPublisher:
    return StatusPublisher(config, [lambda status: ray.get(store.put.remote(status))])


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)


def engines(*states: State) -> list[Replica]:
    return [Replica(name=f"rollout-{i}", state=state, restarts=i) for i, state in enumerate(states)]


def tell(publisher: StatusPublisher, *states: State, queued: int = 0) -> None:
    publisher._last = float("-inf")  # as if the last was published long ago
    publisher.rollouts(engines(*states), queued, lambda weights: weights)


def start(config: Config, name: str) -> Any:
    beating = with_heartbeats(Beater, heartbeat_sender(config, name, "rollout"))
    return ray.remote(beating).options(num_cpus=0).remote("hello")


def test_a_process_is_seen_working_hanging_frozen_and_replaced(config: Config, store: Any) -> None:
    watch = HeartbeatMonitor.of(store, config.cluster)
    actor = start(config, "rollout-0")
    assert ray.get(actor.work.remote(7)) == "hello 7"
    pid = ray.get(actor.pid.remote())
    until(lambda: "rollout-0" in watch.heartbeats())
    seen = watch.heartbeats()["rollout-0"]
    assert (seen.pid, seen.node) == (pid, ray.util.get_node_ip_address())
    assert seen.rss > 10 * 2**20
    assert watch.problem("rollout-0", busy_s=100) is None

    actor.hang.remote(60)
    until(lambda: watch.problem("rollout-0", busy_s=100))
    assert "made no progress for" in (watch.problem("rollout-0", busy_s=100) or "")
    assert watch.problem("rollout-0", busy_s=1) is None

    os.kill(pid, signal.SIGSTOP)
    until(lambda: "sent no heartbeat" in (watch.problem("rollout-0") or ""))
    ray.kill(actor)
    os.kill(pid, signal.SIGKILL)
    watch.forget("rollout-0")
    assert watch.problem("rollout-0", busy_s=100) is None

    again = start(config, "rollout-0")
    until(lambda: "rollout-0" in watch.heartbeats())
    assert watch.heartbeats()["rollout-0"].pid != pid
    ray.kill(again)
    log = (config.run_dir / "logs" / "rollout-0.log").read_text()
    assert f"rollout-0: pid {pid}, all output in /" in log
    assert log.count("rollout-0: pid") == 2


def test_an_actor_without_a_store_works_and_says_so(tmp_path: Path) -> None:
    config = load_config(None, [f"dir={tmp_path}", "cluster.heartbeat_s=0.1"])
    actor = start(config, "rollout-9")
    assert ray.get(actor.work.remote(1)) == "hello 1"
    log = config.run_dir / "logs" / "rollout-9.log"
    until(lambda: "no heartbeat store can be reached" in log.read_text())
    time.sleep(0.5)
    assert log.read_text().count("no heartbeat store") == 1
    ray.kill(actor)


def test_two_drivers_cannot_work_in_one_folder(
    config: Config, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.monitoring.heartbeat, "_NAME_FREE_WITHIN_S", 0.6)
    with pytest.raises(ActorError, match="another run works in this folder"):
        start_heartbeat_store(config)


def fgaif(*arguments: object, fails: bool = False) -> Result:
    runs.out.width = 120  # whoever imported it first has fixed it
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert bool(result.exception) == fails, result.exception or result.stdout
    return result


def test_status_shows_a_living_run(config: Config, store: Any, publisher: StatusPublisher) -> None:
    publisher.step(StepReport(step=3, version=3, metrics={"reward/task": 0.25, "policy/lr": 1.0}))
    tell(publisher, "busy", "starting", queued=5)
    ray.get(store.request_rollouts.remote(2))
    for run in (config.run_dir, "mine"):
        text = fgaif("status", run, "--once", "--address", _address()).stdout
        assert "step 3/9, weights v3, queue 5 + 0 in work, reward 0.25" in text
        assert "rollout-1" in text
        assert "starting" in text
    tree = json.loads(fgaif("status", config.run_dir, "--json").stdout)
    assert tree["alive"] is True
    assert [actor["restarts"] for actor in tree["actors"]] == [0, 1]
    assert "mine" in fgaif("list", config.dir).stdout


def test_a_status_fits_80_columns_whatever_the_nodes() -> None:
    """No name is cut and no row is broken: each actor is on a line of its own."""
    actors = tuple(
        ActorStatus(
            name=name, role="reward", state="starting", version=1234, restarts=12,
            node=f"10.128.255.{index % 2}", rss=123 * 2**30, tokens_per_second=123456.0,
            sign_age_s=100.0,
        )
        for index, name in enumerate(["reward-attribute-0", "rollout-10", "reference-0"])
    )  # fmt: skip
    now = RunStatus(run="mine", steps=9, actors=actors, updated_at=datetime.now(UTC))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(runs.render(now))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for actor in actors:
        line = next(line for line in lines if line.strip().startswith(actor.name))
        assert line.split()[1:] == ["starting", "v1234", "12", "123456", "123.0", "100", "s", "ago"]
    assert sum("node 10.128.255." in line for line in lines) == 2
    assert "…" not in console.export_text()


def test_scale_asks_for_engines_and_can_wait_for_it(
    config: Config, store: Any, publisher: StatusPublisher
) -> None:
    tell(publisher, "busy", "leaving")
    text = fgaif("scale", config.run_dir, "--rollout", 3).stdout
    assert "mine: 1 -> 3 rollout engines" in text
    assert "2 start" in text
    assert "to start it again with so many: cluster.rollout.replicas=3" in text
    assert ray.get(store.view.remote()).wished == 3

    def grow() -> None:
        time.sleep(1)
        tell(publisher, "busy", "idle", "busy")

    growing = threading.Thread(target=grow)
    growing.start()
    assert (
        "3 rollout engines are ready"
        in fgaif("scale", config.run_dir, "--rollout", 3, "--wait").stdout
    )
    growing.join()
    result = fgaif("scale", config.run_dir, "--rollout", 1, "--wait", "--timeout", 0.5, fails=True)
    assert "2 leave when" in result.stdout
    assert "3 of 1 rollout engines are ready" in str(result.exception)
    assert fgaif("scale", config.run_dir, "--rollout", 0, fails=True).exit_code == 2


@pytest.mark.usefixtures("store", "publisher")
def test_another_process_finds_the_run_by_its_folder(config: Config) -> None:
    # Ray's own settings, which this process has from starting Ray, are not there in another shell.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "fgaif", "scale", config.run_dir, "--rollout", "2"],
        env=ours,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert "-> 2 rollout engines" in done.stdout, done.stderr


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


@pytest.mark.usefixtures("store")
def test_a_run_that_nobody_knows_is_told_from_one_that_lives(tmp_path: Path) -> None:
    error = fgaif("status", "yours", "--address", _address(), fails=True).exception
    assert isinstance(error, DataError)
    assert str(error) == "yours: no such run lives on this cluster; there are: mine"
    error = fgaif("scale", tmp_path / "none", "--rollout", 2, fails=True).exception
    assert "no such run folder; give the folder of a run" in str(error)
    (tmp_path / "new").mkdir()
    assert "has not trained yet" in str(fgaif("status", tmp_path / "new", fails=True).exception)


def test_a_run_that_died_is_shown_as_it_was_last(tmp_path: Path) -> None:
    config = load_config(None, [f"dir={tmp_path}", "name=dead"])
    past = datetime.now(UTC) - timedelta(hours=3)
    config.run_dir.mkdir()
    write_run_address(config, address=_address(), namespace=NAMESPACE, store="run:/dead", job="01")
    status = RunStatus(run="dead", step=4, steps=9, updated_at=past)
    (config.run_dir / "status.json").write_text(status.model_dump_json())
    assert "out of reach" in fgaif("status", config.run_dir).stdout  # its driver, this test, lives
    live = json.loads((config.run_dir / "live.json").read_text())
    (config.run_dir / "live.json").write_text(json.dumps(live | {"host": "elsewhere"}))
    fresh = status.model_copy(update={"updated_at": datetime.now(UTC)})
    (config.run_dir / "status.json").write_text(fresh.model_dump_json())
    assert "out of reach" in fgaif("status", config.run_dir).stdout  # only its board may be lost
    (config.run_dir / "status.json").write_text(status.model_dump_json())
    text = fgaif("status", config.run_dir).stdout
    assert "step 4/9" in text
    assert "last heard of" in text
    assert "3 h ago" in text
    assert "runs it no more" in text
    assert "dead  died" in text
    assert json.loads(fgaif("status", config.run_dir, "--json").stdout)["state"] == "died"
    error = fgaif("scale", config.run_dir, "--rollout", 2, fails=True).exception
    assert "runs it no more" in str(error)
    ended = status.model_copy(update={"state": "ended"})
    (config.run_dir / "status.json").write_text(ended.model_dump_json())
    text = fgaif("status", config.run_dir).stdout
    assert "last heard" not in text
    assert "ended" in text
    listed = fgaif("list", tmp_path).stdout
    assert "4/9" in listed
    assert "ended" in listed


def test_prometheus_finds_every_metric_at_the_node(config: Config) -> None:
    MetricsExporter("other").step(
        StepReport(step=1, version=1, metrics={})
    )  # runs one after the other
    exporter = MetricsExporter("mine")
    report = StepReport(
        step=3,
        version=3,
        metrics={
            "reward/object": 0.5, "reward/task": 1.5, "hallu/relation": 0.25, "kl/response": 2.0,
            "kl/coef": 0.1, "length/tokens": 12.0, "mismatch/mean": 0.001, "tokens_per_second": 9.0,
            "seconds/rollout": 4.0, "sync/seconds": 0.5, "sync/bytes": 100.0,
        },
    )  # fmt: skip
    exporter.step(report)
    exporter.step(report)
    actor = ActorStatus(
        name="rollout-0", role="rollout", state="busy", restarts=1, tokens_per_second=8.0,
        rss=2**30, sign_age_s=1.0,
    )  # fmt: skip
    status = RunStatus(
        run="mine", steps=9, version=3, chunks_waiting=5, set_aside=1, stale_dropped=2,
        actors=(actor,), updated_at=datetime.now(UTC),
    )  # fmt: skip
    exporter.status(status)
    grown = actor.model_copy(update={"restarts": 3})
    exporter.status(status.model_copy(update={"actors": (grown,)}))

    def found() -> dict[str, float]:
        page = urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=5)
        lines = [line for line in page.read().decode().splitlines() if line.startswith("ray_fgaif")]
        lines = [line for line in lines if 'run="mine"' in line]
        return {_short(line): float(line.rsplit(" ", 1)[1]) for line in lines}

    until(lambda: {name.split("{")[0] for name in found()} == {f"ray_{name}" for name in METRICS})
    until(lambda: found()['ray_fgaif_restarts_total{role="rollout"}'] == 3)
    values = found()
    assert values['ray_fgaif_reward{kind="object"}'] == 0.5
    assert values['ray_fgaif_hallucination_rate{kind="relation"}'] == 0.25
    assert values['ray_fgaif_stage_seconds{stage="rollout"}'] == 4
    assert values["ray_fgaif_sync_bytes_total{}"] == 200
    assert values["ray_fgaif_set_aside_total{}"] == 1
    assert values['ray_fgaif_queue_chunks{state="waiting"}'] == 5
    assert values['ray_fgaif_actors{role="rollout",state="busy"}'] == 1
    assert values['ray_fgaif_actors{role="rollout",state="idle"}'] == 0
    assert values['ray_fgaif_actor_rss_bytes{actor="rollout-0",role="rollout"}'] == 2**30

    exporter.status(status.model_copy(update={"actors": ()}))  # the engine left
    until(lambda: found()['ray_fgaif_actors{role="rollout",state="busy"}'] == 0)
    assert found()['ray_fgaif_actor_rss_bytes{actor="rollout-0",role="rollout"}'] == 0


def _short(line: str) -> str:
    """Name and our own labels of a sample, in order."""
    name, _, labels = line.rpartition(" ")[0].rstrip("}").partition("{")
    ours = ("kind=", "stage=", "role=", "actor=", "state=")
    return name + "{" + ",".join(sorted(x for x in labels.split(",") if x.startswith(ours))) + "}"
