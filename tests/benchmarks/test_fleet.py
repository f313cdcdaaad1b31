"""The fleet's benchmark: its parts here, the whole of it once in small, by hand."""

from __future__ import annotations

import subprocess
import urllib.request
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from safetensors.numpy import load

from benchmarks.fleet import CASE, Overhead, Spread, numbered_lora, report, slow_host, spread
from cluster.simulation import Outcome, predictions
from tests.paths import PROJECT


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
    assert set(loras) <= set(range(CASE.loras))


def test_in_the_default_case_routing_makes_more_of_a_difference_than_chance() -> None:
    ours, least_loaded = spread(CASE, "ours"), spread(CASE, "least-loaded")
    assert ours.mean - 2 * ours.deviation > least_loaded.mean + 2 * least_loaded.deviation


def test_the_report_has_a_row_for_each_figure() -> None:
    costs, outcomes = {"a": Overhead(1, 3)}, {"measured": Outcome(0.5, 1, 2)}
    text = report(["--load", "0.2"], costs, CASE, outcomes, Counter(hit=1, miss=1), {"ours": Spread(0.85, 0.03)})
    assert "`script/bench fleet --load 0.2`" in text
    assert "| a | 1.0 | 3.0 | 2.0 |" in text
    assert "| measured | 50 % | 1.00 | 2.00 |" in text
    assert "ours 85 ± 3 %" in text


@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path: Path) -> None:
    small = ["--replicas", "2", "--rounds", "5", "--requests", "12", "--loras", "20", "--files", "4"]
    command = [str(PROJECT / "script" / "bench"), "fleet", *small, "--output", str(tmp_path / "fleet.md")]
    subprocess.run(command, check=True, capture_output=True, timeout=3000)
    assert "| measured |" in (tmp_path / "fleet.md").read_text()
