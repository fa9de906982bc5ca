"""The memory of the machine, or of the container that the process may use."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import psutil

_ROOT = Path("/")


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int  #: without swapping


def memory(root: Path = _ROOT) -> Memory:
    """What the process may use; `root` is where /proc and /sys are.

    A control group may allow less than the machine has, as in a container or a systemd unit: the kernel ends what takes
    more. Pages of files in its account are given back when they are needed. `ulimit -v` may allow less as well.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in chain(_limits(root), _address_space()):
        if limit < machine.total:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that the process is in, from its own to the root's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, of which there is nothing to see: then the top is its own.
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (limit := _number(group / names[0])) is not None:
                yield limit, (_number(group / names[1]) or 0) - _of_files(group / "memory.stat", names[2])
            if group == top:
                break


def _address_space() -> Iterator[tuple[int, int]]:
    """Limit and use of addresses (RLIMIT_AS), which files that are mapped take as well."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit, psutil.Process().memory_info().vms


def _number(file: Path) -> int | None:
    """None where there is no file or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _of_files(file: Path, name: str) -> int:
    try:
        return next((int(n) for key, n in map(str.split, file.read_text().splitlines()) if key == name), 0)
    except (OSError, ValueError):
        return 0
