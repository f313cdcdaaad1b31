"""The guide beside the tree: what it names exists, and what exists is in it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import errors
from settings import Settings
from tests.paths import PROJECT
from tests.test_structure import ROOMS

ARCHITECTURE = (PROJECT / "docs" / "architecture.md").read_text()
TRACKED = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
DOCUMENTS = [name for name in TRACKED if name.endswith(".md") and not name.startswith("tests/")]
NO_MODULES = ("tests/", "examples/")
MODULES = [name for name in TRACKED if re.search(r"(?<!__init__)\.py$", name) and not name.startswith(NO_MODULES)]
MADE_LATER = ("build/", ".cog/", ".venv/")
"""Folders that are not in the repository."""


def in_the_tables(text: str) -> list[str]:
    """The modules of the tables' first column, in order."""
    return re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)


def named_files(text: str) -> set[str]:
    """Paths of this project between back-quotes: with a slash and a known beginning, or a file at the top."""
    top = {path.name for path in PROJECT.iterdir()}
    quoted = re.findall(r"`([\w./-]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    inside = {name for name in quoted if "/" in name and name.split("/")[0] in top}
    return inside | {name for name in quoted if "/" not in name and re.search(r"\.(py|md|txt|lock|toml|yaml)$", name)}


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_module_is_in_the_architecture_once() -> None:
    described = in_the_tables(ARCHITECTURE)
    assert sorted(described) == sorted(MODULES), "docs/architecture.md, the rooms: a row for each module"


def test_the_rooms_are_described_in_the_order_of_imports() -> None:
    names = [name.removesuffix(".py").replace("/", ".") for name in in_the_tables(ARCHITECTURE)]
    rooms = [next(room for room in ROOMS if name == room or name.startswith(f"{room}.")) for name in names]
    assert [room for room, before in zip(rooms, [None, *rooms], strict=False) if room != before] == list(ROOMS)


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_every_file_that_the_guide_names_exists(name: str) -> None:
    named = named_files((PROJECT / name).read_text())
    assert named
    assert [file for file in sorted(named) if not (PROJECT / file).exists() and not file.startswith(MADE_LATER)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_this_project_leads_somewhere(name: str) -> None:
    file = PROJECT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name} links to {target}"


# docs/settings.md


def settings_in_the_docs() -> dict[str, str]:
    """The default of each variable, as its table says."""
    text = (PROJECT / "docs" / "settings.md").read_text()
    return dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", text, re.MULTILINE))


def test_every_setting_is_in_the_table() -> None:
    read = set(re.findall(r'"((?:FLUX|HF|CIVITAI|REPLICATE)_[A-Z_]+)"', (PROJECT / "settings.py").read_text()))
    assert set(settings_in_the_docs()) == read, "docs/settings.md: a row for each variable of settings.py"


@pytest.mark.parametrize(("variable", "default"), settings_in_the_docs().items())
def test_the_default_in_the_table_is_the_one_without_the_variable(variable: str, default: str) -> None:
    given = "" if default == "none" else default.strip("`")
    assert Settings.from_env({variable: given}) == Settings.from_env({})
    if default == "none":
        assert (
            Settings.from_env({variable: "https://example.com" if variable.endswith("ENDPOINT") else "7"}) != Settings()
        )


# docs/troubleshooting.md

ERRORS = {name for name in dir(errors) if name.endswith("Error") and isinstance(getattr(errors, name), type)}
EXPLAINED = [name for name in MODULES if not name.startswith(("training/", "benchmarks/", "cluster/", "studio/"))]


def spelt(node: ast.expr) -> str:
    """The text of a string, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(spelt(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return spelt(left) + spelt(right)
    return "…"


def strings(module: str) -> Iterator[str]:
    """All texts in a module."""
    nodes = ast.walk(ast.parse((PROJECT / module).read_text()))
    yield from {spelt(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)}


def messages(module: str) -> Iterator[str]:
    """The texts that errors of ours are made with; those that are made elsewhere, or of parts alone, are left out."""
    for node in ast.walk(ast.parse((PROJECT / module).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ERRORS and node.args:
            text = spelt(node.args[0])
            if len(re.findall(r"[a-z]+", text)) > 2:
                yield text


def rows_of_troubleshooting() -> list[str]:
    text = (PROJECT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `(.+?)` \|", text.partition("## Inputs")[2], re.MULTILINE)


def explains(row: str, text: str) -> bool:
    return re.search(".*?".join(re.escape(part) for part in row.split("…")), text) is not None


@pytest.mark.parametrize("module", [name for name in EXPLAINED if any(messages(name))])
def test_every_error_is_explained(module: str) -> None:
    rows = rows_of_troubleshooting()
    unexplained = [text for text in messages(module) if not any(explains(row, text) for row in rows)]
    assert unexplained == [], "docs/troubleshooting.md: a row for each"


def test_every_explained_error_exists() -> None:
    texts = {text for module in EXPLAINED for text in strings(module) if " " in text or ":" in text}
    assert [row for row in rows_of_troubleshooting() if not any(explains(row, text) for text in texts)] == []
