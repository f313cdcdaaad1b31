"""From settings to an engine that is ready, compiled where that is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx

from engine.profiles import model_profiles
from engine.start import start_engine
from settings import Settings
from tests.conftest import QUICK, request_of

CPU = torch.device("cpu")


def test_an_engine_serves_both_models_in_both_precisions() -> None:
    engine = start_engine(model_profiles("tiny", Settings()), Settings(go_fast_lora_gain=2.0), CPU)
    assert engine.fast is not None
    assert (engine.exact.lora_gain, engine.fast.lora_gain) == (1.0, 2.0)
    assert engine.exact.models.keys() == engine.fast.models.keys() == {"dev", "schnell"}


@pytest.mark.slow
def test_a_compiled_engine_keeps_its_graphs_and_draws_nearly_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real compiler, so it takes minutes; a second start in this process finds the file."""
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
