"""How much of native/ the C tests reach, branch by branch.

    python tests/native_coverage.py

Builds them with gcc's --coverage, runs tests/test_native.py, and merges what gcov says of each program. Status
1, and their lines, if there are branches of four files that no test takes.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPLETE = ("schedule.c", "graph.c", "layers.c", "verify.c")
FILES = (*COMPLETE, "engine.c", "rotate.c")  # the Python tests reach the rest of these two

Taken = dict[tuple[int, int], int]  # (line, branch of the line) -> how often


def measure(folder: Path) -> tuple[dict[str, Counter[int]], dict[str, Taken]]:
    """Counts of lines, and of branches, of each file."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", ROOT / "tests" / "test_native.py"],
        env=os.environ | {"SX_GGUF_TEST_NATIVE": f"coverage:{folder}"},
        check=True,
    )
    lines: dict[str, Counter[int]] = defaultdict(Counter)
    branches: dict[str, Taken] = defaultdict(Counter)
    for data in folder.rglob("*.gcda"):
        if data.name.removesuffix(".gcda") not in FILES:
            continue
        subprocess.run(
            ["gcov", "--json-format", "--branch-probabilities", data], cwd=data.parent, check=True, capture_output=True
        )
        for report in data.parent.glob("*.gcov.json.gz"):
            for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
                name = Path(file["file"]).name
                for line in file["lines"] if name in FILES else ():
                    lines[name][line["line_number"]] += line["count"]
                    for i, branch in enumerate(line["branches"]):
                        branches[name][line["line_number"], i] += branch["count"]
            report.unlink()
    return lines, branches


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines, branches = measure(Path(folder))
    untaken = []
    print("| file | lines | branches |\n|---|---:|---:|")
    for name in FILES:
        source = (ROOT / "native" / name).read_text().splitlines()
        missed = [line for (line, _), count in sorted(branches[name].items()) if count == 0]
        if name in COMPLETE:
            untaken += [f"{name}:{line}: {source[line - 1].strip()}" for line in missed]
        reached = sum(count > 0 for count in lines[name].values())
        taken, n_branches = len(branches[name]) - len(missed), len(branches[name])
        print(f"| `{name}` | {reached} of {len(lines[name])} | {taken} of {n_branches} |")
    sys.exit("\n".join(untaken) if untaken else 0)


if __name__ == "__main__":
    main()
