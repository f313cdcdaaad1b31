"""A module imports only from its own room and the rooms above it; nothing reads the environment but the settings."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest

from tests.paths import PROJECT

ROOMS = (
    "errors",
    "settings",
    "logs",
    "metrics",
    "images",
    "fetching",
    "uploads",
    "weights",
    "lora_loading.shapes",
    "lora_loading.known_models",
    "lora_loading.updates",
    "lora_loading.rotations",
    "lora_loading.finding",
    "lora_loading.reading",
    "lora_loading.applying",
    "lora_loading.base_lora",
    "request",
    "image_metadata",
    "safety",
    "engine",
    "predict",
    "cli",
    "cluster",
    "training",
    "benchmarks",
    "studio",
)
"""From the top. A module belongs to the room that its name begins with."""
NOT_ROOMS = ("tests",)


def modules_of_the_project() -> dict[str, ast.Module]:
    folders = [path for path in PROJECT.iterdir() if (path / "__init__.py").exists() and path.name not in NOT_ROOMS]
    files = [*PROJECT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    names = {str(file.relative_to(PROJECT).with_suffix("")).replace("/", "."): file for file in files}
    return {name.removesuffix(".__init__"): ast.parse(file.read_text()) for name, file in names.items()}


MODULES = modules_of_the_project()


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            both = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            finer = {name for name in both if name in MODULES and name != node.module}
            names |= finer or both
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES or name.split(".")[0] in NOT_ROOMS}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_room_and_those_above(module: str) -> None:
    own = room_of(module)
    for name in imports(module) if own else ():
        room = room_of(name)
        assert room is not None, f"{module} imports {name}"
        assert ROOMS.index(room) <= ROOMS.index(str(own)), f"{module} imports {name}"


def test_every_module_has_a_room() -> None:
    folders = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    assert [name for name in MODULES if room_of(name) is None and name not in folders] == []
    assert [room for room in ROOMS if not any(room_of(name) == room for name in MODULES)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    order = TopologicalSorter({name: imports(name) - {name} for name in MODULES})
    assert len(list(order.static_order())) >= len(MODULES)


def test_the_environment_is_read_in_one_place() -> None:
    """`predict` and `cli.predict` hand it to the settings, the others to what they start."""
    reads = {"environ", "getenv"}
    holders = {
        name
        for name, tree in MODULES.items()
        if room_of(name) not in ("training", "benchmarks")
        and any(isinstance(node, ast.Attribute) and node.attr in reads for node in ast.walk(tree))
    }
    assert holders == {
        "predict",
        "cli.lora",
        "cli.predict",
        "cli.serve",
        "cluster.__main__",
        "cluster.child",
        "studio.__main__",
    }


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "studio"])
def test_the_page_imports_nothing_of_the_project(module: str) -> None:
    assert [name for name in imports(module) if room_of(name) != "studio"] == []


@pytest.mark.parametrize("module", ["errors", "settings", "images", "request", "logs"])
def test_what_checks_inputs_imports_no_torch(module: str) -> None:
    top = [node for node in MODULES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("torch" in ast.unparse(node) or "diffusers" in ast.unparse(node) for node in top)
