"""Modules import only from the layers above them, nothing reads the environment but the settings."""

from __future__ import annotations

import ast

import pytest

from tests.paths import PROJECT

LAYERS = [
    ["errors"],
    ["settings", "images", "logs"],
    ["lora_loading.finding.references.named"],
    ["lora_loading.finding.references.path"],
    ["lora_loading.finding.references.url", "lora_loading.finding.references.data"],
    [
        "lora_loading.finding.references.replicate",
        "lora_loading.finding.references.hugging_face",
        "lora_loading.finding.references.civitai",
    ],
    ["lora_loading.finding.reference"],
    ["fetching.network", "fetching.containers", "fetching.store"],
    ["fetching.download"],
    ["weights"],
    ["request"],
    ["lora_loading.finding.tokens"],
    ["lora_loading.finding.sources.access", "lora_loading.finding.sources.api"],
    [
        "lora_loading.finding.sources.replicate",
        "lora_loading.finding.sources.hugging_face",
        "lora_loading.finding.sources.civitai",
    ],
    ["lora_loading.finding.sources.url", "lora_loading.finding.sources.data"],
    ["lora_loading.finding.resolve"],
    ["lora_loading.finding.store"],
    ["lora_loading.shapes", "lora_loading.updates", "lora_loading.reading.metadata", "lora_loading.applying.slots"],
    ["lora_loading.reading.formats.spelling"],
    [
        "lora_loading.reading.formats.targets",
        "lora_loading.reading.formats.embeddings",
        "lora_loading.reading.formats.not_flux",
    ],
    ["lora_loading.reading.formats.diffusers", "lora_loading.reading.formats.text"],
    ["lora_loading.reading.formats.bfl"],
    ["lora_loading.reading.formats.flat", "lora_loading.reading.formats.xlabs"],
    ["lora_loading.reading.layers"],
    ["lora_loading.reading.adapter"],
    ["lora_loading.reading.adapter_cache", "lora_loading.applying.embeddings"],
    ["lora_loading.applying.manager"],
    ["safety.checker", "safety.manifest", "safety.vision"],
    ["safety.gate", "safety.open_nsfw", "safety.pair"],
    ["safety.strict"],
    ["safety.selftest"],
    ["safety.load"],
    ["engine.profiles"],
    ["engine.model_folders"],
    ["engine.hub_cache"],
    ["engine.hub_access"],
    ["engine.hub_fetch"],
    ["engine.hub"],
    ["engine.loading", "engine.out_of_memory", "engine.offload"],
    ["engine.precision"],
    ["engine.memory_plan"],
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
