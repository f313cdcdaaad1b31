"""Files of other models, and what they are: one table, a row for each model. Also keys that FLUX.1 files may leave out.

A file is recognised by, in this order:

    what its metadata says        modelspec.architecture, ss_base_model_version
    its keys                      a pattern that no file of FLUX.1 has
    its blocks and its width      how many double and single blocks, counted from 0 without a gap; the size of a vector

A LoRA of attention layers alone has the same names in FLUX.1, FLUX.2 [klein], Flex.1 and Chroma. Blocks tell the first
three apart; for Chroma, which has as many, the metadata alone does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lora_loading.reading.header import Header
from lora_loading.reading.metadata import base_model
from lora_loading.shapes import TRANSFORMER, ModelShapes

Blocks = tuple[int, int]
"""How many double and single blocks."""
_P = (
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.|unet\.|model\.|dit\.|pipe\.|lora_unet_|lora_transformer_"
    r"|lycoris_)*"
)
"""Any prefix."""
_N = r"[._]\d+[._]"
"""The number of a block."""


@dataclass(frozen=True)
class OtherModel:
    """A row: what the file is, and by what it is recognised; a width, if given, must agree where the file shows it."""

    name: str
    declared: str = ""
    """Pattern of what the metadata says, in lower-case letters and digits alone."""
    keys: str = ""
    """Pattern of the beginning of a key."""
    blocks: tuple[Blocks, ...] = ()
    width: int | None = None


def _lora(name: str, declared: str = "", keys: str = "", blocks: tuple[Blocks, ...] = (), width: int | None = None) -> OtherModel:  # noqa: E501 # fmt: skip
    return OtherModel(f"a LoRA for {name}", declared, keys, blocks, width)


_FLUX_2 = (
    rf"{_P}(?:(?:double_stream|single_stream)_modulation[._]|single_transformer_blocks{_N}attn[._]to_qkv_mlp_proj"
    rf"|transformer_blocks{_N}ff(?:_context)?[._]linear_(?:in|out))"
)
_LUMINA = rf"{_P}(?:layers|noise_refiner|context_refiner){_N}(?:attn|attention|feed_forward)[._]"
_SD3 = r"(?:.*[._])?joint_blocks[._]"
_ATTENTION_1 = rf"{_P}transformer_blocks{_N}attn[12][._]"

MODELS: tuple[OtherModel, ...] = (
    OtherModel("a ControlNet", "", rf"{_P}controlnet_|(?:.*\.)?controlnet_(?:blocks|mode|x_embedder|single_blocks)"),
    OtherModel("an IP-Adapter", "", r"(?:.*\.)?ip_adapter|image_proj\.|ip_adapter_proj"),
    OtherModel("FLUX.1 Redux, an adapter for images as prompts", "", r"redux_(?:up|down)\."),
    OtherModel("a LoRA in Nunchaku's packed format", "", r"(?:.*[._])?(?:mlp(?:_context)?_fc[12]|qkv_proj(?:_context)?|out_proj(?:_context)?)\.lora_(?:down|up)$|.*\.(?:qweight|wscales|smooth_factor)$"),  # noqa: E501
    OtherModel("a file of embeddings alone (textual inversion)", "", r"emb_params$|string_to_param|(?:clip_l|clip_g|t5|t5xxl)(?:_out)?$|text_encoders_\d$|<[^>]+>$"),  # noqa: E501
    _lora("FLUX.3", "flux3", rf"{_P}(?:(?:txt_)?mode_blocks|early_stream_modulations|single_stream_modulations|x_embedders)\."),  # noqa: E501
    _lora("FLUX.2 [klein] 4B", "flux2klein4b", _FLUX_2, ((5, 20), (5, 0)), 3072),
    _lora("FLUX.2 [klein] 9B", "flux2klein9b", _FLUX_2, ((8, 24),), 4096),
    _lora("FLUX.2 [klein]", "flux2klein"),
    _lora("FLUX.2 [dev]", "flux2", _FLUX_2, ((8, 48),), 6144),
    _lora("FLUX.2", "", _FLUX_2),
    _lora("Chroma", "chroma", rf"{_P}distilled_guidance_layer[._]"),
    _lora("FIBO", "fibo", rf"{_P}caption_projection{_N}linear"),
    _lora("Bria", "bria", "", ((8, 28),)),
    _lora("flux-lite", "fluxlite|flux1lite|flite"),
    _lora("Flex", "^flex[12]"),
    _lora("Flex.1, flux-lite or FIBO", "", "", ((8, 38),)),
    _lora("LongCat-Image", "longcat", "", ((10, 20),)),
    _lora("Ovis-Image", "ovis", "", ((6, 27),)),
    _lora("Qwen-Image", "qwenimage", rf"{_P}transformer_blocks{_N}(?:img|txt)_(?:mlp|mod)[._]", ((60, 0),)),
    _lora("Krea-2", "krea2", rf"{_P}(?:(?:text_fusion|txtfusion)[._]|transformer_blocks{_N}(?:attn[._]to_gate|ff[._](?:gate|up|down)[._])|blocks{_N}attn[._](?:wq|wk|wv|wo|gate)[._])", ((28, 0),)),  # noqa: E501
    _lora("HunyuanImage", "hunyuanimage", "", ((20, 40),), 3584),
    _lora("HunyuanVideo", "hunyuanvideo", rf"{_P}(?:double_blocks\.\d+\.(?:img|txt)_(?:attn_|mlp\.fc|mod\.linear)|(?:.*[._])?individual_token_refiner|context_embedder\.token_refiner|lora_unet_double_blocks_\d+_(?:img|txt)_(?:mlp_fc|mod_linear)|double_blocks_\d+_(?:img|txt)_(?:mlp_fc|mod_linear))", ((20, 40),), 3072),  # noqa: E501
    _lora("Anima", "anima", r"(?:.*[._])?llm_adapter[._]"),
    _lora("Cosmos or Anima", "cosmos", rf"{_P}(?:net[._])?blocks{_N}(?:(?:self|cross)_attn[._](?:[qkv]|output)_proj|mlp[._]layer[12]|adaln_modulation|block[._]attn)|{_P}transformer_blocks{_N}norm[123][._]linear_[12]"),  # noqa: E501
    _lora("Wan", "wan", rf"{_P}(?:blocks{_N}(?:(?:self|cross)_attn[._](?:[qkvo]|[qk]_img|v_img)\b|(?:self|cross)_attn_[qkvo]\.|ffn[._]|attn[12][._])|_blocks{_N})"),  # noqa: E501
    _lora("LTX-Video", "^ltx(?!2)|ltxv", _ATTENTION_1, width=2048),
    _lora("LTX-2", "ltx2", rf"{_P}transformer_blocks{_N}(?:audio_|video_to_audio|audio_to_video)"),
    _lora("PixArt", "pixart", _ATTENTION_1, width=1152),
    _lora("Sana", "^sana", _ATTENTION_1, width=2240),
    _lora("LTX-Video, Cosmos or PixArt", "", _ATTENTION_1),
    _lora("Lumina-Image 2", "lumina", _LUMINA, width=2304),
    _lora("Z-Image", "zimage", _LUMINA, width=3840),
    _lora("Z-Image or Lumina-Image 2", "", _LUMINA),
    _lora("AuraFlow", "auraflow", rf"{_P}(?:joint_transformer_blocks|(?:double|single)_layers){_N}"),
    _lora("HiDream", "hidream", rf"{_P}(?:double|single)_stream_blocks{_N}"),
    _lora("Stable Diffusion 3 or 3.5 Medium", "", _SD3, ((24, 0),), 1536),
    _lora("Stable Diffusion 3.5 Large", "", _SD3, ((38, 0),), 2432),
    _lora("Stable Diffusion 3", "^(?:sd3|stablediffusionv?3)", _SD3),
    _lora("Stable Diffusion XL", "^sdxl|stablediffusionxl"),
    _lora("Stable Diffusion 1.5 or 2", "^(?:sd[12]|stablediffusionv[12])"),
    _lora("Stable Diffusion 1.5 or SDXL", "", rf"{_P}(?:down|up|mid)_block|lora_unet_(?:input|output|middle)_block|lora_te2_text_model_|lora_te_text_model_encoder_layers_(?:1[2-9]|2\d)_"),  # noqa: E501
    OtherModel("a LoRA for another model (its blocks are called blocks.N)", "", rf"{_P}blocks{_N}(?!attn[._][ab]_to_|ff_[ab][._]|norm1_[ab][._])"),  # noqa: E501
)  # fmt: skip
CHECKPOINT = re.compile(
    r"(?:.*\.)?(?:qkv|linear1|linear2|to_q|to_k|to_v|proj_out|proj_mlp|SelfAttention\.q|self_attn\.q_proj|conv_in)\.weight"
)
WHOLE = re.compile(rf"{_P}(?:x_embedder|img_in)\.weight")
RELATED: tuple[tuple[str, str], ...] = (
    ("kontext", "FLUX.1 Kontext"),
    ("flux1?(?:dev)?krea|krea1?dev", "FLUX.1 Krea"),
    ("flux1?(?:dev)?fill", "FLUX.1 Fill"),
    ("flux1?(?:dev)?canny", "FLUX.1 Canny"),
    ("flux1?(?:dev)?depth", "FLUX.1 Depth"),
    ("flux1?(?:dev)?redux", "FLUX.1 Redux"),
)
"""Models of FLUX.1's own layers: their LoRAs load wherever their shapes fit, and the log says so."""
_FLUX_1 = re.compile(r"flux(?:1|dev|schnell|$)|fluxkontext|fluxkrea|fluxfill")


def other_model(header: Header, shapes: ModelShapes, keys_are_known: bool = False) -> str | None:
    """What a file is instead of a LoRA for FLUX.1, None if nothing tells.

    Args:
        header: the file's.
        shapes: the model's; a file with as many blocks is not judged by them.
        keys_are_known: every key belongs to a layer of FLUX.1, so patterns of keys are not asked.
    """
    said = _normalised(base_model(header.metadata))
    for model in MODELS:
        if model.declared and re.search(model.declared, said) and not _is_flux_1(said):
            return model.name
    width = None
    if not keys_are_known:
        width = _width(header)
        for model in MODELS:
            if model.keys and model.width in (None, width) and any(re.match(model.keys, key) for key in header.tensors):
                return model.name
        if any(WHOLE.fullmatch(key) for key in header.tensors) and not any(map(CHECKPOINT.fullmatch, header.tensors)):
            return "a control LoRA (it holds the whole weight of the input layer)"
        if any(map(CHECKPOINT.fullmatch, header.tensors)):
            return "a full checkpoint"
    blocks = block_counts(header.tensors)
    if _is_flux_1(said) or blocks is None or blocks == _blocks_of(shapes):
        return None
    return _by_blocks(blocks, width or _width(header))


def _by_blocks(blocks: Blocks, width: int | None) -> str | None:
    for model in MODELS:
        if blocks in model.blocks and model.width in (None, width):
            return f"{model.name}, by its {blocks[0]} double and {blocks[1]} single blocks"
    of_width = {m.width: m.name for m in reversed(MODELS) if m.blocks and m.width not in (None, 3072)}
    return of_width.get(width) if width is not None else None


def related_model(metadata: Mapping[str, str]) -> str | None:
    """The model of FLUX.1's kin that the file says it is for, None if it says nothing or FLUX.1 itself."""
    said = _normalised(base_model(metadata))
    return next((name for pattern, name in RELATED if re.search(pattern, said)), None)


def _normalised(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _is_flux_1(said: str) -> bool:
    return _FLUX_1.match(said) is not None and "lite" not in said


_BLOCK = re.compile(rf"{_P}(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)[._](\d+)[._]")


def block_counts(keys: Collection[str]) -> Blocks | None:
    """How many double and single blocks a file has; None if they do not begin at 0 or have gaps."""
    found: tuple[set[int], set[int]] = set(), set()
    for key in keys:
        if match := _BLOCK.match(key):
            found[match[1].startswith("single")].add(int(match[2]))
    whole = all(indices == set(range(len(indices))) for indices in found)
    return (len(found[0]), len(found[1])) if whole and any(found) else None


def _blocks_of(shapes: ModelShapes) -> Blocks | None:
    return block_counts([f"{name}." for name in shapes.by_component[TRANSFORMER]])


_QUERY = re.compile(
    rf"{_P}(?:double_blocks|transformer_blocks|layers){_N}(?:(?:img_)?att(?:n|ention)1?)[._](?:to_q|qkv|to_qkv|wq)[._](?:\d[._])?"
    r"(?:lora_A.*weight|lora_down\.weight|lora\.down\.weight|lora_A)"
)


def _width(header: Header) -> int | None:
    """The size of the vectors that the attention layers read, where a low-rank file shows it."""
    sizes = (info.shape[-1] for key, info in header.tensors.items() if info.shape and _QUERY.fullmatch(key))
    return next(sizes, None)


def left_out(paths: Iterable[str], shapes: ModelShapes) -> frozenset[str]:
    """Those of the paths that mean nothing in this model and can be left out without a change of its images.

    CLIP's projection of text comes after the vector that FLUX.1 reads. [schnell] has no embedder for guidance.
    """
    harmless = [
        r"(?:lora_te\d?[_.]|text_encoder\.|text_encoders\.clip_l\.|clip_l\.)(?:transformer\.)?(?:text_projection|logit_scale)"
    ]
    if not any("guidance_embedder" in name for name in shapes.by_component[TRANSFORMER]):
        harmless.append(r".*guidance_(?:in|embedder)[._].*")
    pattern = re.compile("|".join(harmless))
    return frozenset(path for path in paths if pattern.fullmatch(path))
