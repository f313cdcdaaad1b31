"""Runs on the disk: a folder for each, with the images as the server sent them, the inputs' files, and `run.json`.

The history is that folder: what lies in it is shown, and the oldest runs leave when it holds too many. Images that
carry their settings (`docs/metadata.md`) can be read from anywhere.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

from PIL import Image

from studio.form import Attachment, Field, Inputs, without_secrets

MOST_RUNS = 200
MOST_BYTES = 2 * 10**9
RECORD = "run.json"
_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_SETTINGS = re.compile(r"<flux:settings>(.*?)</flux:settings>", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """One prediction that made images."""

    folder: Path
    inputs: dict[str, Any]
    """As sent, with the seed that was used and without tokens; files as attachments."""
    secrets: tuple[str, ...]
    """Which tokens were sent along."""
    images: tuple[Path, ...]
    log: str

    @property
    def name(self) -> str:
        """The folder's name, which begins with the time."""
        return self.folder.name


def keep(root: Path, fields: Sequence[Field], inputs: Inputs, prediction: Mapping[str, Any], log: str) -> Run:
    """Write a run and return it. Addresses in its output, of a server that uploads its images, are left out."""
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True, mode=0o700)
    for index, uri in enumerate(prediction.get("output") or ()):
        head, _, content = str(uri).partition(",")
        if head.startswith("data:"):
            suffix = _SUFFIXES.get(head[5:].partition(";")[0], ".bin")
            (folder / f"{index}{suffix}").write_bytes(base64.b64decode(content))
    record = {
        "inputs": {name: _stored(folder, name, value) for name, value in without_secrets(fields, inputs).items()},
        "secrets": [field.name for field in fields if field.kind == "secret" and field.name in inputs],
        "log": log,
    }
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, ensure_ascii=False, indent=1))
    partial.rename(folder / RECORD)
    return read(folder)


def _stored(folder: Path, name: str, value: Any) -> Any:
    """An image is copied into the run's folder; a LoRA, which is large, is remembered by its path."""
    if not isinstance(value, Attachment):
        return value
    if name not in ("image", "mask"):
        return {"file": str(value.path)}
    shutil.copyfile(value.path, folder / f"{name}{value.path.suffix.lower()}")
    return {"file": f"{name}{value.path.suffix.lower()}"}


def read(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        OSError, ValueError, KeyError: it holds none.
    """
    record = json.loads((folder / RECORD).read_text())
    inputs = {
        name: Attachment(folder / value["file"]) if isinstance(value, dict) and "file" in value else value
        for name, value in record["inputs"].items()
    }
    images = sorted(file for file in folder.iterdir() if file.stem.isdecimal() and file.suffix in _SUFFIXES.values())
    return Run(folder, inputs, tuple(record.get("secrets", ())), tuple(images), str(record.get("log", "")))


def kept(root: Path) -> list[Run]:
    """Return all runs in a folder, the newest first; what is no run is passed over."""
    runs = []
    for folder in sorted(root.iterdir() if root.is_dir() else (), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            runs.append(read(folder))
    return [run for run in runs if run.images]


def leaving(runs: Sequence[Run], most_runs: int = MOST_RUNS, most_bytes: int = MOST_BYTES) -> list[Run]:
    """Return which runs are too many, given the newest first. The newest always stays."""
    total, too_many = 0, []
    for position, run in enumerate(runs):
        total += sum(file.stat().st_size for file in run.folder.iterdir())
        if position and (position >= most_runs or total > most_bytes):
            too_many.append(run)
    return too_many


def remove(runs: Sequence[Run]) -> None:
    """Delete the folders of runs."""
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)


def differences(first: Inputs, second: Inputs, fields: Sequence[Field]) -> list[tuple[str, Any, Any]]:
    """Return the inputs that differ: name and both values, where absent the default. Files are compared by content."""
    defaults = {field.name: field.default for field in fields}
    names = [field.name for field in fields if field.name in first or field.name in second]
    pairs = [(name, first.get(name, defaults[name]), second.get(name, defaults[name])) for name in names]
    return [(name, one, other) for name, one, other in pairs if _content(one) != _content(other)]


def _content(value: Any) -> Any:
    with suppress(OSError):
        return value.path.read_bytes() if isinstance(value, Attachment) else value
    return value


def settings_inside(path: Path) -> dict[str, Any] | None:
    """Return the inputs that an image file of this predictor carries in its XMP packet; None where it has none."""
    with Image.open(path) as image:
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    found = _SETTINGS.search(text)
    values = json.loads(unescape(found[1])) if found else None
    if not isinstance(values, dict):
        return None
    loras = values.pop("loras", ())
    for (reference, scale), lora in zip(
        (("replicate_weights", "lora_scale"), ("extra_lora", "extra_lora_scale")), loras, strict=False
    ):
        values |= {reference: lora["reference"], scale: lora["scale"]}
    return {name: value for name, value in values.items() if name not in ("version", "mode")}
