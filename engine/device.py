"""Choose the device to run on; refuse to fall back to the CPU where an NVIDIA GPU or driver is visible but unusable.

Without this check a driver that is too old, or a container started without its GPU, would look like a machine without
a GPU, and the embedded tiny model would be served in place of FLUX.1. Only files are looked at; knows no models.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import SettingsError

ROOT = Path("/")
OLDEST_DRIVER = {12: 525, 13: 580}
"""The first driver for each major version of CUDA; every later one runs it. Source: CUDA's release notes, table 3."""
LIBRARIES = ("usr/lib/*/libcuda.so.1", "usr/lib64/libcuda.so.1", "usr/local/nvidia/lib*/libcuda.so.1", "usr/lib/wsl/lib/libcuda.so.1")  # noqa: E501 # fmt: skip
"""Where a driver or a container runtime puts CUDA's library. `/usr/local/cuda/compat`, part of every CUDA image, says
nothing about the host."""
TOOLS = ("usr/bin/nvidia-smi", "usr/local/nvidia/bin/nvidia-smi")
KERNEL_MODULE = "proc/driver/nvidia/version"


def choose_device(profile: str, root: Path = ROOT) -> torch.device:
    """Return the first CUDA device, or the CPU where no NVIDIA GPU is visible or the profile is "tiny".

    Args:
        profile: `Settings.profile`.
        root: the folder that stands for "/".

    Raises:
        SettingsError: an NVIDIA device or driver is visible, and CUDA cannot be used.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    found = look_for_nvidia(root)
    if profile != "tiny" and found.signs:
        raise SettingsError(
            f'FLUX_PROFILE is "{profile}" and this host shows {", ".join(found.signs)}, but CUDA cannot be used: '
            f"{explain(found, torch.version.cuda)} Or set FLUX_PROFILE to tiny for the embedded model on the CPU."
        )
    return torch.device("cpu")


@dataclass(frozen=True)
class Nvidia:
    """What a host shows of NVIDIA."""

    signs: tuple[str, ...]
    """Devices, driver, library and tool that were found, in words."""
    driver: str | None
    """The driver's version."""
    devices: tuple[Path, ...]
    """The GPUs' device files."""
    closed: tuple[Path, ...]
    """Those of them that this user may not open."""


def look_for_nvidia(root: Path = ROOT) -> Nvidia:
    """Return what there is of NVIDIA: device files, kernel driver, CUDA's library, nvidia-smi."""
    devices = sorted([*root.glob("dev/nvidia[0-9]*"), *root.glob("dev/dxg")])
    kernel = _text(root / KERNEL_MODULE)
    libraries = [path for pattern in LIBRARIES for path in root.glob(pattern)]
    tools = [root / tool for tool in TOOLS if (root / tool).exists()]
    named = [kernel, *(path.resolve().name for path in libraries)]
    driver = next((found[0] for text in named if text and (found := re.search(r"\d{3,}\.\d+(\.\d+)*", text))), None)
    signs = [f"/{path.relative_to(root)}" for path in [*devices, *libraries[:1], *tools[:1]]]
    if kernel is not None:
        signs.append(f"/{KERNEL_MODULE}")
    closed = [path for path in devices if not os.access(path, os.R_OK | os.W_OK)]
    return Nvidia(tuple(signs), driver, tuple(devices), tuple(closed))


def explain(found: Nvidia, cuda: str | None) -> str:
    """Return why CUDA cannot be used with what was found, and what to do.

    Args:
        found: with signs of an NVIDIA GPU.
        cuda: the version that torch was built with; None for a build without CUDA.
    """
    if cuda is None:
        return "the installed torch is a build for CPUs. Install the pinned torch from PyPI, which is built for CUDA."
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if needed and found.driver and int(found.driver.split(".")[0]) < needed:
        return f"the driver is {found.driver}, and CUDA {cuda} needs {needed} or newer. Update the host's driver."
    if not found.devices:
        return "there is no device file such as /dev/nvidia0. Give the container the GPU (docker run --gpus all)."
    if found.closed:
        return f"this user may not open {found.closed[0]}. Grant read and write access to the device."
    version = f"driver {found.driver}" if found.driver else "driver of unknown version"
    wanted = f"CUDA {cuda} needs {needed} or newer" if needed else f"torch is built for CUDA {cuda}"
    return f"the device does not answer ({version}; {wanted}). See whether nvidia-smi and CUDA_VISIBLE_DEVICES show it."


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
