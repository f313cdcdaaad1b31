"""Modules import only from the layers above them, nothing reads the environment but the settings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
LAYERS = [
    ["errors"],
    ["settings", "images", "logs"],
    ["request"],
    ["engine.profiles"],
    ["engine.loading"],
    ["engine.engine"],
    ["predict"],
    ["cli.schema"],
    ["cli.predict", "cli.serve"],
]
"""From the top; a module may import from the lists before its own."""
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    tree = ast.parse((PROJECT / f"{module.replace('.', '/')}.py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in LEVEL or name.split(".")[0] in ("training", "tests")}


@pytest.mark.parametrize("module", LEVEL)
def test_a_module_imports_only_from_layers_above(module: str) -> None:
    for name in imports(module):
        assert LEVEL.get(name, len(LAYERS)) < LEVEL[module], f"{module} imports {name}"


def test_every_module_has_a_layer() -> None:
    served = [path for pattern in ("*.py", "engine/*.py", "cli/*.py") for path in PROJECT.glob(pattern)]
    modules = {str(p.relative_to(PROJECT).with_suffix("")).replace("/", ".") for p in served if p.name != "__init__.py"}
    assert modules == set(LEVEL)


def test_the_environment_is_read_in_one_place() -> None:
    """`predict` hands it to the settings, `cli.serve` to the server that it starts; no one else has it."""
    holders = {module for module in LEVEL if "import os" in (PROJECT / f"{module.replace('.', '/')}.py").read_text()}
    assert holders == {"predict", "cli.serve"}


def test_request_and_images_know_no_torch() -> None:
    for module in ("errors", "settings", "images", "request", "logs"):
        tree = ast.parse((PROJECT / f"{module}.py").read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(node) or "diffusers" in ast.unparse(node) for node in top)
