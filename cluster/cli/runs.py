"""``fgaif status``, ``fgaif scale`` and ``fgaif list``: runs while they go on, and afterwards."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live as LiveDisplay
from rich.table import Table
from rich.text import Text

from cluster.monitoring.status import (
    AUTH_MODE,
    ActorStatus,
    RunAddress,
    RunStatus,
    driver_is_alive,
    read_run_address,
    read_status,
)
from fgaif.errors import ActorError, DataError, first_line

Run = Annotated[str, typer.Argument(help="Folder of the run; with --address its name is enough.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray's address, HEAD:6379; default: what the run noted in its folder.",
    ),
]
out = Console()

_REACH_S = 5.0
_ANSWER_S = 30.0
_REFRESH_S = 2.0
_SILENT = timedelta(minutes=1)  # a driver publishes about once a second


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A run as its folder knows it; ``folder`` is None where only a name was given."""

    name: str
    folder: Path | None
    live: RunAddress | None
    status: RunStatus | None


def status(
    run: Run,
    address: RayAddress = None,
    watch: Annotated[
        bool | None,
        typer.Option("--watch/--once", help="Until the run ends; default: if on a terminal."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Once, as JSON.")] = False,
) -> None:
    """Show what a run is doing: step, weights, queue, actors and their last heartbeat.

    A run that has ended, or died, is shown as it was last.
    """
    found = _find(run, address)
    try:
        with _store(found, address) as store:
            if as_json or not (out.is_terminal if watch is None else watch):
                now = _ask(store)
                _show_once(now, now.state, alive=True, as_json=as_json)
            else:
                _watch(store)
    except _OutOfReach as gone:
        last = found.folder and read_status(found.folder)
        if not last:
            raise ActorError(str(gone)) from gone
        state = _state(last, found.live, lost=isinstance(gone, _Lost))
        _show_once(last, state, alive=False, as_json=as_json)
        if not as_json and last.state == "running":
            if_it = "" if state == "died" else "if it died: "
            out.print(f"{gone}; {if_it}its command goes on from its last checkpoint")


def scale(
    run: Run,
    rollout: Annotated[int, typer.Option(min=1, help="Rollout engines from now on.")],
    address: RayAddress = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until so many are ready.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that --wait waits.")] = 600.0,
) -> None:
    """Change a run's number of rollout engines while it goes on.

    New engines start in placement groups of their own, load the present weights and then get work;
    where there is no room they wait, which makes Ray's autoscaler add nodes. Engines that leave
    finish what they have in hand. A run that is started again begins with its configuration.
    """
    found = _find(run, address)
    with _store(found, address) as store:
        import ray

        now = _ask(store)
        here = [actor for actor in now.actors if actor.role == "rollout"]
        staying = sum(actor.state != "leaving" for actor in here)
        ray.get(store.request_rollouts.remote(rollout))
        out.print(f"{now.run}: {staying} -> {rollout} rollout engines", highlight=False)
        if rollout > staying:
            out.print(f"{rollout - staying} start, and wait if there is no room for them yet")
        elif rollout < staying:
            out.print(f"{staying - rollout} leave when they have finished their chunk")
        keep = f"cluster.rollout.replicas={rollout}"
        out.print(f"until it ends or stops; to start it again with so many: {keep}", soft_wrap=True)
        if wait:
            _wait_for(store, rollout, timeout)


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    address: Annotated[
        str | None,
        typer.Option(help="A head's dashboard: list the jobs of that cluster instead."),
    ] = None,
) -> None:
    """Runs in a folder, their step and last heartbeat; with --address, jobs of a cluster."""
    if address or os.environ.get("RAY_API_SERVER_ADDRESS"):
        from cluster.cli.jobs import list_jobs

        list_jobs(address)
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of runs; give one, or --address of a cluster")
    table = Table()
    for column in ("run", "state", "step", "last seen"):
        table.add_column(column)
    for path in sorted(folder.iterdir()):
        if (path / "config.yaml").is_file() or (path / "status.json").is_file():
            table.add_row(path.name, *_line(path))
    out.print(table)


class _OutOfReach(ActorError):
    """The run cannot be reached: it has ended, or died, or its cluster is gone."""


class _Lost(_OutOfReach):
    """Its cluster answers, and runs it no more."""


def _find(run: str, address: str | None) -> _Found:
    for folder in (Path(run), Path("runs") / run):
        live, last = read_run_address(folder), read_status(folder)
        if live or last:
            return _Found(name=folder.resolve().name, folder=folder, live=live, status=last)
    if address is None:
        known = "has not trained yet" if Path(run).is_dir() else "no such run folder"
        raise DataError(
            f"{run}: {known}; give the folder of a run, or its name and the --address of its "
            "cluster; `fgaif list` shows runs"
        )
    return _Found(name=Path(run).name, folder=None, live=None, status=None)


@contextmanager
def _store(found: _Found, address: str | None) -> Iterator[Any]:
    """The living run's heartbeat store; the connection to its cluster is closed afterwards."""
    if found.status and found.status.state != "running" and address is None:
        raise _OutOfReach(f"{found.name}: {found.status.state} {_ago(found.status.updated_at)}")
    where = address or (found.live.address if found.live else None)
    if where is None:
        raise _OutOfReach(f"{found.name}: its folder says no address; give --address")
    if found.live and found.live.auth:  # Ray reads it when it is imported
        os.environ.setdefault(AUTH_MODE, found.live.auth)
    import ray  # takes a second

    from cluster.monitoring.heartbeat import NAMESPACE

    mine = not ray.is_initialized()
    if mine:
        _connect(found, where)
    try:
        name, gone = _store_name(found), f"{found.name}: the cluster at {where} runs it no more"
        try:
            store = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError as error:
            raise _Lost(gone) from error
        try:
            yield store
        except ray.exceptions.ActorDiedError as error:
            raise _Lost(gone) from error
    finally:
        if mine:
            ray.shutdown()


def _connect(found: _Found, address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_REACH_S).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        first = first_line(error)
        if "InvalidAuthToken" in f"{error} {error.__cause__}":
            first = f"it wants its token: set {AUTH_MODE}=token, and RAY_AUTH_TOKEN or _PATH"
        raise _OutOfReach(f"{found.name}: no Ray cluster answers at {address} ({first})") from error


def _store_name(found: _Found) -> str:
    if found.live is not None:
        return found.live.store
    from cluster.monitoring.heartbeat import heartbeat_stores

    names = heartbeat_stores(found.name)
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(f"{found.name}: several runs are called so: {', '.join(names)}; give the "
                        "folder")  # fmt: skip
    others = ", ".join(Path(name).name for name in heartbeat_stores("")) or "none"
    raise DataError(f"{found.name}: no such run lives on this cluster; there are: {others}")


def _ask(store: Any) -> RunStatus:
    import ray

    found = ray.get(store.status.remote(), timeout=_ANSWER_S)
    if found is None:
        raise ActorError("the run has just started and says nothing yet; try again")
    return RunStatus.model_validate(found)


def _watch(store: Any) -> None:
    with LiveDisplay(console=out, auto_refresh=False) as display:
        while True:
            now = _ask(store)
            display.update(render(now), refresh=True)
            if now.state != "running":
                return
            time.sleep(_REFRESH_S)


def _wait_for(store: Any, wanted: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        now = _ask(store)
        engines = [actor for actor in now.actors if actor.role == "rollout"]
        ready = sum(actor.state in ("idle", "busy") for actor in engines)
        if ready == len(engines) == wanted:
            out.print(f"{wanted} rollout engines are ready")
            return
        if now.state != "running":
            raise ActorError(f"{now.run}: {now.state} with {ready} rollout engines ready")
        if time.monotonic() > end:
            raise ActorError(
                f"{now.run}: after {timeout:g} s {ready} of {wanted} rollout engines are ready; "
                "the wish stands, `fgaif status` shows what they wait for"
            )
        time.sleep(1)


def _show_once(status: RunStatus, state: str, *, alive: bool, as_json: bool) -> None:
    if as_json:
        tree = json.loads(status.model_dump_json())
        out.print_json(data={"alive": alive} | tree | {"state": state})
        return
    now: dict[str, None] = {} if alive else {"tokens_per_second": None, "sign_age_s": None}
    actors = tuple(actor.model_copy(update=now) for actor in status.actors)
    out.print(render(status.model_copy(update={"actors": actors}), state))
    if not alive:
        said = "last heard of" if status.state == "running" else status.state
        out.print(f"{said} {_when(status.updated_at)}", highlight=False)


def render(status: RunStatus, state: str | None = None) -> Group:
    """A run's status as lines and a table of its actors; ``state`` where more is known by now."""
    shown = status.metrics
    parts = [
        *([status.stage] if status.stage else []),
        f"step {status.step}/{status.steps}",
        f"weights v{status.version}",
        f"queue {status.chunks_waiting} + {status.chunks_in_flight} in work",
        *(f"{name} {_number(shown[key])}" for name, key in _METRICS.items() if key in shown),
    ]
    counts = {"set aside": status.set_aside, "too old": status.stale_dropped}
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    engines = sum(actor.role == "rollout" for actor in status.actors)
    if status.wished not in (None, engines):
        parts.append(f"{status.wished} engines wished")
    # 80 columns hold it: nodes stand above their actors, and only where there are several.
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("actor", "state", "weights", "restarts", "tokens/s", "GiB", "last sign"):
        table.add_column(column, no_wrap=True)
    nodes = list(dict.fromkeys(actor.node or "" for actor in status.actors))
    for node in nodes:
        if len(nodes) > 1:
            table.add_section()
            table.add_row(Text(f"node {node}" if node else "no node yet", "dim"))
        for actor in status.actors:
            if (actor.node or "") == node:
                table.add_row(*_actor(actor))
    heading = Text.assemble((status.run, "bold"), f"  {state or status.state}")
    return Group(heading, Text(", ".join(parts)), table)


def _actor(actor: ActorStatus) -> tuple[str, ...]:
    return (
        actor.name,
        actor.state,
        "" if actor.version is None else f"v{actor.version}",
        str(actor.restarts),
        "" if actor.tokens_per_second is None else f"{actor.tokens_per_second:.0f}",
        "" if actor.rss is None else f"{actor.rss / 2**30:.1f}",
        "" if actor.sign_age_s is None else f"{actor.sign_age_s:.0f} s ago",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_METRICS = {
    "reward": "reward/task",
    "KL": "kl/response",
    "tokens/s": "tokens_per_second",
    "seconds": "seconds/total",
    "arrived": "sync/arrived",
}


def _line(folder: Path) -> tuple[str, str, str]:
    status = read_status(folder)
    if status is None:
        return "not trained", "", ""
    state = _state(status, read_run_address(folder), believed="running")
    return state, f"{status.step}/{status.steps}", _when(status.updated_at)


def _state(
    status: RunStatus,
    live: RunAddress | None,
    *,
    lost: bool = False,
    believed: str = "out of reach",
) -> str:
    """The state by now of a run that is not asked itself.

    ``lost``: its cluster has no heartbeat store of it. ``believed``: what is said of one that may
    still run, as a driver does that has lost its store.
    """
    if status.state != "running":
        return status.state
    lives = driver_is_alive(live) if live else None
    silent = datetime.now(UTC) - status.updated_at > _SILENT
    return "died" if lives is False or (lives is None and lost and silent) else believed


def _when(moment: datetime) -> str:
    return f"{moment.astimezone().isoformat(' ', 'seconds')}, {_ago(moment)}"


def _ago(moment: datetime) -> str:
    seconds = int((datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
