"""A LoRA file -> a LoraAdapter on the CPU: every tensor applied or named, all checked against the model's shapes.

Knows no model's weights, no network and no strength. A file passes as a whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.formats import locate
from lora_loading.reading.formats.embeddings import read_embedding_key
from lora_loading.reading.formats.not_flux import left_out, other_kind
from lora_loading.reading.formats.spelling import Key, read_key
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.layers import FileLayer, LayerUpdate, layer_updates
from lora_loading.reading.metadata import peft_settings, trigger_words
from lora_loading.shapes import COMPONENTS, ModelShapes
from lora_loading.updates import Dora, LowRank

KEPT_AS = {
    torch.float8_e4m3fn: torch.bfloat16,  # which holds all of its numbers
    torch.float8_e5m2: torch.bfloat16,
    torch.float64: torch.float32,  # no model works in float64; too large a number becomes infinite, and is refused
}
USED = (torch.float32, torch.float16, torch.bfloat16)
MAX_EMBEDDING_TOKENS = 64
"""Of all of a file's words, for each text encoder; two adapters stay within `words.TOKENS`."""


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
    """sha256 of the file."""
    format: str
    """For people: the families of its names and the kinds of its changes, as in "kohya, text encoders: LoRA"."""
    layers: tuple[LayerUpdate, ...]
    embeddings: tuple[BundledEmbedding, ...] = ()
    trigger_words: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Keys that mean nothing in this model and are harmless."""

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
        """What its tensors take, those that several layers share counted once."""
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
        return f"{self.format}{rank}, layers: {', '.join(counts) or 'none'}, {self.bytes / 2**20:.1f} MB{words}{unused}"


def read_adapter(path: Path, shapes: ModelShapes, *, label: str = "", digest: str | None = None) -> LoraAdapter:
    """Read and check a file; nothing of it is believed before.

    Args:
        path: a safetensors file.
        shapes: what it has to fit.
        label: the file's name in messages.
        digest: the file's sha256 where it is known; it is worked out otherwise.

    Raises:
        LoraFormatError: it is no LoRA for FLUX.1, is damaged, or does not fit this model.
    """
    try:
        tensors, metadata = _load(path)
        return _build(tensors, metadata, shapes, digest or _sha256(path))
    except LoraFormatError as error:
        name = f' "{label}"' if label else ""
        raise LoraFormatError(f"Cannot use LoRA{name}: {error}") from error


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: _own(file.get_tensor(key)) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        _refuse("the file is no safetensors file, or a damaged one", "Use a LoRA saved as .safetensors.", error)


def _own(tensor: Tensor) -> Tensor:
    """A copy in memory of our own, since the library's is a view of the file."""
    return tensor.to(KEPT_AS.get(tensor.dtype, tensor.dtype), copy=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Sorted:
    """A file's keys, each in one of four places."""

    layers: Mapping[Target, Mapping[str, str]]
    """Key by part, of each target."""
    families: tuple[str, ...]
    embeddings: tuple[str, ...]
    left_out: tuple[str, ...]


def _build(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shapes: ModelShapes, digest: str) -> LoraAdapter:
    keys = _sort(tuple(tensors), shapes)
    for key in tensors.keys() - set(keys.left_out):
        _check_numbers(key, tensors[key])
    settings = {component: peft_settings(metadata, component) for component in COMPONENTS}
    kinds, layers = set(), []
    for target, parts in keys.layers.items():
        scale_of = settings[target.component].scale
        kind, updates = layer_updates(FileLayer(target, {part: tensors[key] for part, key in parts.items()}, scale_of))
        kinds.add(kind)
        layers += updates
    embeddings = tuple(_embedding(key, tensors[key], shapes) for key in keys.embeddings)
    for component in COMPONENTS:
        count = sum(len(e.vectors) for e in embeddings if e.component == component)
        if count > MAX_EMBEDDING_TOKENS:
            _refuse(f"its words have {count} vectors, and {MAX_EMBEDDING_TOKENS} are taken", "Use another LoRA.")
    return LoraAdapter(
        digest=digest,
        format=f"{', '.join(keys.families)}: {', '.join(sorted(kinds))}" if layers else "embeddings",
        layers=tuple(layers),
        embeddings=embeddings,
        trigger_words=trigger_words(metadata),
        left_out=keys.left_out,
    )


def _sort(keys: tuple[str, ...], shapes: ModelShapes) -> _Sorted:
    """Find each key's place.

    Raises:
        LoraFormatError: a key has none, or shares its place.
    """
    if not keys:
        _refuse("the file is empty", "Use a LoRA for FLUX.1.")
    layers: dict[Target, dict[str, str]] = {}
    families: dict[str, None] = {}
    embeddings, unknown = [], []
    for text in sorted(keys):
        key = read_key(text)
        if key is not None and key.part == "no":
            _explain_kind(keys, key)
        found = None if key is None else locate(key.path, shapes)
        if key is not None and found is not None and _is_change(key, found[1]):
            families[found[0].name] = None
            _place(layers.setdefault(found[1], {}), key)
        elif read_embedding_key(text) is not None:
            embeddings.append(text)
        else:
            unknown.append((text, "" if key is None else key.path))
    harmless = left_out({path for _, path in unknown}, shapes)
    unmatched = [text for text, path in unknown if path not in harmless]
    if unmatched or not (layers or embeddings):
        _explain(keys, unmatched, matched=len(keys) - len(unknown))
    return _Sorted(layers, tuple(families), tuple(embeddings), tuple(t for t, path in unknown if path in harmless))


def _is_change(key: Key, target: Target) -> bool:
    """Whether the tensor can be a change of the layer; whole weights are taken for norms alone."""
    return key.part != "value" or len(target.weight) == 1


def _place(parts: dict[str, str], key: Key) -> None:
    if key.part in parts:
        _refuse(f'"{parts[key.part]}" and "{key.text}" are the same thing twice', "Use another file.")
    parts[key.part] = key.text


def _explain_kind(keys: tuple[str, ...], key: Key) -> NoReturn:
    """Say that a kind of change is known, and not done."""
    if other := other_kind(keys):
        _refuse(f"it is {other}", "Use a LoRA for FLUX.1.")
    found = f'"{key.text[:120]}" is of a kind that is not supported (OFT, GLoRA, VeRA and Tucker cores are not)'
    _refuse(found, "Use a LoRA, DoRA, LoHa or LoKr.")


def _explain(keys: tuple[str, ...], unmatched: list[str], matched: int) -> NoReturn:
    """Say what the file is instead, or what of it is not understood."""
    kind = other_kind(keys)
    if kind is not None:
        _refuse(f"it is {kind}", "Use a LoRA for FLUX.1.")
    names = ", ".join(f'"{key[:120]}"' for key in unmatched[:3]) or "nothing"
    if not matched:
        _refuse(f"none of its {len(keys)} tensors belongs to a layer of this model, as {names}", "Use a FLUX.1 LoRA.")
    found = f"{len(unmatched)} of its {len(keys)} tensors are not understood, as {names}"
    _refuse(found, "Use a LoRA of a kind that is supported, for this model.")


def _check_numbers(key: str, tensor: Tensor) -> None:
    counts = key.endswith("alpha") and not tensor.is_floating_point()
    if tensor.dtype not in USED and not counts:
        _refuse(f'"{key[:120]}" is of type {str(tensor.dtype).removeprefix("torch.")}', "Save it in bf16 or float32.")
    if not counts and not _is_finite(tensor):
        _refuse(f'"{key[:120]}" holds numbers that are not finite', "Train it again, or use another checkpoint of it.")


def _is_finite(tensor: Tensor) -> bool:
    """A sum in float64, which finite numbers of the types that are used cannot overflow; a fifth of the time."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def _embedding(key: str, vectors: Tensor, shapes: ModelShapes) -> BundledEmbedding:
    read = read_embedding_key(key)
    if read is None:
        raise ValueError(key)
    word, component = read
    width = shapes.width(component)
    if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
        found = "x".join(map(str, vectors.shape))
        _refuse(f'"{key[:120]}" is {found}, and this model takes any number x {width}', "Use a LoRA for this model.")
    return BundledEmbedding(word, component, vectors)


def _refuse(found: str, advice: str, cause: Exception | None = None) -> NoReturn:
    raise LoraFormatError(f"{found}. {advice}") from cause
