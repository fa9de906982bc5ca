"""Programs that run in a process of their own, since what they try could end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

_ATTEMPT = """
import json, sys
from selfextend_gguf import SelfExtendError
for name, code in json.load(sys.stdin).items():
    print(json.dumps([name, "died", ""]), flush=True)
    try:
        exec(code, dict(globals()))
        outcome = ["passed", ""]
    except SelfExtendError as error:
        outcome = [type(error).__name__, str(error)]
    except BaseException as error:
        outcome = ["foreign " + type(error).__name__, str(error)]
    print(json.dumps([name, *outcome]), flush=True)
"""


# Not from the present folder, which in a clone holds a part of the package.
_INSTALLED = "import sys; sys.path.remove('')\n"


def run_python(code: str, stdin: str | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A Python program and what it left."""
    return subprocess.run(
        [sys.executable, "-c", _INSTALLED + code],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # which would take seconds where gdb is installed
    )


def attempt(setup: str, cases: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Pieces of code one after another in one process, each after `setup` and none of the others.

    By name: the class of the error it raised, one of ours, and the message; "passed"; "foreign ..." for others' errors;
    "died" for the one that ended the process, which is the last.
    """
    result = run_python(setup + _ATTEMPT, json.dumps(cases))
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert lines, result.stderr
    outcomes = {name: (kind, message) for name, kind, message in lines}
    died = next((name for name, (kind, _) in outcomes.items() if kind == "died"), None)
    assert (result.returncode == 0) == (died is None), f"{died}: exit code {result.returncode}\n{result.stderr[-2000:]}"
    return outcomes
