"""The form follows the document, whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studio.form import Attachment, Field, fields_of, parsed, without_secrets
from tests.paths import DATA

DOCUMENT = json.loads((DATA / "cog_cli_schema.json").read_text())
FIELDS = {field.name: field for field in fields_of(DOCUMENT)}


def test_order_bounds_choices_and_defaults_are_the_documents() -> None:
    properties = DOCUMENT["components"]["schemas"]["Input"]["properties"]
    assert list(FIELDS) == sorted(properties, key=lambda name: int(properties[name]["x-order"]))
    steps = FIELDS["num_inference_steps"]
    assert (steps.kind, steps.minimum, steps.maximum, steps.default) == ("integer", 1, 50, 28)
    assert FIELDS["model"].choices == ("dev", "schnell")
    assert FIELDS["model"].default == "dev"
    assert [name for name, field in FIELDS.items() if field.required] == ["prompt"]
    assert all(field.description for field in FIELDS.values())


def test_images_loras_and_tokens_have_kinds_of_their_own() -> None:
    kinds = {name: field.kind for name, field in FIELDS.items()}
    assert {name for name, kind in kinds.items() if kind == "lora"} == {"replicate_weights", "extra_lora"}
    assert {name for name, kind in kinds.items() if kind == "secret"} == {"hf_api_token", "civitai_api_token"}
    assert (kinds["image"], kinds["mask"]) == ("image", "mask")


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, "text"),
        ({"type": "number", "minimum": 0}, "number"),
        ({"allOf": [{"$ref": "#/components/schemas/model"}]}, "choice"),
        ({"$ref": "#/components/schemas/model"}, "choice"),
        ({"type": "string", "format": "uri"}, "file"),
        ({"type": "array", "items": {"type": "string"}}, "json"),
    ],
)
def test_a_field_that_a_later_version_adds_appears(schema: dict[str, Any], kind: str) -> None:
    later = json.loads(json.dumps(DOCUMENT))
    later["components"]["schemas"]["Input"]["properties"]["later"] = {**schema, "x-order": 1000}
    field = fields_of(later)[-1]
    assert (field.name, field.kind) == ("later", kind)


@pytest.mark.parametrize(
    ("name", "given", "sent"),
    [
        ("seed", "18446744073709551615", 18446744073709551615),
        ("seed", " 7 ", 7),
        ("seed", "seven", "seven"),
        ("seed", "", None),
        ("height", "NaN", "NaN"),
        ("num_inference_steps", 4.0, 4),
        ("num_inference_steps", 28, None),
        ("lora_scale", 0.5, 0.5),
        ("go_fast", False, None),
        ("model", "schnell", "schnell"),
        ("replicate_weights", "owner/name", "owner/name"),
        ("replicate_weights", "  ", None),
        ("replicate_weights", "@/a/b.safetensors", Attachment(Path("/a/b.safetensors"))),
        ("prompt", "@ home", "@ home"),
    ],
)
def test_what_a_control_holds_becomes_what_is_sent(name: str, given: Any, sent: Any) -> None:
    assert parsed(FIELDS[name], given) == sent


def test_tokens_are_left_out_also_where_an_address_holds_them() -> None:
    inputs = {
        "prompt": "a key?token=rose",
        "hf_api_token": "hf_secret",
        "replicate_weights": "https://me:hf_secret@a.host/b.safetensors?x=1&token=secret&sig=secret#c",
    }
    kept = without_secrets(tuple(FIELDS.values()), inputs)
    assert kept["prompt"] == inputs["prompt"]
    assert "secret" not in str(kept)
    assert "x=1" in kept["replicate_weights"]


def test_a_lists_value_is_read_as_json() -> None:
    field = Field("list", "json", "list", "", False)
    assert parsed(field, '["a", 2]') == ["a", 2]
