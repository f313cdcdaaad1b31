"""The services that LoRAs come from: a file and a row each."""

from __future__ import annotations

from typing import Any

from lora_loading.finding.services import civitai, data, hugging_face, replicate, url
from lora_loading.finding.services.service import LoraReference, Service

SERVICES: tuple[Service[Any], ...] = (
    replicate.SERVICE,
    hugging_face.SERVICE,
    civitai.SERVICE,
    url.SERVICE,
    data.SERVICE,
)


def service_of(reference: LoraReference) -> Service[Any]:
    """The service that a reference belongs to."""
    return next(service for service in SERVICES if isinstance(reference, service.reference))
