"""When an actor fails, the first cause is told: who, what, and the last lines it wrote."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import ray

import cluster.groups.failures
from cluster.groups.failures import is_gone, translate
from fgaif.errors import ActorError, CheckpointError, DataError


class Fragile:
    """An actor that fails in the ways actors do."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise CheckpointError("model 'x': give another directory")

    def refuse(self) -> None:
        raise DataError("row 7: no image")

    def stumble(self) -> None:
        raise ZeroDivisionError("by nothing")

    def wait(self) -> None:
        raise TimeoutError("no reply")

    def crash(self) -> None:
        os.abort()

    def die(self) -> None:
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def failure(method: str, *, broken: bool = False) -> Exception:
    actor = ray.remote(Fragile).options(num_cpus=0).remote(broken)
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(getattr(actor, method).remote(), timeout=60)
    return translate(caught.value, "reward-object-0")


@pytest.mark.usefixtures("local_ray")
def test_our_own_errors_keep_their_type_and_gain_the_actor_s_name() -> None:
    error = failure("refuse")
    assert isinstance(error, DataError)
    assert str(error) == "reward-object-0: row 7: no image"


@pytest.mark.usefixtures("local_ray")
def test_other_errors_are_named() -> None:
    error = failure("stumble")
    assert isinstance(error, ActorError)
    assert str(error) == "reward-object-0 failed: ZeroDivisionError: by nothing"


@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_could_not_start_says_why() -> None:
    message = str(failure("refuse", broken=True))
    assert message.startswith("reward-object-0 could not start: CheckpointError: model 'x'")


@pytest.mark.usefixtures("local_ray")
def test_a_dead_process_leaves_its_last_words() -> None:
    """What ended it, on which node, who may have killed it, what it last said."""
    message = str(failure("die"))
    head, hint, *log = message.splitlines()
    here = ray.util.get_node_ip_address()
    assert re.fullmatch(
        rf"reward-object-0 died: SYSTEM_ERROR: .*End of file\. \(node {here}, pid \d+\)", head
    )
    assert "killed " in hint
    assert "common causes" not in message
    assert re.fullmatch(r"last lines of worker-\w+-\w+-\d+\.err:", log[0].strip())
    assert log[-1].strip() == "the last words"


@pytest.mark.usefixtures("local_ray")
def test_a_crash_in_native_code_is_not_taken_for_a_lack_of_memory() -> None:
    message = str(failure("crash"))
    assert "Fatal Python error: Aborted" in message
    assert "out of memory" not in message


@pytest.mark.usefixtures("local_ray")
def test_the_kernel_s_count_tells_a_lack_of_memory_from_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count is of the driver's machine: of another one nothing is said for sure."""
    counters = tmp_path / "vmstat"
    monkeypatch.setattr(cluster.groups.failures, "_COUNTERS", counters)
    monkeypatch.setattr(cluster.groups.failures, "_kills_before", 3)

    def hint(ip: str, kills: int) -> str:
        counters.write_text(f"nr_free_pages 9\noom_kill {kills}\nswap_ra 1\n")
        dead = ray.exceptions.ActorDiedError()
        dead.error_msg = (
            f"The actor died.\n\tip: {ip}\n\tWorker exit type: SYSTEM_ERROR Worker exit detail: "
            "Worker unexpectedly exits with a connection error code 2. End of file."
        )
        return str(translate(dead, "judge-0")).splitlines()[1].strip()

    here = ray.util.get_node_ip_address()
    assert hint(here, 3).startswith("killed by somebody, or it ended itself")
    assert hint("10.1.2.3", 4).startswith("killed by the kernel for lack of memory (`dmesg` on")
    assert hint(here, 4).startswith("the kernel has killed for lack of memory on this machine")
    assert hint(here, 4).startswith("the kernel has killed for lack")  # two at a time, perhaps
    monkeypatch.setattr(cluster.groups.failures, "_COUNTERS", tmp_path / "none")
    assert hint(here, 5).startswith("killed by the kernel for lack of memory (`dmesg` on")


@pytest.mark.usefixtures("local_ray")
def test_a_log_on_another_node_is_named() -> None:
    lost = ray.exceptions.ActorDiedError()
    lost.error_msg = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 42\n"
        "\tip: 10.1.2.3\nThe actor died because its node has died. Node Id: 0123456789abcdef\n"
        "\tthe actor's node was terminated unexpectedly: health check failed"
    )
    message = str(translate(lost, "learner-1"))
    assert message.startswith(
        "learner-1 died: The actor died because its node has died. Node Id: 0123456789abcdef the "
        "actor's node was terminated unexpectedly: health check failed "
        "(node 10.1.2.3 0123456789ab, pid 42)"
    )
    assert "its log is on node 10.1.2.3: " in message
    assert "-42.err" in message


@pytest.mark.usefixtures("local_ray")
def test_a_time_out_of_the_work_itself_is_no_death() -> None:
    actor = ray.remote(Fragile).options(num_cpus=0).remote()
    with pytest.raises(TimeoutError) as caught:
        ray.get(actor.wait.remote(), timeout=60)
    assert not is_gone(caught.value)
    assert str(translate(caught.value, "judge-0")) == "judge-0 failed: TimeoutError: no reply"


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ActorUnavailableError("Socket closed", None),
        ray.exceptions.NodeDiedError("gone"),
        ray.exceptions.ObjectLostError("ab", None, ""),
        ray.exceptions.OutOfMemoryError("killed"),
        ray.exceptions.GetTimeoutError(),
    ],
)
def test_whatever_takes_the_actor_or_its_answer_away_is_mended(error: Exception) -> None:
    assert is_gone(error)
