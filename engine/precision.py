"""The two precisions: exact, the pristine weights with adapters beside them, and fast, one fp8 working copy of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.fp8 import Scheme
from engine.loading import Model, pipelines_over
from engine.working_copy import WorkingCopy, WorkingCopyAdapters
from lora_loading.applying.manager import AdapterManager, adapter_managers
from lora_loading.shapes import TRANSFORMER
from request import Mode

RESERVED_RANK = 64
"""Of all LoRAs together, for which compiled blocks of the exact models have room, and the device's memory beside them:
two of the usual ranks."""


@dataclass(frozen=True)
class Precision:
    """One of the engine's two settings: the same models and pipelines, other numbers inside."""

    models: Mapping[str, Model]
    adapters: Mapping[str, AdapterManager]
    """What each model carries; a model's pipelines share its modules."""
    lora_gain: float = 1.0
    """What the strengths of LoRAs are multiplied by."""
    release: Callable[[], None] = lambda: None
    """Give the device's memory back that the next `apply` can fill again."""


def exact_precision(models: Mapping[str, Model], reserved_rank: int = 0) -> Precision:
    """The models as they were loaded; `reserved_rank` as `adapter_managers` wants it."""
    return Precision(
        models, adapter_managers({n: m.pipelines[Mode.TXT2IMG] for n, m in models.items()}, reserved_rank), 1
    )


def fast_precision(exact: Precision, scheme: Scheme, device: torch.device, lora_gain: float) -> Precision:
    """The same models over one fp8 working copy; text encoders and VAE are shared with `exact`."""
    pristine = {name: model.pipelines[Mode.TXT2IMG].transformer for name, model in exact.models.items()}
    working_copy = WorkingCopy(pristine, scheme, device)
    models, adapters = {}, {}
    for name, model in exact.models.items():
        text = [part for part in exact.adapters[name].components.values() if part.name != TRANSFORMER]
        models[name] = Model(
            model.profile, pipelines_over(working_copy.transformers[name], model.pipelines[Mode.TXT2IMG].components)
        )
        adapters[name] = AdapterManager([WorkingCopyAdapters(name, working_copy), *text])
    return Precision(models, adapters, lora_gain, working_copy.release)
