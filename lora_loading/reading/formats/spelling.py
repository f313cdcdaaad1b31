"""What a key's end says about its tensor, whatever family its beginning is of.

A key is a path, a dot, and a spelling of a part:

    a, b         ....lora_A.weight  .lora_A.default.weight  .lora_down.weight  .lora.down.weight  .lora_linear_layer.down.weight
    down, up     double_blocks.0.processor.qkv_lora1.down.weight                                  XLabs
    alpha        ....alpha
    magnitude    ....dora_scale  .lora_magnitude_vector  .lora_magnitude_vector.weight            a row or a column
    hada_*       ....hada_w1_a                                                                    LoHa
    lokr_*       ....lokr_w1  .lokr_w1_a                                                          LoKr
    diff         ....diff  .w_norm                                                                the whole difference
    diff_b       ....diff_b  .b_norm                                                              of the bias
    bias         ....lora_B.bias                                                                  of the second factor
    value        ....norm_q.weight  .query_norm.scale                                             a norm's new weight
    no           ....hada_t1  .lokr_t2  .lora_mid.weight  .oft_blocks  .set_weight                known, and not done
"""  # noqa: E501 - a table

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"(?:\.[A-Za-z0-9_-]+)?"
"""PEFT's name of the adapter, as in lora_A.default.weight."""
PARTS: tuple[tuple[str, str], ...] = (
    ("a", rf"lora_A{_NAME}\.weight|lora_A|(?:lora_|lora\.|lora_linear_layer\.)down\.weight|down\.weight"),
    ("b", rf"lora_B{_NAME}\.weight|lora_B|(?:lora_|lora\.|lora_linear_layer\.)up\.weight|up\.weight"),
    ("bias", rf"lora_B{_NAME}\.bias|lora_up\.bias"),
    ("alpha", r"alpha"),
    ("magnitude", rf"dora_scale|lora_magnitude_vector{_NAME}(?:\.weight)?"),
    ("diff", r"diff|w_norm"),
    ("diff_b", r"diff_b|b_norm"),
    *((part, rf"{part}{_NAME}") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((part, rf"{part}{_NAME}") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    (
        "no",
        r"(?:hada|lokr)_t[12]|lora_mid\.weight|oft_blocks|oft_diag|oft_R(?:\..*)?|vera_\w+(?:\..*)?|on_input"
        r"|boft_\w+|a1\.weight|a2\.weight|b1\.weight|b2\.weight|set_weight|reshape_weight|lora_A(?:\.\w+)?\.bias"
        r"|rescale|glora_\w+",
    ),
    ("value", r"weight|scale"),
)
_PATTERN = re.compile(
    r"(?P<path>.+?)\.(?:" + "|".join(f"(?P<p{i}>{pattern})" for i, (_, pattern) in enumerate(PARTS)) + ")"
)


@dataclass(frozen=True)
class Key:
    """A key of a file, read."""

    text: str
    path: str
    part: str


def read_key(text: str) -> Key | None:
    """The key's path and part, None if its end is none of the spellings."""
    match = _PATTERN.fullmatch(text)
    if match is None or match.lastgroup is None:
        return None
    return Key(text, match["path"], PARTS[int(match.lastgroup[1:])][0])
