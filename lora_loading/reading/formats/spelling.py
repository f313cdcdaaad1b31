"""The end of a key: which part of a layer's change its tensor is, in every family of names.

A key is a path, a dot, and one spelling of a part:

    a, b           ....lora_A.weight  .lora_A.default.weight  .lora_down.weight  .lora.down.weight
                   ....lora_linear_layer.down.weight  ....qkv_lora1.down.weight (XLabs)
    alpha          ....alpha  .lora_alpha (SimpleTuner)
    magnitude      ....dora_scale  .lora_magnitude_vector  .magnitude (ai-toolkit)     a row or a column of DoRA
    hada_*         ....hada_w1_a                                                       LoHa
    lokr_*         ....lokr_w1  .lokr_w1_a                                             LoKr
    oft_blocks*    ....oft_blocks (LyCORIS)  .oft_blocks.0 (kohya, one for each part)  OFT; BOFT with four dimensions
    rescale        ....rescale                                                         LyCORIS' OFT and BOFT
    oft_R          ....oft_R.weight  .oft_R.default.weight                             PEFT's OFT
    scaled_oft     ....oft_R.scaled_oft                                                OneTrainer: that OFT is scaled
    boft_R, boft_s ....boft_R  .boft_s                                                 PEFT's BOFT
    diff           ....diff  .w_norm                                                   a difference of a weight
    diff_b         ....diff_b  .b_norm                                                 a difference of a bias
    bias           ....lora_B.bias                                                     the bias of factor B
    value          ....norm_q.weight  .query_norm.scale  .set_weight (ComfyUI)         the new weight of a norm
    unsupported    ....hada_t1  .lokr_t2  .lora_mid.weight  .vera_lambda_b             recognised, but not applied
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"(?:\.[A-Za-z0-9_-]+)?"
"""PEFT's name of the adapter, as in lora_A.default.weight."""
_NAMED = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    *("boft_R", "boft_s"),
)
"""Parts that are spelt as they are called here, with or without the name of PEFT's adapter."""
MAX_SPLITS = 4
"""Into how many parts kohya's OFT splits a fused layer: q, k, v and the MLP."""
PARTS: tuple[tuple[str, str], ...] = (
    ("a", rf"lora_A{_NAME}\.weight|lora_A|(?:lora_|lora\.|lora_linear_layer\.)down\.weight|down\.weight"),
    ("b", rf"lora_B{_NAME}\.weight|lora_B|(?:lora_|lora\.|lora_linear_layer\.)up\.weight|up\.weight"),
    ("bias", rf"lora_B{_NAME}\.bias|lora_up\.bias"),
    ("alpha", r"alpha|lora_alpha"),
    ("magnitude", rf"dora_scale|magnitude|lora_magnitude_vector{_NAME}(?:\.weight)?"),
    ("diff", r"diff|w_norm"),
    ("diff_b", r"diff_b|b_norm"),
    *((part, rf"{part}{_NAME}") for part in _NAMED),
    ("oft_R", rf"oft_R{_NAME}\.weight"),
    ("scaled_oft", rf"oft_R{_NAME}\.scaled_oft"),
    ("oft_blocks", r"oft_blocks"),
    *((f"oft_blocks.{index}", rf"oft_blocks\.{index}") for index in range(MAX_SPLITS)),
    ("rescale", r"rescale"),
    (
        "unsupported",
        r"(?:hada|lokr)_t[12]|lora_mid\.weight|oft_diag|oft_[rs](?:\..*)?|vera_\w+(?:\..*)?|on_input|boft_\w+"
        r"|a1\.weight|a2\.weight|b1\.weight|b2\.weight|reshape_weight|lora_A(?:\.\w+)?\.bias|glora_\w+",
    ),
    ("value", r"weight|scale|set_weight"),
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
