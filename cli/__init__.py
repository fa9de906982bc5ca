"""The `sx-gguf` command. Each command parses its options, makes one library call and prints."""

from __future__ import annotations

import click

from selfextend_gguf import __version__

from .errors import ErrorHandlingGroup
from .lazy import LazyCommands

COMMANDS = LazyCommands(
    {
        "run": "Complete a prompt of any length.",
        "chat": "Talk with a model; /help lists the commands.",
        "serve": "Serve models over HTTP with OpenAI's API.",
        "info": "Show what a model is, and what Self-Extend does with it.",
        "models": "List the models that are there.",
        "demo": "Let the bundled model find a key beyond its trained context.",
        "bench": "Compare time and memory with plain llama.cpp.",
        "eval": "Measure a model beyond its trained context.",
        "tune": "Try Self-Extend's parameters on a text, and print the best.",
        "completion": "Print a script: completion for bash, zsh or fish.",
    }
)


@click.group(cls=ErrorHandlingGroup, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Read texts longer than a GGUF model's trained context, with Self-Extend on llama.cpp.

    MODEL is a file, or a name: hf:USER/REPO[:QUANT] (-hf USER/REPO[:QUANT] means the same), ollama:NAME or
    lmstudio:PUBLISHER/MODEL. `sx-gguf models` lists what is there.

    \b
    Examples:
        sx-gguf demo
        sx-gguf run model.gguf -f book.txt -p "Who is the narrator?"
    """
