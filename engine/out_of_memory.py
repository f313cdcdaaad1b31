"""Handle a lack of device memory: free what can be freed, try once more, then raise an error for the user.

Knows no models. What is placed where is decided by `engine.memory_plan`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from errors import ModelError
from request import Size

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retry_on_oom(make: Callable[[], T], size: Size) -> T:
    """Call `make`; if the device runs out of memory, free memory and call it once more.

    Args:
        make: generates one image with its own random generator, so that a second call gives the same result.
        size: the image's size, for the error message.

    Raises:
        ModelError: the second call ran out of memory too; everything that both calls held is freed.
    """
    try:
        return make()
    except torch.OutOfMemoryError as error:
        logger.warning("out of device memory, trying once more: %s", _first_line(error))
    free_memory()  # outside `except`: a handled exception keeps its frames, and so their tensors, alive
    try:
        return make()
    except torch.OutOfMemoryError as error:
        logger.error("out of device memory again: %s", _first_line(error))
    free_memory()
    raise ModelError(
        f"Cannot make an image of {size.width}x{size.height} pixels: the server's device ran out of memory, twice. "
        "Ask for a smaller image or for fewer or smaller LoRAs, or try again later."
    )


def free_memory() -> None:
    """Collect unreachable objects, then return the unused blocks of CUDA's allocator to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
