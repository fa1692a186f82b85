"""The store of replies, the memory before a model, and batches: with scripted models."""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fgaif.chat.batched import BatchedChat
from fgaif.chat.cached import CachedChat
from fgaif.chat.messages import (
    ChatRequest,
    Reply,
    RequestFailed,
    gather_all,
    load_prompt,
)
from fgaif.chat.store import ReplyStore
from fgaif.errors import ConfigError, DataError, ServiceError
from fgaif.types import ImageRef

IMAGE = ImageRef(path="/a.png", sha256="a" * 64)
REQUEST = ChatRequest(
    prompt_version="check-1", subject="There is a dog.", text="Dog? {fact}", image=IMAGE
)
REPLY = Reply(text="Yes.", first_token=((" yes", -0.1), (" no", -2.5)), input_tokens=7)


class Scripted:
    """Answers with what ``answer`` returns or raises; keeps what it was asked."""

    name = "scripted"

    def __init__(self, answer: Callable[[ChatRequest], Reply]) -> None:
        self.answer = answer
        self.asked: list[ChatRequest] = []

    async def ask(self, request: ChatRequest) -> Reply:
        self.asked.append(request)
        await asyncio.sleep(0)
        return self.answer(request)


def test_a_key_depends_on_everything_that_a_reply_depends_on() -> None:
    others = {
        "prompt_version": "check-2",
        "subject": "There is a cat.",
        "text": "Cat?",
        "image": ImageRef(path="/a.png", sha256="b" * 64),
        "system": "Be brief.",
        "schema": {"type": "object"},
        "max_tokens": 8,
        "temperature": 0.5,
        "yes_no": True,
        "attempt": 1,
    }
    assert set(others) == set(ChatRequest.__dataclass_fields__)
    keys = {replace(REQUEST, **{name: value}).key("m") for name, value in others.items()}
    keys |= {REQUEST.key("m"), REQUEST.key("n"), replace(REQUEST, image=None).key("m")}
    assert len(keys) == len(others) + 3
    moved = replace(REQUEST, image=ImageRef(path="/b/c.png", sha256="a" * 64))
    assert moved.key("m") == REQUEST.key("m")


def test_replies_come_back_as_they_were_and_failures_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "replies.sqlite"
    with ReplyStore(path) as store:
        assert store.get(REQUEST.key("m")) is None
        store.add("m", REQUEST, "timed out")
        assert store.get(REQUEST.key("m")) is None
        store.add("m", REQUEST, REPLY)
        store.add("m", REQUEST, Reply(text="another"))  # the first reply stays
    with ReplyStore(path) as store:
        assert store.get(REQUEST.key("m")) == REPLY
        assert store.get(REQUEST.key("n")) is None
        assert (len(store), store.failures, store.tokens("m")) == (1, 1, (7, 0))
        first, second = store
    assert (first["failure"], first["reply"]) == ("timed out", None)
    assert second["request"]["text"] == "Dog? {fact}"
    assert second["reply"]["text"] == "Yes."
    assert (second["image"], second["subject"]) == ("a" * 64, "There is a dog.")


def test_closing_leaves_all_replies_in_the_one_file(tmp_path: Path) -> None:
    path, copy = tmp_path / "replies.sqlite", tmp_path / "copy.sqlite"
    other = ReplyStore(path)  # of a worker that is ended without closing it
    other.add("m", REQUEST, REPLY)
    ReplyStore(path).close()
    copy.write_bytes(path.read_bytes())
    with ReplyStore(copy) as store:
        assert store.get(REQUEST.key("m")) == REPLY
    other.close()
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith("replies")] == [
        path.name
    ]


def test_half_characters_are_stored_as_escapes(tmp_path: Path) -> None:
    broken = replace(REQUEST, subject="cut \ud83d", text="cut \ud83d")
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.add("m", broken, "refused \ud83d")
        store.add("m", broken, Reply(text="\ud83d"))
        assert store.get(broken.key("m")) == Reply(text="\ud83d")
        failed, _ = store
    assert (failed["subject"], failed["failure"]) == ("cut \\ud83d", "refused \\ud83d")


def test_nothing_in_the_store_is_changed_or_deleted(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with ReplyStore(path) as store:
        store.add("m", REQUEST, REPLY)
    for statement in ("DELETE FROM replies", "UPDATE replies SET model = 'x'"):
        with sqlite3.connect(path) as file, pytest.raises(sqlite3.IntegrityError, match="never"):
            file.execute(statement)


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    path.write_text("labels, " * 200)
    with pytest.raises(DataError, match=r"replies\.sqlite: file is not a database"):
        ReplyStore(path)


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with ReplyStore(path) as store:
        store.add("m", REQUEST, REPLY)
        pages = store._file.execute("PRAGMA page_count").fetchone()[0]
        store._file.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DataError, match="full; free some space"):
            store.add("m", replace(REQUEST, attempt=1), Reply(text="x" * 100_000))
    with ReplyStore(path) as store:
        assert store.get(REQUEST.key("m")) == REPLY


def test_a_killed_process_loses_no_reply(tmp_path: Path) -> None:
    path, said = tmp_path / "replies.sqlite", tmp_path / "said"
    code = (
        "import itertools, sys; from pathlib import Path\n"
        "from fgaif.chat.messages import ChatRequest, Reply\n"
        "from fgaif.chat.store import ReplyStore\n"
        "store, said = ReplyStore(Path(sys.argv[1])), open(sys.argv[2], 'wb', buffering=0)\n"
        "for n in itertools.count():\n"
        "    request = ChatRequest(prompt_version='v', subject=str(n), text='t')\n"
        "    store.add('m', request, Reply(text=str(n)))\n"
        "    said.write(b'.')\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path), str(said)])
    while not (said.exists() and said.stat().st_size > 300):
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with ReplyStore(path) as store:
        assert len(store) in (said.stat().st_size, said.stat().st_size + 1)


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    model = Scripted(lambda _: REPLY)
    other = replace(REQUEST, subject="There is a cat.")

    async def job() -> None:
        with ReplyStore(tmp_path / "replies.sqlite") as store:
            chat = CachedChat(model, store)
            same = await gather_all(chat.ask(REQUEST) for _ in range(5))
            assert same == [REPLY] * 5
            assert await chat.ask(other) == REPLY
            await chat.ask(REQUEST)
            assert chat.hits == 1

    asyncio.run(job())
    asyncio.run(job_again(tmp_path, model))
    assert model.asked == [REQUEST, other]


async def job_again(folder: Path, model: Scripted) -> None:
    with ReplyStore(folder / "replies.sqlite") as store:
        assert await CachedChat(model, store).ask(REQUEST) == REPLY


def test_a_failed_request_is_kept_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    def fail(_: ChatRequest) -> Reply:
        raise RequestFailed("timed out")

    broken, healed = Scripted(fail), Scripted(lambda _: REPLY)

    async def job(model: Scripted) -> list[Reply | str]:
        with ReplyStore(tmp_path / "replies.sqlite") as store:
            chat = CachedChat(model, store)
            results = await asyncio.gather(
                *(chat.ask(REQUEST) for _ in range(3)), return_exceptions=True
            )
            results.append(await asyncio.gather(chat.ask(REQUEST), return_exceptions=True))
            assert store.failures == 1
            return [str(result) if isinstance(result, Exception) else result for result in results]

    assert asyncio.run(job(broken))[:3] == ["timed out"] * 3
    assert len(broken.asked) == 1
    assert asyncio.run(job(healed))[0] == REPLY


def test_a_reply_on_its_way_is_stored_though_nobody_waits_any_more(tmp_path: Path) -> None:
    async def job() -> None:
        with ReplyStore(tmp_path / "replies.sqlite") as store:
            chat = CachedChat(Scripted(lambda _: REPLY), store)
            waiter = asyncio.create_task(chat.ask(REQUEST))
            await asyncio.sleep(0)
            waiter.cancel()
            while not len(store):
                await asyncio.sleep(0.001)
            assert store.get(REQUEST.key("scripted")) == REPLY

    asyncio.run(job())


def test_of_many_failures_the_one_that_stops_the_job_is_raised() -> None:
    done: list[int] = []

    async def call(number: int) -> int:
        await asyncio.sleep(0.001 * number)
        if number == 0:
            raise RequestFailed("one")
        if number == 1:
            raise ServiceError("no key")
        done.append(number)
        return number

    with pytest.raises(ServiceError, match="no key"):
        asyncio.run(gather_all(call(number) for number in range(4)))
    assert done == [2, 3]  # they were waited for
    assert asyncio.run(gather_all(call(number) for number in (3, 2))) == [3, 2]


def test_questions_of_one_moment_go_in_one_batch_and_busy_times_fill_the_next() -> None:
    sizes: list[int] = []

    def answer(requests: Sequence[ChatRequest]) -> list[Reply | None]:
        sizes.append(len(requests))
        time.sleep(0.01)
        return [Reply(text=request.text) if request.text else None for request in requests]

    async def job() -> None:
        chat = BatchedChat("local", answer, max_batch=10)
        texts = [str(number) for number in range(35)]
        replies = await gather_all(chat.ask(replace(REQUEST, text=text)) for text in texts)
        assert [reply.text for reply in replies] == texts
        with pytest.raises(RequestFailed, match="context"):
            await chat.ask(replace(REQUEST, text=""))

    asyncio.run(job())
    assert sizes == [10, 10, 10, 5, 1]


def test_a_batch_that_cannot_be_answered_fails_each_of_its_questions() -> None:
    def answer(_: Sequence[ChatRequest]) -> list[Reply | None]:
        raise ServiceError("the judge died")

    async def job() -> None:
        chat = BatchedChat("local", answer)
        await gather_all(chat.ask(REQUEST) for _ in range(3))

    with pytest.raises(ServiceError, match="the judge died"):
        asyncio.run(job())


def test_prompts_are_filled_once_and_named_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Facts of {segments}, please: {response}\n")
    prompt = load_prompt(path, ("segments", "response"))
    assert prompt.fill(segments="{response}", response="x") == "Facts of {response}, please: x"
    path.write_text("Other words: {segments} {response}")
    assert load_prompt(path, ("segments",)).version != prompt.version
    assert prompt.version.startswith("mine-")
    with pytest.raises(ConfigError, match=r"holds \{fact\} 0 times"):
        load_prompt(path, ("fact",))
    with pytest.raises(ConfigError, match=r"gone\.txt: cannot be read"):
        load_prompt(tmp_path / "gone.txt", ())


def test_stored_rows_are_json(tmp_path: Path) -> None:
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.add("m", replace(REQUEST, schema={"type": "object"}), REPLY)
        (row,) = json.loads(json.dumps(list(store)))
    assert row["request"]["schema"] == {"type": "object"}
