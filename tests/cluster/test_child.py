"""A replica's child: nothing of it is left, however its parts end; and what it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from cli.serve import health
from cluster.child import Child, own_environment, prediction_path
from tests.cli.test_serve import Client
from tests.paths import PROJECT

SERVER = """
import os, pathlib, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(f"{worker.pid} ")
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""
"""A server with a worker in a session of its own, as `cli.serve` has one."""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are inherited on Linux alone")
@pytest.mark.parametrize("how", ["killed", "stopped", "deaf"])
def test_nothing_is_left_of_a_server(tmp_path: Path, how: str) -> None:
    noted = tmp_path / "worker"
    guardian = subprocess.Popen(
        [sys.executable, "-m", "cluster.child", sys.executable, "-c", SERVER, str(noted), how],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    guardian.wait(60)
    deadline = time.monotonic() + 60
    while not (noted.exists() and noted.read_text().endswith(" ")) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(noted.read_text())
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    if how != "killed":
        guardian.stdin.close()  # as when the replica is gone
    assert guardian.stdout.read() == b""  # closed when the guardian has ended
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def family_of(mark: str) -> dict[int, str]:
    """The processes that have this variable in their environment, with their command lines."""
    family = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                family[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return family


IDS = ("plain-7", "tenant/7", "job?7", "a#b", "../shutdown?", "..", ".", "100%", "a%2Fb", 'quoted" id', "\u00e9 \u6f22")


@pytest.mark.parametrize("id", IDS)
def test_an_id_is_one_segment_of_its_address(id: str) -> None:
    """As httpx sends it, which is the replica's client."""
    with httpx.Client(base_url="http://127.0.0.1:1") as client:
        for end in ("", "/cancel"):
            sent = client.build_request("POST", prediction_path(id) + end).url.raw_path.decode()
            assert sent.startswith("/predictions/")
            assert sent.endswith(end)
            segment = sent.removeprefix("/predictions/").removesuffix(end)
            assert "/" not in segment
            assert unquote(segment) == id


@pytest.mark.slow
def test_the_real_server_takes_any_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_CACHE_DIR", str(tmp_path))
    child = Child("seat-0", threads=1)
    try:
        while health("127.0.0.1", child.port).get("status") != "READY":
            assert child.alive
            time.sleep(0.5)
        body = {"input": {"prompt": "a red circle", "model": "schnell", "num_inference_steps": 1, "megapixels": "0.25"}}
        with httpx.Client(base_url=child.address, timeout=120) as client:
            for id in IDS:
                while (answer := client.put(prediction_path(id), json=body)).status_code == 409:
                    time.sleep(0.05)  # for a moment after an answer
                document = answer.json()
                assert (document["id"], document["status"]) == (id, "succeeded")
    finally:
        child.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("coglet.server._run_worker", signal.SIGSTOP),
        ("cog.server.http", signal.SIGSTOP),
        ("-m cli.serve --port", signal.SIGSTOP),
        ("-m cli.serve --port", signal.SIGKILL),
    ],
)
def test_the_real_server_is_ended_whichever_of_its_processes_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, number: int
) -> None:
    monkeypatch.setenv("FLUX_CACHE_DIR", str(tmp_path))
    child = Child("seat-0", threads=1)
    while health("127.0.0.1", child.port).get("status") != "READY":
        assert child.alive
        time.sleep(0.5)
    family = family_of(f"FLUX_CACHE_DIR={tmp_path}")
    (stuck,) = [pid for pid, command in family.items() if who in command and "cluster.child" not in command]
    body = {"input": {"prompt": "a red circle", "num_inference_steps": 50, "num_outputs": 4}}
    status, _ = Client(child.address).call("PUT", "/predictions/long", body, Prefer="respond-async")
    assert status == 202
    os.kill(stuck, number)
    child.end()
    assert not child.alive
    assert not set(family) & set(family_of(f"FLUX_CACHE_DIR={tmp_path}"))


@pytest.mark.parametrize(
    ("given", "threads", "own"),
    [
        ({}, None, {}),
        ({"FLUX_CACHE_DIR": "/disk"}, 2, {"OMP_NUM_THREADS": "2"}),
        ({"FLUX_CACHE_DIR": "/disk/{seat}"}, None, {"FLUX_CACHE_DIR": "/disk/seat-3"}),
    ],
)
def test_a_child_has_its_share_and_a_folder_of_its_own_where_that_is_asked_for(
    given: dict[str, str], threads: int | None, own: dict[str, str]
) -> None:
    assert own_environment(given, "seat-3", threads) == own
