"""What the rollout group does without a cluster: errors between events, late engines."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

from cluster.groups.rollout_group import RolloutGroup, _RayTransport, _Weights
from cluster.roles import SyncCheck
from fgaif.config import ClusterConfig


class Starting:
    """An actor that is never ready."""

    def __init__(self) -> None:
        self.__ray_ready__ = self

    def remote(self) -> "Starting":
        return self

    def future(self) -> "Future[None]":
        return Future()


def test_an_error_beside_the_events_fails_the_pool_and_leaves_its_thread_at_work() -> None:
    def wished() -> int:
        raise RuntimeError("the head is gone")

    group = RolloutGroup(lambda _: (Starting(), None), ClusterConfig(), wished=wished)
    end = time.monotonic() + 10
    while group._pool.failure is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert str(group._pool.failure) == "the head is gone"
    assert group._thread.is_alive()
    group._put(None)
    group._thread.join(10)
    assert not group._thread.is_alive()


def test_engines_that_went_on_to_newer_weights_prove_the_older_ones_too() -> None:
    transport = _RayTransport(lambda _: (None, None), lambda _: None, ClusterConfig(), None)
    for serial in (1, 2):
        weights = _Weights(version=serial, stored=SimpleNamespace(), probe=None)
        transport.offer(serial, weights, oldest=0)
    check = SyncCheck(arrived=1.0, mean_abs_diff=0.25)
    transport._checks[2].append(check)  # a busy engine was asked for both, and took the last
    assert transport.checks(1) == transport.checks(2) == [check]
