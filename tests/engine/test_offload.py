"""Modules visit a device and are the very ones from before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.offload import moved_to_device
from lora_loading.applying.manager import ComponentAdapters
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.shapes import TRANSFORMER, shapes_of
from tests.lora_files import adapter_of
from tests.tiny_models import narrow_transformer, weights_hash

AWAY = torch.device("meta")
"""Another device than the CPU, which every machine has."""


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("inference", [False, True])
def test_everything_is_on_the_device_within_and_at_home_afterwards(inference: bool) -> None:
    model = narrow_transformer()
    adapter: LoraAdapter = adapter_of(shapes_of({TRANSFORMER: model}))
    ComponentAdapters(TRANSFORMER, model).apply([(adapter, 1.0)])  # its factors visit too
    before, homes = weights_hash({"t": model}), [tensor.data_ptr() for tensor in tensors(model)]
    with torch.inference_mode(inference), moved_to_device([model], AWAY):
        assert {tensor.device for tensor in tensors(model)} == {AWAY}
    assert [tensor.data_ptr() for tensor in tensors(model)] == homes
    assert weights_hash({"t": model}) == before


def test_who_is_there_already_stays_untouched() -> None:
    model = narrow_transformer()
    homes = [tensor.data_ptr() for tensor in tensors(model)]
    with moved_to_device([model], torch.device("cpu")):
        assert [tensor.data_ptr() for tensor in tensors(model)] == homes


def test_an_exception_brings_them_home() -> None:
    model = narrow_transformer()
    with pytest.raises(KeyboardInterrupt), moved_to_device([model], AWAY):
        raise KeyboardInterrupt
    assert {tensor.device for tensor in tensors(model)} == {torch.device("cpu")}
