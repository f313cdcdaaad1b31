"""`script/sbom`: the software bill of materials in CycloneDX 1.6, from the lock files and the manifest of weights.

The same lock files give the same bytes: there is no time in it, and its serial number is made of its content.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from cli.packages import RUNTIME, Package, locked_packages
from image_metadata import VERSION
from safety.manifest import WeightFile
from safety.pair import CONCEPTS, OPINION
from safety.strict import MARQO

NAME = "flux-predictor"
SPDX = re.compile(r"[\w.+-]+(?: (?:AND|OR|WITH) [\w.+-]+)*")


def bill(packages: list[Package], weights: tuple[WeightFile, ...]) -> dict[str, Any]:
    """The document: what the image installs is required, what only development needs is excluded."""
    root = {"type": "application", "bom-ref": NAME, "name": NAME, "version": VERSION}
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": root},
        "components": [*map(_component, packages), *map(_weight_component, weights)],
        "dependencies": _dependencies(packages),
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return {**document, "serialNumber": f"urn:uuid:{serial}"}


def _reference(package: Package) -> str:
    return f"pkg:pypi/{package.name}@{package.version}"


def _component(package: Package) -> dict[str, Any]:
    digests = [{"alg": "SHA-256", "content": digest} for digest in package.sha256]
    return {
        "type": "library",
        "bom-ref": _reference(package),
        "name": package.name,
        "version": package.version,
        "scope": "required" if package.runtime else "excluded",
        "purl": _reference(package),
        "externalReferences": [{"type": "distribution", "url": _reference(package), "hashes": digests}],
        **({"licenses": [_licence(package.licence)]} if package.licence else {}),
    }


def _licence(licence: str) -> dict[str, Any]:
    """An SPDX expression as one; any other text as a name."""
    spdx = SPDX.fullmatch(licence) and ("-" in licence or licence in ("MIT", "0BSD", "Zlib", "ISC"))
    return {"expression": licence} if spdx else {"license": {"name": licence}}


def _weight_component(file: WeightFile) -> dict[str, Any]:
    reference = f"pkg:huggingface/{file.repository}@{file.revision}"
    return {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": f"{file.repository}/{file.name}",
        "version": file.revision,
        "scope": "optional",
        "purl": reference,
        "hashes": [{"alg": "SHA-256", "content": file.sha256}],
    }


def _dependencies(packages: list[Package]) -> list[dict[str, Any]]:
    references = {package.name: _reference(package) for package in packages}
    needs: dict[str, list[str]] = {NAME: [], **{reference: [] for reference in references.values()}}
    for package in packages:
        for needer in package.needed_by:
            owner = NAME if needer == RUNTIME else references.get(needer)
            if owner is not None:
                needs[owner].append(_reference(package))
    return [{"ref": reference, "dependsOn": sorted(found)} for reference, found in sorted(needs.items())]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="script/sbom", description="Write the bill of materials (CycloneDX 1.6).")
    parser.add_argument("-o", "--output", type=Path, help="a file instead of the terminal")
    arguments = parser.parse_args()
    text = json.dumps(bill(locked_packages(), (CONCEPTS, OPINION, MARQO)), indent=2) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
