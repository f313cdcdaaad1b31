"""Counters of a serving process as Prometheus text, filled from the events of its log. Off unless a port is set.

The predictor serves them itself, in the process that predicts, so they are there in an image as well. They begin at 0
with each process.
"""

from __future__ import annotations

import logging
import threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, make_wsgi_app

from errors import SettingsError
from logs import Event, event_of

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)
"""Buckets of the histogram: from a cached LoRA to four large images."""
SILENT_SECONDS = 10
"""How long a client may take to send its request."""


class Metrics(logging.Handler):
    """Counts what is logged; attach it to the root logger."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._predictions = Counter("flux_predictions", "Predictions that ended", ["outcome"], registry=registry)
        self._images = Counter("flux_images", "Images that left", registry=registry)
        self._withheld = Counter("flux_images_withheld", "Images that the safety checker withheld", registry=registry)
        self._seconds = Histogram(
            "flux_stage_seconds", "Seconds of a stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self._bytes = Counter("flux_stage_bytes", "Bytes that a stage read or wrote", ["stage"], registry=registry)
        self._cache = Counter("flux_lora_cache", "How LoRA files were found", ["outcome"], registry=registry)
        self._fetched = Counter("flux_lora_fetched_bytes", "Bytes of LoRA files that were fetched", registry=registry)
        self._swaps = Counter("flux_lora_swaps", "Changes of the LoRAs that a model carries", registry=registry)
        self._last_error = Gauge(
            "flux_last_error_time_seconds", "When a prediction last failed with this error", ["kind"], registry=registry
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record's event, if it has one."""
        event = event_of(record)
        if event is None:
            return
        self._seconds.labels(event.stage).observe(event.seconds)
        self._bytes.labels(event.stage).inc(event.bytes or 0)
        match event.stage:
            case "fetch_lora":
                self._count_fetch(event)
            case "apply_loras" if event.outcome == "swapped":
                self._swaps.inc()
            case "check":
                self._withheld.inc(event.withheld or 0)
            case "prediction":
                self._count_end(event)

    def _count_fetch(self, event: Event) -> None:
        self._cache.labels(event.outcome).inc()
        if event.outcome == "miss":
            self._fetched.inc(event.bytes or 0)

    def _count_end(self, event: Event) -> None:
        self._predictions.labels(event.outcome).inc()
        self._images.inc(event.images or 0)
        if event.error is not None:
            self._last_error.labels(event.error).set_to_current_time()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def log_message(self, *arguments: object) -> None:
        """Scrapes are no news."""


def serve_metrics(metrics: Metrics, address: tuple[str, int]) -> WSGIServer:
    """Answer `GET /metrics` from a thread of its own; return the server, which runs as long as the process.

    Args:
        metrics: what is shown.
        address: host and port.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    host, port = address
    try:
        server = make_server(host, port, make_wsgi_app(metrics.registry), _Server, _Handler)
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"FLUX_METRICS_PORT asks for {host}, port {port}, which cannot be listened on: {found}. Set another one."
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
