"""Programs of this package that run in a process of their own: the command line, and what files can end."""

from __future__ import annotations

import sys
from pathlib import Path

SX_GGUF = str(Path(sys.executable).with_name("sx-gguf"))  #: the command line, as pip puts it beside Python

# With this program's own search path, wherever its packages come from, and without the program's folder in it.
_START = "import runpy, sys; path, n = sys.argv[1], int(sys.argv[2]); sys.path[:], sys.argv[:] = sys.argv[3 : 3 + n], \
[path, *sys.argv[3 + n :]]; runpy.run_path(path, run_name='__main__')"


def command_of(name: str, *arguments: str) -> list[str]:
    """The command that runs a file of this package with `arguments`; the package itself is not imported."""
    path = Path(__file__).with_name(name)
    return [sys.executable, "-c", _START, str(path), str(len(sys.path)), *sys.path, *arguments]
