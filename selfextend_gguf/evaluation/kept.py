"""Results that outlast the process that measured them, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp

from selfextend_gguf import __version__
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.prompt_cache import model_fingerprint


def made_by(model_path: str | Path) -> dict[str, object]:
    """What every result of a model depends on: the file's contents, and the programs. Raises OSError."""
    return {
        "model": model_fingerprint(str(model_path), Path(model_path).stat().st_mtime_ns),
        "selfextend_gguf": __version__,
        "llama_cpp_python": llama_cpp.__version__,
    }


class Kept:
    """Results by what they depend on, in a file of JSON lines: `[what, result]`, written as they come.

    Several processes may add to one file.
    """

    def __init__(self, path: str | Path | None) -> None:
        """`path`: the file, made at the first result; None: nothing is kept beyond this object.

        Raises ConfigError for a file that holds something else, OSError where it cannot be read.
        """
        self._path = None if path is None else Path(path)
        self._results: dict[str, Any] = {}
        if self._path is None or not self._path.exists():
            return
        lines = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                what, result = json.loads(line)
                self._results[_name(what)] = result
            except (ValueError, TypeError, RecursionError):
                raise ConfigError(f"{self._path}, line {number}: no result of a measurement") from None
        if lines[-1]:  # its writer was ended in the middle of it
            with self._path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def __len__(self) -> int:
        return len(self._results)

    def has(self, what: Mapping[str, object]) -> bool:
        return _name(what) in self._results

    def get(self, what: Mapping[str, object]) -> Any:
        """The result for `what`, None if there is none."""
        return self._results.get(_name(what))

    def measured(self, what: Mapping[str, object], measure: Callable[[], Any]) -> Any:
        """The result for `what`, from the file or else by `measure()`: something that JSON can hold."""
        name = _name(what)
        if name not in self._results:
            result = measure()
            line = json.dumps([what, result]).encode() + b"\n"
            self._results[name] = json.loads(line)[1]
            if self._path is not None:
                with self._path.open("ab", buffering=0) as file:
                    file.write(line)
        return self._results[name]


def _name(what: Mapping[str, object]) -> str:
    return json.dumps(dict(what), sort_keys=True)
