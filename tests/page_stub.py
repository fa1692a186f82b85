"""The page without models: a server of its files that answers the scoring API, and a browser.

Probabilities follow from a digest of each sub-sentence, so that the same text is always coloured
the same way. A text with "answer 429" in it (or any other status) gets that answer.
"""

import asyncio
import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from playwright.sync_api import Browser, Page, expect, sync_playwright

import fgaif.serving
from fgaif.config import RewardShapeConfig
from fgaif.feedback.segment import split_offsets
from fgaif.serving.schema import (
    FactOut,
    GenerateRequest,
    KindScore,
    ModelRef,
    ScoreRequest,
    ScoreResponse,
    SegmentOut,
    TextResult,
    Timing,
)
from fgaif.types import DEFAULT_KINDS

FILES = Path(fgaif.serving.__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy that the page must work under."""
GENERATED = "A cat sleeps on a red mat, and a dog is looking at it from the door."
SHAPE = RewardShapeConfig(value_hallu=-3.0)
FIELDS = {422: "text.1"}
MESSAGES = {
    413: "the body is larger than 8388608 bytes",
    422: "text.1: 20,001 characters, but at most 20,000",
    429: "too many requests wait; try again",
    500: "internal error",
}


def probabilities(text: str, kind: str) -> list[float]:
    """Probabilities of NONE, OK and HALLU: three bytes of a digest, made to sum to 1."""
    digest = hashlib.sha256(f"{kind} {text.strip()}".encode()).digest()
    parts = [byte**3 + 1 for byte in digest[:3]]
    return [part / sum(parts) for part in parts]


def score_text(text: str, *, facts: bool) -> TextResult:
    """Score one text as the contract says, with weights of one."""
    segments = []
    for index, (start, end) in enumerate(pairwise(split_offsets(text, 4))):
        kinds = {}
        for kind in DEFAULT_KINDS:
            none, ok, hallu = probabilities(text[start:end], kind)
            kinds[kind] = KindScore(none=none, ok=ok, hallu=hallu, reward=ok - hallu)
        stated = [FactOut(kind="object", text=f"There is <b>number {index}</b>.")]
        segments.append(
            SegmentOut(
                index=index,
                start=start,
                end=end,
                text=text[start:end],
                kinds=kinds,
                reward=sum(score.reward for score in kinds.values()),
                facts=stated if facts else None,
            )
        )
    rewards = {kind: sum(piece.kinds[kind].reward for piece in segments) for kind in DEFAULT_KINDS}
    return TextResult(text=text, segments=segments, rewards=rewards, total=sum(rewards.values()))


class Stub:
    """What the server was asked, and what it should do next."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.key: str | None = None
        self.generates = True
        self.busy = 0  # so many requests are answered 429 first
        self.delay = 0.0
        self.asked: list[ScoreRequest] = []


def _refusal(status: int, kind: str, field: str | None = None) -> JSONResponse:
    message = MESSAGES.get(status, f"status {status}")
    body = {"error": {"type": kind, "message": message, "field": field}}
    return JSONResponse(body, status, {"Retry-After": "1"} if status == 429 else None)


def stub_app(stub: Stub) -> FastAPI:
    """The page's files with the security headers, and the part of the API that the page uses."""
    app = FastAPI()
    names = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}

    @app.middleware("http")
    async def guard(request: Request, call_next):
        path = request.url.path
        given = request.headers.get("Authorization")
        if path.startswith("/v1") and stub.key and given != f"Bearer {stub.key}":
            return _refusal(401, "unauthorized")
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    for path, name in names.items():
        app.get(path)(lambda name=name: FileResponse(FILES / name))

    @app.get("/v1/models")
    async def models() -> dict:
        listed = [
            {
                "name": "scenes",
                "version": "3f9a1c20",
                "kinds": DEFAULT_KINDS,
                "shape": SHAPE.resolved(DEFAULT_KINDS).model_dump(),
            }
        ]
        return {"models": listed, "generates": stub.generates}

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> Response:
        await asyncio.sleep(stub.delay)
        stub.asked.append(request)
        if stub.busy:
            stub.busy -= 1
            return _refusal(429, "overloaded")
        if wanted := re.search(r"answer (\d{3})", "".join(request.texts)):
            status = int(wanted.group(1))
            return _refusal(status, "internal", FIELDS.get(status))
        results = [score_text(text, facts=request.facts) for text in request.texts]
        model = ModelRef(name="scenes", version="3f9a1c20")
        answer = ScoreResponse(
            results=results, model=model, timing_ms=Timing(total=12.3, score=8.1)
        )
        return JSONResponse(answer.model_dump())

    @app.post("/v1/generate")
    async def generate(request: GenerateRequest) -> dict:
        return {"text": GENERATED, "finish": "stop"}

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` on a free loopback port in a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stub server did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium of the system; the caller checks that there is one."""
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=arguments
        )
        yield browser
        browser.close()


def score(page: Page, image: Path, *texts: str) -> None:
    """Choose the image, enter one or two texts, press Score and wait for the result."""
    page.locator("#image").set_input_files(image)
    expect(page.locator("#preview")).to_be_visible()
    page.locator("#text").fill(texts[0])
    if len(texts) == 2:
        if page.locator("#second").is_hidden():
            page.get_by_role("button", name="Compare two texts").click()
        page.locator("#text2").fill(texts[1])
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Scored.")
