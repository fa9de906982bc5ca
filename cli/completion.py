"""`sx-gguf completion`: what makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script: completion for bash, zsh or fish.

    Commands, options, their values and files are completed.

    \b
    Examples:
        eval "$(sx-gguf completion bash)"    # in ~/.bashrc
        eval "$(sx-gguf completion zsh)"     # in ~/.zshrc
        sx-gguf completion fish > ~/.config/fish/completions/sx-gguf.fish
    """
    make = get_completion_class(shell)
    assert make is not None  # these three are click's own
    click.echo(make(context.find_root().command, {}, "sx-gguf", "_SX_GGUF_COMPLETE").source())
