"""The API against its own document, and against bodies that nobody should send."""

import asyncio
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from pydantic import TypeAdapter, ValidationError
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from serving_samples import StubBackend, call, data_uri, png

from fgaif.config import load_config
from fgaif.serving.app import create_app
from fgaif.serving.schema import Text

KEY = "a-key-of-the-tests-0123456789"
URI = data_uri(png())
BODIES = 10_000

schemathesis.openapi.format("image", st.sampled_from([URI, URI.partition(",")[2]]))
for media_type in ("image/png", "image/jpeg", "image/webp"):
    schemathesis.openapi.media_type(media_type, st.just(png()))


def document_app() -> Any:
    return create_app(StubBackend(), load_config(None), key=KEY)


schema = schemathesis.openapi.from_asgi("/openapi.json", document_app())


@pytest.fixture(autouse=True)
def no_constants_of_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same requests whatever ran before.

    Hypothesis also draws constants that it finds in the modules of the project imported so far,
    ``derandomize`` or not: with other tests before this one, other requests were sent.
    """
    nothing = providers.Constants()
    monkeypatch.setattr(providers, "_get_local_constants", lambda: nothing)
    providers.CONSTANTS_CACHE.cache.clear()
    yield
    providers.CONSTANTS_CACHE.cache.clear()


@pytest.mark.filterwarnings("ignore")
@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_api_keeps_to_its_document(case: schemathesis.Case) -> None:
    excluded = []
    if case.media_type == "multipart/form-data":
        # In a form every value is a text, and the generator sends empty ones for any pattern.
        excluded += [negative_data_rejection, positive_data_acceptance]
    if case.path == "/get_reward":
        excluded.append(positive_data_acceptance)  # no schema says that lists are equally long
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=excluded)


def test_a_text_is_blank_for_validation_document_and_code_alike() -> None:
    text = TypeAdapter(Text)
    pattern = re.compile(text.json_schema()["pattern"])  # no escape in it that is not ECMA's too

    def valid(value: str) -> bool:
        try:
            text.validate_python(value)
        except ValidationError:
            return False
        return True

    characters = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    blank = {c for c in characters if c.isspace()}
    assert {"\x85", "\x1c"} < blank
    assert "\ufeff" not in blank
    assert {c for c in characters if not pattern.search(c)} == blank
    assert {c for c in characters if not valid(c)} == blank
    assert not valid("".join(blank))
    assert valid("".join(blank) + "a")


async def accepted(app: Any, path: str, body: bytes, kind: str) -> int:
    headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}"}
    return (await call(app, path, chunks=[body], headers=headers)).status


VALID: dict[str, Any] = {
    "/v1/score": {"text": ["A dog. A cat, and a red ball.", "x"], "image": URI, "facts": True},
    "/v1/score/batch": {"items": [{"text": "A dog.", "image": URI, "min_words": 3}]},
    "/get_reward": {"query": ["Q A dog.</s>"], "prompts": ["Q "], "images": [URI]},
    "/v1/generate": {
        "image": URI,
        "prompt": "What?",
        "temperature": 0.5,
        "seed": 3,
        "best_of": 2,
        "guard": {"threshold": 0.3, "tries": 1},
    },
    "/v1/rank": {"image": URI, "texts": ["A dog.", "A cat."], "min_words": 3},
    "/v1/models/reload": {"version": "stub"},
}
JUNK: list[Any] = [
    None, True, -1, 1e308, 2**70, "", " ", "\x00", "\ud800", "a" * 30_000, [], {}, [[[]]], [None],
    {"a": {"b": []}}, "data:image/png;base64,", "data:image/png;base64,AAAA", "http://127.0.0.1/",
    "https://localhost/x.png", "file:///etc/passwd", "<image>", "</s>", "é\u0301 \u202e",
]  # fmt: skip
KINDS_OF_BODY = ("application/json", "application/json", "text/plain", "multipart/form-data", "")


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with some part of it replaced, removed, doubled or wrapped."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(JUNK)
    if isinstance(value, list):
        copy = [*value, rng.choice(value)] if rng.random() < 0.3 else list(value)
        at = rng.randrange(len(copy))
        copy[at] = mutated(rng, copy[at])
        return copy
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {name: part for name, part in value.items() if name != key}
    if rng.random() < 0.1:
        return {**value, "more": 1}
    return {**value, key: mutated(rng, value[key])}


def broken(rng: random.Random, body: bytes) -> bytes:
    """The bytes cut, with some of them changed, nested or replaced by noise."""
    choice = rng.random()
    if choice < 0.3:
        return body[: rng.randrange(len(body) + 1)]
    if choice < 0.6:
        damaged = bytearray(body or b"x")
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)
    if choice < 0.8:
        return b"[" * rng.randint(1, 20_000) + body
    return rng.randbytes(rng.randint(0, 200))


def form(rng: random.Random) -> tuple[bytes, str]:
    """A form with odd parts, and its content type."""
    names = ["text", "image", "prompt", "facts", "min_words", "text", "x", ""]
    parts = []
    for _ in range(rng.randint(0, 5)):
        name = rng.choice(names)
        file = '; filename="a.png"' if name == "image" or rng.random() < 0.2 else ""
        content = rng.choice([png(), b"A dog.", b"", b"\xff\xfe", b"true", b"3", rng.randbytes(30)])
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    body = b"".join(parts) + b"--b--\r\n"
    kind = rng.choice(["; boundary=b", "; boundary=b", "", "; boundary=b; charset=bogus"])
    return (broken(rng, body) if rng.random() < 0.3 else body), "multipart/form-data" + kind


def random_request(rng: random.Random) -> tuple[str, bytes, str]:
    path = rng.choice(list(VALID))
    if path == "/v1/score" and rng.random() < 0.4:
        return path, *form(rng)
    body = json.dumps(mutated(rng, VALID[path]) if rng.random() < 0.8 else VALID[path]).encode()
    return path, broken(rng, body) if rng.random() < 0.3 else body, rng.choice(KINDS_OF_BODY)


def test_ten_thousand_random_bodies_cause_no_failure() -> None:
    rng, app = random.Random(0), document_app()

    async def every() -> Counter[int]:
        return Counter([await accepted(app, *random_request(rng)) for _ in range(BODIES)])

    found = asyncio.run(every())
    assert set(found) <= {200, 400, 413, 422}
    assert found[200] > BODIES / 50
    assert min(found[400], found[422]) > BODIES / 10
