"""The OpenAPI document against the published contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.schema import openapi_document, write_schema
from tests.paths import DATA

CONTRACT = json.loads((DATA / "contract.json").read_text())
DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]
PROPERTIES = SCHEMAS["Input"]["properties"]
SECRETS = ["hf_api_token", "civitai_api_token"]


def flattened(name: str) -> dict[str, Any]:
    """A property of the document in the contract's form: choices inlined, no title or order."""
    schema = dict(PROPERTIES[name])
    for part in schema.pop("allOf", []):
        choices = SCHEMAS[part["$ref"].rsplit("/", 1)[1]]
        schema |= {"type": choices["type"], "enum": choices["enum"]}
    return {key: value for key, value in schema.items() if key not in ("title", "x-order")}


def test_the_inputs_have_the_contracts_order_and_then_the_two_secrets() -> None:
    ordered = sorted(PROPERTIES, key=lambda name: PROPERTIES[name]["x-order"])
    assert ordered == [field["name"] for field in CONTRACT["inputs"]] + SECRETS


@pytest.mark.parametrize("field", CONTRACT["inputs"], ids=lambda field: field["name"])
def test_an_input_equals_the_contract(field: dict[str, Any]) -> None:
    wanted = {key: value for key, value in field.items() if key not in ("name", "required")}
    assert flattened(field["name"]) == wanted


def test_only_the_prompt_is_required() -> None:
    assert SCHEMAS["Input"]["required"] == ["prompt"]


def test_the_output_equals_the_contract() -> None:
    assert SCHEMAS["Output"] == CONTRACT["output"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_token_is_a_secret_without_a_default(name: str) -> None:
    assert PROPERTIES[name]["x-cog-secret"] is True
    assert "default" not in PROPERTIES[name]


def test_every_reference_in_the_document_resolves() -> None:
    text = json.dumps(DOCUMENT)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in SCHEMAS


def test_the_document_is_written_where_the_server_looks(tmp_path: Path) -> None:
    path = write_schema(tmp_path / ".cog" / "openapi_schema.json")
    assert json.loads(path.read_text()) == DOCUMENT
