"""The OpenAPI document against the published contract, and against what Cog's own CLI writes for predict.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.schema import openapi_document, write_schema
from tests.paths import DATA

CONTRACT = json.loads((DATA / "contract.json").read_text())
WRITTEN_BY_COG = json.loads((DATA / "cog_cli_schema.json").read_text())
DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]
PROPERTIES = SCHEMAS["Input"]["properties"]
SECRETS = ["hf_api_token", "civitai_api_token"]


def fields(document: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a document by its path, so that a difference is shown by name."""
    if isinstance(document, dict):
        return {name: leaf for key in document for name, leaf in fields(document[key], f"{path}/{key}").items()}
    return {path: document}


def contract_form(name: str) -> dict[str, Any]:
    """A property in the contract's form: choices inlined; no title, order or nullable, which Cog derives."""
    schema = dict(PROPERTIES[name])
    for part in schema.pop("allOf", []):
        choices = SCHEMAS[part["$ref"].rsplit("/", 1)[1]]
        schema |= {"type": choices["type"], "enum": choices["enum"]}
    return {key: value for key, value in schema.items() if key not in ("title", "x-order", "nullable")}


def test_the_document_equals_cogs_in_every_field() -> None:
    assert fields(DOCUMENT) == fields(WRITTEN_BY_COG)


def test_the_document_equals_cogs_in_order() -> None:
    assert json.dumps(DOCUMENT) == json.dumps(WRITTEN_BY_COG)


def test_the_inputs_have_the_contracts_order_and_then_the_two_secrets() -> None:
    ordered = sorted(PROPERTIES, key=lambda name: PROPERTIES[name]["x-order"])
    assert ordered == [field["name"] for field in CONTRACT["inputs"]] + SECRETS


@pytest.mark.parametrize("field", CONTRACT["inputs"], ids=lambda field: field["name"])
def test_an_input_equals_the_contract(field: dict[str, Any]) -> None:
    wanted = {key: value for key, value in field.items() if key not in ("name", "required")}
    assert contract_form(field["name"]) == wanted


def test_the_output_equals_the_contract() -> None:
    assert SCHEMAS["Output"] == CONTRACT["output"]


def test_every_reference_in_the_document_resolves() -> None:
    text = json.dumps(DOCUMENT)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in SCHEMAS


def test_the_document_is_written_where_the_server_looks(tmp_path: Path) -> None:
    path = write_schema(tmp_path / ".cog" / "openapi_schema.json")
    assert json.loads(path.read_text()) == DOCUMENT
