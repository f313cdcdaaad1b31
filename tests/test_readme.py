"""The commands in the documents' fenced blocks: run as they are pasted, or parsed where they need Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_serve import free_port
from tests.paths import PROJECT

RUN_HERE = ("README.md", "docs/loras.md")
ELSEWHERE = {"cog", "docker", "kubectl", "sudo", "journalctl"}
"""Programs that need Docker, a cluster or another machine."""
OWN_CHECKS = {"script/test", "script/lint", "script/setup"}
"""What runs these tests, or has run before them."""


def blocks(document: str, language: str) -> list[str]:
    text = (PROJECT / document).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for of, block in found if of == language]


def commands(document: str) -> list[str]:
    """The lines of the document's blocks for a shell, without comments."""
    lines = (line for block in blocks(document, "sh") for line in block.splitlines())
    return [line for line in (re.sub(r"\s+#.*$", "", line) for line in lines) if line]


def program(command: str) -> str:
    return shlex.split(command)[0]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository in another folder, with this environment."""
    root = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, root / name)
    (root / ".venv").symlink_to((PROJECT / ".venv").resolve())
    return root


def run(command: str, clone: Path) -> str:
    environment = {**os.environ, "FLUX_CACHE_DIR": str(clone / "cache")}
    done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def printed(document: str) -> list[str]:
    """The lines that the document says are printed, numbers apart."""
    return [re.sub(r"\d+", "N", line) for block in blocks(document, "") for line in block.splitlines()]


PREDICTIONS = [(d, c) for d in RUN_HERE for c in commands(d) if program(c) == "script/predict"]


@pytest.mark.parametrize(("document", "command"), PREDICTIONS)
def test_a_prediction_runs_as_pasted(document: str, command: str, clone: Path) -> None:
    output = run(command, clone)
    files = re.findall(r"^wrote (.+)$", output, re.MULTILINE)
    assert files
    with Image.open(clone / files[-1]) as image:
        image.load()
    if (document, command) == PREDICTIONS[0]:
        lines = [re.sub(r"\d+", "N", line) for line in output.splitlines()]
        assert [line for line in printed(document) if line not in lines] == []


@pytest.fixture
def server(clone: Path) -> Iterator[str]:
    """script/serve as the README starts it, but at a free port."""
    (command,) = (line for line in commands("README.md") if program(line) == "script/serve")
    port = str(free_port())
    words = shlex.split(command.replace("5000", port))
    environment = {**os.environ, "FLUX_CACHE_DIR": str(clone / "cache")}
    with subprocess.Popen(words, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = f"ready on http://127.0.0.1:{port}"
        assert any(line.startswith(ready) for line in server.stdout)
        yield port
        server.send_signal(signal.SIGTERM)
        server.stdout.read()


def test_the_server_answers_as_pasted(server: str, clone: Path) -> None:
    (command,) = (line for line in commands("README.md") if program(line) == "curl")
    run(command.replace("5000", server), clone)
    with Image.open(clone / "circle.png") as image:
        assert (image.format, image.size) == ("PNG", (1024, 1024))


@pytest.mark.parametrize("document", [*RUN_HERE, "docs/deploy.md", "CONTRIBUTING.md"])
def test_every_other_command_can_be_parsed(document: str) -> None:
    for command in commands(document):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command
        name = program(command)
        if name.startswith("script/"):
            assert os.access(PROJECT / name, os.X_OK), command
        else:
            assert name in ELSEWHERE | {"curl", "cp", "rm"}, command
        for word in shlex.split(command):
            if word.startswith("/opt/flux/") and word != "/opt/flux/.cog":
                assert (PROJECT / word.removeprefix("/opt/flux/")).exists(), command
            if word.startswith("deploy/"):
                assert (PROJECT / word).exists(), command


def test_nothing_of_the_readme_is_left_unchecked() -> None:
    tried = {"script/predict", "script/serve", "curl", *OWN_CHECKS, *ELSEWHERE}
    assert {program(command) for document in RUN_HERE for command in commands(document)} <= tried


def test_the_readme_begins_with_what_it_is_an_image_and_two_commands() -> None:
    text = (PROJECT / "README.md").read_text()
    parts = [
        text.index(part)
        for part in ("# A Cog predictor", "![", "## Two commands", "```sh\nscript/predict", "script/test")
    ]
    assert parts == sorted(parts)
    assert len(blocks("README.md", "sh")[0].splitlines()) == 2
