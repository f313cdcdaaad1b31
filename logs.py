"""What a serving process logs: our lines as text or JSON, the libraries' chatter not at all.

A stage of a prediction is logged with an `Event`: its seconds and bytes. The JSON formatter writes them as fields, and
`metrics.py` counts them; who logs a stage knows neither.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

CHATTY = ("torchao", "torch.utils._pytree", "diffusers", "transformers", "httpx2", "httpcore2", "huggingface_hub")


@dataclass(frozen=True)
class Event:
    """What one stage of a prediction came to. Holds no prompt, token or address."""

    stage: str
    seconds: float
    bytes: int | None = None
    """Of the files that were read or written."""
    outcome: str | None = None
    """How a LoRA was found in the cache, whether LoRAs were swapped, how the prediction ended."""
    images: int | None = None
    withheld: int | None = None
    """How many images did not pass the safety checker."""
    error: str | None = None
    """The class of the exception that ended the prediction."""


def log_stage(logger: logging.Logger, event: Event, message: str) -> None:
    """Log one line about a stage that has ended."""
    logger.info("%s", message, extra={"event": event})


def event_of(record: logging.LogRecord) -> Event | None:
    """The event that a record was logged with."""
    event = getattr(record, "event", None)
    return event if isinstance(event, Event) else None


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, the fields of the event, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        event = event_of(record)
        facts = {} if event is None else {k: _rounded(v) for k, v in asdict(event).items() if v is not None}
        trace = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        entry = {"level": record.levelname.lower(), "message": record.getMessage(), **facts, **trace}
        return json.dumps({"time": datetime.fromtimestamp(record.created, UTC).isoformat(), **entry})


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def configure_logging(log_format: str = "text") -> None:
    """Show our log lines from INFO on stdout and the libraries' from ERROR; call it before torch is first imported.

    Args:
        log_format: one of `settings.LOG_FORMATS`; as text a line is the message alone.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
