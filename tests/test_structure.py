"""Modules import only from the layers above them, nothing reads the environment but the settings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
LAYERS = [
    ["errors"],
    ["settings", "images", "logs"],
    ["lora_loading.references.named"],
    ["lora_loading.references.path"],
    ["lora_loading.references.url", "lora_loading.references.data"],
    ["lora_loading.references.replicate", "lora_loading.references.hugging_face", "lora_loading.references.civitai"],
    ["lora_loading.reference"],
    ["fetching.network", "fetching.containers", "fetching.storage"],
    ["fetching.download"],
    ["weights"],
    ["request"],
    ["lora_loading.tokens"],
    ["lora_loading.sources.access", "lora_loading.sources.api"],
    ["lora_loading.sources.replicate", "lora_loading.sources.hugging_face", "lora_loading.sources.civitai"],
    ["lora_loading.sources.url", "lora_loading.sources.data"],
    ["lora_loading.resolve"],
    ["lora_loading.store"],
    ["lora_loading.shapes", "lora_loading.updates", "lora_loading.metadata", "lora_loading.places"],
    ["lora_loading.formats.spelling"],
    ["lora_loading.formats.targets", "lora_loading.formats.embeddings", "lora_loading.formats.others"],
    ["lora_loading.formats.diffusers", "lora_loading.formats.text"],
    ["lora_loading.formats.bfl"],
    ["lora_loading.formats.flat", "lora_loading.formats.xlabs"],
    ["lora_loading.layers"],
    ["lora_loading.adapter"],
    ["lora_loading.cache", "lora_loading.words"],
    ["lora_loading.apply"],
    ["safety.checker", "safety.manifest", "safety.vision"],
    ["safety.gate", "safety.embedded", "safety.reference"],
    ["safety.strict"],
    ["safety.selftest"],
    ["safety.load"],
    ["engine.profiles"],
    ["engine.parts"],
    ["engine.hub_cache"],
    ["engine.hub_access"],
    ["engine.hub_fetch"],
    ["engine.hub"],
    ["engine.loading", "engine.memory", "engine.placement"],
    ["engine.precision"],
    ["engine.residency"],
    ["engine.engine", "engine.compilation"],
    ["engine.start"],
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
    folders = ("cli", "engine", "fetching", "lora_loading", "safety")
    served = [*PROJECT.glob("*.py"), *(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))]
    modules = {str(p.relative_to(PROJECT).with_suffix("")).replace("/", ".") for p in served if p.name != "__init__.py"}
    assert modules == set(LEVEL)


def test_the_environment_is_read_in_one_place() -> None:
    """`predict` hands it to the settings, `cli.serve` to the server that it starts; no one else has it."""
    reads = ("environ", "getenv")
    texts = {module: (PROJECT / f"{module.replace('.', '/')}.py").read_text() for module in LEVEL}
    holders = {module for module, text in texts.items() if any(f"os.{read}" in text for read in reads)}
    assert holders == {"predict", "cli.serve"}


def test_request_and_images_know_no_torch() -> None:
    for module in ("errors", "settings", "images", "request", "logs"):
        tree = ast.parse((PROJECT / f"{module}.py").read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(node) or "diffusers" in ast.unparse(node) for node in top)
