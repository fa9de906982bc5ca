"""What no client sends: too much, too slowly, or what is no request at all."""

from __future__ import annotations

import json
import socket
import time

import fuzz_server
import httpx
import psutil
import pytest
from served import HTTP, serving

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server import limits


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": TINY_MODEL}, ctx=256) as server:
        yield server


def raw(server, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back until the server closes the connection."""
    address = httpx.URL(server.url)
    received = b""
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        while part := connection.recv(1 << 16):
            received += part
    return received


def head(*lines: str) -> bytes:
    first = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def error_of(answer: bytes) -> tuple[int, str]:
    assert b"connection: close" in answer.lower()
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_bodies_that_are_too_large(server, monkeypatch):
    monkeypatch.setattr(limits, "MOST_BYTES", 2**20)
    wanted = (413, "the body is larger than 1 MiB")
    assert error_of(raw(server, head(f"Content-Length: {2**20 + 1}"))) == wanted  # nothing of it is waited for
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    assert error_of(raw(server, head("Transfer-Encoding: chunked"), *[chunk] * 16, b"1\r\n \r\n")) == wanted
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(2**20)
    assert HTTP.post(
        f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}
    ).is_success


def test_bodies_that_are_too_slow(server, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(limits, "BODY_RATE", 100)
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(100)
    request = head(f"Content-Length: {len(body)}", "Connection: close")
    assert error_of(raw(server, request, body[:10])) == (408, "the body did not arrive in time")
    # With 0.01 seconds more for each byte, five parts come in time.
    parts = [body[i : i + 20] for i in range(0, 100, 20)]
    assert b" 200 OK" in raw(server, request, *parts, pause=0.15)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_headers_that_never_end(server, monkeypatch, sent):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
    began = time.monotonic()
    assert raw(server, sent) == b""
    assert 0.2 < time.monotonic() - began < 5


def test_a_connection_may_wait_between_requests(server, monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    answers = raw(server, request + b"\r\n", request + b"Connection: close\r\n\r\n", pause=0.5)
    assert answers.count(b" 200 OK") == 2


def test_two_lengths_of_one_body(server):
    """A proxy before the server may believe the other one."""
    answer = raw(server, head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert error_of(answer)[0] == 400
    assert answer.count(b"HTTP/1.1 ") == 1


def test_fuzzing(tmp_path):
    """`python tests/fuzz_server.py` sends more."""
    served = fuzz_server.started(tmp_path)
    try:
        counts = fuzz_server.fuzz(served.url, psutil.Process(served.process.pid), 400, seed=7)
    finally:
        code, log = served.end()
    assert (code, "Traceback" in log) == (0, False), log
    assert {kind for kind, _ in counts} == {kind.__name__ for kind in fuzz_server.KINDS}
    assert {200, 400, 403, 404, 405} <= {status for _, status in counts}
    assert counts.total() >= 400
