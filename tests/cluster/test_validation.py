"""Bodies and their answers, beside those of Cog's own server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.schema import openapi_document
from cluster.validation import EVENTS, RefusedError, input_schema, read

INPUTS = input_schema(openapi_document())


def refused(content: bytes, id: str | None = None) -> tuple[int, str]:
    with pytest.raises(RefusedError) as raised:
        read(content, id, "new", INPUTS)
    return raised.value.status, raised.value.content


# As coglet 0.23.1 answers, seen with script/serve
@pytest.mark.parametrize(
    ("given", "details"),
    [
        ({}, [("prompt", "Field required", "value_error.missing")]),
        (
            {"prompt": "x", "num_outputs": 9, "model": "pro", "seed": "a"},
            [
                ("model", '"pro" is not one of ["dev","schnell"]', "value_error"),
                ("num_outputs", "9 is greater than the maximum of 4", "value_error"),
                ("seed", '"a" is not of type "integer"', "value_error"),
            ],
        ),
        ({"prompt": "x", "seed": None}, [("seed", 'null is not of type "integer"', "value_error")]),
        ({"prompt": "x", "lora_scale": -2}, [("lora_scale", "-2 is less than the minimum of -1", "value_error")]),
    ],
)
def test_wrong_inputs_are_answered_as_cog_does(given: dict[str, Any], details: list[tuple[str, str, str]]) -> None:
    status, content = refused(json.dumps({"input": given}).encode())
    found = [(problem["loc"], problem["msg"], problem["type"]) for problem in json.loads(content)["detail"]]
    assert (status, found) == (422, [(["body", "input", name], msg, kind) for name, msg, kind in details])


def test_what_is_no_request_is_refused() -> None:
    assert refused(b'{"inp')[0] == 400
    assert refused(b"[]")[0] == 422
    assert "must match" in refused(b'{"id": "other", "input": {"prompt": "x"}}', "mine")[1]


# As coglet 0.23.1 answers, but for the line and column that it adds
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"webhook_events_filter": 5}, "webhook_events_filter: invalid type: integer `5`, expected a sequence"),
        ({"webhook_events_filter": "a"}, 'webhook_events_filter: invalid type: string "a", expected a sequence'),
        ({"webhook_events_filter": {"a": 1}}, "webhook_events_filter: invalid type: map, expected a sequence"),
        ({"webhook_events_filter": None}, "webhook_events_filter: invalid type: null, expected a sequence"),
        (
            {"webhook_events_filter": ["start", "nope"]},
            "webhook_events_filter[1]: unknown variant `nope`, expected one of `start`, `output`, `logs`, `completed`",
        ),
        ({"id": 5}, "id: invalid type: integer `5`, expected a string"),
        ({"id": True}, "id: invalid type: boolean `true`, expected a string"),
        ({"id": ["a"]}, "id: invalid type: sequence, expected a string"),
        ({"webhook": 1.5}, "webhook: invalid type: floating point `1.5`, expected a string"),
        ({"webhook": {}}, "webhook: invalid type: map, expected a string"),
    ],
)
def test_a_value_of_another_type_is_answered_as_cog_does(wrong: dict[str, Any], why: str) -> None:
    found = refused(json.dumps({"input": {"prompt": "x"}, **wrong}).encode())
    assert found == (422, f"Failed to deserialize the JSON body into the target type: {why}")


def test_an_absent_id_and_webhook_may_be_null() -> None:
    prediction = read(b'{"id": null, "webhook": null, "input": {"prompt": "x"}}', None, "new", INPUTS)
    assert (prediction.id, prediction.webhook) == ("new", None)


def test_a_filter_without_events_asks_for_none() -> None:
    body = b'{"webhook": "http://a/", "webhook_events_filter": [], "input": {"prompt": "x"}}'
    prediction = read(body, None, "new", INPUTS)
    assert prediction.events == ()
    assert "webhook" not in json.loads(prediction.body("http://relay/"))


def nested(lists: int) -> bytes:
    """A body of so many lists in each other, within two objects."""
    return b'{"input": {"prompt": "x", "more": ' + b"[" * lists + b"]" * lists + b"}}"


@pytest.mark.parametrize("lists", [126, 900, 100_000])
def test_a_body_that_is_nested_too_deeply_is_answered_as_cog_does(lists: int) -> None:
    assert refused(nested(lists)) == (400, "Failed to parse the request body as JSON: recursion limit exceeded")


def test_a_body_that_cog_reads_is_read() -> None:
    assert read(nested(125), None, "new", INPUTS).id == "new"


def test_an_id_that_no_address_can_hold_is_refused() -> None:
    status, content = refused(b'{"id": "a\\ud800", "input": {"prompt": "x"}}')
    assert (status, content.partition("JSON: ")[2]) == (400, "id: lone surrogate in hex escape")


def test_the_id_is_that_of_the_address_the_body_or_a_new_one() -> None:
    def id_of(body: dict[str, Any], address: str | None = None) -> str:
        return read(json.dumps({"input": {"prompt": "x"}, **body}).encode(), address, "new", INPUTS).id

    assert (id_of({}, "a"), id_of({"id": "b"}), id_of({})) == ("a", "b", "new")


def test_the_last_event_is_never_asked_of_the_child() -> None:
    prediction = read(b'{"input": {"prompt": "x"}, "webhook": "http://a/"}', None, "new", INPUTS)
    assert prediction.events == EVENTS
    body = json.loads(prediction.body("http://relay/"))
    assert body["webhook_events_filter"] == ["start", "output", "logs"]
    assert "webhook" not in json.loads(prediction.body(None))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"replicate_weights": "owner/name"}, {"replicate_weights": "https://replicate.com/owner/name"}),
        ({"replicate_weights": "a/b", "extra_lora": "c/d"}, {"replicate_weights": "c/d", "extra_lora": "a/b"}),
        ({"extra_lora": "a/b 0.5\nc/d"}, {"extra_lora": "c/d\na/b"}),
        ({}, {"replicate_weights": "", "extra_lora": " "}),
    ],
)
def test_equal_sets_of_loras_have_one_key(one: dict[str, str], other: dict[str, str]) -> None:
    keys = [
        read(json.dumps({"input": {"prompt": "x", **given}}).encode(), None, "n", None).key for given in (one, other)
    ]
    assert keys[0] == keys[1]


def test_other_loras_have_other_keys() -> None:
    def key(text: str) -> str:
        return read(json.dumps({"input": {"prompt": "x", "replicate_weights": text}}).encode(), None, "n", None).key

    assert len({key("a/b"), key("a/c"), key("no reference at all")}) == 3
