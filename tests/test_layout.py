"""The floors of the package: imports go down, and never in a ring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import selfextend_gguf

ROOT = Path(__file__).resolve().parents[1]

# Each floor may import those below it, and files of its own floor in one direction. A folder stands for its files.
FLOORS = [
    [
        "errors",
        "atomic_file",
        "models",
        "drafting",
        "reasoning",
        "programs",
        "pages",
        "document_worker",
        "machine_memory",
        "cores",
    ],
    ["checks", "turns", "stores", "ggml"],
    ["devices", "weights"],
    ["tiny", "schedule", "documents"],
    ["planning", "kv_cache", "reference", "grammar", "json_schema", "chat_schemas", "tool_calls"],
    ["handles", "sampling", "more_samplers", "logprobs", "templates", "template_worker"],
    ["_native"],
    ["tokenizer", "model_info", "context", "prompt_cache", "arguments"],
    ["memory", "prompt", "adapters"],
    ["safe_llama"],
    ["examine", "llama", "catalogue"],
    ["integrations"],
    ["generate", "conversation"],
    ["evaluation", "llm_plugin"],
    ["studies", "server"],
    ["cli"],
]


def sources() -> dict[str, Path]:
    """Files by module name, without the package's own."""
    found = {}
    for folder, prefix in ((ROOT / "selfextend_gguf", ""), (ROOT / "cli", "cli.")):
        for path in folder.rglob("*.py"):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    del found["__init__"]
    return found


def imports(module: str, source: str, modules: set[str]) -> set[str]:
    """Modules of the package that `module` imports, anywhere in its source; relative imports stay in cli/."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level == 1 and module.split(".")[0] == "cli"), (
                f"{module}: import absolutely"
            )
            origin = ".".join((["cli"] if node.level else []) + ([node.module] if node.module else []))
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("selfextend_gguf.") for name in names}
    return {name for name in inside if name in modules}


MODULES = sources()
GRAPH = {name: imports(name, path.read_text(encoding="utf-8"), set(MODULES)) - {name} for name, path in MODULES.items()}


def floor_of(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if module.split(".")[0] in names:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def ring(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; [] if there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_rings_are_found():
    assert ring({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert ring({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_relative_imports_are_seen():
    modules = {"cli", "cli.chat", "cli.options", "llama"}
    source = "from .options import a\nfrom . import chat\nfrom selfextend_gguf.llama import Llama\n"
    assert imports("cli.run", source, modules) == {"cli", "cli.options", "cli.chat", "llama"}
    with pytest.raises(AssertionError, match="import absolutely"):
        imports("server.app", "from .run import serve", modules)


def test_no_files_import_each_other():
    assert ring(GRAPH) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    floor = floor_of(module)
    assert not {other for other in GRAPH[module] if floor_of(other) > floor}


def test_folders_import_in_one_direction():
    folders = {module.split(".")[0] for module in MODULES}
    between = {folder: set() for folder in folders}
    for module, others in GRAPH.items():
        between[module.split(".")[0]] |= {other.split(".")[0] for other in others}
    assert ring({folder: others - {folder} for folder, others in between.items()}) == []


def test_tiny_stands_on_the_ground():
    for module, others in GRAPH.items():
        if module.startswith("tiny"):
            assert all(other.startswith("tiny") for other in others), module


def test_native_headers_include_downwards():
    """selfextend.h is what users see; inside, graph < rotate < layers < verify."""
    order = ["error.h", "graph.h", "rotate.h", "layers.h", "verify.h"]
    for number, header in enumerate(order):
        text = (ROOT / "native" / header).read_text(encoding="utf-8")
        for later in [*order[number:], "selfextend.h"]:
            assert f'#include "{later}"' not in text, (header, later)


def test_public_names():
    assert sorted(selfextend_gguf.__all__) == [
        "Llama",
        "RewriteStats",
        "SelfExtendConfig",
        "SelfExtendError",
        "plan",
        "schedule_positions",
    ]
    assert all(hasattr(selfextend_gguf, name) for name in selfextend_gguf.__all__)
    for name in ("self_extend", "key_positions", "rewrite_stats"):
        assert name in dir(selfextend_gguf.Llama) or name in selfextend_gguf.Llama.__init__.__code__.co_names
