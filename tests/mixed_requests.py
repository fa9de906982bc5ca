"""Mixed requests of several clients at once, of which each answer is compared with that of a fresh model.

    python tests/mixed_requests.py --requests 500 --seed 1
    python tests/mixed_requests.py --hours 2 --type q4_0

The second goes on with one server: lots of 500 with seeds 1, 2, ..., prompts kept in files of at most 64 MiB.

Prompts have up to 16 trained contexts; a tenth of the clients leaves mid-answer, one request in twenty is malformed.
Ends with an error when an answer is another one, one is lost, or the server grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from served import Served

from selfextend_gguf import Llama
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.models import TINY_MODEL

LOT = 500  # requests
CONTEXT = 4096  # 16 trained contexts
TEXT = (Path(__file__).parent / "data" / "heldout.txt").read_text(encoding="ascii")
GROWTH = 48 * 2**20  # bytes that a server may grow once every prompt has been read
_LENGTHS = [4000, 3000, 2000, 1000, *[500] * 2, *[200] * 6, *[60] * 12]
_MALFORMED: list[dict[str, Any]] = [
    {"max_tokens": "many"}, {"prompt": ""}, {"prompt": TEXT[:5000]}, {"grammar": "root ::= ("}, {"model": 4},
    {"temperature": -1}, {"prompt": [1, 300]},
]  # fmt: skip


class MixedError(AssertionError):
    """The server did what it must not do."""


def prompt_of(rng: random.Random) -> str:
    """One of few documents, so that some share beginnings, cut somewhere, and a question."""
    length = rng.choice(_LENGTHS)
    begin = 30_000 * rng.randrange(3)
    return TEXT[begin : begin + length - rng.choice([0, 0, 0, 7])] + rng.choice(
        [" And Paul said", " In those days", ""]
    )


def body_of(number: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}-{number}")
    body = {"prompt": prompt_of(rng), "max_tokens": rng.randint(1, 24), "temperature": rng.choice([0, 0, 0.8])}
    return body | {"seed": rng.randrange(1000), "stream": rng.random() < 0.5}


def ask(url: str, number: int, seed: int) -> tuple[str, str | None]:
    """What kind of request it was, and the text of its answer, if it waited for one."""
    rng = random.Random(f"{seed}-{number}-kind")
    body = body_of(number, seed)
    with httpx.Client(timeout=3600) as client:
        if rng.random() < 0.05:
            answer = client.post(f"{url}/v1/completions", json=body | rng.choice(_MALFORMED))
            if answer.status_code not in (400, 404):
                raise MixedError(f"request {number}: status {answer.status_code}")
            return "malformed", None
        leaves = rng.random() < 0.1
        if leaves:
            body |= {"max_tokens": -1, "stream": True}
        if not body["stream"]:
            answer = client.post(f"{url}/v1/completions", json=body).raise_for_status().json()
            return "whole", answer["choices"][0]["text"]
        text = ""
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if leaves and (text or rng.random() < 0.1):
                    return "left", None
        return "streamed", text


def run(served: Served, n: int, seed: int, clients: int = 8, kind: str = "f16") -> Counter[str]:
    """How many requests of which kind there were; `kind`: the type of keys. Raises MixedError."""
    process = psutil.Process(served.process.pid)
    with ThreadPoolExecutor(clients) as pool:
        answers: list[tuple[str, str | None]] = []
        size = 0
        for answer in pool.map(lambda number: ask(served.url, number, seed), range(n)):
            answers.append(answer)
            if len(answers) == n // 2:
                size = process.memory_info().rss
    grown = process.memory_info().rss - size
    if grown > GROWTH:
        raise MixedError(f"the server has grown by {grown / 2**20:.0f} MiB")
    keys = KV_TYPES[kind]
    llm = Llama(str(TINY_MODEL), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, type_k=keys, verbose=False)
    for number, (_, text) in enumerate(answers):
        if text is None:
            continue
        body = body_of(number, seed)
        del body["stream"]
        llm.reset()
        wanted = llm.create_completion(**body)["choices"][0]["text"]
        if text != wanted:
            raise MixedError(f"request {number}: {text!r}, alone {wanted!r}")
    llm.close()
    if busy := httpx.get(f"{served.url}/health").json()["busy"]:
        time.sleep(1)
        busy = httpx.get(f"{served.url}/health").json()["busy"]
    if busy:
        raise MixedError("somebody is still being answered")
    return Counter(kind for kind, _ in answers)


def started(*arguments: str) -> Served:
    return Served(str(TINY_MODEL), "-c", str(CONTEXT), "-t", "1", "--cache-ram", "64", *arguments)  # is full soon


def haul(hours: float, kind: str) -> None:
    """Lots of requests to one server for so long."""
    end = time.monotonic() + hours * 3600
    with tempfile.TemporaryDirectory() as folder:
        served = started("--prompt-cache", folder, "--cache-type-k", kind)
        process = psutil.Process(served.process.pid)
        sizes = []
        for seed in itertools.count(1):
            run(served, LOT, seed, kind=kind)
            sizes.append(now := process.memory_info().rss)
            files = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            print(
                f"{seed * LOT} requests, {process.num_fds()} files open, {process.num_threads()} threads, "
                f"memory {now / 2**20:.0f} MiB, kept prompts {files / 2**20:.0f} MiB",
                flush=True,
            )
            # One lot may need much for a moment; what leaks stays in the smallest of several.
            grown = min(sizes[-5:]) - min(sizes[:5])
            if grown > GROWTH:
                raise MixedError(f"the server has grown by {grown / 2**20:.0f} MiB")
            if time.monotonic() > end:
                break
        served.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=LOT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float)
    parser.add_argument("--type", choices=KV_TYPES, default="f16")
    given = parser.parse_args()
    if given.hours:
        haul(given.hours, given.type)
        return
    served = started()
    began = time.monotonic()
    try:
        counts = run(served, given.requests, given.seed)
    except MixedError as error:
        sys.exit(str(error))
    finally:
        served.end()
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    print(f"{given.requests} requests with seed {given.seed} in {time.monotonic() - began:.0f} seconds: {kinds}")


if __name__ == "__main__":
    main()
