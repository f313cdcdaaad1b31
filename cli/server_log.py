"""The log of Cog's server made readable: coglet writes JSON lines, of which a person needs the messages."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable

QUIET_SECONDS = 10.0
"""A start that takes longer, for instance since it downloads a model, shows its log from then on."""
LAST_LINE = "Worker shutting down"
"""What coglet logs when every answer has been sent and only the worker has yet to exit."""
_PROGRESS = re.compile(r"\s*\d+%\|")
_LEVELS = {"WARN": "warning: ", "ERROR": "error: "}


def readable(line: str) -> str | None:
    """Return what a line of the server's log tells a person: the predictor's own lines, and coglet's warnings.

    Lines that are not JSON are returned as they are; progress bars and coglet's own routine are left out.
    """
    try:
        entry = json.loads(line)
        fields, level = entry["fields"], entry["level"]
        message = str(fields["message"]).rstrip()
    except (ValueError, TypeError, KeyError):
        return line.rstrip() or None
    if "source" in fields or entry.get("target") == "coglet::user":
        return None if _PROGRESS.match(message) or "DeprecationWarning" in message else message
    if level not in _LEVELS or "deprecated" in message:
        return None
    return f"{_LEVELS[level]}{message}{': ' + fields['error'] if fields.get('error') else ''}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ServerLog:
    """Reads the server's log on a thread of its own; holds it back until the server is ready, or has failed."""

    def __init__(self, lines: Iterable[str], show: Callable[[str], None] = _print) -> None:
        self.answered = threading.Event()
        """Set when a server that is shutting down has sent its last answer."""
        self._lines = lines
        self._show = show
        self._held: list[str] | None = []
        self._lock = threading.Lock()
        self._shown_from = time.monotonic() + QUIET_SECONDS
        self._thread = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._lines:
            if f'"{LAST_LINE}"' in line:
                self.answered.set()
            if (text := readable(line)) is not None:
                self._take(text)

    def _take(self, text: str) -> None:
        with self._lock:
            if self._held is None:
                self._show(text)
            else:
                self._held.append(text)
        if time.monotonic() > self._shown_from:
            self.show_held()

    def show_held(self) -> None:
        """Show what was held back, and everything from now on."""
        with self._lock:
            for text in self._held or ():
                self._show(text)
            self._held = None

    def drop_held(self) -> None:
        """Forget what was held back; show everything from now on."""
        with self._lock:
            self._held = None

    def join(self) -> None:
        """Wait until the last line has been read."""
        self._thread.join(timeout=5)
