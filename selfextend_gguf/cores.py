"""How many threads generate fastest."""

from __future__ import annotations

import ctypes
import os
import sys

import psutil


def fast_cores() -> int:
    """Cores to generate with, as llama.cpp's own programs count them: physical ones, on Apple's chips those made for
    speed; no more than this process may use. A second thread on a core waits for the same memory, and a slow core keeps
    the others waiting."""
    physical = _apples() if sys.platform == "darwin" else None
    physical = physical or psutil.cpu_count(logical=False) or (os.cpu_count() or 2) // 2
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def _apples() -> int | None:
    """None on a Mac whose cores are all alike."""
    value = ctypes.c_int32()
    size = ctypes.c_size_t(ctypes.sizeof(value))
    name = b"hw.perflevel0.physicalcpu"
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value
