"""The inputs of a server, read from its OpenAPI document. Knows no control and no page.

What a field is follows from its schema. Two kinds are told by name, since Cog's schema has no word for them: a LoRA is
a text whose name speaks of a LoRA or of weights, and images are the files called `image` and `mask`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["text", "integer", "number", "boolean", "choice", "image", "mask", "file", "secret", "lora", "json"]
_LORA = re.compile(r"lora|weights")
_KINDS: dict[str, Kind] = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}
_FILES: dict[str, Kind] = {"image": "image", "mask": "mask"}
HIDDEN = "HIDDEN"
_SECRET_IN_ADDRESS = re.compile(
    r"(?i)([?&][^=&#\s]*(?:token|key|secret|password|signature|sig|credential)[^=&#\s]*=)[^&#\s]+|(://)[^/@\s]+(?=@)"
)


@dataclass(frozen=True)
class Attachment:
    """A local file that is sent as a data URI."""

    path: Path


@dataclass(frozen=True)
class Field:
    """One input."""

    name: str
    kind: Kind
    label: str
    description: str
    required: bool
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()


Inputs = Mapping[str, Any]
"""JSON values and attachments by the names of their inputs. What is not set is absent."""


def fields_of(document: Mapping[str, Any]) -> tuple[Field, ...]:
    """Return the inputs in the document's own order.

    Raises:
        KeyError: this is no document of a Cog server.
    """
    schemas = document["components"]["schemas"]
    properties = schemas["Input"].get("properties", {})
    required = schemas["Input"].get("required", ())
    found = [(name, _resolved(schema, schemas)) for name, schema in properties.items()]
    found.sort(key=lambda pair: pair[1].get("x-order", len(properties)))
    return tuple(_field(name, schema, name in required) for name, schema in found)


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """A property with what it refers to; Cog puts choices into a schema of their own."""
    merged: dict[str, Any] = {}
    for part in (schema, *schema.get("allOf", ())):
        if "$ref" in part:
            merged |= schemas[part["$ref"].rpartition("/")[2]]
    return {**merged, **schema}


def _field(name: str, schema: Mapping[str, Any], required: bool) -> Field:
    return Field(
        name=name,
        kind=_kind(name, schema),
        label=name.replace("_", " "),
        description=schema.get("description", ""),
        required=required,
        default=schema.get("default"),
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        choices=tuple(schema.get("enum", ())),
    )


def _kind(name: str, schema: Mapping[str, Any]) -> Kind:
    if schema.get("x-cog-secret") or schema.get("format") == "password":
        return "secret"
    if "enum" in schema:
        return "choice"
    if schema.get("format") == "uri":
        return _FILES.get(name, "file")
    kind = _KINDS.get(schema.get("type", ""), "json")
    return "lora" if kind == "text" and _LORA.search(name) else kind


def parsed(field: Field, given: Any) -> Any:
    """Return what a control holds as the value to send; None where nothing is set or it is the default.

    What cannot be read as the field's type is sent as it is: the server says what is wrong with it.
    """
    if given is None or given == "":
        return None
    value = given
    if isinstance(given, str):
        if field.kind in ("integer", "number", "json"):
            value = _number_or_json(given.strip())
        elif field.kind in ("lora", "file"):
            value = _reference(given.strip())
    elif field.kind == "integer" and isinstance(given, float) and given.is_integer():
        value = int(given)
    return None if value == field.default and not field.required else value


def _number_or_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def _reference(text: str) -> str | Attachment | None:
    """A reference as it is; `@file` names a file on this machine, as with `script/predict`."""
    return Attachment(Path(text[1:]).expanduser().absolute()) if text.startswith("@") else text or None


def without_secrets(fields: Sequence[Field], inputs: Inputs) -> dict[str, Any]:
    """Return the inputs without tokens, those inside addresses included."""
    secret = {field.name for field in fields if field.kind == "secret"}
    prose = {field.name for field in fields if field.kind in ("text", "choice")}
    kept = {name: value for name, value in inputs.items() if name not in secret}
    return {
        name: _SECRET_IN_ADDRESS.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", value)
        if isinstance(value, str) and name not in prose
        else value
        for name, value in kept.items()
    }
