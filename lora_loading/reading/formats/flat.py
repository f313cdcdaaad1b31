"""Names with underscores in place of dots, behind a prefix: kohya's sd-scripts, LyCORIS, OneTrainer's older files.

lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight               kohya: BFL names
lora_unet_final_layer_adaLN_modulation_1.lora_down.weight             kohya: outside the blocks
lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight      OneTrainer: diffusers' names
oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0                    kohya: OFT
lycoris_transformer_blocks_0_attn_to_q.lokr_w1                        LyCORIS: diffusers' names
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.reading.formats.targets import Family, Target, whole
from lora_loading.shapes import TRANSFORMER, ModelShapes


@lru_cache(maxsize=8)
def flat_targets(shapes: ModelShapes) -> Mapping[str, Target]:
    """All targets by their diffusers and BFL names, with underscores; no name stands for two targets."""
    own = {name: whole(layer) for name, layer in shapes.by_component[TRANSFORMER].items()}
    return {name.replace(".", "_"): target for name, target in {**bfl_targets(shapes), **own}.items()}


def _locate(prefixes: tuple[str, ...], path: str, shapes: ModelShapes) -> Target | None:
    names = (path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix))
    return next((found for name in names if (found := flat_targets(shapes).get(name))), None)


FAMILIES = (
    Family("kohya", partial(_locate, ("lora_unet_", "oft_unet_"))),
    Family("OneTrainer", partial(_locate, ("lora_transformer_",))),
    Family("LyCORIS", partial(_locate, ("lycoris_transformer_", "lycoris_unet_", "lycoris_"))),
)
