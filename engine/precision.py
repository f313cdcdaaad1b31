"""The two precisions: exact (original weights, adapters beside them) and fast (fp8 working copy, adapters merged)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.fp8 import Rewrite, Scheme
from engine.loading import Model, pipelines_over
from engine.working_copy import WorkingCopy, WorkingCopyAdapters
from lora_loading.applying.manager import AdapterManager, adapter_managers
from lora_loading.shapes import TRANSFORMER
from request import Mode

RESERVED_RANK = 64
"""The total LoRA rank that compiled exact blocks and the memory plan reserve: two LoRAs of the usual ranks. Stacks of a
higher rank work, and compile a graph more."""


@dataclass(frozen=True)
class Precision:
    """One setting of the engine: models and pipelines whose transformers hold their weights in one precision."""

    models: Mapping[str, Model]
    adapters: Mapping[str, AdapterManager]
    """The adapter manager of each model; a model's pipelines share its modules."""
    lora_gain: float = 1.0
    """The factor that the scales of LoRAs are multiplied by."""
    release: Callable[[], None] = lambda: None
    """Free the device memory that the next `apply` can fill again."""


def exact_precision(models: Mapping[str, Model], reserved_rank: int = 0) -> Precision:
    """The models as they were loaded; see `adapter_managers` for `reserved_rank`."""
    return Precision(
        models, adapter_managers({n: m.pipelines[Mode.TXT2IMG] for n, m in models.items()}, reserved_rank), 1
    )


def fast_precision(
    exact: Precision, scheme: Scheme, device: torch.device, lora_gain: float, rewrite: Rewrite | None = None
) -> Precision:
    """The same models over one fp8 working copy; text encoders, their adapters and the VAE are shared with `exact`.

    For `rewrite` see `fp8.choose_rewrite`.
    """
    pristine = {name: model.pipelines[Mode.TXT2IMG].transformer for name, model in exact.models.items()}
    working_copy = WorkingCopy(pristine, scheme, device, rewrite)
    models, adapters = {}, {}
    for name, model in exact.models.items():
        text = [part for part in exact.adapters[name].components.values() if part.name != TRANSFORMER]
        models[name] = Model(
            model.profile, pipelines_over(working_copy.lean[name], model.pipelines[Mode.TXT2IMG].components)
        )
        adapters[name] = AdapterManager([WorkingCopyAdapters(name, working_copy), *text])
    return Precision(models, adapters, lora_gain, working_copy.release)
