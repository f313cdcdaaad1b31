"""The guide beside the tree: what it names exists, and what exists is in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

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
