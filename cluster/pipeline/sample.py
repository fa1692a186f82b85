"""Sampling many responses, from however many rollout engines there are by then."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from cluster.console import progress_bars
from cluster.groups.rollout_group import RolloutGroup
from cluster.launch import Cluster
from fgaif.pending import Pending
from fgaif.types import GenerationRequest, Response

_REQUESTS = 256
"""Items of a chunk: few enough for a moving progress bar, enough for full batches."""
_ROUNDS = 2
"""Rounds asked for at a time: engines that finish theirs, or have just joined, find work."""


def sample_all(
    cluster: Cluster,
    requests: Sequence[GenerationRequest],
    what: str,
    console: Console,
    done: int = 0,
    keep: Callable[[list[Response]], None] = lambda _: None,
) -> list[Response]:
    """Sample in rounds with a progress bar, handing each finished round to ``keep``.

    ``what`` stands before the bar; ``done`` more were sampled earlier. Samples that were set aside
    are left out, which is said.
    """
    responses: list[Response] = []
    lost = 0
    with progress_bars(console, what) as progress:
        progress(done, done + len(requests), note="starting engines, then the first round")
        for sampled in sample_in_rounds(cluster.rollouts(), requests, cluster.engines):
            chunk = [response for response in sampled if response is not None]
            keep(chunk)
            responses += chunk
            lost += len(sampled) - len(chunk)
            progress(done + len(responses), done + len(requests))
    if lost:
        console.print(
            f"{lost} of {len(requests)} samples were set aside: each killed rollout engines "
            "more than once",
            style="yellow",
        )
    return responses


def sample_in_rounds(
    rollouts: RolloutGroup, requests: Sequence[GenerationRequest], engines: Callable[[], int]
) -> Iterator[list[Response | None]]:
    """Yield the answers in order, a round after the other; None for one that was set aside.

    A round holds a chunk for each of the engines that there are when it is asked for. Chunks are of
    one size and of the same requests whatever the engines' number, which so changes no answer.
    """
    asked: deque[Pending[list[Response | None]]] = deque()
    position = 0
    while asked or position < len(requests):
        while len(asked) < _ROUNDS and position < len(requests):
            end = position + _REQUESTS * engines()
            asked.append(rollouts.generate(requests[position:end], chunk=_REQUESTS))
            position = end
        yield asked.popleft().result()
