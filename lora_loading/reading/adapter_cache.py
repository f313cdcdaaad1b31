"""The parsed adapters that were used last, in host memory. Knows nothing of where their files come from."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import ModelShapes


class AdapterCache:
    """Adapters by their files' digests; the least recently used is dropped first."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_bytes: the limit for all tensors together; an adapter that is larger is read each time.
        """
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[tuple[str, ModelShapes, str], LoraAdapter] = OrderedDict()

    @property
    def bytes(self) -> int:
        """The memory of all tensors."""
        return sum(adapter.bytes for adapter in self._adapters.values())

    def get(self, path: Path, shapes: ModelShapes, digest: str, label: str = "", config: str = "") -> LoraAdapter:
        """The adapter in a file, which is read if it is not in the cache.

        Args:
            path: the file.
            shapes: what it has to fit.
            digest: the file's sha256.
            label: the file's name in messages.
            config: PEFT's `adapter_config.json` that belongs to it, empty if there is none.

        Raises:
            LoraFormatError: see `read_adapter`.
        """
        key = digest, shapes, config
        adapter = self._adapters.pop(key, None)
        adapter = adapter or read_adapter(path, shapes, label=label, digest=digest, config=config)
        self._adapters[key] = adapter
        while self._adapters and self.bytes > self._max_bytes:
            self._adapters.popitem(last=False)
        return adapter
