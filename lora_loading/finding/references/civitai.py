"""A model on CivitAI, a version of it, or a version alone; any domain of CivitAI's is the same service.

civitai.com/models/123/some-name
civitai.com/models/123?modelVersionId=456
civitai.com/api/download/models/456
urn:air:flux1:lora:civitai:123@456
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs

from lora_loading.finding.references.named import Named, refuse
from lora_loading.finding.references.path import segments_of

FORMS = (
    "civitai.com/models/123, civitai.com/models/123?modelVersionId=456 or civitai.com/api/download/models/456",
    "urn:air:flux1:lora:civitai:123@456",
)
HOSTS = ("civitai.com", "civitai.red", "civitai.green")

_AIR = re.compile(r"(?:urn:)?air:(?:[\w.-]+:){0,2}civitai:([0-9]+)(?:@([0-9]+))?(?::[\w.-]+)?(?:\.\w+)?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class CivitaiReference(Named):
    """A model on CivitAI, a version of it, or a version alone; one of the two ids is there."""

    model_id: int | None
    version_id: int | None = None

    @property
    def immutable(self) -> bool:
        """A version is fixed."""
        return self.version_id is not None

    def __str__(self) -> str:
        if self.model_id is None:
            return f"civitai.com/api/download/models/{self.version_id}"
        version = "" if self.version_id is None else f"?modelVersionId={self.version_id}"
        return f"civitai.com/models/{self.model_id}{version}"


def parse(parts: SplitResult) -> CivitaiReference:
    """Read the address of a model's page, or of a version's download."""
    match segments_of(parts.path):
        case ["models", model] | ["models", model, _]:
            versions = _query(parts).get("modelVersionId", [None])
            if len(set(versions)) > 1:
                refuse("modelVersionId is given more than once")
            return _reference(model, versions[0])
        case ["api", "download", "models", version]:
            return _reference(None, version)
    refuse("the address is neither /models/<id> nor /api/download/models/<version>")


def parse_air(text: str) -> CivitaiReference | None:
    """Read an AIR, CivitAI's own way to name things; None where the text is none."""
    match = _AIR.fullmatch(text)
    return None if match is None else _reference(match[1], match[2])


def _query(parts: SplitResult) -> dict[str, list[str]]:
    try:
        return parse_qs(parts.query, max_num_fields=100)
    except ValueError:
        refuse("the query behind the ? cannot be read")


def _reference(model: str | None, version: str | None) -> CivitaiReference:
    return CivitaiReference(_number(model, "model"), _number(version, "version"))


def _number(text: str | None, what: str) -> int | None:
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) == 0:
        refuse(f"the {what}'s id is no number")
    return int(text)
