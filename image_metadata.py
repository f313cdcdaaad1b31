"""What an image file says of itself: that a model generated it, and what is needed to make it again.

The mark is IPTC's `DigitalSourceType`, the settings are JSON in a property of our own; both travel as one XMP packet,
which PNG, JPEG and WebP can hold. Knows no files and no pixels.

Source: IPTC Photo Metadata Standard 2023.2, "Digital Source Type"; Adobe XMP Specification part 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, unescape

from request import ASPECT_RATIOS, DIVISORS, GenerationRequest, Mode, Size

VERSION = "0.2.0"
"""Of this predictor: the same version makes the same bytes from the same settings."""
CONTENTS = ("off", "mark", "settings", "prompt")
"""What files can carry, each with all before it."""
JPEG_BYTES = 65_504
"""What one segment of a JPEG file has for XMP: a prompt of 20,000 characters may be longer, and is left out then."""
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:flux="urn:flux-predictor:1">
<xmp:CreatorTool>flux-predictor {version}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>{settings}
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
_SETTINGS = re.compile(r"<flux:settings>(.*?)</flux:settings>", re.DOTALL)


def xmp_packet(
    contents: str,
    request: GenerationRequest,
    index: int,
    digests: Sequence[str],
    base_lora: Mapping[str, str | float] | None = None,
) -> bytes | None:
    """Return the XMP packet of one image; None with the contents "off".

    Args:
        contents: one of `CONTENTS`.
        request: what the image was made from.
        index: which of the request's images it is, counted from 0.
        digests: sha256 of each of the request's LoRA files, in order.
        base_lora: reference, scale and sha256 of the operator's base LoRA.
    """
    if contents == "off":
        return None
    made_from = "trainedAlgorithmicMedia" if request.image is None else "compositeWithTrainedAlgorithmicMedia"
    settings = ""
    if contents != "mark":
        values = settings_of(request, index, digests)
        if base_lora is not None:
            values["base_lora"] = dict(base_lora)
        if contents == "prompt":
            values["prompt"] = request.prompt
        settings = f"\n<flux:settings>{escape(json.dumps(values, ensure_ascii=False))}</flux:settings>"
    filled = _PACKET.format(version=VERSION, source_type=_SOURCE_TYPES + made_from, settings=settings)
    packet = filled.encode("utf-8", "replace")
    if contents == "prompt" and request.output_format == "jpg" and len(packet) > JPEG_BYTES:
        return xmp_packet("settings", request, index, digests, base_lora)
    return packet


def settings_of(request: GenerationRequest, index: int, digests: Sequence[str]) -> dict[str, Any]:
    """The inputs that make this one image again, by their names, without the prompt, images and secrets."""
    values: dict[str, Any] = {"version": VERSION, "model": request.model, "seed": request.seed_of(index)}
    if request.image is None:
        values |= _size_inputs(request.size)
    else:
        values |= {"mode": request.mode.value, "prompt_strength": request.strength}
    values |= {
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "go_fast": request.go_fast,
        "output_format": request.output_format,
        "output_quality": request.output_quality,
    }
    if request.loras:
        values["loras"] = [
            {"reference": reference.label, "scale": scale, "sha256": digest}
            for (reference, scale), digest in zip(request.loras, digests, strict=True)
        ]
    return values


def _size_inputs(size: Size) -> dict[str, Any]:
    """The inputs that give a size: an aspect ratio where one does, since go_fast wants one."""
    for megapixels in DIVISORS:
        for ratio in ASPECT_RATIOS:
            if Size.from_aspect_ratio(ratio, megapixels) == size:
                return {"aspect_ratio": ratio, "megapixels": megapixels}
    return {"aspect_ratio": "custom", "width": size.width, "height": size.height}


def read_settings(packet: str | bytes) -> dict[str, Any] | None:
    """The settings in an XMP packet; None where it has none of ours."""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    found = _SETTINGS.search(text)
    if found is None:
        return None
    try:
        values = json.loads(unescape(found[1]))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def needs_image(settings: dict[str, Any]) -> tuple[str, ...]:
    """The names of the inputs that hold images, which a file does not carry."""
    return {Mode.IMG2IMG.value: ("image",), Mode.INPAINT.value: ("image", "mask")}.get(settings.get("mode", ""), ())
