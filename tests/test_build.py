"""What an environment and an image are built from: cog.yaml, the pins, the lock files, script/setup, the workflow."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.markers import Marker
from packaging.utils import canonicalize_name

from engine.model_folders import OWN, SHARED
from safety.pair import CONCEPTS, OPINION
from settings import Settings
from tests.paths import PROJECT

COG = yaml.safe_load((PROJECT / "cog.yaml").read_text())
LOCKS = ("requirements.lock", "requirements-torch.lock")


def pins(*files: str) -> dict[str, str]:
    """Versions by name, of the lines that hold on this machine."""
    found: dict[str, str] = {}
    for line in "\n".join((PROJECT / file).read_text() for file in files).splitlines():
        match = re.match(r"([\w.-]+)==([^\s;\\]+)(?:\s*;\s*(.+?))?\s*\\?$", line)
        if match and (match[3] is None or Marker(match[3]).evaluate()):
            found[canonicalize_name(match[1])] = match[2]
    return found


PINS = pins("requirements.txt", "requirements-dev.txt")


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
    lines = "\n".join(
        (PROJECT / file).read_text() for file in ("requirements.txt", "requirements-dev.txt")
    ).splitlines()
    assert len(PINS) == len([line for line in lines if line and not line.startswith("#")])


def test_the_image_has_what_the_predictor_imports_and_not_the_tests() -> None:
    patterns = (PROJECT / ".dockerignore").read_text().split()

    def left_out(path: str) -> bool:
        return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path.split("/")[0], p) for p in patterns)

    for needed in ("predict.py", "request.py", "images.py", "engine/engine.py", "engine/tiny/tiny-dev/vae/config.json"):
        assert not left_out(needed)
    for needless in ("tests/conftest.py", "training/train.py", ".venv/bin/python", ".git/config"):
        assert left_out(needless)


# the lock files


def test_the_lock_files_hold_every_requirement_at_its_version() -> None:
    assert PINS.items() <= pins(*LOCKS).items(), "run script/lock after a change of requirements*.txt"


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_file_has_a_hash_and_no_address(name: str) -> None:
    text = (PROJECT / name).read_text()
    entries = re.split(r"\n(?=\w)", text)[1:]
    assert entries
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert "://" not in text
    assert "index" not in text


def test_torch_and_its_cuda_libraries_alone_are_in_torchs_lock_file() -> None:
    torch = pins("requirements-torch.lock")
    assert "torch" in torch
    assert "torchvision" not in torch
    assert not torch.keys() & pins("requirements.lock").keys()
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in torch)


def test_this_environment_is_the_locked_one() -> None:
    locked = pins("requirements.lock") | {"torch": PINS["torch"]}
    found = {name: version(name).split("+")[0] for name in locked}
    assert found == locked, "run script/setup"


# script/setup, with stand-ins for the indexes


def wheel(folder: Path, name: str, release: str, requires: str = "") -> str:
    """Write a wheel with nothing in it into `folder` and return its digest."""
    info = f"{name}-{release}.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    file = folder / f"{name}-{release}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for part, text in (
            ("METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n{needs}"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
        ):
            archive.writestr(zipfile.ZipInfo(f"{info}/{part}"), text)  # without a date: the same digest each time
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[str]:
    """A server with an ordinary index at /simple and one of CPU builds at /cpu."""
    root = tmp_path / "indexes"

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    for folder in ("simple/torch", "simple/cuda-toolkit", "simple/other", "cpu/torch"):
        (root / folder).mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment, to be copied."""
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def project(tmp_path: Path, indexes: str, empty_environment: Path) -> Path:
    """A project of script/setup and three small packages: torch, what its ordinary build needs, and another."""
    root, served = tmp_path / "project", tmp_path / "indexes"
    (root / "script").mkdir(parents=True)
    shutil.copy(PROJECT / "script" / "setup", root / "script")
    torch = wheel(served / "simple/torch", "torch", "2.13.0", "cuda-toolkit==13")
    cuda = wheel(served / "simple/cuda-toolkit", "cuda_toolkit", "13")
    other = wheel(served / "simple/other", "other", "1")
    wheel(served / "cpu/torch", "torch", "2.13.0+cpu")
    (root / "requirements.txt").write_text("torch==2.13.0\nother==1\n")
    (root / "requirements-torch.lock").write_text(
        f"torch==2.13.0 --hash=sha256:{torch}\ncuda-toolkit==13 --hash=sha256:{cuda}\n"
    )
    (root / "requirements.lock").write_text(f"other==1 --hash=sha256:{other}\n")
    shutil.copytree(empty_environment, root / ".venv", symlinks=True)
    return root


def set_up(project: Path, indexes: str, cpu_index: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_INDEX_URL": f"{indexes}/simple",
        "TORCH_CPU_INDEX": cpu_index,
        **more,
    }
    command = [str(project / "script" / "setup")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def installed(project: Path) -> set[str]:
    command = [str(project / ".venv/bin/python"), "-m", "pip", "freeze", "--disable-pip-version-check"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("_", "-").split())


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of torch")


@needs_linux
def test_setup_takes_torchs_cpu_build_where_there_is_no_gpu(project: Path, indexes: str) -> None:
    done = set_up(project, indexes, f"{indexes}/cpu")
    assert done.returncode == 0, done.stderr
    assert installed(project) == {"torch==2.13.0+cpu", "other==1"}
    assert "the CPU build" in done.stderr
    assert set_up(project, indexes, f"{indexes}/cpu").stderr == ""  # nothing is left to do


@needs_linux
def test_setup_falls_back_to_the_ordinary_index_with_one_line(project: Path, indexes: str, silent_port: int) -> None:
    done = set_up(project, indexes, f"http://127.0.0.1:{silent_port}/whl/cpu")
    assert done.returncode == 0, done.stderr
    assert installed(project) == {"torch==2.13.0", "cuda-toolkit==13", "other==1"}
    assert len([line for line in done.stderr.splitlines() if "does not answer" in line]) == 1
    assert "WARNING" not in done.stdout + done.stderr


def test_setup_takes_the_ordinary_torch_for_a_gpu_and_checks_its_hash(project: Path, indexes: str) -> None:
    (project / "nvidia-smi").write_text("#!/bin/sh\n")
    (project / "nvidia-smi").chmod(0o755)
    path = f"{project}{os.pathsep}{os.environ['PATH']}"
    wheel(project.parent / "indexes/simple/torch", "torch", "2.13.0", "something-else")
    refused = set_up(project, indexes, f"{indexes}/cpu", PATH=path)
    assert refused.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr
    wheel(project.parent / "indexes/simple/torch", "torch", "2.13.0", "cuda-toolkit==13")
    assert set_up(project, indexes, f"{indexes}/cpu", PATH=path).returncode == 0
    assert installed(project) == {"torch==2.13.0", "cuda-toolkit==13", "other==1"}


def test_setup_refuses_another_file_than_the_locked_one(project: Path, indexes: str) -> None:
    wheel(project.parent / "indexes/simple/other", "other", "1", "torch")
    done = set_up(project, indexes, f"{indexes}/cpu")
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not (project / ".venv" / ".installed").exists()


# what runs the checks elsewhere


def test_the_workflow_runs_script_test_and_fits_its_schema() -> None:
    file = PROJECT / ".github" / "workflows" / "test.yml"
    steps = yaml.safe_load(file.read_text())["jobs"]["test"]["steps"]
    assert "script/test" in [step.get("run") for step in steps]
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_weekly_audit_fits_its_schema() -> None:
    file = PROJECT / ".github" / "workflows" / "audit.yml"
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_checks_before_a_commit_use_the_pinned_ruff() -> None:
    configured = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in configured["repos"] for hook in repo["hooks"]]
    assert [hook["additional_dependencies"] for hook in hooks] == [[f"ruff=={PINS['ruff']}"]] * 2


# deploy/


def test_replicates_image_holds_what_the_predictor_reads() -> None:
    config = yaml.safe_load((PROJECT / "deploy" / "replicate" / "cog.yaml").read_text())
    assert {key: value for key, value in config["build"].items() if key != "run"} == COG["build"]
    assert config["predict"] == COG["predict"]
    settings = Settings.from_env(dict(line.split("=") for line in config["environment"]))
    assert settings.profile == "full"
    dev, schnell, *checkers = [shlex.split(step["command"]) for step in config["build"]["run"]]
    assert dev[dev.index("--local-dir") + 1] == settings.dev
    assert schnell[schnell.index("--local-dir") + 1] == settings.schnell
    for command, parts in ((dev, (*OWN, *SHARED)), (schnell, OWN)):
        patterns = command[command.index("--include") + 1 :]
        for part in parts:
            assert any(fnmatch.fnmatch(f"{part.name}/{part.config}", pattern) for pattern in patterns), part.name
    for command, file in zip(checkers, (CONCEPTS, OPINION), strict=True):
        assert command[2:4] == [file.repository, file.name]
        assert command[command.index("--revision") + 1] == file.revision
        assert command[command.index("--local-dir") + 1] == f"{settings.safety_folder}/{file.repository}"


def test_the_token_reaches_replicates_image_as_a_secret_alone() -> None:
    config = yaml.safe_load((PROJECT / "deploy" / "replicate" / "cog.yaml").read_text())
    (mount,) = (mount for step in config["build"]["run"] for mount in step.get("mounts", ()))
    assert mount == {"type": "secret", "id": "hf_token", "target": "/run/secrets/hf_token"}
    assert not any("TOKEN" in line for line in config["environment"])


def test_the_kubernetes_manifest_fits_kubernetes_schema() -> None:
    file = PROJECT / "deploy" / "kubernetes" / "flux.yaml"
    for document in yaml.safe_load_all(file.read_text()):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("probe", "passing"),
    [("startupProbe", {"READY", "BUSY"}), ("livenessProbe", {"STARTING", "READY", "BUSY"})],
)
def test_the_probes_read_the_status(probe: str, passing: set[str], tmp_path: Path) -> None:
    documents = yaml.safe_load_all((PROJECT / "deploy" / "kubernetes" / "flux.yaml").read_text())
    (container,) = next(d for d in documents if d["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"]
    program = container[probe]["exec"]["command"][2]

    class Health(BaseHTTPRequestHandler):
        status = ""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'{{"status": "{Health.status}"}}'.encode())

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = program.replace("127.0.0.1:5000", f"127.0.0.1:{server.server_port}")
        for status in ("STARTING", "READY", "BUSY", "UNHEALTHY", "DEFUNCT", "SETUP_FAILED"):
            Health.status = status
            assert (subprocess.run([sys.executable, "-c", there]).returncode == 0) is (status in passing), status
        server.shutdown()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    unit = tmp_path / "flux.service"
    text = (PROJECT / "deploy" / "systemd" / "flux.service").read_text()
    assert "WorkingDirectory=/opt/flux\n" in text
    unit.write_text(text.replace("/opt/flux", str(PROJECT)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
