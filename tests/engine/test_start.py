"""From settings to an engine that is ready, compiled where that is asked for."""

from __future__ import annotations

import gc
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from diffusers import FluxTransformer2DModel

from engine.loading import load_models
from engine.profiles import model_profiles
from engine.start import start_engine
from request import Mode
from settings import Settings
from tests.conftest import QUICK, request_of
from tests.tiny_models import weights_hash

CPU = torch.device("cpu")


def test_an_engine_serves_both_models_in_both_precisions() -> None:
    engine = start_engine(model_profiles("tiny", Settings()), Settings(go_fast_lora_gain=2.0), CPU)
    assert engine.fast is not None
    assert (engine.exact.lora_gain, engine.fast.lora_gain) == (1.0, 2.0)
    assert engine.exact.models.keys() == engine.fast.models.keys() == {"dev", "schnell"}


def test_transformers_are_those_that_diffusers_loads(tmp_path: Path) -> None:
    """From one file or from shards, to the bit, and in the order of the profiles."""
    profiles = model_profiles("tiny", Settings())
    theirs = FluxTransformer2DModel.from_pretrained(profiles[0].source, subfolder="transformer")
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    shutil.copytree(Path(profiles[0].source) / "scheduler", tmp_path / "scheduler")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    sharded = replace(profiles[0], name="sharded", source=str(tmp_path), shared_source=profiles[0].shared_source)
    models = load_models((*profiles, sharded), CPU)
    assert list(models) == ["dev", "schnell", "sharded"]
    ours = {name: model.pipelines[Mode.TXT2IMG].transformer for name, model in models.items()}
    expected = weights_hash({"t": theirs})
    assert [weights_hash({"t": ours[name]}) for name in ("dev", "sharded")] == [expected] * 2
    assert weights_hash({"t": ours["schnell"]}) != expected
    parameters = [parameter for module in ours.values() for parameter in module.parameters()]
    assert {(p.dtype, p.device, p.requires_grad) for p in parameters} == {(torch.float32, CPU, False)}


def test_what_is_done_meanwhile_has_the_shared_parts_and_may_fail() -> None:
    seen: list[set[str]] = []

    def meanwhile(shared: Mapping[str, Any]) -> None:
        seen.append(set(shared))
        raise ValueError("it failed")

    with pytest.raises(ValueError, match="it failed"):
        load_models(model_profiles("tiny", Settings()), CPU, meanwhile=meanwhile)
    assert seen == [{"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}]


def test_the_log_has_a_line_for_each_part_of_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        start_engine(model_profiles("tiny", Settings()), Settings(), CPU)
    lines = [line for record in caplog.records if (line := record.getMessage()).startswith("start: ")]
    parts = {line.split(": ")[1] for line in lines}
    assert parts == {
        "VAE", "text encoder CLIP", "text encoder T5", "tokenizers",
        "transformer dev", "transformer schnell", "fp8 copy",
    }  # fmt: skip
    assert all(re.fullmatch(r"start: .+: \d+\.\d s, from \d+\.\d to \d+\.\d s", line) for line in lines)


@pytest.mark.slow
def test_what_is_compiled_while_weights_are_read_serves_the_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs made for three blocks of zeros, which are gone by then, are the real models' too: none is made later."""
    graphs: list[bool] = []

    def compile_fx(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(is_ahead())
        return graph.forward

    def is_ahead() -> bool:
        return not any("start: compilation" in record.getMessage() for record in caplog.records)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO):
        engine = start_engine(model_profiles("tiny", Settings()), Settings(compile="on", cache_dir=tmp_path), CPU)
    assert "afterwards" not in caplog.text
    gc.collect()
    large = {**QUICK, "width": 336}  # torch's convolutions on a CPU differ for maps of less, and so do graphs
    for inputs in ({}, {"go_fast": True}, {"model": "schnell"}, {"height": 352}):
        list(engine.generate(request_of(**{**large, **inputs})))
    assert len(graphs) == 3 + 2 + 5 + 1, "exact blocks, with LoRAs, go_fast's, and the decoder"
    assert all(graphs), f"{graphs.count(False)} of {len(graphs)} graphs were made after the weights were there"


@pytest.mark.slow
def test_a_compiled_engine_keeps_its_graphs_and_draws_nearly_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real compiler, so it takes minutes; a second start in this process finds the file."""
    torch._dynamo.reset()  # what other tests compiled would be found in this process's memory, and nothing be kept
    profiles = model_profiles("tiny", Settings())
    settings = Settings(compile="on", cache_dir=tmp_path, graphs_dir=tmp_path / "volume")
    plain, compiled = start_engine(profiles, Settings(), CPU), start_engine(profiles, settings, CPU)
    for model in ("dev", "schnell"):
        request = request_of(**QUICK, model=model)
        images = [next(engine.generate(request)).convert("RGB").tobytes() for engine in (plain, compiled)]
        assert max(abs(a - b) for a, b in zip(*images, strict=True)) <= 8
    assert len(list((tmp_path / "volume").glob("*.graphs"))) == 1
    with caplog.at_level(logging.INFO):
        start_engine(profiles, settings, CPU)
    assert "MB loaded in" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_machine_that_cannot_compile_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    """Without a working compiler, and where a kernel fails at its first call."""

    def failing(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda *_, **__: failing if late else failing())
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING):
        engine = start_engine(
            model_profiles("tiny", Settings()), Settings(compile="on", cache_dir=tmp_path), torch.device("cpu")
        )
    lines = [record.getMessage() for record in caplog.records if "no kernel image" in record.getMessage()]
    assert lines
    assert all("uncompiled and slower" in line for line in lines)
    assert next(engine.generate(request_of(**QUICK, go_fast=True)))
