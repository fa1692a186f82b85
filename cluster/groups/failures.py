"""Say the first cause when an actor fails: role, node, what happened, last log lines."""

import re
from pathlib import Path
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData

from fgaif.errors import ActorError, FgaifError, first_line

_TAIL_LINES = 15
CREATION = "raised in its creation task"
"""In Ray's words for an actor whose constructor failed: another one would fail too."""
_GONE = (
    ray.exceptions.ActorDiedError
    | ray.exceptions.ActorUnavailableError
    | ray.exceptions.NodeDiedError
    | ray.exceptions.WorkerCrashedError
    | ray.exceptions.ObjectLostError
    | ray.exceptions.OutOfMemoryError
    | ray.exceptions.ActorPlacementGroupRemoved
    | ray.exceptions.TaskPlacementGroupRemoved
    | ray.exceptions.GetTimeoutError
)
_LOST = ray.exceptions.ObjectLostError | ray.exceptions.NodeDiedError
_KILLED = ("connection error code 2", "exit code 137", "SIGKILL")
"""In Ray's words for a process that ended without a word: killed, or crashed in native code."""
_CRASHED = ("Fatal Python error", "*** SIG")
"""In the log of a process that crashed by itself."""
_MEMORY = ("low on memory", "out of memory", "OutOfMemory")
_LESS_MEMORY = "lower the batch sizes or spread the roles over more nodes"


def is_gone(error: BaseException) -> bool:
    """Whether an actor, its node or the answer it gave is lost, so that another one may help."""
    by_itself = isinstance(error, ray.exceptions.RayTaskError)  # also carries the type it raised
    return isinstance(error, _GONE | TimeoutError) and not by_itself


def cause_of_death(actor: Any) -> ray.exceptions.RayError | None:
    """Why an actor is dead that this process has called, as far as it has heard; asks nobody.

    Ray has no public way to this; its own Ray Data goes the same.
    """
    if actor._get_local_state() != ActorTableData.DEAD:
        return None
    try:
        ray.get(actor.__ray_ready__.remote())  # of a dead actor this fails at once
    except ray.exceptions.RayError as error:
        return error
    return None


def never_started(error: BaseException) -> bool:
    """Whether the actor's own constructor raised, which it would do again."""
    return isinstance(error, ray.exceptions.ActorDiedError) and CREATION in str(error)


def translate(error: Exception, name: str, node: str = "") -> FgaifError:
    """Turn Ray's exception into one of ours that names the actor and the first cause.

    ``node`` is the id of the actor's node, where that is known.
    """
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, FgaifError):
            return type(cause)(f"{name}: {cause}")
        return ActorError(f"{name} failed: {type(cause).__name__}: {cause}")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return ActorError(
            f"{name} was killed because the node ran out of memory; {_LESS_MEMORY} ({error})"
        )
    if isinstance(error, ray.exceptions.ActorDiedError):
        if never_started(error):
            return ActorError(f"{name} could not start: {_last_line(error)}")
        return ActorError(f"{name} died: {_death(str(error), node)}")
    if isinstance(error, TimeoutError | ray.exceptions.GetTimeoutError):
        return ActorError(
            f"{name} did not answer in time; raise cluster.call_timeout_s if the work is long"
        )
    place = f" (node {node[:12]})" if node else ""
    if isinstance(error, _LOST):
        return ActorError(f"{name}: its answer was lost with its node{place}: {first_line(error)}")
    return ActorError(f"{name}: {first_line(error)}{place}")


def _death(text: str, node: str) -> str:
    """What ended the process and where, its last log lines, and whether memory ran out."""
    ip, pid = _field(r"\bip: *(\S+)", text), _field(r"\bpid[:=] *(\d+)", text)
    node = _field(r"Node Id: *(\w+)", text) or node
    place = [f"node {' '.join(part for part in (ip, node[:12]) if part)}"] if ip or node else []
    place += [f"pid {pid}"] if pid else []
    detail = _exit(text)
    lines = [detail + (f" ({', '.join(place)})" if place else "")]
    tail = _log_tail(ip, pid) if pid else []
    told = any(word in detail for word in _MEMORY)
    silent = any(word in detail for word in _KILLED)
    if told:
        lines.append(f"out of memory: {_LESS_MEMORY}")
    elif silent and not any(word in line for word in _CRASHED for line in tail):
        lines.append(_killer(here=ip == ray.util.get_node_ip_address()))
    return "\n  ".join([*lines, *tail])


def _killer(here: bool) -> str:
    """Who may have killed a process that left no word: Ray says the same of all."""
    kills = _memory_kills()
    if not here or kills is None or _kills_before is None:
        return (
            "killed by the kernel for lack of memory (`dmesg` on that node tells; if so, "
            f"{_LESS_MEMORY}) or by somebody, or it ended itself without a word"
        )
    if kills > _kills_before:
        return (
            "the kernel has killed for lack of memory on this machine since the run began: "
            f"{_LESS_MEMORY}"
        )
    return (
        "killed by somebody, or it ended itself without a word: the kernel has killed nothing here "
        "for lack of memory"
    )


def _memory_kills() -> int | None:
    """Processes that the kernel has killed on this machine for lack of memory, since it started."""
    try:
        found = re.search(r"(?m)^oom_kill (\d+)", _COUNTERS.read_text(encoding="ascii"))
    except OSError:
        return None
    return int(found[1]) if found else None


_COUNTERS = Path("/proc/vmstat")
_kills_before = _memory_kills()  # as the run began


def _exit(text: str) -> str:
    """Ray's own words for the end: exit type and detail, or why the node or the actor is gone."""
    if kind := _field(r"Worker exit type: *(\w+)", text):
        detail = _field(r"Worker exit detail: *(.*)", text).partition(" Some common causes")[0]
        return f"{kind}: {detail.strip()}"
    facts = r"class_name|actor_id|pid|name|namespace|ip"
    lines = [line.strip() for line in text.splitlines()[1:]]
    said = [line for line in lines if line and not re.match(rf"({facts}): ", line)]
    return " ".join(said) or first_line(Exception(text))


def _field(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _last_line(error: Exception) -> str:
    """The exception at the end of a traceback, without its module path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1])


def _log_tail(ip: str, pid: str) -> list[str]:
    """The last lines that the dead actor's process wrote, or where they are."""
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    pattern = f"worker-*-{context.get_job_id()}-{pid}.err"
    if ip and ip != ray.util.get_node_ip_address():
        return [f"its log is on node {ip}: {folder / pattern}"]
    for log in folder.glob(pattern):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        marks = (":job_id:", ":actor_name:")
        words = [line for line in lines if line.strip() and not line.startswith(marks)]
        if words:
            return [f"last lines of {log.name}:", *words[-_TAIL_LINES:]]
    return []
