"""Requests as no client sends them: headers, bodies and URLs of all kinds, slow ones, and such as smuggle others.

    python tests/fuzz_server.py --requests 10000 --seed 1

Starts a server, and prints how often it answered what. Ends with an error, and the number of the request, when an
answer has status 500, does not come in time, or the server grows. `--only NUMBER` sends one request again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from served import HTTP, Served

from selfextend_gguf.models import TINY_MODEL

IN_TIME = 60.0  # seconds, of a request among others
GROWTH = 64 * 2**20  # bytes that a server may grow, of all that it is asked
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")

PATHS = [
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/tiny", "/health", "/metrics", "/props",
    "/tokenize", "/detokenize", "/apply-template", "/extras/tokenize/count", "/v1/embeddings", "/v1/responses",
    "/v1/messages", "/", "/nowhere",
]  # fmt: skip
POSTED = [path for path in PATHS if path not in ("/v1/models", "/v1/models/tiny", "/health", "/metrics", "/props")]
STRANGE = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, "", "a", "\x00", "\u202e", "\U0001f600",
    "a" * 3000, [], {}, [[]],
    [None], [1, "a"], {"a": {"b": [{}]}}, [0, 1, 2], [255, 256], ["a", "b"], "NaN", "1", "null",
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "min_tokens", "n", "seed", "stop", "stream", "stream_options",
    "return_progress", "logit_bias", "logit_bias_type", "ignore_eos", "grammar", "temperature", "top_p", "min_p",
    "typical_p", "top_k", "repeat_penalty", "mirostat", "mirostat_tau", "xtc_probability", "dry_multiplier",
    "dry_sequence_breakers", "echo", "logprobs", "top_logprobs", "best_of", "tools", "tool_choice", "functions",
    "response_format", "reasoning_effort", "chat_template_kwargs", "content", "tokens", "input", "add_special", "user",
    "text", "reasoning", "previous_response_id", "stop_sequences", "thinking", "output_config",
    "max_output_tokens", "instructions", "system", "metadata", "parallel_tool_calls", "a", "", "__proto__",
]  # fmt: skip


@dataclass
class Case:
    """What is sent, in parts, and whether an answer is waited for: not where the request never ends."""

    kind: str
    parts: list[bytes]
    pause: float = 0.0  # seconds between parts
    is_complete: bool = True


def head(method: str, target: str, *headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(path: str, body: bytes, *headers: str) -> bytes:
    return head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers) + body


def good_body(rng: random.Random) -> dict[str, object]:
    text = "".join(rng.choices("And Paul said unto them ", k=rng.randint(1, 60)))
    body: dict[str, object] = {"max_tokens": rng.randint(1, 4), "stream": rng.random() < 0.3}
    messages = [{"role": "user", "content": text}]
    return body | {"prompt": text, "messages": messages, "content": text, "tokens": [1, 2], "input": text}


# ---- kinds of requests -----------------------------------------------------------------------------------------


def fields(rng: random.Random) -> Case:
    body = good_body(rng)
    for _ in range(rng.randint(0, 4)):
        body[rng.choice(FIELDS)] = rng.choice(STRANGE)
    for name in rng.sample(sorted(body), rng.randint(0, 2)):
        del body[name]
    return Case("fields", [post(rng.choice(POSTED), json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())])


def encodings(rng: random.Random) -> Case:
    text = json.dumps(good_body(rng))
    body, *headers = rng.choice(
        [
            (text.encode("utf-16"),),
            (text.encode("utf-8-sig"),),
            (text.encode("utf-32-le"),),
            (text.replace("P", "\xe9").encode("latin-1"),),
            (text.replace("P", "\\ud800").encode(),),
            (gzip.compress(text.encode()), "Content-Encoding: gzip"),
            (text.encode(), "Content-Encoding: br"),
            (text.encode("utf-7"), "Content-Type: application/json; charset=utf-7"),
            (text.encode(), "Content-Type: text/plain"),
            (text.encode(), "Content-Type: multipart/form-data; boundary=x"),
            (b"--x\r\n\r\n--x--", "Content-Type: multipart/form-data; boundary=x"),
            (text.encode(), "Content-Type: \xff"),
            (text.encode()[: rng.randint(0, len(text))],),
            (rng.randbytes(rng.randint(0, 300)),),
            (b"[" * rng.choice([10, 10_000, 100_000]),),
            (b'{"a":' * rng.choice([10, 10_000]),),
            (b'{"prompt": "a", "max_tokens": ' + b"1" * rng.choice([10, 5000]) + b"}",),
            (b'{"prompt": "a", "prompt": "b", "max_tokens": 1}',),
            (b'{"prompt": "' + b"a" * rng.choice([2000, 10**5]) + b'"}',),
        ]
    )
    return Case("encodings", [post(rng.choice(POSTED), body, *headers)])


def lengths(rng: random.Random) -> Case:
    body = json.dumps(good_body(rng)).encode()
    path = rng.choice(POSTED)
    length = rng.choice(
        ["-1", "+5", "0x10", "5, 5", "5, 6", "", "a", "1e3", "\xb2", " 5", "9" * 30, str(2**40), "0", "2"]
    )
    if rng.random() < 0.3:
        return Case("lengths", [head("POST", path, f"Content-Length: {len(body) + 9}") + body], is_complete=False)
    given = length.strip()
    if given.isascii() and given.isdigit() and len(given) < 10 and int(given) > len(body):
        return Case("lengths", [head("POST", path, f"Content-Length: {length}") + body], is_complete=False)
    return Case("lengths", [head("POST", path, f"Content-Length: {length}") + body])


def targets(rng: random.Random) -> Case:
    target = rng.choice(
        [
            "/" + "".join(rng.choices("abc/%.?#&=;+~\\\"'<>{}|^`", k=rng.randint(1, 60))),
            "/" + "".join(f"%{rng.randrange(256):02x}" for _ in range(rng.randint(1, 40))),
            "/v1/models/" + "%2e%2e%2f" * rng.randint(1, 9) + "etc/passwd",
            "/v1/models/" + "../" * rng.randint(1, 9),
            "//v1//models//",
            "http://evil.example/v1/models",
            "localhost:80",
            "*",
            "",
            "/" + "a" * rng.choice([100, 8000, 60_000, 200_000]),
            "/props?model=" + "%00%ff" * rng.randint(1, 20),
            "/props?" + "&".join(f"a{i}={i}" for i in range(rng.choice([10, 3000]))),
            "/v1/models?\xe9",
            "/v1/mod els",
            "/v1/models\t",
        ]
    )
    method = rng.choice(
        ["GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get", "A" * 90]
    )
    return Case("targets", [head(method, target)])


def headers(rng: random.Random) -> Case:
    more = rng.choice(
        [
            [f"X-{i}: {i}" for i in range(rng.choice([5, 200, 5000]))],
            ["X-Long: " + "a" * rng.choice([1000, 70_000, 300_000])],
            ["X-Folded: a\r\n b"],
            ["Host: evil.example"],
            ["Host: localhost:99999999"],
            ["Origin: https://evil.example"],
            ["Origin: null", "Access-Control-Request-Method: POST"],
            ["Origin: http://localhost", "Access-Control-Request-Method: \xff"],
            [
                "Authorization: "
                + rng.choice(["Bearer", "Bearer \xe9", "Basic Og==", "", "\x01", "Bearer " + "a" * 9000])
            ],
            ["X-Api-Key: \xff"],
            ["Bad Name: a"],
            [": a"],
            ["X: \x00"],
            ["X: a\rb"],
            ["X: a\nGET / HTTP/1.1"],
            ["Expect: 100-continue"],
            ["Expect: \xff"],
            ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: a", "Sec-WebSocket-Version: 13"],
            ["Upgrade: h2c", "HTTP2-Settings: a"],
            ["Range: bytes=0-99999999999"],
            ["Accept-Encoding: " + "gzip, " * 500],
            ["Cookie: " + "a=b; " * 2000],
            ["X-Forwarded-For: \xe9, 1.2.3.4", "X-Forwarded-Proto: ftp", "Forwarded: for=\xff"],
        ]
    )
    if rng.random() < 0.5:
        return Case("headers", [head(rng.choice(["GET", "OPTIONS"]), rng.choice(PATHS), *more)])
    return Case("headers", [post(rng.choice(POSTED), json.dumps(good_body(rng)).encode(), *more)])


def smuggling(rng: random.Random) -> Case:
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    encoding = rng.choice(
        ["chunked", "Chunked", "chunked, identity", "identity", "gzip, chunked", " chunked", "\tchunked", "xchunked",
         "chunked\x0b", "chunked, chunked", "\x00chunked"]
    )  # fmt: skip
    lines = [
        rng.choice(["Transfer-Encoding", "Transfer-encoding", "Transfer-Encoding ", "Transfer_Encoding"])
        + f": {encoding}"
    ]
    if rng.random() < 0.5:
        lines.append(rng.choice([f"Content-Length: {rng.randint(0, 9)}", "Content-Length: 4\r\nContent-Length: 9"]))
    if rng.random() < 0.2:
        lines.append("Transfer-Encoding: identity")
    rng.shuffle(lines)
    data = rng.choice(
        [
            b"0\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\r\n" + inner,
            b"0\r\n\r\n" + inner,
            b"ffffffffffffffffff\r\na\r\n",
            b"-1\r\n\r\n",
            b"5;a=b\r\nhello\r\n0\r\nTrailer: a\r\n\r\n",
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b";" + b"a" * 9000 + b"\r\n",
            inner,
        ]
    )
    return Case("smuggling", [head("POST", rng.choice(POSTED), *lines) + data], is_complete=False)


def pipelining(rng: random.Random) -> Case:
    requests = [
        f"GET {rng.choice(['/health', '/v1/models'])} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for _ in range(rng.randint(1, 12))
    ]
    if rng.random() < 0.4:
        requests.insert(rng.randrange(len(requests)), post("/v1/completions", b'{"prompt": "a", "max_tokens": 2}'))
    data = b"".join(requests) + head("GET", "/health")
    cut = rng.randrange(len(data))
    return Case("pipelining", [data[:cut], data[cut:]])


def slow(rng: random.Random) -> Case:
    data = post("/v1/completions", json.dumps(good_body(rng)).encode())
    cuts = sorted(rng.sample(range(1, len(data)), rng.randint(2, 8)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if rng.random() < 0.5:
        return Case("slow", parts[: rng.randrange(len(parts))], 0.02, is_complete=False)
    return Case("slow", parts, 0.02)


def noise(rng: random.Random) -> Case:
    data = rng.choice(
        [
            rng.randbytes(rng.randint(1, 2000)),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.0\r\n\r\n",
            b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
            b"\r\n" * 500,
            b"GET /health HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.1\nHost: localhost\n\n",
            b" GET / HTTP/1.1\r\n\r\n",
        ]
    )
    return Case("noise", [data], is_complete=False)


def leaving(rng: random.Random) -> Case:
    body = good_body(rng) | {
        "max_tokens": 300,
        "prompt": "And he said " * rng.randint(1, 15),
        "stream": rng.random() < 0.5,
    }
    return Case("leaving", [post("/v1/completions", json.dumps(body).encode())], is_complete=False)


KINDS = [fields, fields, encodings, lengths, targets, headers, smuggling, pipelining, slow, noise, leaving]


# ---- sending ---------------------------------------------------------------------------------------------------


def case(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed}-{number}")
    return rng.choice(KINDS)(rng)


def send(url: str, sent: Case) -> list[int]:
    """Statuses of the answers. Raises TimeoutError."""
    address = httpx.URL(url)
    received = b""
    with socket.create_connection((address.host, address.port), timeout=IN_TIME) as connection:
        try:
            for part in sent.parts:
                connection.sendall(part)
                time.sleep(sent.pause)
            if not sent.is_complete:
                connection.settimeout(0.05)
            while part := connection.recv(1 << 16):
                received += part
        except TimeoutError:
            if sent.is_complete:
                raise
        except (ConnectionResetError, BrokenPipeError):
            pass  # the server did not wait for all of it
    return [int(status) for status in _STATUS.findall(received)]


class FuzzError(AssertionError):
    """The server did what it must not do."""


def check(url: str, seed: int, number: int) -> Iterator[tuple[str, int]]:
    """Send a request: its kind and the statuses of what came, of which 0 is none. Raises FuzzError."""
    sent = case(seed, number)
    try:
        statuses = send(url, sent)
    except TimeoutError:
        raise FuzzError(f"request {number}: no answer in {IN_TIME} seconds to {sent}") from None
    except OSError as error:
        raise FuzzError(f"request {number}: {error}") from None
    for status in statuses or [0]:
        if status >= 500:
            raise FuzzError(f"request {number}: status {status} for {sent}")
        yield sent.kind, status


def fuzz(url: str, process: psutil.Process, n: int, seed: int, clients: int = 8) -> Counter[tuple[str, int]]:
    """Send `n` requests; how often which kind got which status. Raises FuzzError."""
    good = {"prompt": "And Paul said", "max_tokens": 5, "temperature": 0}

    def answer() -> object:
        return HTTP.post(f"{url}/v1/completions", json=good).json()["choices"][0]["text"]

    wanted = answer()
    counts: Counter[tuple[str, int]] = Counter()
    size = 0
    with ThreadPoolExecutor(clients) as pool:
        for begin in range(0, n, 200):
            for found in pool.map(lambda number: list(check(url, seed, number)), range(begin, min(begin + 200, n))):
                counts.update(found)
            if answer() != wanted:
                raise FuzzError(f"requests up to {begin + 200}: an answer is another one now")
            if begin == 200 * (n // 600):  # what is cached is cached by then
                size = process.memory_info().rss
    end = time.monotonic() + IN_TIME
    while HTTP.get(f"{url}/health").json()["busy"]:
        if time.monotonic() > end:
            raise FuzzError("somebody is still being answered")
        time.sleep(0.05)
    grown = process.memory_info().rss - size
    if grown > GROWTH:
        raise FuzzError(f"the server has grown by {grown / 2**20:.0f} MiB")
    open_files = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    if len(open_files) > 2 * clients:
        raise FuzzError(f"{len(open_files)} connections are still open")
    return counts


def started(folder: Path) -> Served:
    """A server of the bundled model, with a chat template that shows tools."""
    (folder / "template").write_text(
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    )
    arguments = (
        "--chat-template",
        str(folder / "template"),
        "--alias",
        "tiny",
        "-c",
        "512",
        "-t",
        "1",
        "--cache-ram",
        "16",
    )
    return Served(str(TINY_MODEL), *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = started(Path(folder))
        try:
            if given.only is not None:
                print(case(given.seed, given.only))
                print(list(check(server.url, given.seed, given.only)))
                return
            began = time.monotonic()
            counts = fuzz(server.url, psutil.Process(server.process.pid), given.requests, given.seed)
            took = time.monotonic() - began
        except FuzzError as error:
            sys.exit(str(error)[:2000])
        finally:
            log = server.end()[1]
    if "Traceback" in log:
        sys.exit(log[-5000:])
    print(
        f"{given.requests} requests with seed {given.seed} in {took:.0f} seconds; status 0 = no answer was waited for"
    )
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:12}", "  ".join(f"{s}: {n}" for (k, s), n in sorted(counts.items()) if k == kind))


if __name__ == "__main__":
    main()
