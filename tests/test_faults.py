"""After any fault at any stage: the right error, nothing left behind, and the next requests give their golden bytes.

Through Cog's real server, whose predictor has a trip-wire at each stage (`tests/faults.py`). The ordinary run takes
every fault at one stage, every stage with one fault, and a cancellation at every stage; `-m slow` takes all of them.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load, save

from cli.serve import start_server, stop_server, wait_until_ready
from tests.cli.test_serve import Client, free_port
from tests.conftest import QUICK
from tests.faults import FAULT_FILE, HANG, MARK, NOT_FINITE, RAISED, STAGES, WITH_NUMBERS
from tests.paths import DATA, PROJECT
from tests.services import Reply, Storage, StoredFile

LORA = load((DATA / "loras" / "tok-style.safetensors").read_bytes())
SETTLE_SECONDS = 3


@dataclass
class Victim:
    """A server whose predictor has trip-wires, and what may not grow in it."""

    client: Client
    storage: Storage
    folder: Path
    worker: int
    golden: Any = None
    golden_with_lora: Any = None
    count: Iterator[int] = field(default_factory=itertools.count)

    def new_lora(self) -> str:
        """The address of the LoRA under a new name and digest, so that no cache knows it."""
        content = save(LORA, metadata={"number": str(next(self.count))})
        return self.storage.put(f"/{next(self.count)}.safetensors", StoredFile(content, '"1"'))

    def inputs(self) -> dict[str, Any]:
        """A request that goes through every stage."""
        return {**QUICK, "prompt": f"a red circle, number {next(self.count)}", "replicate_weights": self.new_lora()}

    def arm(self, stage: str, fault: str) -> None:
        file = self.folder / "fault.json"
        written = file.with_suffix(".new")
        written.write_text(json.dumps({"stage": stage, "fault": fault}))
        written.replace(file)

    def disarm(self) -> None:
        for name in ("fault.json", "fault.json.hanging"):
            (self.folder / name).unlink(missing_ok=True)

    def good(self) -> tuple[Any, Any]:
        """The output of two good requests, without and with the LoRA."""
        plain = self.client.predict(prompt="a blue square")
        with_lora = self.client.predict(prompt="a blue square", replicate_weights=self.new_lora())
        for answer in (plain, with_lora):
            assert answer["status"] == "succeeded", answer["error"]
        return plain["output"], with_lora["output"]

    def leftovers(self) -> list[str]:
        """Files of downloads and inputs, and locks, that nothing needs any more."""
        cache, temporary = self.folder / "cache", self.folder / "tmp"
        found = [str(path) for path in (cache / "partial").iterdir()]
        found += [path.name for path in temporary.iterdir() if path.name.startswith("flux-")]
        for lock in (cache / "locks").iterdir():
            with lock.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(f"lock {lock.name}")
        return found

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.worker}/fd"))  # noqa: PTH208

    def threads(self) -> list[str]:
        """The threads of ours that were alive when the last prediction began; coglet's own come and go."""
        return (self.folder / "fault.json.threads").read_text().split()

    def settled(self, files: int) -> None:
        """Wait until no thread of ours is left and no more files are open than before."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.open_files() > files and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.threads() == []
        assert self.open_files() <= files


def children(pid: int) -> list[int]:
    """Those of all its threads."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder, port = tmp_path_factory.mktemp("faults"), free_port()
    (folder / "tmp").mkdir()
    with Storage("127.0.0.1") as storage, pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLUX_CACHE_DIR", str(folder / "cache"))
        environment.setenv("FLUX_CACHE_MIN_FREE_GB", "0")
        environment.setenv("FLUX_TRUSTED_HOSTS", storage.authority)
        environment.setenv("FLUX_METADATA", "mark")  # the digests of new LoRAs would differ in the settings
        environment.setenv("TMPDIR", str(folder / "tmp"))
        environment.setenv(FAULT_FILE, str(folder / "fault.json"))
        server = start_server("127.0.0.1", port, predictor="tests/faults.py:FaultyPredictor")
        try:
            assert wait_until_ready(server, "127.0.0.1", port, 120) == "READY"
            worker = max(children(server.pid), key=resident_bytes)
            victim = Victim(Client(f"http://127.0.0.1:{port}"), storage, folder, worker)
            for _ in range(2):  # the first requests start threads and open files that stay
                victim.golden, victim.golden_with_lora = victim.good()
            yield victim
        finally:
            stop_server(server, 10)


def expected(stage: str, fault: str) -> str:
    """What the error says."""
    if stage == "check":
        return "the check for NSFW content could not be completed"
    if fault == NOT_FINITE:
        return "not finite"
    if fault == "device memory" and stage in ("apply", "encode the prompt", "denoise", "decode"):
        return "ran out of memory, twice"
    if fault == "timeout" and stage in ("download", "verify"):
        return "The file cannot be stored: TimeoutError"
    return "StopIteration" if fault == "stop iteration" else MARK


def check_fault(victim: Victim, stage: str, fault: str) -> None:
    files = victim.open_files()
    inputs = victim.inputs()
    victim.arm(stage, fault)
    try:
        answer = victim.client.predict(**inputs)
    finally:
        victim.disarm()
    assert answer["status"] == "failed"
    assert expected(stage, fault) in answer["error"]
    assert "Traceback" not in answer["error"]
    assert victim.leftovers() == []
    assert victim.client.predict(**inputs)["status"] == "succeeded", "the same request fails again"
    assert victim.good() == (victim.golden, victim.golden_with_lora)
    victim.settled(files)


def check_cancellation(victim: Victim, stage: str) -> None:
    """Cancel while the stage is at work; the slot is free within a second."""
    client, name = victim.client, f"cancel-{next(victim.count)}"
    files = victim.open_files()
    victim.arm(stage, HANG)
    try:
        client.wait_for_slot()
        assert client.call("PUT", f"/predictions/{name}", {"input": victim.inputs()}, Prefer="respond-async")[0] == 202
        deadline = time.monotonic() + 20
        while not (victim.folder / "fault.json.hanging").exists():
            assert time.monotonic() < deadline, "the stage was not reached"
            time.sleep(0.01)
        started = time.monotonic()
        assert client.call("POST", f"/predictions/{name}/cancel")[0] == 200
        if stage in ("encode the image", "write"):  # in a thread whose end the prediction waits for
            victim.disarm()
        client.wait_for_slot()
        assert time.monotonic() - started < 1
    finally:
        victim.disarm()
    assert victim.leftovers() == []
    assert victim.good() == (victim.golden, victim.golden_with_lora)
    victim.settled(files)


def served(**answer: Any) -> StoredFile:
    return StoredFile(b"", first=[Reply(**answer)] * 9)


def changed(name: str, value: float) -> bytes:
    """The LoRA with one number of one tensor set."""
    tensor = LORA[name].copy()
    tensor.flat[0] = value
    return save({**LORA, name: tensor})


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


FIRST = sorted(LORA)[0]
CONTENT = save(LORA)
OUTSIDE: dict[str, tuple[str, StoredFile, str]] = {
    "not found": ("lora", served(status=404), "has no such thing"),
    "refused": ("lora", served(status=403), "refuses"),
    "failing": ("lora", served(status=500, headers={"Retry-After": "0"}), "failed (status 500)"),
    "web page": ("lora", StoredFile(b"<!DOCTYPE html><title>Sorry</title>"), "it is a web page"),
    "cut off": ("lora", StoredFile(CONTENT, ranges=False, declared_length=len(CONTENT) + 9), "cut"),
    "too short": ("lora", StoredFile(CONTENT[:-9]), "not fully covered"),
    "compressed": ("lora", StoredFile(CONTENT, gzip=True), "gzip encoding"),
    "redirects for ever": (
        "lora",
        served(status=302, headers={"Location": "/lora.safetensors"}),
        "redirects more than",
    ),
    "redirect inside": ("lora", served(status=302, headers={"Location": "https://127.0.0.1:1/x"}), "public internet"),
    "NaN": ("lora", StoredFile(changed(FIRST, float("nan"))), "not finite"),
    "infinite": ("lora", StoredFile(changed(FIRST, float("inf"))), "not finite"),
    "another shape": ("lora", StoredFile(save({**LORA, FIRST: LORA[FIRST][:, :-1].copy()})), "Cannot use LoRA"),
    "one factor": ("lora", StoredFile(save({FIRST: LORA[FIRST]})), "Cannot use LoRA"),
    "no image": ("image", StoredFile(b"no image"), "not in a format that can be read"),
    "image cut off": ("image", StoredFile(png(256, 256)[:60]), "damaged"),
    "image bomb": ("image", StoredFile(png(9000, 9000)), "megapixels"),
    "image too thin": ("image", StoredFile(png(2000, 100)), "8:1"),
    "image not found": ("image", served(status=404), "answered 404"),
}
"""What hosts send: for which input, what is served, what the error says."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_hosts_send(victim: Victim, name: str) -> None:
    kind, file, found = OUTSIDE[name]
    files = victim.open_files()
    address = victim.storage.put("/lora.safetensors" if kind == "lora" else "/image.png", replace(file))
    given = {"replicate_weights" if kind == "lora" else "image": f"{address}?{next(victim.count)}"}
    answer = victim.client.predict(**given)
    assert answer["status"] == "failed"
    assert found in answer["error"]
    assert victim.leftovers() == []
    assert victim.good() == (victim.golden, victim.golden_with_lora)
    victim.settled(files)


ROTATED = [(fault, STAGES[index % len(STAGES)]) for index, fault in enumerate(RAISED)]


@pytest.mark.parametrize(("fault", "stage"), ROTATED)
def test_every_fault_at_one_stage(victim: Victim, fault: str, stage: str) -> None:
    check_fault(victim, stage, fault)


@pytest.mark.parametrize("stage", WITH_NUMBERS)
def test_numbers_that_are_not_finite(victim: Victim, stage: str) -> None:
    check_fault(victim, stage, NOT_FINITE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancellation_at_every_stage(victim: Victim, stage: str) -> None:
    check_cancellation(victim, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", RAISED)
def test_every_fault_at_every_stage(victim: Victim, fault: str, stage: str) -> None:
    check_fault(victim, stage, fault)


def test_the_temporary_folder_is_the_servers_own(victim: Victim) -> None:
    """So that the tests above look where the server writes."""
    assert tempfile.gettempdir() != str(victim.folder / "tmp")
    assert victim.client.predict()["status"] == "succeeded"


def test_the_table_of_faults_names_each_of_them_and_every_stage() -> None:
    text = (PROJECT / "docs" / "robustness.md").read_text()
    table = text.partition("## Injected faults")[2].partition("## ")[0]
    head, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [stage for stage in STAGES if stage not in head] == []
    assert [fault for fault in [*RAISED, NOT_FINITE] if not any(f"`{fault}`" in row for row in rows)] == []
