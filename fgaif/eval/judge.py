"""A chat model as judge: many items at a time, re-asked where a reply cannot be read."""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from fgaif.chat.messages import ChatModel, ChatRequest, RequestFailed, gather_all

T = TypeVar("T")
R = TypeVar("R")
Failure = Literal["unreadable", "no_reply"]

PROMPTS = Path(__file__).parent / "prompts"
READS = 3
CONCURRENCY = 64

Progress = Callable[[int, int], None]
"""Called with (items done, items in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(Generic[T]):
    """What a judge said of one item.

    ``value`` is None if it failed, and ``failure`` says how; ``reply`` is the last reply's text, or
    why there was none.
    """

    value: T | None
    reply: str
    failure: Failure | None = None


async def judge(
    model: ChatModel, request: ChatRequest, read: Callable[[str], T | None], reads: int = READS
) -> Judgement[T]:
    """Ask until a reply can be read, ``reads`` times at most (``attempt`` 0, 1, ...).

    Raises:
        ServiceError: the model cannot be asked at all.
    """
    text = ""
    for attempt in range(reads):
        try:
            text = (await model.ask(replace(request, attempt=attempt))).text
        except RequestFailed as error:
            return Judgement(value=None, reply=str(error), failure="no_reply")
        value = read(text)
        if value is not None:
            return Judgement(value=value, reply=text)
    return Judgement(value=None, reply=text, failure="unreadable")


async def judge_all(
    model: ChatModel,
    items: Sequence[R],
    make_request: Callable[[R], ChatRequest],
    read: Callable[[str], T | None],
    *,
    reads: int = READS,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> list[Judgement[T]]:
    """Judge every item, in order, ``concurrency`` of them at a time.

    Raises:
        ServiceError: the model cannot be asked at all; replies so far are the model's to keep.
    """

    async def one(item: R) -> Judgement[T]:
        return await judge(model, make_request(item), read, reads)

    return await in_parallel(one, items, concurrency, progress)


async def in_parallel(
    call: Callable[[R], Awaitable[T]],
    items: Sequence[R],
    limit: int = CONCURRENCY,
    progress: Progress | None = None,
) -> list[T]:
    """Await ``call(item)`` for every item, ``limit`` at a time; results in order.

    After a failure nothing new starts, what is on its way ends, and the failure is raised.
    """
    results: dict[int, T] = {}
    left = deque(enumerate(items))

    async def work() -> None:
        while left:
            index, item = left.popleft()
            try:
                results[index] = await call(item)
            except BaseException:
                left.clear()
                raise
            if progress is not None:
                progress(len(results), len(items))

    await gather_all(work() for _ in range(min(limit, len(items))))
    return [results[index] for index in range(len(items))]


def failures(judgements: Iterable[Judgement[T]]) -> dict[str, int]:
    """Count failed judgements: ``judge_unreadable`` and ``judge_no_reply``."""
    found = Counter(judgement.failure for judgement in judgements)
    return {
        "judge_unreadable": found["unreadable"],
        "judge_no_reply": found["no_reply"],
    }
