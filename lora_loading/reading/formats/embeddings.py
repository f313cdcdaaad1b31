"""New words that a file brings along: OneTrainer's bundled embeddings.

bundle_emb.ohwx.clip_l        (tokens, width of CLIP)
bundle_emb.ohwx.t5            (tokens, width of T5)
"""

from __future__ import annotations

import re

from lora_loading.shapes import CLIP, T5

PATTERN = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<encoder>clip_l|t5)")
ENCODERS = {"clip_l": CLIP, "t5": T5}


def read_embedding_key(key: str) -> tuple[str, str] | None:
    """The word and the component of an embedding's key, None for any other key."""
    match = PATTERN.fullmatch(key)
    return None if match is None else (match["word"], ENCODERS[match["encoder"]])
