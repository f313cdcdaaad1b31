"""Cog's real HTTP server, called over HTTP."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli.serve import start_server, stop_server, wait_until_ready
from tests.conftest import QUICK
from tests.hostile import Behaviour, HostileHost, dripping_headers, hostile_host, silent
from tests.paths import PROJECT
from tests.services import Reply, Storage, StoredFile

PROMPT = {"prompt": "a red circle on a white background"}
SLOW = {**PROMPT, **QUICK, "width": 512, "height": 512, "num_inference_steps": 50, "num_outputs": 4}
"""Takes over ten seconds on a fast machine, so that a cancel after three finds it running."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Client:
    """Speaks JSON to one server."""

    base: str

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json", **named}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            return error.code, json.loads(text) if text.startswith(("{", "[")) else text

    def wait_for_slot(self) -> None:
        """Wait until the slot is free: coglet answers shortly before it frees the slot."""
        deadline = time.monotonic() + 60
        while self.call("GET", "/health-check")[1]["status"] != "READY":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def predict(self, **inputs: Any) -> Any:
        self.wait_for_slot()
        status, answer = self.call("POST", "/predictions", {"input": {**PROMPT, **QUICK, **inputs}})
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module")
def hostile() -> Iterator[dict[Behaviour, HostileHost]]:
    """Misbehaving hosts, trusted by the server so that they are reached at all."""
    with ExitStack() as stack:
        yield {behave: stack.enter_context(hostile_host(behave)) for behave in (silent, dripping_headers)}


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def client(
    lora_storage: Storage,
    hostile: dict[Behaviour, HostileHost],
    metrics_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLUX_CACHE_DIR", str(tmp_path_factory.mktemp("server-cache")))
        environment.setenv("FLUX_CACHE_MIN_FREE_GB", "0")
        trusted = [lora_storage.authority, *(host.authority for host in hostile.values())]
        environment.setenv("FLUX_TRUSTED_HOSTS", ",".join(trusted))
        environment.setenv("FLUX_METRICS_PORT", str(metrics_port))
        server = start_server("127.0.0.1", port)
    try:
        assert wait_until_ready(server, "127.0.0.1", port, 120) == "READY"
        yield Client(f"http://127.0.0.1:{port}")
    finally:
        assert stop_server(server) == 0


def decode(uri: str) -> tuple[str, bytes]:
    head, _, body = uri.partition(",")
    return head, base64.b64decode(body)


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_prediction_returns_images_metrics_and_logs(client: Client) -> None:
    answer = client.predict(num_outputs=2, output_format="webp", seed=99)
    assert answer["status"] == "succeeded"
    assert [decode(uri)[0] for uri in answer["output"]] == ["data:image/webp;base64"] * 2
    with Image.open(io.BytesIO(decode(answer["output"][0])[1])) as image:
        assert (image.format, image.size) == ("WEBP", (256, 256))
    assert answer["metrics"]["seed"] == 99
    assert "Using seed: 99\n" in answer["logs"]
    assert "3/3" in answer["logs"]  # the progress bar, which clients read


def test_no_seed_reports_the_one_used_and_it_repeats_the_image(client: Client) -> None:
    first = client.predict(seed=-1)
    assert client.predict(seed=first["metrics"]["seed"])["output"] == first["output"]


def test_numbers_may_come_as_floats(client: Client) -> None:
    assert client.predict(seed=7.0, num_inference_steps=3.0, guidance_scale=3)["output"] == client.predict()["output"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"num_outputs": 5}, "num_outputs"),
        ({"num_outputs": 0}, "num_outputs"),
        ({"width": 255}, "width"),
        ({"aspect_ratio": "2:1"}, "aspect_ratio"),
        ({"output_format": "gif"}, "output_format"),
        ({"prompt_strength": 1.1}, "prompt_strength"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"model": "pro"}, "model"),
    ],
)
def test_a_wrong_input_is_a_422_that_names_it(client: Client, wrong: dict[str, Any], field: str) -> None:
    status, answer = client.call("POST", "/predictions", {"input": {**PROMPT, **QUICK, **wrong}})
    assert status == 422
    assert [error["loc"] for error in answer["detail"]] == [["body", "input", field]]


def test_a_missing_prompt_is_a_422(client: Client) -> None:
    status, answer = client.call("POST", "/predictions", {"input": {}})
    assert status == 422
    assert answer["detail"][0]["loc"][-1] == "prompt"


def test_an_unknown_input_is_ignored(client: Client) -> None:
    assert client.predict(hyperdrive=11)["output"] == client.predict()["output"]


def test_a_refused_request_says_why_without_a_trace_and_the_next_works(client: Client) -> None:
    golden = client.predict()["output"]
    answer = client.predict(replicate_weights="not a lora", hf_api_token="hf_canary123")
    assert answer["status"] == "failed"
    assert 'Cannot read LoRA "not a lora"' in answer["error"]
    assert "Traceback" not in json.dumps(answer)
    assert "canary123" not in json.dumps(answer["logs"]) + answer["error"]
    assert client.predict()["output"] == golden


STYLE = (PROJECT / "tests" / "data" / "loras" / "tok-style.safetensors").read_bytes()


def test_loras_are_fetched_swapped_and_gone_again(client: Client, lora_storage: Storage) -> None:
    address = lora_storage.put("/served.safetensors", StoredFile(STYLE, '"1"'))
    none = client.predict()
    first = client.predict(replicate_weights=address)
    again = client.predict(replicate_weights=address)
    half = client.predict(replicate_weights=address, lora_scale=0.5)
    bad = client.predict(replicate_weights=address, extra_lora=f"{lora_storage.address}/nowhere.safetensors")
    (fetched,), (found,) = first["metrics"]["loras"], again["metrics"]["loras"]
    assert (fetched["cache"], found["cache"]) == ("miss", "hit")
    assert (fetched["rank"], fetched["megabytes"]) == (6, 0.2)
    assert fetched["layers"] == 45
    assert "LoRA" in fetched["format"]
    assert "served.safetensors: miss, 0.2 MB" in first["logs"]
    assert again["output"] == first["output"]
    assert len({none["output"][0], first["output"][0], half["output"][0]}) == 3
    assert bad["status"] == "failed"
    assert "nowhere.safetensors" in bad["error"]
    assert "has no such thing" in bad["error"]
    assert client.predict()["output"] == none["output"]
    assert client.predict(replicate_weights=address)["output"] == first["output"]


def test_a_cancel_during_a_slow_download_frees_the_slot(client: Client, lora_storage: Storage) -> None:
    golden = client.predict()["output"]
    address = lora_storage.put("/slow.safetensors", StoredFile(STYLE, '"1"', bytes_per_second=2000))
    client.wait_for_slot()
    inputs = {**PROMPT, **QUICK, "replicate_weights": address}
    status, _ = client.call("PUT", "/predictions/slow", {"input": inputs}, Prefer="respond-async")
    assert status == 202
    deadline = time.monotonic() + 20
    while lora_storage.count("/slow.safetensors") == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    assert client.call("POST", "/predictions/slow/cancel")[0] == 200
    client.wait_for_slot()
    assert time.monotonic() - started < 5
    assert client.predict()["output"] == golden


@pytest.mark.parametrize("text", ["/etc/hostname", "file:///etc/hostname", ""])
def test_text_that_is_no_upload_is_refused(client: Client, text: str) -> None:
    answer = client.predict(image=text)
    assert answer["status"] == "failed"
    assert "not an uploaded file" in answer["error"]


def test_an_image_and_a_mask_come_as_data_uris(client: Client, scene_image: Image.Image) -> None:
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 40, 256))
    answer = client.predict(image=data_uri(scene_image), mask=data_uri(mask), prompt_strength=0.9)
    with Image.open(io.BytesIO(decode(answer["output"][0])[1])) as image:
        kept = (40, 0, 256, 256)
        assert image.crop(kept).tobytes() == scene_image.crop(kept).tobytes()


def test_an_image_comes_from_an_address(client: Client, lora_storage: Storage, scene_image: Image.Image) -> None:
    address = lora_storage.put("/scene.png", StoredFile(decode(data_uri(scene_image))[1]))
    by_address = client.predict(image=address, prompt_strength=0.9)
    assert by_address["output"] == client.predict(image=data_uri(scene_image), prompt_strength=0.9)["output"]


@pytest.mark.parametrize("name", ["image", "replicate_weights"])
def test_no_address_leads_to_this_machine(client: Client, lora_storage: Storage, name: str) -> None:
    with Storage("127.0.0.1") as inside:
        address = inside.put("/x.safetensors", StoredFile(b"inside"))
        redirect = Reply(302, {"Location": f"{address}?signature=canary"})
        lora_storage.put("/redirect.safetensors", StoredFile(b"", first=[redirect]))
        for asked in (f"{address}?signature=canary", f"{lora_storage.address}/redirect.safetensors"):
            answer = client.predict(**{name: asked})
            assert answer["status"] == "failed"
            assert "canary" not in answer["error"] + answer["logs"]
        assert inside.requests == []


@pytest.mark.parametrize("name", ["image", "replicate_weights"])
@pytest.mark.parametrize("behave", [silent, dripping_headers])
def test_a_cancellation_frees_the_slot_within_a_second_of_a_bad_host(
    client: Client, name: str, behave: Behaviour, hostile: dict[Behaviour, HostileHost]
) -> None:
    golden = client.predict()["output"]
    client.wait_for_slot()
    inputs = {**PROMPT, **QUICK, name: f"http://{hostile[behave].authority}/x.safetensors"}
    asked, before = f"{name}-{behave.__name__}", len(hostile[behave].connections)
    assert client.call("PUT", f"/predictions/{asked}", {"input": inputs}, Prefer="respond-async")[0] == 202
    deadline = time.monotonic() + 20
    while len(hostile[behave].connections) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    started = time.monotonic()
    assert client.call("POST", f"/predictions/{asked}/cancel")[0] == 200
    client.wait_for_slot()
    assert time.monotonic() - started < 1
    assert client.predict()["output"] == golden


def test_put_creates_a_prediction_of_that_name(client: Client) -> None:
    client.wait_for_slot()
    status, answer = client.call("PUT", "/predictions/mine", {"input": {**PROMPT, **QUICK}})
    assert (status, answer["id"], answer["status"]) == (200, "mine", "succeeded")
    assert answer["output"] == client.predict()["output"]


def cancel_and_time_the_slot(client: Client, name: str, after_seconds: float) -> float:
    """Cancel a running prediction and return the seconds until the slot is free."""
    client.wait_for_slot()
    status, _ = client.call("PUT", f"/predictions/{name}", {"input": SLOW}, Prefer="respond-async")
    assert status == 202
    time.sleep(after_seconds)
    assert client.call("POST", f"/predictions/{name}/cancel")[0] == 200
    cancelled = time.monotonic()
    client.wait_for_slot()
    return time.monotonic() - cancelled


@pytest.mark.parametrize("after_seconds", [0.3, 1.5, 3.0])
def test_a_cancelled_prediction_frees_the_slot_within_a_step_and_the_next_is_golden(
    client: Client, after_seconds: float
) -> None:
    golden = client.predict()["output"]
    started = time.monotonic()
    client.predict(width=512, height=512, num_inference_steps=2)
    step_seconds = time.monotonic() - started
    assert cancel_and_time_the_slot(client, f"cancel-{after_seconds}", after_seconds) < max(1.0, step_seconds) + 0.5
    assert client.predict()["output"] == golden


def test_a_busy_server_refuses_a_second_prediction(client: Client) -> None:
    client.wait_for_slot()
    client.call("PUT", "/predictions/busy", {"input": SLOW}, Prefer="respond-async")
    try:
        assert client.call("POST", "/predictions", {"input": {**PROMPT, **QUICK}})[0] == 409
    finally:
        cancel = client.call("POST", "/predictions/busy/cancel")
        client.wait_for_slot()
    assert cancel[0] == 200


def test_the_document_is_served(client: Client) -> None:
    status, document = client.call("GET", "/openapi.json")
    assert status == 200
    assert document["components"]["schemas"]["Input"]["required"] == ["prompt"]


def test_metrics_are_served_by_the_process_that_predicts(client: Client, metrics_port: int) -> None:
    def succeeded() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as answer:
            name = 'flux_predictions_total{outcome="succeeded"} '
            return sum(float(line.removeprefix(name)) for line in answer.read().decode().splitlines() if name in line)

    before = succeeded()
    client.predict()
    client.wait_for_slot()
    assert succeeded() == before + 1


# script/serve itself, with an upload address


@pytest.fixture
def receiver() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server that stores what is PUT to it."""
    received: dict[str, bytes] = {}

    class Keep(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            received[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keep)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/images/", received
    server.shutdown()
    server.server_close()


def test_script_serve_gets_ready_uploads_and_stops_cleanly(
    receiver: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    address, received = receiver
    port = free_port()
    command = [str(PROJECT / "script" / "serve"), "--port", str(port), "--upload-url", address]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert any(line.startswith("ready on http://127.0.0.1") for line in server.stdout)
            answers = [Client(f"http://127.0.0.1:{port}").predict(num_outputs=2) for _ in range(2)]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    sent = [uri for answer in answers for uri in answer["output"]]
    assert len(set(sent)) == len(received) == 4
    assert all(data.startswith(b"\x89PNG") for data in received.values())
    numbers = [sorted(uri.rpartition("-")[2] for uri in answer["output"]) for answer in answers]
    assert numbers == [["0.png", "1.png"]] * 2  # the order in which uploads end is not that of the images
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


@dataclass
class Served:
    """A running script/serve, and what it printed so far."""

    process: subprocess.Popen[str]
    port: int

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert any(line.startswith("ready on") for line in self.process.stdout)

    def descendants(self) -> list[int]:
        """Its processes, the worker last."""
        found = [self.process.pid]
        for pid in found:
            threads = Path(f"/proc/{pid}/task").glob("*/children")
            found += [int(child) for thread in threads for child in thread.read_text().split()]
        return found


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended stays listed until whoever inherits it has read its status."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start script/serve; what is still running at the end is ended."""
    started: list[Served] = []

    def start(*arguments: str, port: int | None = None) -> Served:
        number = port or free_port()
        (tmp_path / "temporary").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [str(PROJECT / "script" / "serve"), "--port", str(number), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        )  # fmt: skip
        started.append(Served(process, number))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.terminate()
        server.process.communicate(timeout=30)


def test_a_port_in_use_is_one_line_before_anything_is_loaded(served: Callable[..., Served]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = time.monotonic()
        process = served(port=port).process
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output == ""
    assert errors == (
        f"Error: cannot listen on 127.0.0.1, port {port}: Address already in use. Choose another one with --port.\n"
    )
    assert time.monotonic() - started < 3


def test_requests_before_it_is_ready_are_refused_and_do_not_stop_it(served: Callable[..., Served]) -> None:
    server = served()
    client, statuses = Client(f"http://127.0.0.1:{server.port}"), []
    deadline = time.monotonic() + 60
    while 200 not in statuses and time.monotonic() < deadline:
        with suppress(OSError):
            statuses.append(client.call("POST", "/predictions", {"input": {**PROMPT, **QUICK}})[0])
        time.sleep(0.05)
    assert statuses[-1] == 200
    assert set(statuses) <= {503, 200}
    server.wait_until_ready()
    assert server.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_at_once(served: Callable[..., Served], number: signal.Signals) -> None:
    server = served()
    server.wait_until_ready()
    sent = time.monotonic()
    server.process.send_signal(number)
    output, errors = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert time.monotonic() - sent < 2  # one second on a quiet machine
    assert output == "stopped\n"
    (profile,) = errors.splitlines()
    assert profile.startswith("profile tiny on cpu: ")


def test_a_shutdown_that_a_caller_asks_for_is_no_fault(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a proxy of the environment is not asked about this machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server = served()
    server.wait_until_ready()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/shutdown")
    assert connection.getresponse().status == 200
    connection.close()
    output, errors = server.process.communicate(timeout=30)
    assert (server.process.returncode, output) == (0, "stopped\n")
    assert "Error" not in errors


def test_a_dead_worker_ends_the_server_with_a_line_and_leaves_nothing(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    server = served()
    server.wait_until_ready()
    processes = server.descendants()
    killed = time.monotonic()
    os.kill(processes[-1], signal.SIGKILL)
    _, errors = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert time.monotonic() - killed < 4  # two seconds on a quiet machine
    assert errors.splitlines()[-1].startswith("Error: UNHEALTHY")
    assert not any(map(is_running, processes[1:]))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_json_lines_carry_the_predictions_id(served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_LOG_FORMAT", "json")
    server = served()
    assert server.process.stdout is not None
    assert any(json.loads(line)["message"].startswith("ready on") for line in server.process.stdout)
    client = Client(f"http://127.0.0.1:{server.port}")
    status, answer = client.call("PUT", "/predictions/order-17", {"input": {**PROMPT, **QUICK}})
    assert (status, answer["status"]) == (200, "succeeded")
    server.process.terminate()
    _, errors = server.process.communicate(timeout=30)
    stages = [entry for entry in map(json.loads, errors.splitlines()) if "stage" in entry]
    assert {entry["prediction"] for entry in stages} == {"order-17"}
    assert stages[-1].items() >= {"stage": "prediction", "outcome": "succeeded", "images": 1}.items()


def test_a_dead_worker_is_replaced_where_a_restart_is_wanted(served: Callable[..., Served]) -> None:
    server = served("--restart")
    server.wait_until_ready()
    os.kill(server.descendants()[-1], signal.SIGKILL)
    server.wait_until_ready()
    assert Client(f"http://127.0.0.1:{server.port}").predict()["status"] == "succeeded"
