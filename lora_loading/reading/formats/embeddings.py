"""New words that a file brings along: OneTrainer's bundled embeddings.

bundle_emb.ohwx.clip_l        (tokens, width of CLIP): what CLIP reads for the word
bundle_emb.ohwx.t5            (tokens, width of T5)
bundle_emb.ohwx.clip_l_out    what replaces CLIP's output for the word; OneTrainer itself ignores it for FLUX.1
bundle_emb.ohwx.t5_out        what replaces T5's output for the word; not applied here
"""

from __future__ import annotations

import re

from lora_loading.shapes import CLIP, T5

PATTERN = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<encoder>clip_l|t5)(?P<output>_out)?")
ENCODERS = {"clip_l": CLIP, "t5": T5}


def read_embedding_key(key: str) -> tuple[str, str] | None:
    """The word and the component of an embedding's key, None for any other key."""
    match = PATTERN.fullmatch(key)
    return None if match is None or match["output"] else (match["word"], ENCODERS[match["encoder"]])


def is_output_embedding(key: str) -> bool:
    """Whether the tensor replaces the output of a text encoder."""
    match = PATTERN.fullmatch(key)
    return match is not None and match["output"] is not None
