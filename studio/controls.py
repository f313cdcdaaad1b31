"""A control for each input, and what it holds. The only module beside `page.py` that knows Gradio."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from studio import painting
from studio.form import Attachment, Field, parsed

GROUPS = {
    "image": ("Image and mask", ("image", "mask")),
    "lora": ("LoRAs", ("lora",)),
    "secret": ("Tokens", ("secret",)),
}
"""Folded sections, by the kind of field that opens them. A LoRA's scale, the field after it, goes with it."""

PAINT = (f"rgb{painting.PAINT[:3]}", painting.PAINT[3] / 255)


def control(field: Field) -> Any:
    """Return the Gradio component of a field, whose name becomes the element's id."""
    named = {"label": field.label + _bounds(field), "elem_id": f"input-{field.name}", "min_width": 240}
    said = {**named, "info": field.description, "value": field.default}
    match field.kind:
        case "image":
            return gr.Image(**named, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240)
        case "mask":
            return gr.ImageEditor(
                label="mask: paint what is to be repainted",
                elem_id=named["elem_id"],
                type="pil",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=[PAINT], default_color=PAINT, color_mode="fixed"),
                format="png",
                buttons=[],
                height=420,
            )
        case "boolean":
            return gr.Checkbox(**{**said, "value": bool(field.default)})
        case "choice":
            return gr.Dropdown(**said, choices=list(field.choices))
        case "secret":
            return gr.Textbox(**said, type="password")
        case "lora":
            return gr.Textbox(**said, lines=2, max_lines=5, placeholder="owner/name, an address, or @file.safetensors")
        case "integer" | "number" if _has_slider(field):
            step = 1 if field.kind == "integer" else 0.05
            return gr.Slider(field.minimum, field.maximum, step=step, **said)
        case "text" if field.required:
            return gr.Textbox(**said, lines=3, autofocus=True)
    return gr.Textbox(**said)


def _has_slider(field: Field) -> bool:
    """An optional number may be left empty, which a slider can't be."""
    return None not in (field.minimum, field.maximum, field.default)


def _bounds(field: Field) -> str:
    if field.kind not in ("integer", "number") or _has_slider(field) or field.minimum is None:
        return ""
    return (
        f" ({field.minimum:g} to {field.maximum:g})" if field.maximum is not None else f" ({field.minimum:g} or more)"
    )


def sections(fields: Sequence[Field]) -> list[tuple[str | None, list[Field]]]:
    """Return the fields in their order, those of one section together where its first one stands; None: unfolded."""
    result: list[tuple[str | None, list[Field]]] = []
    before: str | None = None
    for field in fields:
        title = next((title for title, kinds in GROUPS.values() if field.kind in kinds), None)
        if title is None and before == GROUPS["lora"][0] and field.name.endswith("scale"):
            title = before
        before = title
        open_one = next((group for name, group in result if title is not None and name == title), None)
        if open_one is not None:
            open_one.append(field)
        elif title is None and result and result[-1][0] is None:
            result[-1][1].append(field)
        else:
            result.append((title, [field]))
    return result


def inputs_of(fields: Sequence[Field], values: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Return what to send, from the controls' values in the fields' order.

    Args:
        fields: all inputs.
        values: what their controls hold.
        folder: where a painted mask is written.
    """
    inputs: dict[str, Any] = {}
    for field, value in zip(fields, values, strict=True):
        if field.kind == "image":
            given = Attachment(Path(value)) if value else None
        elif field.kind == "mask":
            image = dict(zip((one.kind for one in fields), values, strict=True)).get("image")
            given = _painted(value, image, folder)
        else:
            given = parsed(field, value)
        if given is not None:
            inputs[field.name] = given
    return inputs


def _painted(editor: Mapping[str, Any] | None, image: str | None, folder: Path) -> Attachment | None:
    """The mask as a file: as large as the upright image, 0 and 255 alone."""
    if not editor or not image:
        return None
    mask = painting.mask_of(editor["layers"], painting.upright(Path(image)).size)
    if mask is None:
        return None
    mask.save(folder / "mask.png")
    return Attachment(folder / "mask.png")


def canvas(image: Path | None, mask: Path | None = None) -> dict[str, Any] | None:
    """Return what the mask's editor shows: the upright image under the mask's strokes."""
    if image is None:
        return None
    background = painting.upright(image)
    layers = [] if mask is None else [painting.layer_of(mask, background.size)]
    # as JPEG, which the browser gets many times faster; what is sent is the image itself
    shown = save_pil_to_cache(background, tempfile.gettempdir(), "background", "jpeg")
    return {"background": shown, "layers": layers, "composite": None}


def shown(fields: Sequence[Field], inputs: Mapping[str, Any]) -> list[Any]:
    """Return the values of the controls that show these inputs; what is absent is at its default."""
    image, mask = (value.path if (value := inputs.get(name)) else None for name in ("image", "mask"))
    values = []
    for field in fields:
        value = inputs.get(field.name, field.default)
        if field.kind == "mask":
            value = canvas(image, mask)
        elif field.kind == "image":
            value = None if image is None else str(image)
        elif isinstance(value, Attachment):
            value = f"@{value.path}"
        elif field.kind in ("integer", "number") and not _has_slider(field):
            value = None if value is None else str(value)
        values.append(gr.update(value=value))
    return values
