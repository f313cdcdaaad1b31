"""A model on Replicate.

owner/name
owner/name:version
owner/name/version
https://replicate.com/owner/name/versions/version
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult

from lora_loading.finding.references.named import Named, refuse
from lora_loading.finding.references.path import is_safetensors, segments_of

FORMS = ("owner/name or owner/name:version (a Replicate model)",)
HOSTS = ("replicate.com",)
DELIVERY_HOST = "replicate.delivery"
"""And every host below it: where the tars of trainings lie; may be written without https://."""

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,95}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class ReplicateReference(Named):
    """A model on Replicate, at its latest version unless one is named."""

    owner: str
    name: str
    version: str | None = None
    """8 to 64 lower-case hexadecimal digits."""

    @property
    def immutable(self) -> bool:
        """A version that is written out is fixed; a shortened one might come to mean another."""
        return self.version is not None and len(self.version) == 64

    def __str__(self) -> str:
        version = f"/versions/{self.version}" if self.version else ""
        return f"replicate.com/{self.owner}/{self.name}{version}"


def parse(parts: SplitResult) -> ReplicateReference:
    """Read the address of a model's page, of a version's, or of the weights behind either."""
    return parse_name(parts.path)


def parse_name(text: str) -> ReplicateReference:
    """Read owner/name, owner/name:version, owner/name/version, owner/name/versions/version; maybe with /_weights."""
    segments = segments_of(text)
    if segments[-1:] == ["_weights"]:
        segments = segments[:-1]
    if len(segments) == 4 and segments[2] == "versions":
        segments = [*segments[:2], segments[3]]
    if len(segments) == 2 and ":" in segments[1]:
        segments = [segments[0], *segments[1].split(":", 1)]
    if len(segments) not in (2, 3):
        refuse("it is not owner/name, and no address of a service that we know")
    owner, name, *versions = segments
    if not _OWNER.fullmatch(owner) or not _NAME.fullmatch(name) or ".." in name:
        refuse("it is no owner/name")
    if is_safetensors(name):
        refuse("it looks like a path to a file, and files are not read")
    version = versions[0].lower() if versions else None
    if version is not None and not _VERSION.fullmatch(version):
        refuse("what follows owner/name is no version, which has up to 64 hexadecimal digits")
    return ReplicateReference(owner, name, version)
