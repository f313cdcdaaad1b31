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
    assert "`nope`" in refused(b'{"input": {"prompt": "x"}, "webhook_events_filter": ["nope"]}')[1]
    assert "must match" in refused(b'{"id": "other", "input": {"prompt": "x"}}', "mine")[1]


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
