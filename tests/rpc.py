"""A ggml RPC server on loopback: a device whose memory the process that uses it cannot touch.

Needs a llama-cpp-python built with CMAKE_ARGS=-DGGML_RPC=ON. `python tests/rpc.py ENDPOINT` serves this machine's CPU.
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp


def _function(name: str, argtypes: list, restype: type | None) -> ctypes._CFuncPtr:
    function = getattr(llama_cpp.llama_cpp._lib, name)
    function.argtypes, function.restype = argtypes, restype
    return function


def serve(endpoint: str) -> None:
    """Serve the CPU until killed."""
    # ggml_backend_dev_t ggml_backend_dev_by_name(const char * name);
    cpu = _function("ggml_backend_dev_by_name", [ctypes.c_char_p], ctypes.c_void_p)(b"CPU")
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir,
    #                                    size_t n_threads, size_t n_devices, ggml_backend_dev_t * devices);
    start = _function(
        "ggml_backend_rpc_start_server",
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)],
        None,
    )
    start(endpoint.encode(), None, 1, 1, (ctypes.c_void_p * 1)(cpu))


@contextmanager
def running() -> Iterator[str]:
    """HOST:PORT of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen([sys.executable, __file__, endpoint], stdout=subprocess.DEVNULL)
    host, port = endpoint.split(":")
    try:
        for _ in range(100):
            if process.poll() is not None:
                raise RuntimeError("the RPC server ended; was llama-cpp-python built with GGML_RPC=ON?")
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield endpoint
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
