"""Renders chat templates, as a program of its own: `templates.py` starts it, nothing imports it.

Each line of standard input is a request, JSON: {"template", "variables", "seconds"}; "variables" null = compile only.
Each line of standard output is its answer: {"text"}, {}, or {"error"}: what the template does instead. A template
that takes more processor time than `seconds` ends the program; the memory is limited for all of its life.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes
LONGEST_TEXT = 2**26  # characters
LONGEST_MESSAGE = 300  # characters


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model said, for training; what is within is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Leave out the tags."""
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape what HTML does. What filters such as `map` make is a list, as in llama.cpp."""
    return json.dumps(value, ensure_ascii=ensure_ascii, default=list, **options)


class Refusal(Exception):
    """What a template says of messages that it does not take."""


def refuse(message: str) -> NoReturn:
    """raise_exception of templates."""
    raise Refusal(message)


def now(form: str) -> str:
    """strftime_now of templates."""
    return datetime.now().strftime(form)


# As Hugging Face's transformers renders chat templates, for which they are written.
ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
ENVIRONMENT.filters["tojson"] = to_json
ENVIRONMENT.globals |= {"raise_exception": refuse, "strftime_now": now, "add_generation_prompt": True}


@lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to render."""
    return ENVIRONMENT.from_string(template)


def in_one_line(error: Exception) -> str:
    """What an error says, shortened."""
    return " ".join(str(error).split())[:LONGEST_MESSAGE]


def answer(request: dict[str, Any]) -> dict[str, str]:
    """What to say to a request."""
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # ends the program: nobody handles its signal
    try:
        template = compiled(request["template"])
        if request["variables"] is None:
            return {}
        text = template.render(request["variables"])
        if len(text) > LONGEST_TEXT:
            return {"error": f"makes a text of more than {LONGEST_TEXT} characters"}
        text.encode()  # halves of characters
        return {"text": text}
    except MemoryError:
        return {"error": f"takes more than {MEMORY // 2**20} MiB of memory"}
    except RecursionError:
        return {"error": "calls itself without end, or nests too deeply"}
    except Refusal as error:
        return {"error": f"refuses the messages: {in_one_line(error)}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is no template: {in_one_line(error)}"}
    except jinja2.TemplateError as error:
        return {"error": f"failed: {in_one_line(error)}"}
    except Exception as error:
        return {"error": f"failed: {type(error).__name__}: {in_one_line(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
