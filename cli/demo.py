"""`sx-gguf demo`: the bundled model finds a key far beyond its trained context; plain llama.cpp does not."""

from __future__ import annotations

import click
import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.retrieval import greedy_answer
from selfextend_gguf.llama import Llama
from selfextend_gguf.models import DEMO_TEXT, TINY_MODEL
from selfextend_gguf.tiny.keys import KeyTask, key_task


@click.command()
@click.option(
    "--times", type=click.IntRange(1, 64), default=16, show_default=True, help="Text length in trained contexts."
)
@click.option(
    "--depth", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Where the key is hidden; 0 = start."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Which key and which part of the text.")
def demo(times: int, depth: float, seed: int) -> None:
    """Let the bundled model find a key beyond its trained context.

    A key is hidden in a text of 16 trained contexts. The model is asked for it, with and without Self-Extend.

    \b
    Example:
        sx-gguf demo --times 32 --depth 0.1
    """
    text = DEMO_TEXT.read_text(encoding="ascii")
    n_ctx_train = 256
    task = key_task(np.random.default_rng(seed), text, times * n_ctx_train, depth)
    n_ctx = times * n_ctx_train + 64
    extended = Llama(str(TINY_MODEL), n_ctx=n_ctx, verbose=False)
    plain = llama_cpp.Llama(str(TINY_MODEL), n_ctx=extended.n_ctx(), op_offload=False, verbose=False)

    click.echo(f"The bundled model ({TINY_MODEL.name}) was trained on {n_ctx_train} tokens (bytes).")
    click.echo(f"It reads {len(task.prompt)} tokens, {times} times as many. {depth:.0%} into the text stands:")
    click.echo(f"    {task.fact}")
    click.echo("and at its end:")
    click.echo(f"    {task.prompt.splitlines()[-1]}_")
    click.echo()
    click.echo(f"{'':<20}{'answer':<12}{'right':<8}")
    found = show("with Self-Extend", extended, task)
    show("plain llama.cpp", plain, task)
    click.echo()
    click.echo(str(extended.self_extend))
    extended.close()
    plain.close()
    if not found:
        raise click.ClickException("Self-Extend did not find the key")


def show(name: str, llm: llama_cpp.Llama, task: KeyTask) -> bool:
    """Print one row of the comparison; whether the answer was right."""
    answer = greedy_answer(llm, task.prompt, len(task.answer))
    right = answer == task.answer
    click.echo(f"{name:<20}{answer.encode('unicode_escape').decode():<12}{'yes' if right else 'no':<8}")
    return right
