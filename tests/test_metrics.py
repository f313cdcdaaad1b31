"""What the metrics count, read over HTTP as Prometheus reads them."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import LoraAccessError, SettingsError, UnsafeOutputError
from metrics import Metrics, serve_metrics
from predict import Predictor
from safety.checker import Verdict
from tests.conftest import QUICK, predict_arguments
from tests.paths import DATA
from tests.services import Reply, Storage, StoredFile

LORA = (DATA / "loras" / "tok-style.safetensors").read_bytes()
Read = Callable[[str], float]


@pytest.fixture
def read() -> Iterator[Read]:
    """Reads one value of metrics that count from now on."""
    metrics = Metrics()
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(metrics)
    server = serve_metrics(metrics, ("127.0.0.1", 0))

    def value(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)

    yield value
    server.shutdown()
    server.server_close()
    root.removeHandler(metrics)
    root.setLevel(level)


def predict(predictor: Predictor, **given: Any) -> list[Path]:
    return [Path(file) for file in predictor.predict(**predict_arguments(**{**QUICK, **given}))]


def test_a_prediction_counts_its_images_stages_and_bytes(predictor: Predictor, read: Read) -> None:
    files = predict(predictor, num_outputs=2)
    assert read('flux_predictions_total{outcome="succeeded"}') == 1
    assert read("flux_images_total") == 2
    assert read('flux_stage_bytes_total{stage="write"}') == sum(file.stat().st_size for file in files)
    for stage, times in {
        "inputs": 1,
        "encode_prompt": 1,
        "generate": 2,
        "check": 1,
        "write": 2,
        "prediction": 1,
    }.items():
        assert read(f'flux_stage_seconds_count{{stage="{stage}"}}') == times
    stages = sum(read(f'flux_stage_seconds_sum{{stage="{stage}"}}') for stage in ("inputs", "generate", "check"))
    assert 0 < stages < 2 * read('flux_stage_seconds_sum{stage="prediction"}')


def test_loras_count_hits_misses_bytes_and_swaps(predictor: Predictor, lora_storage: Storage, read: Read) -> None:
    address = lora_storage.put("/metrics.safetensors", StoredFile(LORA, '"1"'))
    predict(predictor, replicate_weights=address)
    predict(predictor, replicate_weights=address)
    predict(predictor)
    assert read('flux_lora_cache_total{outcome="miss"}') == 1
    assert read('flux_lora_cache_total{outcome="hit"}') == 1
    assert read("flux_lora_fetched_bytes_total") == len(LORA)
    assert read("flux_lora_swaps_total") == 2
    assert read('flux_stage_seconds_count{stage="read_lora"}') == 2


def test_a_failure_counts_as_one_and_leaves_its_kind(predictor: Predictor, lora_storage: Storage, read: Read) -> None:
    lora_storage.first.append(Reply(403))
    with pytest.raises(LoraAccessError):
        predict(predictor, replicate_weights=f"{lora_storage.address}/refused.safetensors?signature=canary")
    assert read('flux_predictions_total{outcome="failed"}') == 1
    assert read('flux_last_error_time_seconds{kind="LoraAccessError"}') > 1.7e9
    assert read("flux_images_total") == 0


def test_a_withheld_image_counts_as_one(predictor: Predictor, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        predictor.checker._detector, "check", lambda images: [Verdict(True, (), "flagged")] * len(images)
    )
    with pytest.raises(UnsafeOutputError):
        predict(predictor)
    assert read("flux_images_withheld_total") == 1
    assert read('flux_predictions_total{outcome="withheld"}') == 1


def test_a_cancellation_counts_as_one(predictor: Predictor, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor.engine, "generate", cancel)
    with pytest.raises(KeyboardInterrupt):
        predict(predictor)
    assert read('flux_predictions_total{outcome="cancelled"}') == 1


def test_memory_and_open_files_of_the_process_are_there(read: Read) -> None:
    assert read("process_resident_memory_bytes") > 1e7
    assert read("process_open_fds") > 3


def test_a_port_in_use_names_the_setting() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SettingsError, match="FLUX_METRICS_PORT asks for"),
    ):
        serve_metrics(Metrics(), ("127.0.0.1", taken.getsockname()[1]))
