"""The `sx-gguf` command. Each command parses its options, makes one library call and prints."""

from __future__ import annotations

import click

from selfextend_gguf import __version__
from selfextend_gguf.cli.bench import bench
from selfextend_gguf.cli.chat import chat
from selfextend_gguf.cli.demo import demo
from selfextend_gguf.cli.errors import ErrorHandlingGroup
from selfextend_gguf.cli.evaluate import evaluate
from selfextend_gguf.cli.info import info
from selfextend_gguf.cli.run import run
from selfextend_gguf.cli.serve import serve
from selfextend_gguf.cli.tune import tune


@click.group(cls=ErrorHandlingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Read texts longer than a GGUF model's trained context, with Self-Extend on llama.cpp.

    \b
    Examples:
        sx-gguf demo
        sx-gguf run model.gguf -f book.txt -p "Who is the narrator?"
    """


for command in (run, chat, serve, info, demo, bench, evaluate, tune):
    main.add_command(command)
