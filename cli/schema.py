"""The predictor's OpenAPI document, which Cog's server needs for validating requests: behind `script/schema`.

`cog build` writes it into an image from the source text of predict.py. Outside an image it is written here, from the
loaded class, and equals what `cog build` writes. `openapi.json` holds the part that is the same for every predictor.
"""

from __future__ import annotations

import argparse
import inspect
import json
import typing
from pathlib import Path
from typing import Any

import cog
from cog.input import FieldInfo

PROJECT = Path(__file__).parent.parent
SCHEMA_FILE = PROJECT / ".cog" / "openapi_schema.json"
FRAME = Path(__file__).with_name("openapi.json")

JSON_TYPES: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"format": "uri", "type": "string"},
    cog.Secret: {"format": "password", "type": "string", "writeOnly": True, "x-cog-secret": True},
}


def predictor_schemas(predict: Any) -> dict[str, Any]:
    """Return the schemas of a predict method: `Input`, `Output`, and an enumeration for each input with choices."""
    hints = typing.get_type_hints(predict)
    fields = {name: p.default for name, p in inspect.signature(predict).parameters.items() if name != "self"}
    if missing := [name for name, field in fields.items() if not isinstance(field, FieldInfo)]:
        raise TypeError(f"predict.py: {missing[0]} has no Input(...)")
    properties = {name: _property(name, hints[name], field, n) for n, (name, field) in enumerate(fields.items())}
    required = [name for name, schema in properties.items() if not {"default", "nullable"} & schema.keys()]
    return {
        "Input": {"properties": properties, "required": required, "title": "Input", "type": "object"},
        "Output": {"items": JSON_TYPES[typing.get_args(hints["return"])[0]], "title": "Output", "type": "array"},
        **{name: _enumeration(name, field.choices) for name, field in fields.items() if field.choices},
    }


def _property(name: str, hint: Any, field: FieldInfo, order: int) -> dict[str, Any]:
    plain = next((part for part in typing.get_args(hint) if part is not type(None)), hint)
    described = {"description": field.description, "default": field.default, "x-order": order}
    kind: dict[str, Any]
    if field.choices:
        kind = {"allOf": [{"$ref": f"#/components/schemas/{name}"}]}
    else:
        optional = {"nullable": True} if plain is not hint else {}
        kind = {**JSON_TYPES[plain], "title": name.replace("_", " ").title(), **optional}
    present = {**kind, **described, "minimum": field.ge, "maximum": field.le}
    return {key: value for key, value in sorted(present.items()) if value is not None}


def _enumeration(name: str, choices: list[Any]) -> dict[str, Any]:
    return {"description": "An enumeration.", "enum": choices, "title": name, "type": "string"}


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the predictor's HTTP API."""
    from predict import Predictor

    document: dict[str, Any] = json.loads(FRAME.read_text())
    components = document["components"]
    components["schemas"] = {**predictor_schemas(Predictor.predict), **components["schemas"]}
    return document


def write_schema(path: Path = SCHEMA_FILE) -> Path:
    """Write the document to `path` and return it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(openapi_document(), indent=2) + "\n")
    return path


def main() -> None:
    """The command line: it has no options but --help."""
    written = f"Write the predictor's OpenAPI document to {SCHEMA_FILE.relative_to(PROJECT)}, as `cog build` does."
    argparse.ArgumentParser(prog="script/schema", description=written).parse_args()
    print(f"wrote {write_schema().relative_to(PROJECT)}")


if __name__ == "__main__":
    main()
