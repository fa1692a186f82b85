"""Say the first cause when an actor fails: role, node, what happened, last log lines."""

import re
from pathlib import Path

import ray

from fgaif.errors import ActorError, FgaifError

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
    | ray.exceptions.GetTimeoutError
)


def is_gone(error: BaseException) -> bool:
    """Whether an actor, its node or the answer it gave is lost, so that another one may help."""
    return isinstance(error, _GONE | TimeoutError)


def translate(error: Exception, name: str) -> FgaifError:
    """Turn Ray's exception into one of ours that names the actor and the first cause."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, FgaifError):
            return type(cause)(f"{name}: {cause}")
        return ActorError(f"{name} failed: {type(cause).__name__}: {cause}")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return ActorError(
            f"{name} was killed because the node ran out of memory; lower the batch sizes or "
            f"spread the roles over more nodes ({error})"
        )
    if isinstance(error, ray.exceptions.ActorDiedError):
        if CREATION in str(error):
            return ActorError(f"{name} could not start: {_last_line(error)}")
        return ActorError(f"{name} died: {_first_line(error)}{_log_tail(error)}")
    if isinstance(error, TimeoutError | ray.exceptions.GetTimeoutError):
        return ActorError(
            f"{name} did not answer in time; raise cluster.call_timeout_s if the work is long"
        )
    return ActorError(f"{name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _last_line(error: Exception) -> str:
    """The exception at the end of a traceback, without its module path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1])


def _log_tail(error: Exception) -> str:
    """The last lines that the dead actor's process wrote, where its logs are on this machine."""
    pid = re.search(r"\bpid[:=]\s*(\d+)", str(error))
    if pid is None:
        return ""
    for log in Path("/tmp/ray/session_latest/logs").glob(f"worker-*-{pid.group(1)}.err"):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n  " + "\n  ".join([f"last lines of {log.name}:", *lines])
    return ""
