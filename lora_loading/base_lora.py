"""The operator's base LoRA: read once at setup, part of every image, exempt from go_fast's gain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from errors import PredictionError, SettingsError
from lora_loading.finding.services.service import LoraReference
from lora_loading.finding.store import LoraStore
from lora_loading.finding.tokens import Tokens
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import ModelShapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that every image is made with."""

    reference: LoraReference
    scale: float
    adapters: Mapping[str, LoraAdapter]
    """By model, since each has layer shapes of its own."""

    @property
    def facts(self) -> dict[str, str | float]:
        """What an image file says of it: its reference without secrets, scale, and its file's sha256."""
        digest = next(iter(self.adapters.values())).digest
        return {"reference": self.reference.label, "scale": self.scale, "sha256": digest}


def load_base_lora(store: LoraStore, shapes: Mapping[str, ModelShapes]) -> BaseLora | None:
    """Fetch the store's base LoRA and read it for each model; None where there is none.

    Args:
        store: knows its reference and scale, and fetches it with the operator's tokens.
        shapes: by model, the layer shapes that an adapter must fit.

    Raises:
        SettingsError: it cannot be fetched, or does not fit one of the models.
    """
    if store.base_lora is None:
        return None
    reference, scale = store.base_lora
    try:
        with store.open(reference, Tokens()) as file:
            adapters = {
                model: read_adapter(
                    file.path,
                    needed,
                    label=reference.label,
                    digest=file.sha256,
                    config=file.fact("adapter_config.json"),
                )
                for model, needed in shapes.items()
            }
    except PredictionError as error:
        raise SettingsError(f"FLUX_BASE_LORA: {error}") from error
    logger.info("base LoRA %s: scale %g, %s", reference.label, scale, next(iter(adapters.values())).summary)
    return BaseLora(reference, scale, adapters)
