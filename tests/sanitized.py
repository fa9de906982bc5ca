"""A Python program with the native library under a sanitizer of gcc.

    python tests/sanitized.py address,undefined tests/random_operations.py --sequences 300 --kept done.txt
    python tests/sanitized.py thread tests/random_operations.py --sequences 300 --kept done.txt

Compiles the package into a folder of its own, and loads the sanitizer in front of Python. llama.cpp and Python are as
they are, so that what is reported is of native/. Leaks are left to the C tests: Python keeps what it allocates.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def main() -> None:
    sanitizers, *program = sys.argv[1:]
    flags = f"-g -O1 -fno-omit-frame-pointer -fsanitize={sanitizers}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            folder,
        ]
        subprocess.run(
            [*pip, ROOT], env=os.environ | {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags}, check=True
        )
        libraries = [
            subprocess.run(["gcc", f"-print-file-name=lib{kind}.so"], capture_output=True, text=True, check=True)
            for kind in {"address,undefined": ("asan", "ubsan"), "thread": ("tsan",)}[sanitizers]
        ]
        environment = {"PYTHONPATH": folder, "LD_PRELOAD": " ".join(done.stdout.strip() for done in libraries)}
        command = [sys.executable, __file__, "--inside", folder, *program]
        sys.exit(subprocess.run(command, env=os.environ | OPTIONS | environment).returncode)


def inside(folder: str, program: list[str]) -> None:
    # An editable install comes before all folders.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in type(finder).__name__]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
    from selfextend_gguf import _native

    loaded = _native._library_path()
    assert loaded.is_relative_to(folder), f"{loaded} was loaded"
    sys.argv[:] = program
    sys.path[0] = str(Path(program[0]).parent)
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    inside(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "--inside" else main()
