"""Runs on the disk: kept, bounded, compared, and copied as programs that give the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from studio import copies, runs
from studio.client import Server
from studio.form import Attachment, Field, fields_of
from studio.work import Desk, work
from tests.paths import LORAS, PROJECT
from tests.studio.test_work import QUICK

FIELDS = (
    Field("prompt", "text", "prompt", "", True),
    Field("image", "image", "image", "", False),
    Field("scale", "number", "scale", "", False, default=1),
    Field("token", "secret", "token", "", False),
)
PREDICTION = {"output": ["data:image/webp;base64,QUJD", "https://elsewhere.example/1.webp"]}


def test_a_run_survives_on_the_disk_without_its_token(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").write_bytes(b"pixels")
    inputs = {"prompt": "ä", "image": Attachment(tmp_path / "a.PNG"), "token": "hf_secret"}
    run = runs.keep(tmp_path / "runs", FIELDS, inputs, PREDICTION, "log")
    (tmp_path / "a.PNG").unlink()
    (again,) = runs.kept(tmp_path / "runs")
    assert again == run
    assert again.inputs["image"].path.read_bytes() == b"pixels"
    assert [image.read_bytes() for image in again.images] == [b"ABC"]
    assert again.secrets == ("token",)
    assert "hf_secret" not in (run.folder / runs.RECORD).read_text()
    assert run.folder.stat().st_mode & 0o077 == 0


def test_what_is_no_run_is_passed_over(tmp_path: Path) -> None:
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"inputs": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / runs.RECORD).write_text(text)
    (tmp_path / "file").write_text("")
    assert runs.kept(tmp_path) == []
    assert runs.kept(tmp_path / "missing") == []


def test_the_oldest_runs_leave_first_and_the_newest_stays(tmp_path: Path) -> None:
    for _ in range(3):
        runs.keep(tmp_path, FIELDS, {}, PREDICTION, "")
    newest_first = runs.kept(tmp_path)
    assert runs.leaving(newest_first, most_runs=2) == newest_first[2:]
    assert runs.leaving(newest_first, most_bytes=0) == newest_first[1:]
    assert runs.leaving(newest_first) == []
    runs.remove(newest_first[1:])
    assert runs.kept(tmp_path) == newest_first[:1]


def test_only_what_differs_is_compared(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    one = {"prompt": "a", "image": Attachment(tmp_path / "a")}
    other = {"prompt": "a", "image": Attachment(tmp_path / "b"), "scale": 1}
    assert runs.differences(one, other, FIELDS) == []
    other |= {"scale": 0.5, "image": Attachment(tmp_path / "c")}
    assert [name for name, _, _ in runs.differences(one, other, FIELDS)] == ["image", "scale"]


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run with everything that a shell could misread."""
    prompt = "a red circle on a white background \"$HOME\" `id` \\n 'q' é\n"
    desk = Desk(server, fields_of(server.openapi()), tmp_path_factory.mktemp("runs"))
    inputs = {
        **QUICK,
        "num_inference_steps": 2,
        "prompt": prompt,
        "image": Attachment(PROJECT / "examples" / "photo.jpg"),
        "mask": Attachment(PROJECT / "examples" / "mask.png"),
        "replicate_weights": Attachment(LORAS / "tok-style.safetensors"),
        "output_format": "png",
        "num_outputs": 2,
        "hf_api_token": "hf_secret",
        "disable_safety_checker": True,
    }
    view = list(work(desk, [inputs], lambda prediction: True))[-1]
    assert view.state == "done", view.message
    assert "LoRA" in view.message
    return view.runs[0]


def test_each_copy_gives_the_same_bytes(run: runs.Run, server: Server, tmp_path: Path) -> None:
    url = server.url
    programs = {
        "curl": (["bash", "-eu"], copies.curl(run, url)),
        "python": ([sys.executable, "-"], copies.python(run, url)),
        "javascript": (["node", "--input-type=module", "-"], copies.javascript(run, url)),
    }
    environment = {"PATH": os.environ["PATH"], "HF_API_TOKEN": "hf_secret"}
    for name, (command, program) in programs.items():
        assert "hf_secret" not in program
        folder = tmp_path / name
        folder.mkdir()
        subprocess.run(command, input=program, text=True, cwd=folder, env=environment, check=True, timeout=60)
        for index, image in enumerate(run.images):
            assert (folder / f"output.{index}.png").read_bytes() == image.read_bytes(), name


def test_an_images_own_settings_fill_the_form(run: runs.Run, tmp_path: Path) -> None:
    settings = runs.settings_inside(run.images[1])
    assert settings is not None
    assert settings["prompt"] == run.inputs["prompt"]
    assert settings["seed"] == run.inputs["seed"] + 1
    assert settings["lora_scale"] == 1
    assert "version" not in settings
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert runs.settings_inside(tmp_path / "plain.png") is None


def test_a_kept_run_is_plain_json(run: runs.Run) -> None:
    record = json.loads((run.folder / runs.RECORD).read_text())
    assert record["inputs"]["image"] == {"file": "image.jpg"}
    assert record["inputs"]["mask"] == {"file": "mask.png"}
