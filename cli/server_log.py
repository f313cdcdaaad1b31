"""The log of Cog's server made readable: coglet writes JSON lines of its own around those of the predictor.

The predictor is not told its prediction's id, coglet adds it to every line. Here both come together, as text for people
or as one flat JSON object a line for a collector of logs.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

QUIET_SECONDS = 10.0
"""A start that takes longer, for instance since it downloads a model, shows its log from then on."""
LAST_LINE = "Worker shutting down"
"""What coglet logs when every answer has been sent and only the worker has yet to exit."""
_PROGRESS = re.compile(r"\s*\d+%\|")
_LEVELS = {"WARN": "warning", "ERROR": "error"}
_NOISE = ("DeprecationWarning", "deprecated")


@dataclass(frozen=True)
class Line:
    """What one line of the server's log tells."""

    message: str
    level: str = ""
    """As coglet says it; empty for a line of the predictor's."""
    prediction: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    """What the predictor's JSON line holds besides; empty where it logs text."""


def line_of(text: str) -> Line | None:
    """Return what a line tells a person: the predictor's own lines, and coglet's warnings.

    Lines that are not JSON are returned as they are; progress bars and coglet's own routine are left out.
    """
    try:
        entry = json.loads(text)
        fields, level = entry["fields"], entry["level"]
        message = str(fields["message"]).rstrip()
    except (ValueError, TypeError, KeyError):
        return Line(text.rstrip()) if text.strip() else None
    if _PROGRESS.match(message) or any(word in message for word in _NOISE):
        return None
    if "source" in fields or entry.get("target") == "coglet::user":
        return _of_the_predictor(message, fields.get("prediction_id"))
    if level not in _LEVELS:
        return None
    return Line(f"{message}{': ' + fields['error'] if fields.get('error') else ''}", _LEVELS[level])


def _of_the_predictor(message: str, prediction: str | None) -> Line:
    try:
        fields = json.loads(message)
        return Line(str(fields.pop("message")), prediction=prediction, fields=fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Line(message, prediction=prediction)


def as_text(line: Line) -> str:
    """The line for a person, the prediction's id in front."""
    level = f"{line.level}: " if line.level else ""
    return f"[{line.prediction}] {level}{line.message}" if line.prediction else f"{level}{line.message}"


def as_json(line: Line) -> str:
    """One flat JSON object."""
    of_ours = {"time": datetime.now(UTC).isoformat(), "level": line.level or "info"}
    prediction = {"prediction": line.prediction} if line.prediction else {}
    return json.dumps({**of_ours, "message": line.message, **prediction, **line.fields})


FORMATS: dict[str, Callable[[Line], str]] = {"text": as_text, "json": as_json}
"""By `FLUX_LOG_FORMAT`."""


class Console:
    """Where lines go, all in one format."""

    def __init__(self, log_format: str = "text") -> None:
        self._format = FORMATS.get(log_format, as_text)  # the setup refuses another one, in words

    def log(self, line: Line) -> None:
        """Show a line of the server's log."""
        self._print(line, sys.stderr)

    def say(self, text: str) -> None:
        """Show a line of the supervisor's own."""
        self._print(Line(text), sys.stdout)

    def error(self, text: str) -> None:
        """Show why the server ended."""
        message = f"Error: {text}" if self._format is as_text else text
        self._print(Line(message, "" if self._format is as_text else "error"), sys.stderr)

    def _print(self, line: Line, stream: TextIO) -> None:
        print(self._format(line), file=stream, flush=True)


class ServerLog:
    """Reads the server's log on a thread of its own; holds it back until the server is ready, or has failed."""

    def __init__(self, lines: Iterable[str], show: Callable[[Line], None]) -> None:
        self.answered = threading.Event()
        """Set when a server that is shutting down has sent its last answer."""
        self._lines = lines
        self._show = show
        self._held: list[Line] | None = []
        self._lock = threading.Lock()
        self._shown_from = time.monotonic() + QUIET_SECONDS
        self._thread = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for text in self._lines:
            if f'"{LAST_LINE}"' in text:
                self.answered.set()
            if (line := line_of(text)) is not None:
                self._take(line)

    def _take(self, line: Line) -> None:
        with self._lock:
            if self._held is None:
                self._show(line)
            else:
                self._held.append(line)
        if time.monotonic() > self._shown_from:
            self.show_held()

    def show_held(self) -> None:
        """Show what was held back, and everything from now on."""
        with self._lock:
            for line in self._held or ():
                self._show(line)
            self._held = None

    def drop_held(self) -> None:
        """Forget what was held back, but for the line that says which profile serves and why; show everything from now
        on."""
        with self._lock:
            for line in self._held or ():
                if line.message.startswith("profile "):
                    self._show(line)
            self._held = None

    def join(self) -> None:
        """Wait until the last line has been read."""
        self._thread.join(timeout=5)
