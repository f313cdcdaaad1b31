"""A file inside the request: the reference is its own source."""

from __future__ import annotations

from lora_loading.finding.reference import DataReference
from weights import Container, Source


def resolve(reference: DataReference) -> Source:
    """The content itself. A tar's digest and size are not its member's, so only a bare file has them."""
    return Source(
        name=reference.label,
        content=reference.content,
        container=Container.TAR if reference.is_tar else Container.SAFETENSORS,
        revision=f"sha256:{reference.sha256}",
        immutable=True,
        sha256=None if reference.is_tar else reference.sha256,
        size_bytes=None if reference.is_tar else len(reference.content),
    )
