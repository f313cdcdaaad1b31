"""A LoRA file becomes a LoraAdapter on the CPU: every tensor is applied or named, all are checked against the model.

Knows no model's weights, no network and no scale. A file passes as a whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.duplicates import without_duplicates
from lora_loading.reading.fit import sizes
from lora_loading.reading.formats.embeddings import read_embedding_key
from lora_loading.reading.header import Header, holds_only_zeros, read_header
from lora_loading.reading.keys import SortedFile, sort_file
from lora_loading.reading.layers import FileLayer, LayerUpdate, layer_updates
from lora_loading.reading.metadata import config_from, trigger_words
from lora_loading.reading.scales import Settings, layer_names, notes_on_scales, settings_of
from lora_loading.reading.tensors import load_tensors
from lora_loading.shapes import COMPONENTS, ModelShapes
from lora_loading.updates import Dora, LowRank

MAX_EMBEDDING_TOKENS = 64
"""Of all words of a file, for each text encoder; `applying.embeddings.TOKENS` is what a stack may bring."""


@dataclass(frozen=True)
class BundledEmbedding:
    """A word that stands for vectors of a text encoder."""

    word: str
    component: str
    vectors: Tensor
    """(tokens, width)"""


@dataclass(frozen=True)
class LoraAdapter:
    """One file's changes of the model, checked and complete."""

    digest: str
    """sha256 of the file; with PEFT's configuration, of that and the file's sha256."""
    format: str
    """For people: the families of its names and the kinds of its changes, as in "kohya, text encoders: LoRA"."""
    layers: tuple[LayerUpdate, ...]
    embeddings: tuple[BundledEmbedding, ...] = ()
    trigger_words: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Keys that change nothing in this model."""
    notes: tuple[str, ...] = ()
    """What the file leaves open, and what was assumed; for the log."""

    @cached_property
    def components(self) -> frozenset[str]:
        """The components of which it changes layers, or to which it brings words."""
        return frozenset([*(u.component for u in self.layers), *(e.component for e in self.embeddings)])

    @cached_property
    def ranks(self) -> tuple[int, int]:
        """The least and the greatest rank of its low-rank changes; zeros where there are none."""
        inner = (u.update.inner if isinstance(u.update, Dora) else u.update for u in self.layers)
        ranks = {update.rank for update in inner if isinstance(update, LowRank)}
        return (min(ranks), max(ranks)) if ranks else (0, 0)

    @cached_property
    def bytes(self) -> int:
        """The memory of its tensors; what several share is counted once."""
        held = chain(*(u.update.tensors() for u in self.layers), (e.vectors for e in self.embeddings))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    def count(self, component: str) -> int:
        """How many layers of a component it changes."""
        return len({u.layer for u in self.layers if u.component == component})

    @property
    def summary(self) -> str:
        """One line for the log."""
        low, high = self.ranks
        rank = f", rank {low}" + (f" to {high}" if high > low else "") if high else ""
        counts = [f"{self.count(component)} of the {component}" for component in COMPONENTS if self.count(component)]
        counts += [f"the word {e.word!r} for the {e.component}" for e in self.embeddings]
        words = f", trigger words {', '.join(self.trigger_words)}" if self.trigger_words else ""
        unused = f", left out {len(self.left_out)} tensors: {', '.join(self.left_out[:3])}" if self.left_out else ""
        notes = "".join(f"; {note}" for note in self.notes)
        layers = ", ".join(counts) or "none"
        return f"{self.format}{rank}, layers: {layers}, {self.bytes / 2**20:.1f} MB{words}{unused}{notes}"


Stack = Sequence[tuple[LoraAdapter, float]]
"""Adapters and their scales; the order does not matter."""


def read_adapter(
    path: Path,
    shapes: ModelShapes,
    *,
    label: str = "",
    digest: str | None = None,
    config: str = "",
) -> LoraAdapter:
    """Read and check a file; nothing that it says is trusted before.

    Args:
        path: a safetensors file.
        shapes: what it has to fit.
        label: the file's name in messages.
        digest: the file's sha256 where it is known; it is computed otherwise.
        config: PEFT's `adapter_config.json` beside the file, for what the file itself does not say.

    Raises:
        LoraFormatError: it is no LoRA for FLUX.1, is damaged, or does not fit this model.
    """
    try:
        header = read_header(path)
        file = sort_file(header, shapes, partial(holds_only_zeros, path, header))
        tensors = load_tensors(path, header, file.used)
        settings = settings_of(header.metadata, config_from(config))
        return _build(file, tensors, header, shapes, _digest(digest or _sha256(path), config), settings)
    except LoraFormatError as error:
        name = f' "{label}"' if label else ""
        raise LoraFormatError(f"Cannot use LoRA{name}: {error}") from error


def _digest(file: str, config: str) -> str:
    """What the adapter is told from others by: two configurations of one file are two adapters."""
    return hashlib.sha256(f"{file} {config}".encode()).hexdigest() if config else file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    file: SortedFile,
    tensors: Mapping[str, Tensor],
    header: Header,
    shapes: ModelShapes,
    digest: str,
    settings: Settings,
) -> LoraAdapter:
    layers = [
        FileLayer(
            layer.target,
            {part: tensors[key] for part, key in layer.keys.items()},
            layer_names(layer),
            settings[layer.target.component],
        )
        for layer in file.layers
    ]
    changes = [sorted_layer.changes for sorted_layer in file.layers]
    updates, duplicates = without_duplicates(
        (layer.target, [update for change in own for update in layer_updates(layer, change)])
        for layer, own in zip(layers, changes, strict=True)
    )
    notes = [*file.notes, *notes_on_scales(file, settings)]
    if duplicates:
        notes.append(f"{duplicates} layers are in the file under two names, with the same change: used once")
    return LoraAdapter(
        digest=digest,
        format=file.format,
        layers=tuple(updates),
        embeddings=_embeddings(file, tensors, shapes),
        trigger_words=trigger_words(header.metadata),
        left_out=file.left_out,
        notes=tuple(notes),
    )


def _embeddings(file: SortedFile, tensors: Mapping[str, Tensor], shapes: ModelShapes) -> tuple[BundledEmbedding, ...]:
    embeddings = tuple(_embedding(key, tensors[key], shapes) for key in file.embeddings)
    for component in COMPONENTS:
        count = sum(len(e.vectors) for e in embeddings if e.component == component)
        if count > MAX_EMBEDDING_TOKENS:
            raise LoraFormatError(
                f"its words have {count} vectors, and {MAX_EMBEDDING_TOKENS} are taken. Use another LoRA."
            )
    return embeddings


def _embedding(key: str, vectors: Tensor, shapes: ModelShapes) -> BundledEmbedding:
    read = read_embedding_key(key)
    if read is None:
        raise ValueError(key)
    word, component = read
    width = shapes.width(component)
    if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
        found = sizes(tuple(vectors.shape))
        raise LoraFormatError(
            f'"{key[:120]}" is {found}, and this model takes any number x {width}. Use a LoRA for this model.'
        )
    return BundledEmbedding(word, component, vectors)
