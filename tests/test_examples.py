"""The programs in examples/, against script/serve; the official clients through a stand-in of Replicate's API."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_serve import free_port
from tests.paths import DATA, PROJECT
from tests.replicate_api import TOKEN, ReplicateApi

EXAMPLES = PROJECT / "examples"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicateApi]:
    """The stand-in, with script/serve behind it."""
    with ReplicateApi() as api:
        port = free_port()
        api.cog = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "FLUX_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
            "FLUX_CACHE_MIN_FREE_GB": "0",
            "FLUX_TRUSTED_HOSTS": api.authority,
        }
        command = [str(PROJECT / "script" / "serve"), "--port", str(port)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert any(line.startswith("ready on") for line in server.stdout)
            yield api
            server.send_signal(signal.SIGTERM)
            server.stdout.read()
        assert server.returncode == 0


def run(command: list[str], api: ReplicateApi, folder: Path, **more: str) -> str:
    """What the program prints; its images are in `folder`."""
    environment = {
        "PATH": os.environ["PATH"],
        "FLUX_URL": api.cog,
        "FLUX_MODEL": "owner/flux",
        "FLUX_WEBHOOK": f"{api.address}/webhook",
        "REPLICATE_BASE_URL": api.address,
        "REPLICATE_API_TOKEN": TOKEN,
        **more,
    }
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_images(folder: Path) -> None:
    """Every request was understood: the sizes, the shape in the middle, the kept pixels, the LoRA's stripes."""
    images = {file.stem: Image.open(file).convert("RGB") for file in folder.glob("*.png")}
    assert {"text", "image", "mask", "lora"} <= set(images)
    assert {image.size for image in images.values()} == {(512, 512)}
    red, green, blue = images["text"].getpixel((256, 256))  # type: ignore[misc]
    assert red > 180 > 90 > max(green, blue)
    photo = np.asarray(Image.open(EXAMPLES / "photo.jpg").convert("RGB"))
    mask = np.asarray(Image.open(EXAMPLES / "mask.png"))
    repainted = np.asarray(images["mask"])
    assert np.array_equal(repainted[mask == 0], photo[mask == 0])
    assert not np.array_equal(repainted[mask > 0], photo[mask > 0])
    assert not np.array_equal(np.asarray(images["image"]), photo)
    assert not np.array_equal(np.asarray(images["lora"]), np.asarray(images["text"]))


def lora_address(api: ReplicateApi) -> str:
    api.files["style"] = ("application/octet-stream", (DATA / "loras" / "tok-style.safetensors").read_bytes())
    return f"{api.address}/files/style.safetensors"


def test_curl(api: ReplicateApi, tmp_path: Path) -> None:
    printed = run([str(EXAMPLES / "curl.sh")], api, tmp_path)
    check_images(tmp_path)
    assert "slow: starting\nslow: canceled" in printed


def test_plain_http_in_python(api: ReplicateApi, tmp_path: Path) -> None:
    printed = run([sys.executable, str(EXAMPLES / "python" / "plain_http.py")], api, tmp_path)
    check_images(tmp_path)
    assert (tmp_path / "webhook.png").exists()
    assert "slow: canceled" in printed


def test_replicates_python_client(api: ReplicateApi, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "python" / "replicate_client.py")]
    printed = run(command, api, tmp_path, FLUX_LORA=lora_address(api))
    check_images(tmp_path)
    assert "later: succeeded\nslow: canceled" in printed
    assert [event["status"] for event in api.webhooks] == ["succeeded"]


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js with npm")
def test_replicates_javascript_client(api: ReplicateApi, tmp_path: Path) -> None:
    project = tmp_path / "examples" / "javascript"
    shutil.copytree(EXAMPLES / "javascript", project, ignore=shutil.ignore_patterns("node_modules"))
    for name in ("photo.jpg", "mask.png"):
        shutil.copy(EXAMPLES / name, project.parent)
    subprocess.run(["npm", "ci", "--silent"], cwd=project, check=True, capture_output=True, timeout=120)
    api.webhooks.clear()
    printed = run(
        ["node", str(project / "replicate_client.mjs")], api, tmp_path / "images", FLUX_LORA=lora_address(api)
    )
    check_images(tmp_path / "images")
    assert "later: succeeded\nslow: canceled" in printed
    assert [event["status"] for event in api.webhooks] == ["succeeded"]
