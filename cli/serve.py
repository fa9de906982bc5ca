"""`sx-gguf serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from selfextend_gguf.machine_memory import memory
from selfextend_gguf.stores import is_name, model_path

from .options import (
    OFFLINE,
    at_most_one,
    batch_option,
    context_option,
    device_options,
    llama_arguments,
    offline_option,
    self_extend_options,
    take_template,
    template_options,
    verbose_option,
)
from .texts import read_text


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@offline_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on; 0 = a free one."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    help="Key that requests must carry, or several; in SX_GGUF_API_KEY other users do not see it.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with such keys, one a line.")
@click.option(
    "--cors-origins",
    metavar="ORIGIN,...",
    default="",
    help="Web pages that may use the server, beside those of this machine: https://example.org; * = all.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    help="A model's name for clients, once for each model [its name, or its file's].",
)
@context_option
@batch_option
@click.option(
    "--cache-ram", type=click.IntRange(0), help="MiB for copies of prompts [a quarter of the available memory]."
)
@click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path),
    help="Folder that keeps prompts beyond the end of the server, within the size of --cache-ram.",
)
@click.option("--prompt-cache-ro", type=click.Path(path_type=Path), help="The same, but nothing is written there.")
@click.option("--strict", is_flag=True, help="Refuse unknown fields, and other models' names.")
@click.option(
    "--reasoning-format",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="auto: thoughts come as reasoning_content, apart from the answer. none: they stay in its text.",
)
@template_options
@self_extend_options
@device_options
@verbose_option
def serve(
    models: tuple[Path, ...],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    cors_origins: str,
    aliases: tuple[str, ...],
    ctx: int | None,
    batch_size: int,
    cache_ram: int | None,
    prompt_cache: Path | None,
    prompt_cache_ro: Path | None,
    strict: bool,
    reasoning_format: Literal["auto", "none"],
    **options: Any,
) -> None:
    """Serve models over HTTP with OpenAI's API.

    Completions and chat, streamed or not. Several models are loaded one at a time, when asked for.

    Needs pip install 'selfextend-gguf[server]'.

    \b
    Examples:
        sx-gguf serve model.gguf
        sx-gguf serve small.gguf large.gguf --alias small --alias large --port 9000 --ctx 32768
    """
    try:
        from selfextend_gguf.server.access import check_keys, check_origins, is_loopback
        from selfextend_gguf.server.app import Settings, create_app
        from selfextend_gguf.server.kept_prompts import KeptPrompts
        from selfextend_gguf.server.models import OneModelAtATime, ServedModel
        from selfextend_gguf.server.run import listen, run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise click.ClickException(f"the server needs {missing}: pip install 'selfextend-gguf[server]'") from error
    names = aliases or tuple(str(m) if is_name(m) else m.name.removesuffix(".gguf") for m in models)
    if len(names) != len(models):
        raise click.UsageError(f"{len(models)} models and {len(names)} aliases: give one --alias for each model")
    if len(set(names)) != len(names):
        raise click.UsageError("two models have the same name; give each an --alias of its own")
    keys = check_keys([*api_keys, *_lines_of(api_key_file)])
    if not keys and not is_loopback(host):
        click.echo(f"Warning: anyone who reaches {host} can use this server: set --api-key", err=True)

    verbose = options["verbose"]
    template = take_template(options)
    arguments = {**llama_arguments(**options), "n_batch": batch_size}
    caches = {"--prompt-cache": prompt_cache, "--prompt-cache-ro": prompt_cache_ro}
    prompt_cache, prompt_cache_ro = at_most_one(caches).values()
    if prompt_cache is not None:
        prompt_cache.mkdir(parents=True, exist_ok=True)
    folder, read_only = prompt_cache or prompt_cache_ro, prompt_cache_ro is not None

    def keep() -> KeptPrompts:
        # Called when a model is loaded: a quarter of what it leaves.
        n_bytes = memory().available // 4 if cache_ram is None else cache_ram * 2**20
        return KeptPrompts(n_bytes, folder, read_only=read_only)

    paths = [model_path(model, offline=click.get_current_context().meta[OFFLINE]) for model in models]
    served = [
        ServedModel.from_file(path, name, ctx, arguments, keep, **template)
        for path, name in zip(paths, names, strict=True)
    ]
    settings = Settings(
        keys=keys,
        origins=check_origins(cors_origins.split(",") if cors_origins else []),
        is_local=is_loopback(host) and not keys,
        strict=strict,
        reasoning_format=reasoning_format,
    )
    with listen(host, port) as listener:
        port = listener.getsockname()[1]
        offered = OneModelAtATime(served, any_name=not strict)
        app = create_app(offered, settings, verbose=verbose)
        contexts = ", ".join(f"{m.alias} (trained on {m.info.n_ctx_train} tokens, reads {m.n_ctx})" for m in served)
        click.echo(f"Listening on http://{f'[{host}]' if ':' in host else host}:{port}: {contexts}")
        try:
            run(app, offered, listener, verbose=verbose)
        finally:
            offered.close()


def _lines_of(file: Path | None) -> list[str]:
    """The lines of a file of keys, without blank ones. UsageError if there are none."""
    if file is None:
        return []
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise click.UsageError(f"{file} holds no API key")
    return lines
