"""What happens when the device's memory does not suffice: free what is held for nothing, once more, then say so.

Knows no models. A plan of what lives where is `engine.memory_plan`'s.
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
    """What `make` returns; where the device's memory does not suffice for it, memory is freed and it is called again.

    Args:
        make: makes one image, and can be called again: it draws from a generator of its own.
        size: the image's, for the error.

    Raises:
        ModelError: it does not suffice the second time either; everything that the tries held is freed by then.
    """
    try:
        return make()
    except torch.OutOfMemoryError as error:
        logger.warning("the device's memory did not suffice, trying once more: %s", _first_line(error))
    free_memory()  # not above: an exception that is being handled keeps the frames, and with them the tensors, alive
    try:
        return make()
    except torch.OutOfMemoryError as error:
        logger.error("the device's memory did not suffice again: %s", _first_line(error))
    free_memory()
    raise ModelError(
        f"An image of {size.width}x{size.height} was asked for; the memory of this server's device does not suffice. "
        "Ask for a smaller image, fewer or smaller LoRAs, or try again later."
    )


def free_memory() -> None:
    """Give back what nothing refers to any more: cycles first, then the blocks that CUDA's allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
