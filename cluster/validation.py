"""What a request's body says, and the answers to a wrong one: those of Cog's own server (coglet 0.23), word for word
where clients may read them. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from errors import LoraReferenceError
from lora_loading.finding.reference import parse

EVENTS = ("start", "output", "logs", "completed")
MAX_DEPTH = 127
"""How deep lists and objects may be in each other: the limit of Cog's server, which reads JSON with serde_json."""
JSON_TYPES = {
    bool: "boolean `{}`",
    int: "integer `{}`",
    float: "floating point `{}`",
    str: "string {}",
    list: "sequence",
    dict: "map",
    type(None): "null",
}
"""How serde_json names a value of a type that was not expected."""
LORA_INPUTS = ("replicate_weights", "extra_lora")


@dataclass(frozen=True)
class RefusedError(Exception):
    """A request that gets no prediction, and the answer to it."""

    status: int
    content: str
    media_type: str = "application/json"


@dataclass(frozen=True)
class Prediction:
    """A request that is well formed."""

    id: str
    input: Mapping[str, Any]
    webhook: str | None
    events: tuple[str, ...]

    def body(self, webhook: str | None) -> bytes:
        """The body for the child, whose events go to `webhook`."""
        events = [event for event in self.events if event != "completed"]
        hook = {"webhook": webhook, "webhook_events_filter": events} if webhook and events else {}
        return json.dumps({"id": self.id, "input": self.input, **hook}).encode()

    @property
    def key(self) -> str:
        """A digest of its LoRAs; equal for equal sets, however they are written. Empty without LoRAs."""
        texts = [text for name in LORA_INPUTS for text in _lines(self.input.get(name))]
        if not texts:
            return ""
        return hashlib.sha256("\n".join(sorted({_canonical(text) for text in texts})).encode()).hexdigest()[:32]


def read(content: bytes, id_in_address: str | None, new_id: str, inputs: Mapping[str, Any] | None) -> Prediction:
    """Read the body of a request.

    Args:
        content: JSON.
        id_in_address: of PUT /predictions/<id>.
        new_id: the prediction's id where neither the address nor the body has one.
        inputs: the schema of the inputs; None while no replica has told it.

    Raises:
        RefusedError: it is not what Cog's server takes.
    """
    document = _parsed(content or b"{}")
    if not isinstance(document, dict) or not isinstance(document.get("input", {}), dict):
        raise _not_a_request("expected an object with an object as input")
    events, own_id, webhook = _events(document), _text(document, "id"), _text(document, "webhook")
    if id_in_address and own_id not in (None, id_in_address):
        raise _details([(["body", "id"], "prediction ID must match the ID supplied in the URL", "value_error")])
    given = document.get("input", {})
    if problems := [] if inputs is None else list(_problems(given, inputs)):
        raise _details(problems)
    return Prediction(id_in_address or own_id or new_id, given, webhook or None, events)


def input_schema(openapi: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the inputs in an OpenAPI document, with its references replaced by what they name."""
    schemas = openapi["components"]["schemas"]
    properties = {}
    for name, schema in schemas["Input"]["properties"].items():
        named = [schemas[part["$ref"].rsplit("/", 1)[1]] for part in schema.get("allOf", [])]
        whole = {**schema, **{key: value for part in named for key, value in part.items()}}
        properties[name] = {key: value for key, value in whole.items() if key != "allOf"}
    return {"properties": properties, "required": schemas["Input"]["required"], "type": "object"}


def _parsed(content: bytes) -> Any:  # noqa: ANN401 - any JSON
    try:
        document = json.loads(content)
    except RecursionError:
        raise _not_json("recursion limit exceeded") from None
    except ValueError as error:
        raise _not_json(str(error)) from None
    if _is_deeper(document, MAX_DEPTH):
        raise _not_json("recursion limit exceeded")
    return document


def _is_deeper(document: object, limit: int) -> bool:
    """Whether more than so many lists and objects are in each other."""
    level = [document]
    for _ in range(limit):
        parts = [value.values() if isinstance(value, dict) else value for value in level if _is_nested(value)]
        level = [inner for part in parts for inner in part]
    return any(map(_is_nested, level))


def _is_nested(value: object) -> TypeGuard[dict[str, object] | list[object]]:
    return isinstance(value, (dict, list))


def _events(document: Mapping[str, Any]) -> tuple[str, ...]:
    events = document.get("webhook_events_filter", list(EVENTS))
    if not isinstance(events, list):
        raise _not_a_request(f"webhook_events_filter: invalid type: {_type_of(events)}, expected a sequence")
    for index, event in enumerate(events):
        if event not in EVENTS:
            known = ", ".join(f"`{name}`" for name in EVENTS)
            raise _not_a_request(f"webhook_events_filter[{index}]: unknown variant `{event}`, expected one of {known}")
    return tuple(events)


def _text(document: Mapping[str, Any], name: str) -> str | None:
    text = document.get(name)
    if text is not None and not isinstance(text, str):
        raise _not_a_request(f"{name}: invalid type: {_type_of(text)}, expected a string")
    if text and any("\ud800" <= character <= "\udfff" for character in text):  # it has no UTF-8
        raise _not_json(f"{name}: lone surrogate in hex escape")
    return text


def _type_of(value: object) -> str:
    return JSON_TYPES[type(value)].format(json.dumps(value))


def _problems(given: Mapping[str, Any], inputs: Mapping[str, Any]) -> Iterator[tuple[list[str], str, str]]:
    for name in inputs["required"]:
        if name not in given:
            yield ["body", "input", name], "Field required", "value_error.missing"
    schema = {"properties": inputs["properties"]}
    for error in sorted(Draft7Validator(schema).iter_errors(given), key=lambda error: list(error.path)):
        yield ["body", "input", *map(str, error.path)], _in_words(error), "value_error"


def _in_words(error: ValidationError) -> str:
    value, allowed = (json.dumps(part, separators=(",", ":")) for part in (error.instance, error.validator_value))
    words = {
        "enum": f"{value} is not one of {allowed}",
        "type": f"{value} is not of type {allowed}",
        "minimum": f"{value} is less than the minimum of {allowed}",
        "maximum": f"{value} is greater than the maximum of {allowed}",
    }
    return words.get(str(error.validator), str(error.message))


def _details(problems: list[tuple[list[str], str, str]]) -> RefusedError:
    details = [{"loc": loc, "msg": msg, "type": kind} for loc, msg, kind in problems]
    return RefusedError(422, json.dumps({"detail": details}, separators=(",", ":")))


def _not_json(why: str) -> RefusedError:
    return RefusedError(400, f"Failed to parse the request body as JSON: {why}", "text/plain")


def _not_a_request(why: str) -> RefusedError:
    return RefusedError(422, f"Failed to deserialize the JSON body into the target type: {why}", "text/plain")


def _lines(text: object) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] if isinstance(text, str) else []


def _canonical(text: str) -> str:
    try:
        return parse(text.split()[0] if not text.startswith("data:") else text).key
    except LoraReferenceError:
        return text
