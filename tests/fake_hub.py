"""A Hugging Face Hub on loopback: one repository's revisions, and what is uploaded to any."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from fgaif.lvlm import hub


class FakeHub:
    """``branches`` and ``folders`` may be changed at any time; ``asked`` are the reads so far."""

    def __init__(self, repository: str) -> None:
        self.repository = repository
        self.folders: dict[str, Path] = {}
        """The files of each commit."""
        self.branches: dict[str, str] = {}
        self.asked: list[str] = []
        self.sent: list[tuple[str, Any]] = []
        """Paths and bodies of everything that was uploaded."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET or HEAD."""
        parts = unquote(path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"] and (folder := self.folders.get(parts[3])):
            file = folder / "/".join(parts[4:])
            if file.is_file():
                etag = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": parts[3]}
                return 200, etag, file.read_bytes()
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _api(self, repository: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repository == "someone/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repository != self.repository:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self.branches.get("/".join(rest[1:]), rest[1] if rest[1:] else "")
        if commit not in self.folders:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if rest[0] == "revision":
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode()
        folder = self.folders[commit]
        listed = [
            {
                "type": "file", "path": str(file.relative_to(folder)), "oid": _digest(file),
                "size": file.stat().st_size,
            }
            for file in sorted(folder.rglob("*")) if file.is_file()
        ]  # fmt: skip
        return 200, {}, json.dumps(listed).encode()

    def take(self, path: str, body: bytes) -> dict[str, Any]:
        """The reply to an upload's POST."""
        if path.endswith("/commit/main"):
            rows = [json.loads(line) for line in body.splitlines()]
            self.sent.append((path, rows))
            url = f"{constants.ENDPOINT}/{self.repository}/commit/{'c' * 40}"
            return {"commitUrl": url, "commitOid": "c" * 40, "success": True}
        asked = json.loads(body)
        self.sent.append((path, asked))
        if "/preupload/" in path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **mode} for file in asked["files"]]}
        return {"url": f"{constants.ENDPOINT}/{self.repository}"}

    @cached_property
    def server(self) -> ThreadingHTTPServer:
        """Serves on a free port of loopback."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked.append(self.path)
                status, headers, body = fake.answer(self.path)
                self._reply(status, headers, body)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._reply(200, {}, json.dumps(fake.take(self.path, body)).encode())

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextmanager
def online(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, huggingface_hub asks the fake and keeps its files under ``cache``.

    What is patched within has to be undone within: with a context of the patch.
    """
    thread = Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{fake.server.server_port}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        hub._folder.cache_clear()
        try:
            yield
        finally:
            hub._folder.cache_clear()
            fake.server.shutdown()
            thread.join()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
