"""Log lines as text and as JSON, and what is never in one."""

from __future__ import annotations

import json
import logging
import sys

import cog
import pytest

from logs import Event, JsonFormatter, log_stage
from predict import Predictor
from tests.conftest import QUICK, predict_arguments
from tests.paths import DATA
from tests.services import Reply, Storage, StoredFile

LORA = (DATA / "loras" / "tok-style.safetensors").read_bytes()


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(JsonFormatter().format(record)) for record in caplog.records]


def test_a_stage_has_its_seconds_and_bytes_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_stage(logging.getLogger("x"), Event("write", 0.123456, 17, outcome="done"), "17 bytes")
    (entry,) = entries(caplog)
    assert entry.pop("time")
    assert entry == {
        "level": "info", "message": "17 bytes", "stage": "write", "seconds": 0.1235, "bytes": 17, "outcome": "done",
    }  # fmt: skip


def test_a_traceback_stays_on_one_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["exception"]


def test_a_prediction_logs_each_stage_once(
    predictor: Predictor, lora_storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    address = lora_storage.put("/logs.safetensors", StoredFile(LORA))
    predictor.predict(**predict_arguments(**QUICK, replicate_weights=address))
    found = [entry for entry in entries(caplog) if "stage" in entry]
    assert [entry["stage"] for entry in found] == [
        "inputs", "fetch_lora", "read_lora", "apply_loras", "encode_prompt", "generate", "write", "check", "prediction",
    ]  # fmt: skip
    assert all(isinstance(entry["seconds"], float) for entry in found)
    assert {entry["stage"] for entry in found if "bytes" in entry} == {"inputs", "fetch_lora", "read_lora", "write"}


@pytest.mark.parametrize("answer", [200, 403])
def test_no_line_holds_a_prompt_a_token_or_a_signed_address(
    predictor: Predictor, lora_storage: Storage, caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    caplog.set_level("INFO")
    address = lora_storage.put(f"/secret-{answer}.safetensors", StoredFile(LORA))
    if answer != 200:
        lora_storage.first.append(Reply(answer))
    given = predict_arguments(
        **{**QUICK, "prompt": "a canary7prompt"},
        replicate_weights=f"{address}?X-Amz-Signature=canary-signature",
        hf_api_token=cog.Secret("hf_canary-token"),
        civitai_api_token=cog.Secret("canary-token"),
    )
    try:
        predictor.predict(**given)
    except Exception:
        assert answer != 200
    assert lora_storage.first == []
    assert "canary" not in json.dumps(entries(caplog)) + caplog.text
