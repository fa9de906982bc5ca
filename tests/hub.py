"""A Hugging Face on loopback: what its client asks of the real one, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves `repos`: the files of each repository, by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None  #: without which repositories are gated
        self.breaks = 0  #: so many answers end in the middle of a file
        self.holds: Event | None = None  #: half of a file is sent, and the rest when this is set
        self.damages = False  #: whether files arrive other than announced
        self.status = 200  #: of the list of files
        self.waits = 0.0  #: seconds before that
        self.list: bytes | None = None  #: another answer in its place
        self.sent: list[tuple[str, int]] = []  #: the files that were asked for, and from which byte on

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has gone
            super().handle_error(*request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def find(self, repo: str) -> dict[str, bytes] | None:
        """The files of a repository; None once an error is answered."""
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif repo not in self.server.repos:
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        else:
            return self.server.repos[repo]
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if listing := re.fullmatch("/api/models/([^/]+/[^/]+)", path):
            self.list_files(listing[1])
        elif resolve := re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(*resolve.groups())
        else:
            self.answer(404)

    def list_files(self, repo: str) -> None:
        Event().wait(self.server.waits)
        if self.server.status != 200 or self.server.list is not None:
            return self.answer(self.server.status, self.server.list or b"")
        files = self.find(repo)
        if files is None:
            return None
        siblings = []
        for name, content in files.items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "b" * 40, "lfs": lfs})
        body = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def send_file(self, repo: str, name: str) -> None:
        files = self.find(repo)
        if files is None:
            return None
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        content = files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": tag, "X_Linked_ETag": tag, "X_Repo_Commit": COMMIT, "X_Linked_Size": str(len(content))}
        if self.command == "HEAD":
            return self.answer(200, Content_Length=str(len(content)), **headers)
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        self.server.sent.append((name, start))
        body = content[start:]
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.server.damages:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.server.breaks:
            self.server.breaks -= 1
            headers["Content_Length"] = str(len(body))
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.server.holds:
            headers["Content_Length"] = str(len(body))
            self.answer(206 if start else 200, body[: len(body) // 2], **headers)
            self.server.holds.wait()
            self.wfile.write(body[len(body) // 2 :])
            return None
        return self.answer(206 if start else 200, body, **headers)


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
