"""Which device is chosen, and what is said where an NVIDIA GPU is visible but cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.device import choose_device, explain, look_for_nvidia
from errors import SettingsError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which is taken")
VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 19 19:05:00 UTC 2023\nGCC version: gcc 12.3.0\n"
Host = Callable[..., Path]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A root folder with these files; "__" in a name stands for "/"."""

    def make(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_without_a_trace_of_nvidia_the_cpu_is_taken(host: Host) -> None:
    """CUDA's images carry a compatibility library of their own, which says nothing about the host."""
    root = host(usr__local__cuda__compat__libcuda="", dev__null="", proc__version="Linux")
    assert choose_device("auto", root) == torch.device("cpu")


@pytest.mark.parametrize("trace", ["dev__nvidia0", "proc__driver__nvidia__version", "usr__bin__nvidia-smi"])
@pytest.mark.parametrize("profile", ["auto", "full"])
def test_any_trace_of_nvidia_stops_the_setup_unless_the_tiny_profile_is_asked_for(
    host: Host, trace: str, profile: str
) -> None:
    root = host(**{trace: "535.104.05"})
    with pytest.raises(SettingsError, match=f"shows /{trace.replace('__', '/')}, but CUDA cannot be used") as raised:
        choose_device(profile, root)
    assert "set FLUX_PROFILE to tiny" in str(raised.value)
    assert choose_device("tiny", root) == torch.device("cpu")


def test_the_library_of_a_driver_is_a_trace_and_tells_its_version(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    (folder / "libcuda.so.550.54.14").touch()
    (folder / "libcuda.so.1").symlink_to("libcuda.so.550.54.14")
    found = look_for_nvidia(tmp_path)
    assert found.signs == ("/usr/lib/x86_64-linux-gnu/libcuda.so.1",)
    assert found.driver == "550.54.14"


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("535.104.05", "13.0", "the driver is 535.104.05, and CUDA 13.0 needs 580 or newer"),
        ("470.82.01", "12.8", "the driver is 470.82.01, and CUDA 12.8 needs 525 or newer"),
        ("580.65.06", "13.0", "the device does not answer (driver 580.65.06; CUDA 13.0 needs 580 or newer)"),
        ("580.65.06", None, "the installed torch is a build for CPUs"),
    ],
)
def test_the_driver_is_held_against_the_cuda_of_torch(host: Host, driver: str, cuda: str | None, said: str) -> None:
    found = look_for_nvidia(host(proc__driver__nvidia__version=VERSION.format(driver), dev__nvidia0=""))
    assert explain(found, cuda).startswith(said)


def test_a_container_without_its_gpu_is_told_how_to_get_it(host: Host) -> None:
    """The kernel's driver shows in every container of the host, the device files only where they are given."""
    found = look_for_nvidia(host(proc__driver__nvidia__version=VERSION.format("580.65.06")))
    assert "--gpus all" in explain(found, "13.0")


def test_a_device_that_cannot_be_opened_is_named(host: Host) -> None:
    """A link to nowhere cannot be opened by root either, who runs these tests in a container."""
    root = host(proc__driver__nvidia__version=VERSION.format("580.65.06"), dev__null="")
    (root / "dev/nvidia0").symlink_to("gone")
    assert f"this user may not open {root}/dev/nvidia0" in explain(look_for_nvidia(root), "13.0")
