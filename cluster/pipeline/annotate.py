"""Step 1 at any scale: Ray Data streams stored responses through one process that asks the models.

Limits and budget hold for the whole job because one process does the asking; what costs time is
waiting for replies, and one event loop waits for thousands of them. Rows come in chunks, in order,
so memory does not grow with their number and the label file is always a prefix of the final one.
"""

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from cluster.groups.failures import translate
from fgaif import errors
from fgaif.chat.batched import BatchedChat
from fgaif.chat.limits import Usage
from fgaif.chat.messages import gather_all
from fgaif.chat.store import ReplyStore
from fgaif.config import Config
from fgaif.errors import FgaifError
from fgaif.feedback.label_order import repair_order
from fgaif.feedback.models import FeedbackModels
from fgaif.feedback.segment import segment_responses
from fgaif.feedback.store import JsonlStore, encode_labeled, label_store, response_store
from fgaif.files import write_whole
from fgaif.types import LabeledResponse, Response

if TYPE_CHECKING:
    from cluster.groups.role_groups import JudgeGroup

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Usage | None], None]
"""Told rows done, rows in all, and what was asked and paid so far in this run."""

_CHUNKS, _CHUNK_ROWS = 4096, 32
_CONCURRENT_CHUNKS = 8
_ROWS_IN_FLIGHT = 256
_POLL_S = 0.5


@dataclass(eq=False)
class _Fast:
    """What segments need of a tokenizer; it can be referred to weakly, as by their caches."""

    backend_tokenizer: Tokenizer


class AnnotateChunk:
    """Ray Data's worker: reads a chunk of responses, returns them labelled, as JSON lines."""

    def __init__(
        self,
        config: Config,
        tokenizer: str,
        chunks: Sequence[tuple[int, int]],
        judges: "JudgeGroup | None",
        judge_name: str,
    ) -> None:
        folder = config.run_dir / "feedback"
        self._models = _models(config, judges, judge_name, ReplyStore(folder / "replies.sqlite"))
        self._annotator = self._models.annotator()
        self._responses = response_store(config.run_dir / "responses" / "responses.jsonl")
        self._tokenizer = _Fast(backend_tokenizer=Tokenizer.from_str(tokenizer))
        self._min_words = config.segment.least_words
        self._chunks = chunks
        self._rows_done = 0
        self._progress = folder / "progress.json"
        self._writing = threading.Lock()
        self._room = asyncio.Semaphore(_ROWS_IN_FLIGHT)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._report(), self._loop)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[str]]:
        """Label the chunk with this number; the loop works on several chunks at the same time.

        An error that users can mend is returned, as (name, message): Ray Data's own wrapping
        would lose which one it was.
        """
        (number,) = batch["item"].tolist()
        work = asyncio.run_coroutine_threadsafe(self._label(*self._chunks[number]), self._loop)
        try:
            lines = [json.dumps(encode_labeled(item)) for item in work.result()]
        except FgaifError as error:
            return {"line": [str(error)], "error": [type(error).__name__]}
        self._write_progress()
        return {"line": lines, "error": [""] * len(lines)}

    async def _label(self, position: int, count: int) -> list[LabeledResponse]:
        responses = list(self._responses.read(position, count))
        segments = segment_responses(responses, self._tokenizer, self._min_words)
        return await gather_all(map(self._row, responses, segments))

    async def _row(self, response: Response, segments: Any) -> LabeledResponse:
        async with self._room:
            labeled = await self._annotator.annotate(response, segments)
        self._rows_done += 1
        return labeled

    async def _report(self) -> None:
        """Keep a small file up to date: a chunk may take minutes where requests are rationed."""
        while True:
            await asyncio.to_thread(self._write_progress)
            await asyncio.sleep(_POLL_S)

    def _write_progress(self) -> None:
        usage = asdict(self._models.usage())
        state = {"rows": self._rows_done, "usage": usage, "pid": os.getpid()}
        with self._writing:
            write_whole(self._progress, json.dumps(state))


def _models(
    config: Config, judges: "JudgeGroup | None", judge_name: str, store: ReplyStore
) -> FeedbackModels:
    local = None
    if judges is not None:
        local = BatchedChat(judge_name, lambda asked: judges.answer(asked).result())
    return FeedbackModels(config, store, local)


def annotate_responses(
    config: Config,
    labels: JsonlStore[LabeledResponse],
    tokenizer: Any,
    judges: "JudgeGroup | None",
    judge_name: str,
    progress: Progress,
) -> None:
    """Label the responses of the run that have no label yet, appending to ``labels`` in order.

    Ray must be running. A job that is stopped at any moment goes on where it was: rows from the
    label file, replies from the reply store. A label file whose rows are not those of the first
    responses is kept beside, and what is right of it stays (:func:`repair_order`).

    Raises:
        ConfigError: a key, a price or a prompt is missing; nothing was started.
        ServiceError: a model cannot be asked (key, quota, budget); all that was paid for is kept.
        DataError: a malformed stored response, a full disk.
        ActorError: the worker or a judge died.
    """
    responses = response_store(config.run_dir / "responses" / "responses.jsonl")
    if repaired := repair_order(labels, responses):
        log.warning("%s", repaired)
    label_store(labels.path, config.kind_names)  # refuses labels of other kinds
    start, total = len(labels), len(responses)
    rows = max(_CHUNK_ROWS, -(-(total - start) // _CHUNKS))
    chunks = list(responses.offsets(rows, start))
    if not chunks:
        progress(total, total, None)
        return
    folder = config.run_dir / "feedback"
    with ReplyStore(folder / "replies.sqlite") as store:
        _models(config, judges, judge_name, store).annotator()  # what is missing is said here
    snapshot = folder / "progress.json"
    snapshot.unlink(missing_ok=True)
    # The worker must find the run folder whatever its own working directory is.
    placed = config.model_copy(update={"dir": config.dir.resolve()})
    dataset = _dataset(placed, tokenizer, chunks, judges, judge_name)
    stopped = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(snapshot, start, total, progress, stopped), daemon=True
    )
    watcher.start()
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for name, message in zip(batch["error"], batch["line"], strict=True):
                if name:
                    raise getattr(errors, name)(message)
            labels.append_lines(batch["line"].tolist())
    except ray.exceptions.RayError as error:
        raise translate(error, "annotation") from error
    finally:
        stopped.set()
        watcher.join()
        _show(snapshot, start, total, progress)
        ReplyStore(folder / "replies.sqlite").close()  # the worker is ended without doing so


def _dataset(
    config: Config,
    tokenizer: Any,
    chunks: Sequence[tuple[int, int]],
    judges: "JudgeGroup | None",
    judge_name: str,
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    here = ray.get_runtime_context().get_node_id()
    parallel = min(_CONCURRENT_CHUNKS, len(chunks))
    backend = tokenizer.backend_tokenizer.to_str()
    return ray.data.from_items(
        list(range(len(chunks))), override_num_blocks=len(chunks)
    ).map_batches(
        AnnotateChunk,
        fn_constructor_args=(config, backend, chunks, judges, judge_name),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            size=1,
            max_tasks_in_flight_per_actor=parallel,
            max_concurrent_calls_per_actor=parallel,
            enable_true_multi_threading=True,
        ),
        num_cpus=0,
        label_selector={"ray.io/node-id": here},  # the stores lie on this machine
    )


def _watch(
    snapshot: Path, start: int, total: int, progress: Progress, stopped: threading.Event
) -> None:
    while not stopped.wait(_POLL_S):
        _show(snapshot, start, total, progress)


def _show(snapshot: Path, start: int, total: int, progress: Progress) -> None:
    if not snapshot.is_file():
        progress(start, total, None)
        return
    state = json.loads(snapshot.read_text(encoding="utf-8"))
    progress(start + state["rows"], total, Usage(**state["usage"]))
