"""The `sx-gguf` command. Each command parses its options, makes one library call and prints."""

from __future__ import annotations

import click

from selfextend_gguf import __version__

from .bench import bench
from .chat import chat
from .completion import completion
from .demo import demo
from .errors import ErrorHandlingGroup
from .evaluate import evaluate
from .info import info
from .models import models
from .run import run
from .serve import serve
from .settings import let_variables_set
from .tune import tune


@click.group(cls=ErrorHandlingGroup, context_settings={"help_option_names": ["-h", "--help"]})
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


for command in (run, chat, serve, info, models, demo, bench, evaluate, tune, completion):
    main.add_command(command)
let_variables_set(main)
