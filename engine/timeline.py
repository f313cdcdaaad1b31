"""A line in the log for each part of the start: how long it took, and between which seconds, as parts overlap."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Timeline:
    """Begins when it is made. Parts may be noted from several threads."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Log what happens within as one part, once it has ended well."""
        began = self.seconds
        yield
        ended = self.seconds
        logger.info("start: %s: %.1f s, from %.1f to %.1f s", name, ended - began, began, ended)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began
