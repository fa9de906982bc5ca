"""Devices beside the CPU that this build of llama.cpp can put a model on."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp

from selfextend_gguf.checks import shown
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.ggml import function

ALL_LAYERS = -1  #: as `n_gpu_layers`
_GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: GPUs with memory of their own, and those that share ours
_RPC_SECONDS = 5.0
_WITH_RPC = "CMAKE_ARGS=-DGGML_RPC=ON pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python=="


@dataclass(frozen=True)
class Device:
    """A GPU, or one of another machine by RPC."""

    name: str  #: as `devices` and --device take it: CUDA0, Metal, RPC0, ...
    description: str
    free: int  #: bytes
    total: int  #: bytes
    pointer: int = field(repr=False)  # ggml_backend_dev_t


_n_devices = function("ggml_backend_dev_count", ctypes.c_size_t)
_device = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_type = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_name = function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_description = function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
_memory = function("ggml_backend_dev_memory", None, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2)
_register = function("ggml_backend_register", None, ctypes.c_void_p)


def devices() -> list[Device]:
    """All devices but the CPU and what helps it, in llama.cpp's order."""
    found = []
    for index in range(_n_devices()):
        pointer = _device(index)
        if _type(pointer) not in _GPU_TYPES:
            continue
        name, description = (text(pointer).decode(errors="replace") for text in (_name, _description))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _memory(pointer, free, total)
        found.append(Device(name, description, free.value, total.value, pointer))
    return found


def usual_layers() -> int:
    """`n_gpu_layers` for a model that is put where it is fastest: all of them if there is a device."""
    return ALL_LAYERS if devices() else 0


def chosen(names: Sequence[str] | None) -> list[Device]:
    """The devices of these names, all for None. ConfigError for a name that no device has."""
    there = {device.name: device for device in devices()}
    if names is None:
        return list(there.values())
    for name in names:
        if name not in there:
            raise ConfigError(f"there is no device {shown(name)}; there is {', '.join(there) or 'none but the CPU'}")
    return [there[name] for name in names]


def pointers(names: Sequence[str]) -> Any:
    """The devices of these names as `llama_model_params.devices` wants them. ConfigError."""
    found = chosen(names)
    return (ctypes.c_void_p * (len(found) + 1))(*(device.pointer for device in found), None)


def placement(n_gpu_layers: int, names: Sequence[str] | None = None, n_layers: int = 2**31 - 2) -> str:
    """Where the layers of a model that has `n_layers` are, in words."""
    where = ", ".join(device.name for device in chosen(names))
    if not where or n_gpu_layers == 0:
        return "CPU"
    return f"{n_gpu_layers if 0 < n_gpu_layers <= n_layers else 'all'} layers on {where}"


def add_rpc_server(endpoint: str) -> None:
    """Make the devices of a ggml RPC server, HOST:PORT, known in this process.

    Raises ConfigError if llama.cpp was built without RPC, and if nobody listens there.
    """
    if not llama_cpp.llama_cpp.llama_supports_rpc():
        raise ConfigError(
            f"this llama-cpp-python was built without RPC; with it: {_WITH_RPC}{llama_cpp.__version__}, and compile "
            "selfextend_gguf again"
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"an RPC server is named HOST:PORT, not {shown(endpoint)}")
    try:  # ggml would end the process
        socket.create_connection((host.strip("[]"), int(port)), timeout=_RPC_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no RPC server answers at {endpoint} ({error.strerror or error})") from error
    add_server = function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    registry = add_server(endpoint.encode())
    if not registry:
        raise ConfigError(f"the RPC server at {endpoint} offers no device")
    _register(registry)
