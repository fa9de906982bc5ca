"""Memory that a container allows, in trees that are laid out like the kernel's."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from selfextend_gguf.machine_memory import Memory, memory

MIB = 2**20


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (  # version 2, in its own name space
            {
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/memory.max": 512 * MIB,
                "sys/fs/cgroup/memory.current": 200 * MIB,
                "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {50 * MIB}",
            },
            Memory(512 * MIB, 362 * MIB),
        ),
        (  # the parent allows less than the group itself
            {
                "proc/self/cgroup": "0::/user.slice/run.scope",
                "sys/fs/cgroup/user.slice/memory.max": 300 * MIB,
                "sys/fs/cgroup/user.slice/memory.current": 100 * MIB,
                "sys/fs/cgroup/user.slice/run.scope/memory.max": 400 * MIB,
                "sys/fs/cgroup/user.slice/run.scope/memory.current": 10 * MIB,
            },
            Memory(300 * MIB, 200 * MIB),
        ),
        (  # version 1 in a container, where the host's path is not to be seen
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 256 * MIB,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": 300 * MIB,
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0",
            },
            Memory(256 * MIB, 0),
        ),
    ],
)
def test_a_container_allows_less_than_the_machine_has(tmp_path, files, expected):
    assert memory(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"},
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712},
        {"proc/self/cgroup": "0::/gone", "sys/fs/cgroup/memory.max": "nonsense"},
    ],
)
def test_without_a_limit_it_is_the_machines(tmp_path, files):
    found, machine = memory(tree(tmp_path, files)), psutil.virtual_memory()
    assert found.total == machine.total
    assert found.available == pytest.approx(machine.available, rel=0.2)


def test_ulimit_allows_less_addresses_than_the_machine_has(tmp_path, monkeypatch):
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (taken + 64 * MIB, resource.RLIM_INFINITY))
    found = memory(tmp_path)
    assert found.total == taken + 64 * MIB
    assert found.available == pytest.approx(64 * MIB, abs=16 * MIB)
