"""What the lock files install: versions, digests, who needs what, and under which licence.

Read for Linux on x86_64, the image's platform, whatever this machine is. Versions, digests and needs come from the lock
files, licences from the installed packages' own metadata or, where that cannot be, from a table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from cli.schema import PROJECT

LOCKS = ("requirements.lock", "requirements-torch.lock")
RUNTIME = "-r requirements.txt"
"""How the lock files name the list of what the image installs."""
IMAGE = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "python_version": "3.11",
    "python_full_version": "3.11.0",
}
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
"""CUDA's end user licence; it allows these libraries to be shipped with a program."""
KNOWN = {
    r"torchao": "BSD-3-Clause",  # its metadata names none, its file LICENSE is this text
    r"cuda-(bindings|pathfinder)": "Apache-2.0",
    r"cuda-toolkit|nvidia-.*": NVIDIA,
}
"""Licences, by pattern of names, of packages that are not installed everywhere or do not say theirs."""
_PIN = re.compile(r"^([\w.-]+)==([^\s;\\]+)(?:\s*;\s*(.+?))?\s*\\?$")


@dataclass(frozen=True)
class Package:
    """One locked package."""

    name: str
    version: str
    sha256: tuple[str, ...]
    """Of each of its files that may be installed."""
    needed_by: tuple[str, ...]
    """Packages, and `-r requirements.txt` or `-r requirements-dev.txt`."""
    licence: str | None
    """As its metadata says it, mostly an SPDX expression; None where it is not installed here."""
    runtime: bool
    """Whether the image has it; the others are for development."""


def locked_packages(folder: Path = PROJECT) -> list[Package]:
    """All packages of the lock files in this folder that the image's platform takes, by name."""
    found: dict[str, tuple[str, list[str], list[str]]] = {}
    for lock in LOCKS:
        for name, version, digests, needed_by in _entries((folder / lock).read_text()):
            found[name] = version, digests, needed_by
    runtime = _runtime({name: needed_by for name, (_, _, needed_by) in found.items()})
    return [
        Package(name, version, tuple(digests), tuple(needed_by), licence_of(name), name in runtime)
        for name, (version, digests, needed_by) in sorted(found.items())
    ]


def _entries(text: str) -> list[tuple[str, str, list[str], list[str]]]:
    """Name, version, digests and needers of each entry of a lock file whose marker holds for the image."""
    entries: list[tuple[str, str, list[str], list[str]]] = []
    taken = False
    for line in text.splitlines():
        if pin := _PIN.match(line):
            taken = pin[3] is None or Marker(pin[3]).evaluate(dict(IMAGE))
            if taken:
                entries.append((canonicalize_name(pin[1]), pin[2], [], []))
        elif taken and (digest := re.search(r"--hash=sha256:(\w+)", line)):
            entries[-1][2].append(digest[1])
        elif taken and (needer := re.match(r"\s+#(?: via)?\s+(\S.*)$", line)) and needer[1] != "via":
            entries[-1][3].append(needer[1])
    return entries


def _runtime(needed_by: dict[str, list[str]]) -> set[str]:
    """What requirements.txt needs, directly or through others."""
    runtime = {RUNTIME}
    while more := {n for n, needers in needed_by.items() if n not in runtime and runtime & set(needers)}:
        runtime |= more
    return runtime - {RUNTIME}


def licence_of(name: str) -> str | None:
    """The licence in an installed package's metadata: the expression, else the short name, else the classifiers."""
    if known := next((licence for pattern, licence in KNOWN.items() if re.fullmatch(pattern, name)), None):
        return known
    try:
        about: Any = metadata.metadata(name)  # an email.message.Message, of which the stubs know less
    except metadata.PackageNotFoundError:
        return None
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or () if "License :: " in text]
    if classifiers:
        return " AND ".join(classifiers)
    first = str(about.get("License") or "").strip().partition("\n")[0]
    return first or None
