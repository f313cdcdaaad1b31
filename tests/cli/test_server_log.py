"""What script/serve makes of coglet's log lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.server_log import as_json, as_text, line_of


def coglet(message: str, level: str = "INFO", target: str = "coglet::prediction", **fields: Any) -> str:
    return json.dumps({"level": level, "fields": {"message": message, **fields}, "target": target})


def text(line: str) -> str | None:
    found = line_of(line)
    return None if found is None else as_text(found)


OURS = {"source": "Stdout", "prediction_id": "abc"}
STAGE = {"time": "2026-11-28T12:00:00+00:00", "level": "info", "message": "image 0: generated", "stage": "generate"}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (coglet("Using seed: 7", **OURS), "[abc] Using seed: 7"),
        (coglet("profile tiny on cpu", target="coglet::user"), "profile tiny on cpu"),
        (coglet(json.dumps(STAGE), **OURS), "[abc] image 0: generated"),
        (coglet(" 33%|###   | 1/3", **OURS), None),
        (coglet("Starting prediction", prediction_id="abc"), None),
        (coglet("the worker crashed", "ERROR", error="signal 9"), "error: the worker crashed: signal 9"),
        (coglet("slow", "WARN"), "warning: slow"),
        ("not JSON\n", "not JSON"),
        ("", None),
    ],
)
def test_a_person_reads(line: str, shown: str | None) -> None:
    assert text(line) == shown


def test_a_stage_becomes_one_flat_object_with_its_predictions_id() -> None:
    line = line_of(coglet(json.dumps({**STAGE, "seconds": 0.5, "bytes": 3}), **OURS))
    assert line is not None
    assert json.loads(as_json(line)) == {**STAGE, "seconds": 0.5, "bytes": 3, "prediction": "abc"}


@pytest.mark.parametrize("line", [coglet("12", **OURS), coglet("[1]", **OURS), coglet('{"a": 1}', **OURS), "words"])
def test_whatever_else_comes_is_a_message(line: str) -> None:
    found = line_of(line)
    assert found is not None
    entry = json.loads(as_json(found))
    assert entry["message"] in ("12", "[1]", '{"a": 1}', "words")
    assert entry["level"] == "info"
    assert entry["time"]
