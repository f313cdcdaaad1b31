"""What the measurements were taken on: device, clocks, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao", "peft", "cache-dit")
CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def machine(device: torch.device) -> Mapping[str, str]:
    """The device and its software, in words."""
    facts = {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["CUDA"] = str(torch.version.cuda)
        facts["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return facts | {package: _version(package) for package in PACKAGES}


def clocks() -> Mapping[str, str]:
    """The first GPU's driver, clocks (MHz), power (W) and temperature as nvidia-smi has them; empty where it is not."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (value.strip() for value in line.split(",")), strict=False))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
