"""The dry run finds what it is there to find; and FLUX.1's real blocks compile for an H100, in both precisions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.dry_run.__main__ import run
from benchmarks.dry_run.changes import changes_table
from benchmarks.dry_run.counting import BF16, FP8, DeviceCounter, Product
from benchmarks.dry_run.device import DEVICE, H100, fake_device, fake_tensors
from benchmarks.dry_run.flux import shortened, take_step
from benchmarks.dry_run.graphs import Recorder, recording
from benchmarks.dry_run.images import images_table
from benchmarks.dry_run.memory import memory_table
from benchmarks.dry_run.rewrite import rewrite_table
from benchmarks.dry_run.steps import DECODER, compiled_graphs, graphs_table
from benchmarks.dry_run.times import Rates, seconds
from benchmarks.models import building
from benchmarks.plan import SQUARE
from benchmarks.tables import Table
from engine.compilation import INDUCTOR_OPTIONS, compile_blocks
from engine.fp8 import DYNAMIC
from engine.working_copy import WorkingCopy

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs g++")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_go_fasts_blocks_compile_for_an_h100_once() -> None:
    """Every kernel assembled, no spill, and no graph more for other sizes, models and LoRAs."""
    table = graphs_table(compiled_graphs(shortened(1, 2), ("fast",)))
    assert table.problems == []
    assert table.rows


@pytest.mark.slow
def test_the_vaes_decoder_compiles_for_an_h100_once() -> None:
    compiled = compiled_graphs(shortened(1, 1), (DECODER,))
    assert graphs_table(compiled).problems == []
    (graph,) = compiled[DECODER].graphs
    assert graph.products == 40, "its convolutions, and the attention's products"


@pytest.mark.slow
def test_exact_blocks_compile_for_an_h100_once() -> None:
    assert graphs_table(compiled_graphs(shortened(1, 2), ("exact",))).problems == []


def test_the_fault_that_ended_the_setup_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' fp8 single block, with the option of inductor that it could not be compiled with."""
    from diffusers import FluxTransformer2DModel

    monkeypatch.setitem(INDUCTOR_OPTIONS, "loop_ordering_after_fusion", True)
    recorder = Recorder()
    with fake_device(), recording(recorder), fake_tensors():
        with building(DEVICE, torch.bfloat16):
            transformer = FluxTransformer2DModel(**shortened(0, 1).transformer, guidance_embeds=True)
        copied = WorkingCopy({"dev": transformer.eval().requires_grad_(False)}, DYNAMIC, DEVICE).transformers["dev"]
        compile_blocks(copied)
        take_step(copied)
    assert "CantSplit" in recorder.graphs[0].error


def test_the_memory_plan_is_what_is_allocated_with_few_blocks() -> None:
    table = memory_table((H100,), shortened(1, 1))
    assert table.problems == []


@pytest.mark.slow
def test_the_memory_plan_is_what_is_allocated() -> None:
    table = memory_table((H100,))
    assert table.problems == []


def test_a_request_waits_and_copies_only_where_that_is_planned() -> None:
    table = images_table((SQUARE,), ("dev",), shortened(1, 1))
    assert table.problems == []
    assert len(table.rows) == 18


def test_a_change_of_loras_stays_within_its_bounds_with_few_blocks() -> None:
    table, counts = changes_table(shortened(1, 2))
    assert table.problems == []
    read_and_written = 3 * 66 * 3072**2  # bf16 and fp8 of one double and two single blocks
    assert counts["to none"].moved_bytes >= read_and_written


@pytest.mark.slow
def test_a_change_of_loras_stays_within_its_bounds() -> None:
    assert changes_table()[0].problems == []


def test_the_kernel_of_lora_changes_spills_no_register_on_an_h100() -> None:
    assert rewrite_table((3072,), ("bf16",)).problems == []


def test_modelled_seconds_are_those_worked_out_by_hand() -> None:
    rates = Rates(fp8=10, bf16=5, attention=2, convolution=1, bytes=4, launch_seconds=0.5, upload_bytes=1)
    products = {Product(FP8, 20.0, 4): 2, Product(BF16, 5.0, 40): 1}
    assert seconds(3, 8, products, rates) == 2 * 2 + 10 + 2 + 1.5


# The counting


def test_counts_are_those_of_a_sum_worked_out_by_hand() -> None:
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        left, right = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((32, 64), (64, 16)))
        counts = counter.restart()
        total = (left @ right).relu().cpu().sum()
        assert float(total) == 0.5
    assert counts.kernels == 2
    assert counts.flop == 2 * 32 * 64 * 16
    assert counts.elementwise_bytes == 2 * 2 * 32 * 16
    assert counts.peak_bytes == 2 * (32 * 64 + 64 * 16) + 2 * 2 * 32 * 16
    assert (sum(counts.copies.values()), counts.copied_bytes) == (1, 2 * 32 * 16)
    assert not counts.syncs, "the sum was asked of the host"


def test_a_value_asked_of_the_device_is_a_wait_of_its_caller() -> None:
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        torch.zeros(3, device=DEVICE).sum().item()
    (caller,) = counter.counts.syncs
    assert caller == "benchmarks/test_dry_run.py:test_a_value_asked_of_the_device_is_a_wait_of_its_caller"


def test_memory_that_is_freed_or_resized_away_is_no_longer_counted() -> None:
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        kept, gone = torch.empty(100, device=DEVICE), torch.empty(50, device=DEVICE)
        assert counter.live_bytes == 600
        del gone
        assert counter.live_bytes == 400
        kept.untyped_storage().resize_(0)
        assert (counter.live_bytes, counter.most_bytes) == (0, 600)


def test_a_figure_beyond_its_bound_fails_the_run(tmp_path: Path) -> None:
    lines: list[str] = []
    good, bad = Table("Good", ("a",), [(1,)]), Table("Bad", ("a",), [(2,)])
    bad.require(False, "2 is more than 1")
    assert run(iter([good]), tmp_path / "report.md", lines.append) == 0
    assert run(iter([good, bad]), tmp_path / "report.md", lines.append) == 1
    assert "PROBLEM  Bad: 2 is more than 1" in lines
    assert "| 2 |" in (tmp_path / "report.md").read_text()


def test_torch_is_itself_again_afterwards() -> None:
    generator, available = torch.Generator, torch.cuda.is_available()
    with fake_device():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() is available
    assert torch.Generator is generator
