"""The secrets that a caller may use. Imported by whoever passes them on; knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tokens:
    """What the caller may use, by service; never shown."""

    hugging_face: str | None = field(default=None, repr=False)
    civitai: str | None = field(default=None, repr=False)
    replicate: str | None = field(default=None, repr=False)
