"""The fleet's benchmark: its parts here, the whole of it once in small, by hand."""

from __future__ import annotations

import subprocess
import urllib.request
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from safetensors.numpy import load

from benchmarks.fleet import Overhead, numbered_lora, report, slow_host
from cluster.simulation import Case, Outcome, predictions, simulate
from cluster.simulation import policies as policies_of
from tests.paths import PROJECT

CASE = Case(replicas=4, files=20, fetch_seconds=1.0, load=0.1, loras=200, image_seconds=0.1, swap_seconds=0.0)


def test_each_numbered_lora_is_another_file_with_the_same_tensors() -> None:
    one, other = numbered_lora(1), numbered_lora(2)
    assert one != other
    assert load(one).keys() == load(other).keys()
    with slow_host(0.0) as host, urllib.request.urlopen(f"http://{host}/2.safetensors") as answer:
        assert answer.read() == other


def test_what_is_sent_is_what_the_simulation_draws() -> None:
    def drawn(seed: int) -> list[tuple[float, int]]:
        return list(islice(zip(*predictions(CASE, seed), strict=True), 300))

    assert drawn(0) == drawn(0) != drawn(1)
    times, loras = zip(*drawn(0), strict=True)
    assert list(times) == sorted(times)
    assert 300 / times[-1] == pytest.approx(0.1 * 4 / 0.1, rel=0.2)
    assert set(loras) <= set(range(200))


def test_the_default_case_is_one_that_routing_makes_a_difference_to() -> None:
    found = {name: simulate(CASE, policy) for name, policy in policies_of(CASE).items()}
    assert found["ours"].hits > found["least-loaded"].hits


def test_the_report_has_a_row_for_each_figure() -> None:
    text = report({"a": Overhead(1, 3)}, CASE, {"measured": Outcome(0.5, 1, 2)}, Counter(hit=1, miss=1))
    assert "| a | 1.0 | 3.0 | 2.0 |" in text
    assert "| measured | 50 % | 1.00 | 2.00 |" in text


@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path: Path) -> None:
    small = ["--replicas", "2", "--rounds", "5", "--requests", "12", "--loras", "20", "--files", "4"]
    command = [str(PROJECT / "script" / "bench"), "fleet", *small, "--output", str(tmp_path / "fleet.md")]
    subprocess.run(command, check=True, capture_output=True, timeout=3000)
    assert "| measured |" in (tmp_path / "fleet.md").read_text()
