"""Cog's HTTP API with Python's standard library: python examples/python/plain_http.py [folder for the images]."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

URL = os.environ.get("FLUX_URL", "http://127.0.0.1:5000")
EXAMPLES = Path(__file__).parent.parent
QUICK = {"model": "schnell", "num_inference_steps": 4, "megapixels": "0.25", "output_format": "png"}


def call(method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Send a request; while the server is busy with another prediction it answers 409, and the call is repeated."""
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json", **headers}, method=method)
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise SystemExit(f"{error.code}: {error.read().decode()}") from error
            time.sleep(0.5)


def predict(**inputs: Any) -> list[str]:
    """The data URIs of one prediction; a failed one answers 200 with its reason in `error`."""
    prediction = call("POST", "/predictions", {"input": {**QUICK, **inputs}})
    if prediction["status"] != "succeeded":
        raise SystemExit(f"{prediction['status']}: {prediction.get('error')}")
    output: list[str] = prediction["output"]
    return output


def data_uri(file: Path) -> str:
    """A file as an input: images, masks and LoRAs may be data URIs or http(s) addresses."""
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def save(uri: str, file: Path) -> None:
    """Decode an output."""
    file.write_bytes(base64.b64decode(uri.partition(",")[2]))
    print(f"wrote {file}")


class Webhooks:
    """A receiver of the server's webhooks."""

    def __init__(self) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        events = self.events

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                events.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def completed(self, name: str) -> dict[str, Any]:
        """Wait for the end of a prediction."""
        while True:
            event = self.events.get(timeout=120)
            if event["id"] == name:
                return event


def in_the_background(webhooks: Webhooks, name: str, **inputs: Any) -> None:
    """Start a prediction under a name; the result comes to the webhook alone."""
    body = {"input": inputs, "webhook": webhooks.url, "webhook_events_filter": ["completed"]}
    call("PUT", f"/predictions/{name}", body, Prefer="respond-async")


def main(folder: Path) -> None:
    """Each kind of request once."""
    folder.mkdir(parents=True, exist_ok=True)
    photo, mask = data_uri(EXAMPLES / "photo.jpg"), data_uri(EXAMPLES / "mask.png")
    lora = data_uri(EXAMPLES.parent / "tests" / "data" / "loras" / "tok-style.safetensors")
    save(predict(prompt="a red circle on a white background")[0], folder / "text.png")
    save(predict(prompt="a green heart on a white background", image=photo)[0], folder / "image.png")
    save(predict(prompt="a red square on a white background", image=photo, mask=mask)[0], folder / "mask.png")
    save(predict(prompt="a red circle on a white background", replicate_weights=lora)[0], folder / "lora.png")

    webhooks = Webhooks()
    in_the_background(webhooks, "later", prompt="a blue star on a yellow background", **QUICK)
    save(webhooks.completed("later")["output"][0], folder / "webhook.png")

    in_the_background(webhooks, "slow", prompt="a blue star on a yellow background", num_inference_steps=50)
    time.sleep(0.2)  # a cancellation in the very moment of the request may come before the prediction has begun
    call("POST", "/predictions/slow/cancel")
    print(f"slow: {webhooks.completed('slow')['status']}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
