"""`script/bench gpu`: its formulas against published figures and torch's own counts, and the whole of it in small."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import quantize_
from transformers import CLIPTokenizer

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.contenders import fp8_scheme
from benchmarks.gpu.floor import AttentionRate, Floor, ProductRate, step_flop, step_products, tokens_of
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.models import Weights, build_weights, building, clip_of, t5_of, twin, vae_of
from benchmarks.gpu.plan import COMPILED, EAGER, Budget, Case, Stage, stages
from benchmarks.gpu.rows import digest, percentile
from benchmarks.gpu.run import run
from benchmarks.gpu.scales import FULL, TINY
from engine.profiles import TINY as TINY_MODELS
from lora_loading.shapes import COMPONENTS, TRANSFORMER, shapes_of
from tests.paths import PROJECT

CPU = torch.device("cpu")


# Formulas


@pytest.mark.parametrize(
    ("model", "width", "height", "published"),
    [("dev", 1024, 1024, 74.4), ("schnell", 1024, 1024, 69.5), ("dev", 512, 512, 21.5), ("dev", 1440, 1440, 163)],
)
def test_the_work_of_a_step_is_the_published_one(model: str, width: int, height: int, published: float) -> None:
    assert step_flop(FULL, tokens_of(FULL, model, width, height)) / 1e12 == pytest.approx(published, rel=0.003)


def test_the_work_of_a_step_is_what_torch_counts() -> None:
    """But for the embedders and the modulations, which are left out."""
    image, text = tokens_of(FULL, "dev", 1216, 832)
    with building(torch.device("meta"), torch.bfloat16), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer = FluxTransformer2DModel(**FULL.transformer, guidance_embeds=True)
        transformer(
            hidden_states=torch.empty(1, image, FULL.transformer["in_channels"]),
            encoder_hidden_states=torch.empty(1, text, FULL.transformer["joint_attention_dim"]),
            pooled_projections=torch.empty(1, FULL.transformer["pooled_projection_dim"]),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            img_ids=torch.empty(image, 3),
            txt_ids=torch.empty(text, 3),
        )
    assert step_flop(FULL, (image, text)) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_full_models_are_as_large_as_flux() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TINY_MODELS / "tiny-dev", subfolder="tokenizer")
    with building(torch.device("meta"), torch.bfloat16):
        parts: dict[str, nn.Module] = {
            "transformer": FluxTransformer2DModel(**FULL.transformer, guidance_embeds=True),
            "t5": t5_of(FULL),
            "clip": clip_of(FULL, tokenizer),
            "vae": vae_of(FULL),
        }
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6) for name, part in parts.items()}
    assert millions == {"transformer": 11901, "t5": 4762, "clip": 123, "vae": 84}
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}


def test_the_floor_of_a_step_is_its_work_at_the_measured_rates() -> None:
    """At one rate for all products it is their work over that rate, and nearer shapes count where rates differ."""
    sides = {(shape.k, shape.n) for shape in step_products(FULL, 4096, 512)}

    def floor(large: float, small: float) -> Floor:
        rates = {4608: large, 4096: large, 512: small}
        products = [ProductRate(m, k, n, "exact", 1.0, rate) for k, n in sides for m, rate in rates.items()]
        return Floor(tuple(products), (AttentionRate(24, 4608, 128, "FLASH", 1.0, 600.0),), 3000.0)

    attention = 14.87 / 600
    assert floor(800, 800).step_seconds(FULL, (4096, 512), "exact") == pytest.approx(59.5 / 800 + attention, rel=0.002)
    prompt = sum(shape.flop for shape in step_products(FULL, 4096, 512) if shape.m == 512) / 1e12
    slower = floor(800, 400).step_seconds(FULL, (4096, 512), "exact")
    assert slower == pytest.approx((59.5 + prompt) / 800 + attention, rel=0.002)
    assert floor(800, 400).step_seconds(FULL, (4096, 512), "fp8") == slower, "no fp8 rates: the exact ones"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(20, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile([3.0], 0.95)) == (10.0, 19.0, 3.0)


def test_a_stage_gets_its_part_and_what_the_others_left() -> None:
    first, second, third = (Stage(name, part, ()) for name, part in (("a", 5), ("b", 3), ("c", 2)))
    budget = Budget(1000)
    start = budget.deadline(third, []) - 1000
    assert budget.deadline(first, [second, third]) - start == pytest.approx(500, abs=5)
    assert budget.deadline(second, [third]) - start == pytest.approx(600, abs=5)


# Models


@pytest.fixture(scope="module")
def weights() -> Weights:
    return build_weights(TINY, CPU)


def test_random_weights_hold_no_zeros(weights: Weights) -> None:
    modules = [*weights.transformers.values(), *(weights.shared[n] for n in ("vae", "text_encoder", "text_encoder_2"))]
    for module in modules:
        for name, parameter in module.named_parameters():
            assert torch.count_nonzero(parameter) == parameter.numel(), name


def test_a_twin_shares_its_weights_and_leaves_the_original_alone(weights: Weights) -> None:
    original = weights.transformers["dev"]
    before = digest(original)
    other = twin(original)
    assert {id(p) for p in other.parameters()} == {id(p) for p in original.parameters()}
    assert digest(other) == before
    quantize_(other, fp8_scheme(CPU).config)
    assert digest(other) != before
    assert digest(original) == before


def test_one_changed_bit_changes_the_digest() -> None:
    layer = nn.Linear(3, 5)
    before = digest(layer)
    layer.weight.data.view(torch.int32)[4, 2] ^= 1
    assert digest(layer) != before
    layer.weight.data.view(torch.int32)[4, 2] ^= 1
    assert digest(layer) == before


def test_both_sides_read_the_same_lora(weights: Weights, tmp_path: Path) -> None:
    transformer = weights.transformers["dev"]
    modules = {"transformer": transformer, **weights.shared}
    loras = Loras(tmp_path, transformer, shapes_of({name: modules[name] for name in COMPONENTS}))
    theirs = loras.state_dict(4, 0)
    ours = {layer.layer: layer.update for layer in loras.adapter(4, 0).layers}
    linear = {n for n, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and "blocks." in n}
    assert ours.keys() == linear
    assert loras.adapter(4, 0).count(TRANSFORMER) == len(linear) == len(theirs) / 2
    for name, update in ours.items():
        a, b = update.tensors()
        assert torch.equal(a, theirs[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(b, theirs[f"transformer.{name}.lora_B.weight"])
    assert loras.adapter(4, 0).digest != loras.adapter(4, 1).digest


# The command


def committed() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (PROJECT / "benchmarks").glob("gpu.*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `script/bench gpu --tiny` writes on a CPU."""
    before = committed()
    output = tmp_path_factory.mktemp("bench")
    command = [str(PROJECT / "script" / "bench"), "gpu", "--tiny", "--minutes", "60", "--output", str(output)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (output / "gpu.md").read_text() in done.stdout
    assert committed() == before
    yield output


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return data


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["status"] == "measured"]


def test_the_report_has_every_row_of_the_plan(report: dict[str, Any]) -> None:
    """cache-dit's too, where it is not installed."""
    jobs = [job for stage in stages(TINY) for job in stage.jobs]
    planned = [(job.contender, job.model, job.width, job.height, job.loras, job.rank) for job in jobs if isinstance(job, Case)]  # noqa: E501 # fmt: skip
    found = [tuple(r[k] for k in ("contender", "model", "width", "height", "loras", "rank")) for r in report["rows"]]
    assert found == planned
    assert len(report["changes"]) == len(jobs) - len(planned)
    for row in report["rows"] + report["changes"]:
        allowed = {"measured", "not installed"} if row["contender"] == "cache-dit" else {"measured"}
        assert row["status"] in allowed, row


def test_all_figures_are_finite_and_positive(report: dict[str, Any]) -> None:
    may_be_none = {"loras", "rank", "rest_seconds", "compile_seconds", "compilations", "recompilations", "whole"}
    for row in measured(report):
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        assert len(numbers) == 21
        for name, value in numbers.items():
            assert math.isfinite(value) and (value > 0 or name in may_be_none), (row, name)
    rates = report["floor"]["products"] + report["floor"]["attention"]
    assert all(rate[key] > 0 for rate in rates for key in ("milliseconds", "tflops"))
    assert report["floor"]["copy_gb_per_second"] > 0
    swaps = [row for row in report["changes"] if row["what"] != "unload LoRA"]
    assert all(0 < row["p50_milliseconds"] <= row["p95_milliseconds"] for row in swaps)


def test_shares_and_rates_follow_from_their_parts(report: dict[str, Any]) -> None:
    floor = Floor(
        tuple(ProductRate(**rate) for rate in report["floor"]["products"]),
        tuple(AttentionRate(**rate) for rate in report["floor"]["attention"]),
        report["floor"]["copy_gb_per_second"],
    )
    for row in measured(report):
        tokens = tokens_of(TINY, row["model"], row["width"], row["height"])
        arithmetic = "fp8" if row["contender"] in ("ours, fast", "diffusers fp8, hotswap") else "exact"
        step = row["milliseconds_a_step"]
        assert row["floor_milliseconds"] == pytest.approx(floor.step_seconds(TINY, tokens, arithmetic) * 1e3)
        assert row["share_of_floor"] == pytest.approx(row["floor_milliseconds"] / step)
        assert row["tflops"] == pytest.approx(step_flop(TINY, tokens) / step / 1e9)


def test_the_parts_make_up_the_end_to_end_time(report: dict[str, Any]) -> None:
    for row in measured(report):
        parts = ("text_seconds", "denoise_seconds", "decode_seconds", "encode_seconds", "rest_seconds")
        assert row["end_to_end_seconds"] == pytest.approx(sum(row[part] for part in parts))
        assert row["denoise_seconds"] == pytest.approx(row["steps"] * row["milliseconds_a_step"] / 1e3)
        assert row["steps"] == TINY.steps[row["model"]]
        assert row["end_to_end"] == ("measured" if row["whole"] else f"computed from {TINY.few_steps} steps")


def test_compilations_are_counted_where_there_are_any(report: dict[str, Any]) -> None:
    first = {row["contender"]: row for row in reversed(measured(report))}
    assert first[COMPILED]["compilations"] == 2, "one for each kind of block"
    assert first[COMPILED]["compile_seconds"] > 0
    assert first[EAGER]["compilations"] == 0
    assert not any(row["recompilations"] for row in measured(report))


def test_a_lora_leaves_nothing_behind(report: dict[str, Any]) -> None:
    unloaded = [row for row in report["changes"] if row["what"] == "unload LoRA"]
    assert [row["contender"] for row in unloaded] == ["ours, fast", "ours, exact"]
    assert all(row["bit_equal_weights"] and row["bit_equal_image"] for row in unloaded)


def test_the_markdown_shows_the_same_rows(folder: Path, report: dict[str, Any]) -> None:
    text = (folder / "gpu.md").read_text()
    for row in measured(report):
        stack = f"{row['loras']} of rank {row['rank']}" if row["loras"] else "none"
        start = f"| {row['contender']} | {row['model']} | {row['width']}x{row['height']} | {stack} | "
        lines = [line for line in text.splitlines() if line.startswith(start)]
        assert len(lines) == 1
        assert f"| {row['share_of_floor']:.2f} | {row['end_to_end_seconds']:.3f}" in lines[0]
    assert report["machine"]["torch"] in text
    assert text.count("equal to the bit") == 4


def test_without_time_all_rows_are_listed_as_not_run(tmp_path: Path) -> None:
    run(TINY, stages(TINY), CPU, 0, tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["status"] for row in report["rows"] + report["changes"]} == {"not run"}
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("not run") == len(report["rows"]) + len(report["changes"])


def test_a_contender_that_fails_leaves_the_others_their_rows(tmp_path: Path) -> None:
    scale = replace(TINY, compiler="no such compiler", gemm_repeats=1)
    plan = [Stage(name, 1, (Case(name, "dev", 64, 48, 0, 0, whole=False),)) for name in (COMPILED, EAGER)]
    run(scale, plan, CPU, 60, tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["failed", "measured"]
    assert "no such compiler" in report["rows"][0]["reason"]
    assert "no such compiler" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_the_trial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="--tiny"):
        main()
