"""A long chat with answers taken back and given anew: its last answer is that of a fresh reading, memory stays flat.

python tests/long_chat.py --turns 1000 --type q4_0
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from pathlib import Path

import psutil

from selfextend_gguf.conversation import Conversation
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama

TEXT = Path(__file__).with_name("data") / "heldout.txt"
COPIES = 256 << 20  # bytes


def open_llama(info: ModelInfo, kind: str, n_ctx: int) -> RememberingLlama:
    """As `sx-gguf chat` does for quantised keys."""
    llm = RememberingLlama(
        str(info.path),
        n_ctx=n_ctx,
        model_info=info,
        type_k=KV_TYPES[kind],
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
    )
    llm.kept_prompts, llm.comes_again = KeptPrompts(COPIES), True
    return llm


def answer(pieces: contextlib.closing) -> str:
    with pieces as open_pieces:
        return "".join(piece.text for piece in open_pieces)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--type", choices=list(KV_TYPES), default="q4_0")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    rng, words = random.Random(args.seed), TEXT.read_text().split()
    asked = {"max_tokens": 6, "temperature": 0}
    began, memory = time.monotonic(), []
    with ModelInfo(TINY_MODEL) as info:
        llm = open_llama(info, args.type, 24 * args.turns)
        talk = Conversation(llm, info)
        last = ""
        for turn in range(args.turns):
            begin = rng.randrange(len(words) - 4)
            last = answer(contextlib.closing(talk.ask(" " + " ".join(words[begin : begin + 4]), **asked)))
            if turn < args.turns - 1 and rng.random() < 0.2:
                talk.undo()
            elif rng.random() < 0.25:
                assert answer(contextlib.closing(talk.ask_again(**asked))) == last, turn
            if turn % (args.turns // 10) == args.turns // 10 - 1:
                memory.append(psutil.Process().memory_info().rss >> 20)
                print(f"{turn + 1} turns, {llm.n_tokens} tokens, {memory[-1]} MiB", flush=True)
        fresh = Conversation(open_llama(info, args.type, 24 * args.turns), info)
        fresh.messages = talk.messages
        again = answer(contextlib.closing(fresh.ask_again(**asked)))
        print(f"{time.monotonic() - began:.0f} s; last answer {last!r}, of a fresh reading {again!r}")
        raise SystemExit(again != last)


if __name__ == "__main__":
    main()
