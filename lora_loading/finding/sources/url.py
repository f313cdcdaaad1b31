"""A file at any web address: the reference is its own source, and no token plays a part."""

from __future__ import annotations

from lora_loading.finding.reference import UrlReference
from lora_loading.finding.sources.access import Access
from weights import Container, Source

_ADVICE = "Give an address that anyone may read; a signed one expires, so it may have to be signed again."
ACCESS = Access(token_of=lambda tokens: None, given_as="", advice=_ADVICE, advice_to_holder=_ADVICE)


def resolve(reference: UrlReference) -> Source:
    """The source at the address itself."""
    container = Container.TAR if reference.is_tar else Container.SAFETENSORS
    return Source(name=reference.label, address=reference.address, container=container)
