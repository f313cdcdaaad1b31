"""Logging of a process that serves predictions: our lines shown, the libraries' chatter not."""

from __future__ import annotations

import logging
import sys
import warnings

CHATTY = ("torchao", "torch.utils._pytree", "diffusers", "transformers", "httpx2", "httpcore2", "huggingface_hub")


def configure_logging() -> None:
    """Show our log lines from INFO on stdout and the libraries' from ERROR; call it before torch is first imported."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
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
