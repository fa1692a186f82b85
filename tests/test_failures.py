"""When an actor fails, the first cause is told: who, what, and the last lines it wrote."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.failures import translate
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

    def die(self) -> None:
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import Fragile
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=here,
    )
    yield
    ray.shutdown()


def failure(method: str, *, broken: bool = False) -> Exception:
    actor = ray.remote(Fragile).options(num_cpus=0).remote(broken)
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(getattr(actor, method).remote(), timeout=60)
    return translate(caught.value, "reward-object-0")


@pytest.mark.usefixtures("cluster")
def test_our_own_errors_keep_their_type_and_gain_the_actor_s_name() -> None:
    error = failure("refuse")
    assert isinstance(error, DataError)
    assert str(error) == "reward-object-0: row 7: no image"


@pytest.mark.usefixtures("cluster")
def test_other_errors_are_named() -> None:
    error = failure("stumble")
    assert isinstance(error, ActorError)
    assert str(error) == "reward-object-0 failed: ZeroDivisionError: by nothing"


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_could_not_start_says_why() -> None:
    message = str(failure("refuse", broken=True))
    assert message.startswith("reward-object-0 could not start: CheckpointError: model 'x'")


@pytest.mark.usefixtures("cluster")
def test_a_dead_process_leaves_its_last_words() -> None:
    message = str(failure("die"))
    assert message.startswith("reward-object-0 died: ")
    assert "the last words" in message
