"""llama-server's own tests against our server, for docs/peer-tests.md.

    python tests/peer_tests.py LLAMA_CPP --kept results.json

LLAMA_CPP is a copy of llama.cpp's source, such as `vendor/llama.cpp` in llama-cpp-python's source package. Its tests
start the program that `LLAMA_SERVER_BIN_PATH` names: here this file, which starts `sx-gguf serve` with what there is of
llama-server's arguments. Needs `pip install wget filelock requests`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
MODEL = "SX_GGUF_PEER_MODEL"  # environment variable

# ---- as llama-server -------------------------------------------------------------------------------------------------

SAME = {"--port", "--host", "--alias", "--threads", "--api-key", "-ctk", "-ctv", "--lora", "--cors-origins", "-fa",
        "--cache-ram", "--reasoning-format"}  # fmt: skip
RENAMED = {"--ctx-size": "--ctx", "--batch-size": "-b", "--chat-template-file": "--chat-template"}
ALONE = {"--cont-batching", "--embedding", "--reranking", "--metrics", "--kv-unified", "--swa-full", "--slots",
         "--no-slots", "--verbose", "--context-shift", "--no-ui", "--jinja", "--no-jinja", "--offline", "--no-mmproj",
         "--no-models-autoload", "--no-cache-idle-slots", "--ui-mcp-proxy", "--backend_sampling"}  # fmt: skip


def start_server(arguments: list[str]) -> None:
    """Become `sx-gguf serve`, with what there is of llama-server's arguments."""
    ours, template, rest = [], None, iter(arguments)
    for argument in rest:
        if argument in ALONE:
            continue
        value = next(rest)
        if argument in SAME:
            ours += [argument, value]
        elif argument in RENAMED:
            ours += [RENAMED[argument], value]
            template = template or argument == "--chat-template-file"
        elif (argument, value) == ("--reasoning", "off"):
            ours += ["--chat-template-kwargs", '{"enable_thinking": false}']
    if not template:  # llama-server's own for models that have none
        file = Path(tempfile.gettempdir()) / "sx-gguf-chatml.jinja"
        file.write_text(CHATML)
        ours += ["--chat-template", str(file)]
    program = Path(sys.executable).with_name("sx-gguf")
    os.execv(program, [str(program), "serve", os.environ[MODEL], *ours])


# ---- the tests -------------------------------------------------------------------------------------------------------

PLUGIN = """
import utils
utils.ServerPreset.load_all = staticmethod(lambda: None)  # it would download models
"""


def run_file(folder: Path, file: str, model: Path, timeout: int) -> dict[str, str]:
    """Outcomes of the tests of a file, by name: "passed", "skipped", or the line that says what failed."""
    with tempfile.TemporaryDirectory() as made:
        program = Path(made, "llama-server")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} --as-llama-server "$@"\n')
        program.chmod(0o755)
        Path(made, "peer_plugin.py").write_text(PLUGIN)
        report = Path(made, "report.xml")
        environment = os.environ | {
            "LLAMA_SERVER_BIN_PATH": str(program),
            "PYTHONPATH": os.pathsep.join([made, str(folder)]),
            MODEL: str(model),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_plugin", "-p", "no:xdist", f"unit/{file}"]
        try:
            subprocess.run(
                [*command, f"--junitxml={report}"],
                cwd=folder,
                env=environment,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"(the whole file)": f"not done in {timeout} s"}
        return {case.get("name", "?"): _outcome(case) for case in ET.parse(report).iter("testcase")}


def _outcome(case: ET.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            return (child.get("message") or "failed").splitlines()[0][:200]
        if child.tag == "skipped":
            return "skipped"
    return "passed"


# ---- the document ----------------------------------------------------------------------------------------------------


def document(results: Mapping[str, Mapping[str, str]], reasons: Mapping[str, str], release: str) -> str:
    """The text of docs/peer-tests.md. `reasons`: by file, or by file and beginning of a test's name."""
    total = Counter(_kind(outcome) for outcomes in results.values() for outcome in outcomes.values())
    lines = [HEAD.format(release=release, passed=total["passed"], all=sum(total.values()), skipped=total["skipped"])]
    lines += ["| file | passed | failed | skipped | |", "|---|---:|---:|---:|---|"]
    for file, outcomes in results.items():
        kinds = Counter(_kind(outcome) for outcome in outcomes.values())
        counts = " | ".join(str(kinds[kind] or "") for kind in ("passed", "failed", "skipped"))
        lines.append(f"| `{file}` | {counts} | {reasons.get(file, '')} |")
    lines += ["", "## What fails in files that apply", "", "| tests | how many | why |", "|---|---:|---|"]
    rows: Counter[tuple[str, str]] = Counter()
    for file, outcomes in results.items():
        for test, outcome in outcomes.items():
            if file in reasons or _kind(outcome) != "failed":
                continue
            name = f"{file}::{test}"
            begin = next((begin for begin in reasons if name.startswith(begin)), None)
            unknown = f"not looked into: `{outcome.replace('|', '/').replace('`', '')}`"
            rows[(name, unknown) if begin is None else (f"{begin} ...", reasons[begin])] += 1
    lines += [f"| `{name.replace('|', '/')[:90]}` | {n} | {why} |" for (name, why), n in rows.items()]
    return "\n".join(lines) + "\n"


def _kind(outcome: str) -> str:
    return outcome if outcome in ("passed", "skipped") else "failed"


HEAD = """# llama-server's own tests

Written by `python tests/peer_tests.py LLAMA_CPP --kept results.json`, with {release}.

The tests in `tools/server/tests/unit` of its source are run from there, and are no part of this repository. They start
`sx-gguf serve` in place of `llama-server`, with the arguments that both know, a bundled model in place of theirs
(stories260K, which has to be downloaded) and a ChatML template. {passed} of {all} pass, {skipped} are skipped by
themselves. Many of the others look for words that their model says, count its tokens, or speak of features that are
none of ours: the reasons are below.
"""


def main() -> None:
    if sys.argv[1:2] == ["--as-llama-server"]:
        start_server(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source")
    parser.add_argument("--release", default="llama.cpp's tests", help="what it is called in the document")
    parser.add_argument("--model", type=Path, default=ROOT / "selfextend_gguf/models/tiny-256.Q8_0.gguf")
    parser.add_argument("--files", nargs="+", help="of tests [all]")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for a file")
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    args = parser.parse_args()
    folder = args.source / "tools/server/tests"
    results = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    for file in args.files or sorted(path.name for path in (folder / "unit").glob("test_*.py")):
        if file not in results or args.files:
            results[file] = run_file(folder, file, args.model.resolve(), args.timeout)
            args.kept.write_text(json.dumps(results, indent=1, sort_keys=True))
        kinds = Counter(_kind(outcome) for outcome in results[file].values())
        print(f"{file}: {dict(kinds)}", flush=True)
    from peer_reasons import REASONS

    (ROOT / "docs/peer-tests.md").write_text(document(results, REASONS, args.release))


if __name__ == "__main__":
    main()
