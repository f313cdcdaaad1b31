"""Harmless photographs that come with PyPI packages, found without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

FILES = {
    "skimage": (
        "data",
        (
            "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
            "gravel.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png "
            "motorcycle_right.png page.png retina.jpg rocket.jpg text.png"
        ),
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
FACES = 12
"""Of the 100 that scikit-image's excerpt of "Labeled Faces in the Wild" begins with."""


def photographs() -> dict[str, Image.Image]:
    """35 photographs by name, RGB."""
    found = {}
    for package, (folder, names) in FILES.items():
        for name in names.split():
            with Image.open(_root(package) / folder / name) as image:
                found[name] = image.convert("RGB")
    faces = np.load(_root("skimage") / "data" / "lfw_subset.npy")[:FACES]  # (12, 25, 25) in [0, 1]
    for index, face in enumerate(faces):
        found[f"face {index}"] = Image.fromarray((face * 255).round().astype(np.uint8)).convert("RGB")
    return found


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed: run script/setup"
    return Path(spec.origin).parent
