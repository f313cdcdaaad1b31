"""What an image is built from: cog.yaml, the pins, what is left out."""

from __future__ import annotations

import fnmatch
import re

import yaml

from tests.paths import PROJECT

COG = yaml.safe_load((PROJECT / "cog.yaml").read_text())
PINS = dict(
    line.split("==")
    for name in ("requirements.txt", "requirements-dev.txt")
    for line in (PROJECT / name).read_text().splitlines()
    if line and not line.startswith("#")
)


def test_cog_yaml_names_a_gpu_image_and_the_predictor() -> None:
    assert set(COG) == {"build", "predict"}
    assert set(COG["build"]) == {"gpu", "python_version", "cuda", "python_requirements", "sdk_version"}
    assert COG["build"]["gpu"] is True
    assert (PROJECT / COG["build"]["python_requirements"]).is_file()
    file, name = COG["predict"].split(":")
    assert f"class {name}(" in (PROJECT / file).read_text()


def test_the_image_has_the_cog_that_the_tests_ran_with() -> None:
    assert COG["build"]["sdk_version"] == PINS["cog"] == PINS["coglet"]


def test_the_image_has_the_cuda_that_the_pinned_torch_is_built_for() -> None:
    """PyPI's torch 2.13.0 has no other build than the one for CUDA 13.0."""
    assert PINS["torch"] == "2.13.0"
    assert COG["build"]["cuda"] == "13.0"


def test_every_requirement_is_pinned() -> None:
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values())


def test_the_image_has_what_the_predictor_imports_and_not_the_tests() -> None:
    patterns = (PROJECT / ".dockerignore").read_text().split()

    def left_out(path: str) -> bool:
        return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path.split("/")[0], p) for p in patterns)

    for needed in ("predict.py", "request.py", "images.py", "engine/engine.py", "engine/tiny/tiny-dev/vae/config.json"):
        assert not left_out(needed)
    for needless in ("tests/conftest.py", "training/train.py", ".venv/bin/python", ".git/config"):
        assert left_out(needless)
