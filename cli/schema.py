"""The OpenAPI document of the predictor, which Cog's server needs to validate anything.

`cog build` writes it into an image; outside an image `script/schema` writes it to `.cog/openapi_schema.json`.
"""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

import cog
from cog.input import FieldInfo

PROJECT = Path(__file__).parent.parent
SCHEMA_FILE = PROJECT / ".cog" / "openapi_schema.json"

JSON_TYPES: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"type": "string", "format": "uri"},
    cog.Secret: {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
}


def input_schemas(predict: Any) -> dict[str, Any]:
    """Return `components.schemas` of a predict method: `Input`, and an enumeration for each input with choices."""
    hints = typing.get_type_hints(predict)
    parameters = [p for p in inspect.signature(predict).parameters.values() if p.name != "self"]
    properties: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    required: list[str] = []
    for order, parameter in enumerate(parameters):
        field = parameter.default
        if not isinstance(field, FieldInfo):
            raise TypeError(f"predict.py: {parameter.name} has no Input(...)")
        optional = type(None) in typing.get_args(hints[parameter.name])
        if field.default is None and not optional:
            required.append(parameter.name)
        properties[parameter.name] = _property(parameter.name, hints[parameter.name], field, order)
        if field.choices:
            choices[parameter.name] = {
                "type": "string", "enum": list(field.choices), "title": parameter.name,
                "description": "An enumeration.",
            }  # fmt: skip
    return {
        "Input": {"title": "Input", "type": "object", "properties": properties, "required": required},
        **choices,
    }


def _property(name: str, hint: Any, field: FieldInfo, order: int) -> dict[str, Any]:
    plain = next((part for part in typing.get_args(hint) if part is not type(None)), hint)
    described: dict[str, Any] = {"x-order": order}
    if field.description is not None:
        described["description"] = field.description
    if field.default is not None:
        described["default"] = field.default
    if field.choices:
        return {"allOf": [{"$ref": f"#/components/schemas/{name}"}], **described}
    bounds = {"minimum": field.ge, "maximum": field.le}
    given = {key: bound for key, bound in bounds.items() if bound is not None}
    return {**JSON_TYPES[plain], "title": name.replace("_", " ").title(), **given, **described}


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the predictor's HTTP API."""
    from predict import Predictor

    schemas = {**input_schemas(Predictor.predict), **_API_SCHEMAS}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": _paths(),
        "components": {"schemas": schemas},
    }


_URI_LIST = {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}}
_RESPONSE_FIELDS: dict[str, Any] = {
    "id": {"type": "string"},
    "status": {"type": "string", "enum": ["starting", "processing", "succeeded", "canceled", "failed"]},
    "output": {"$ref": "#/components/schemas/Output"},
    "error": {"type": "string"},
    "logs": {"type": "string"},
    "metrics": {"type": "object", "additionalProperties": True},
}
_API_SCHEMAS: dict[str, Any] = {
    "Output": _URI_LIST,
    "PredictionRequest": {
        "title": "PredictionRequest",
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "input": {"$ref": "#/components/schemas/Input"},
            "webhook": {"type": "string", "format": "uri"},
            "webhook_events_filter": {"type": "array", "items": {"type": "string"}},
        },
    },
    "PredictionResponse": {"title": "PredictionResponse", "type": "object", "properties": _RESPONSE_FIELDS},
    "ValidationError": {
        "title": "ValidationError",
        "type": "object",
        "properties": {"detail": {"type": "array", "items": {"type": "object"}}},
    },
}


def _paths() -> dict[str, Any]:
    def answer(name: str) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        return {"description": name, "content": content}

    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}}
    responses = {"200": answer("PredictionResponse"), "422": answer("ValidationError")}
    identifier = {"in": "path", "name": "prediction_id", "required": True, "schema": {"type": "string"}}
    plain = {"description": "Successful Response"}
    return {
        "/health-check": {"get": {"summary": "Healthcheck", "responses": {"200": plain}}},
        "/predictions": {"post": {"summary": "Predict", "requestBody": body, "responses": responses}},
        "/predictions/{prediction_id}": {
            "put": {
                "summary": "Predict Idempotent",
                "parameters": [identifier],
                "requestBody": body,
                "responses": responses,
            }
        },
        "/predictions/{prediction_id}/cancel": {
            "post": {"summary": "Cancel", "parameters": [identifier], "responses": {"200": plain}}
        },
    }


def write_schema(path: Path = SCHEMA_FILE) -> Path:
    """Write the document to `path` and return it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(openapi_document(), indent=2) + "\n")
    return path


if __name__ == "__main__":
    print(f"wrote {write_schema().relative_to(PROJECT)}")
