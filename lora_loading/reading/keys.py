"""The keys of a file, sorted: which belong to which layer, which are embeddings, which may be left out. No torch.

A file is understood as a whole or refused: a key without a place is named in the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from errors import LoraFormatError
from lora_loading.reading.fit import Change, changes_in
from lora_loading.reading.formats import locate
from lora_loading.reading.formats.diffusers import PREFIX
from lora_loading.reading.formats.embeddings import is_output_embedding, read_embedding_key
from lora_loading.reading.formats.not_flux import left_out, other_model, related_model
from lora_loading.reading.formats.spelling import Key, read_key
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.header import Header
from lora_loading.shapes import COMPONENTS, ModelShapes

IsZero = Callable[[str], bool]
"""Whether a tensor of the file holds zeros alone."""


@dataclass(frozen=True)
class SortedLayer:
    """A layer of the file: the key of each part, what its trainer calls it, and the changes that the parts make."""

    target: Target
    keys: Mapping[str, str]
    name: str
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class SortedFile:
    """A file whose keys are all understood."""

    layers: tuple[SortedLayer, ...]
    families: tuple[str, ...]
    embeddings: tuple[str, ...]
    left_out: tuple[str, ...]
    """Keys that mean nothing in this model."""
    notes: tuple[str, ...]
    """What was assumed, for the log."""

    @property
    def used(self) -> list[str]:
        """The keys whose tensors are needed."""
        return [*self.embeddings, *(key for layer in self.layers for key in layer.keys.values())]

    @property
    def format(self) -> str:
        """For people: the families of its names and the kinds of its changes, as in "kohya, text encoders: LoRA"."""
        if not self.layers:
            return "embeddings"
        return f"{', '.join(self.families)}: {', '.join(sorted({kind_of(layer.changes) for layer in self.layers}))}"


def kind_of(changes: tuple[Change, ...]) -> str:
    """What a layer's changes are called together: the kind of the weight's."""
    return next((change.label for change in changes if change.parameter == "weight"), changes[0].label)


def sort_file(header: Header, shapes: ModelShapes, is_zero: IsZero) -> SortedFile:
    """Find each key's place and check that the layers fit the model.

    Args:
        header: the file's.
        shapes: what it has to fit.
        is_zero: asked about the tensors of layers that this model does not have.

    Raises:
        LoraFormatError: it is a file for another model, a key has no place, or a layer does not fit.
    """
    try:
        return _sort(header, shapes, is_zero)
    except LoraFormatError as error:
        other = other_model(header, shapes)
        if other is None:
            raise
        raise LoraFormatError(f"it is {other}. Use a LoRA for FLUX.1.") from error


def _sort(header: Header, shapes: ModelShapes, is_zero: IsZero) -> SortedFile:
    if not header.tensors:
        _refuse("the file is empty", "Use a LoRA for FLUX.1.")
    layers: dict[tuple[Target, str], dict[str, Key]] = {}
    families: dict[str, None] = {}
    embeddings: list[str] = []
    unknown: list[tuple[str, Key | None]] = []
    for text in sorted(header.tensors):
        key = read_key(text)
        found = None if key is None else locate(key.path, shapes)
        if key is not None and key.part == "unsupported":
            _refuse_kind(key)
        if key is not None and found is not None and _is_change(key, found[1]):
            families[found[0].name] = None
            _place(layers.setdefault((found[1], key.path), {}), key)
        elif read_embedding_key(text) is not None:
            embeddings.append(text)
        else:
            unknown.append((text, key))
    harmless = _harmless(unknown, shapes, is_zero)
    unmatched = [text for text, _ in unknown if text not in harmless]
    if unmatched or not (layers or embeddings):
        _refuse_unmatched(len(header.tensors), unmatched, matched=len(header.tensors) - len(unknown))
    sorted_layers = tuple(_checked(target, path, parts, header) for (target, path), parts in layers.items())
    if (other := other_model(header, shapes, keys_are_known=True)) is not None:
        _refuse(f"it is {other}", "Use a LoRA for FLUX.1.")
    notes = [*_notes_on_model(header), *_notes_on_left_out(harmless)]
    return SortedFile(sorted_layers, tuple(families), tuple(embeddings), tuple(harmless), tuple(notes))


def _checked(target: Target, path: str, parts: Mapping[str, Key], header: Header) -> SortedLayer:
    changes = changes_in(target, {part: header.tensors[key.text].shape for part, key in parts.items()})
    return SortedLayer(target, {part: key.text for part, key in parts.items()}, PREFIX.sub("", path, 1), changes)


def _is_change(key: Key, target: Target) -> bool:
    """Whether the tensor can be a change of the layer; whole weights are taken for norms alone."""
    return key.part != "value" or len(target.weight) == 1


def _place(parts: dict[str, Key], key: Key) -> None:
    if key.part in parts:
        _refuse(f'"{parts[key.part].text}" and "{key.text}" are the same thing twice', "Use another file.")
    parts[key.part] = key


# What may be left out


def _harmless(unknown: Iterable[tuple[str, Key | None]], shapes: ModelShapes, is_zero: IsZero) -> list[str]:
    """The keys among those without a place that change nothing in this model."""
    unknown = list(unknown)
    paths = {key.path for _, key in unknown if key is not None}
    by_name = left_out(paths, shapes)
    of_path: dict[str, dict[str, str]] = {}
    for text, key in unknown:
        if key is not None and key.path not in by_name:
            of_path.setdefault(key.path, {})[key.part] = text
    zero = {path for path, parts in of_path.items() if _changes_nothing(parts, is_zero)}
    return [
        text for text, key in unknown if is_output_embedding(text) or (key is not None and key.path in by_name | zero)
    ]


def _changes_nothing(parts: Mapping[str, str], is_zero: IsZero) -> bool:
    """Whether the parts of a layer are a change by zero: a factor that is zero, or differences that are."""
    if "a" in parts and "b" in parts:
        return is_zero(parts["b"]) or is_zero(parts["a"])
    differences = [text for part, text in parts.items() if part in ("diff", "diff_b")]
    return bool(differences) and set(parts) <= {"diff", "diff_b", "alpha"} and all(map(is_zero, differences))


# What is said


def _notes_on_model(header: Header) -> list[str]:
    related = related_model(header.metadata)
    return [] if related is None else [f"made for {related}, used on this model"]


def _notes_on_left_out(keys: list[str]) -> list[str]:
    words = [key for key in keys if is_output_embedding(key)]
    if not words:
        return []
    return [f"not applied: {', '.join(words[:3])}, which replace what a text encoder makes of a word"]


def _refuse_kind(key: Key) -> NoReturn:
    """Say that a kind of change is recognised, and not supported."""
    kinds = "GLoRA, VeRA, Tucker cores, and PEFT's OFT before 0.14"
    found = f'"{key.text[:120]}" is of a kind that is not supported ({kinds})'
    _refuse(found, "Use a LoRA, DoRA, LoHa, LoKr, OFT or BOFT.")


def _refuse_unmatched(count: int, unmatched: list[str], matched: int) -> NoReturn:
    """Say what of the file is not understood."""
    names = ", ".join(f'"{key[:120]}"' for key in unmatched[:3]) or "nothing"
    if not matched:
        _refuse(f"none of its {count} tensors belongs to a layer of this model, as {names}", "Use a FLUX.1 LoRA.")
    found = f"{len(unmatched)} of its {count} tensors are not understood, as {names}"
    _refuse(found, "Use a LoRA of a kind that is supported, for this model.")


def _refuse(found: str, advice: str) -> NoReturn:
    raise LoraFormatError(f"{found}. {advice}")


def components_in(layers: Iterable[SortedLayer]) -> list[str]:
    """The components whose layers are changed, in their usual order."""
    changed = {layer.target.component for layer in layers}
    return [component for component in COMPONENTS if component in changed]
