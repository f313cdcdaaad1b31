"""What lives where, over the cards there are and FLUX.1's real sizes; and what happens when memory does not suffice."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torchao.quantization import Float8Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.dry_run.device import H100
from benchmarks.dry_run.flux import flux_sizes, shortened
from benchmarks.dry_run.memory import memory_table
from engine.fp8 import WEIGHT_ONLY
from engine.loading import load_models
from engine.memory_plan import (
    LAYOUTS,
    RESERVE_BYTES,
    Placement,
    Sizes,
    adapter_bytes,
    new_weights_bytes,
    plan_memory,
    profile_sizes,
    sizes_of,
    working_copy_bytes,
)
from engine.out_of_memory import retry_on_oom
from engine.profiles import TINY, model_profiles
from engine.working_copy import WorkingCopy
from errors import ModelError, SettingsError
from lora_loading.known_models import flux_1
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER, ModelShapes
from lora_loading.updates import Dora, Full, LowRank, Update
from request import Mode, Size
from settings import Settings
from tests.tiny_models import narrow_transformer

CHECKER_BYTES = 1_560_000_000
"""The reference pair in float32: a CLIP ViT-L/14 and a ViT-B/16."""
CARDS = {
    "H100": 85_000_000_000,
    "A100 40 GB": 42_300_000_000,
    "L40S": 47_700_000_000,
    "RTX 4090": 25_200_000_000,
    "RTX 4080": 16_900_000_000,
    "CPU": None,
}
EVERYTHING, ONE_AT_A_TIME, FP8_ALONE = (row.name for row in LAYOUTS)


@pytest.fixture(scope="module")
def empty_flux() -> dict[str, Any]:
    """FLUX.1's modules by its published configs, without weights."""
    with torch.device("meta"):
        return {
            "transformers": [FluxTransformer2DModel(guidance_embeds=guidance) for guidance in (True, False)],
            "text_encoders": [
                CLIPTextModel(
                    CLIPTextConfig(
                        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                    )
                ),
                T5EncoderModel(
                    T5Config(
                        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
                        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
                    )
                ),
            ],
            "vae": AutoencoderKL(
                latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
        }  # fmt: skip


@pytest.fixture(scope="module")
def flux(empty_flux: dict[str, Any]) -> Sizes:
    return sizes_of(**empty_flux, text_tokens=512, fp8=True, checker_bytes=CHECKER_BYTES)


def without_fp8(sizes: Sizes) -> Sizes:
    return replace(sizes, working_copy=0)


# Sizes


def test_flux_has_the_sizes_that_its_files_have(flux: Sizes) -> None:
    found = [round(size / 1e9, 2) for size in (*flux.pristine, flux.working_copy, flux.text_encoders, flux.vae)]
    assert found == [23.80, 23.78, 12.09, 9.77, 0.17]


def test_an_image_of_1440_takes_two_gigabytes_to_denoise_and_four_to_decode(
    empty_flux: dict[str, Any], flux: Sizes
) -> None:
    narrow_vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=16)
    denoising = sizes_of(
        empty_flux["transformers"], [], narrow_vae, text_tokens=512, fp8=True, checker_bytes=0
    ).activations
    assert denoising == pytest.approx(2.1e9, rel=0.02)
    assert flux.activations == pytest.approx(4.2e9, rel=0.02)


def test_the_working_copys_size_is_what_it_takes() -> None:
    models = {
        "dev": narrow_transformer(2, 3, seed=1).bfloat16(),
        "schnell": narrow_transformer(2, 3, seed=2, guidance=False).bfloat16(),
    }
    tensors: dict[int, Tensor] = {}
    for shell in WorkingCopy(models, WEIGHT_ONLY, torch.device("cpu")).transformers.values():
        tensors |= {id(parameter): parameter for parameter in shell.parameters()}
    assert working_copy_bytes(list(models.values())) == sum(map(bytes_of, tensors.values()))


def bytes_of(tensor: Tensor) -> int:
    if isinstance(tensor, Float8Tensor):
        return bytes_of(tensor.qdata) + bytes_of(tensor.scale)
    return tensor.numel() * tensor.element_size()


def test_loras_of_rank_64_take_less_than_a_gigabyte(empty_flux: dict[str, Any]) -> None:
    dev, _ = empty_flux["transformers"]
    assert adapter_bytes(dev, 64) == 64 * 2 * 3072 * (19 * 50 + 38 * 21)


def test_a_profiles_sizes_are_those_of_its_weights() -> None:
    profiles = model_profiles("tiny", Settings())
    sizes = profile_sizes(profiles, fp8=True, checker_bytes=7)
    models = load_models(profiles, torch.device("cpu"))
    components = models["dev"].pipelines[Mode.TXT2IMG].components

    def numbers(*names: str) -> int:
        return sum(p.numel() for name in names for p in components[name].parameters())

    assert sizes.text_encoders == 2 * numbers("text_encoder", "text_encoder_2")
    assert sizes.vae == 2 * numbers("vae")
    assert sizes.pristine[0] == 2 * numbers("transformer")
    assert len(sizes.pristine) == len(models)
    assert sizes.checker == 7
    assert sizes.working_copy < sum(sizes.pristine)


def test_sizes_need_no_weights(tmp_path: Path) -> None:
    for name in ("tiny-dev", "tiny-schnell"):
        for config in (TINY / name).rglob("config.json"):
            copied = tmp_path / config.relative_to(TINY)
            copied.parent.mkdir(parents=True)
            copied.write_bytes(config.read_bytes())
    settings = Settings(dev=str(tmp_path / "tiny-dev"), schnell=str(tmp_path / "tiny-schnell"))
    bare = profile_sizes(model_profiles("full", settings), fp8=True, checker_bytes=0)
    whole = profile_sizes(model_profiles("tiny", Settings()), fp8=True, checker_bytes=0)
    assert replace(bare, activations=0) == replace(whole, activations=0)


# The plan


@pytest.mark.parametrize(
    ("card", "row", "precisions"),
    [
        ("H100", EVERYTHING, ("exact", "fast")),
        ("L40S", ONE_AT_A_TIME, ("exact", "fast")),
        ("A100 40 GB", ONE_AT_A_TIME, ("exact", "fast")),
        ("RTX 4090", FP8_ALONE, ("fast",)),
        ("CPU", EVERYTHING, ("exact", "fast")),
    ],
)
def test_each_card_gets_the_best_that_fits(flux: Sizes, card: str, row: str, precisions: tuple[str, ...]) -> None:
    plan = plan_memory(flux, CARDS[card])
    assert (plan.layout.name, plan.precisions) == (row, precisions)


@pytest.mark.parametrize(
    ("card", "row"), [("H100", EVERYTHING), ("L40S", ONE_AT_A_TIME), ("A100 40 GB", ONE_AT_A_TIME), ("CPU", EVERYTHING)]
)
def test_where_fp8_does_not_work_exact_is_all_that_is_served(flux: Sizes, card: str, row: str) -> None:
    plan = plan_memory(without_fp8(flux), CARDS[card])
    assert (plan.layout.name, plan.precisions) == (row, ("exact",))
    assert "fp8" not in str(plan)


def test_a_card_too_small_is_told_what_is_needed(flux: Sizes) -> None:
    with pytest.raises(SettingsError, match=r"need .* 25\.1 GB .* this one has 16\.9 GB.*FLUX_PROFILE"):
        plan_memory(flux, CARDS["RTX 4080"])
    with pytest.raises(SettingsError, match=r"need .* 4\d\.\d GB .* this one has 25\.2 GB"):
        plan_memory(without_fp8(flux), CARDS["RTX 4090"])


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: row.name)
def test_a_row_is_taken_to_the_byte(flux: Sizes, row: Any) -> None:
    needed = next(plan.needed_bytes for plan in plans(flux) if plan.layout is row)
    assert plan_memory(flux, needed).layout is row
    if row is LAYOUTS[-1]:
        with pytest.raises(SettingsError):
            plan_memory(flux, needed - 1)
    else:
        assert plan_memory(flux, needed - 1).layout is not row


def plans(sizes: Sizes) -> list[Any]:
    return [plan_memory(sizes, card) for card in (CARDS["H100"], CARDS["L40S"], CARDS["RTX 4090"])]


def test_the_peak_is_the_larger_of_encoding_and_making_an_image() -> None:
    sizes = Sizes(pristine=(100, 90), working_copy=60, adapters=5, text_encoders=40, vae=2, checker=1, activations=20)
    everything, one, fp8 = (plan_memory(sizes, RESERVE_BYTES + room).needed_bytes for room in (400, 200, 110))
    assert everything - RESERVE_BYTES == 190 + 60 + 5 + 40 + 2 + 1 + 20
    assert one - RESERVE_BYTES == 100 + 5 + 40 + 2 + 1 + 20
    assert fp8 - RESERVE_BYTES == 60 + 2 + 1 + 40
    crowded = replace(sizes, activations=50)
    assert plan_memory(crowded, RESERVE_BYTES + 120).needed_bytes - RESERVE_BYTES == 60 + 2 + 1 + 50


def test_what_is_not_on_the_device_has_to_fit_into_the_host(flux: Sizes) -> None:
    h100, l40s, rtx = plans(flux)
    pristine = sum(flux.pristine)
    assert [plan.host_bytes for plan in (h100, l40s, rtx)] == [
        0,
        pristine + flux.working_copy,
        pristine + flux.text_encoders,
    ]


def test_a_plan_is_one_line_with_its_numbers(flux: Sizes) -> None:
    line = str(plan_memory(flux, CARDS["RTX 4090"]))
    assert "\n" not in line
    for part in ("25.2 GB", "47.6 GB in host memory", "12.1 GB on the device", "exact requests are served in fp8"):
        assert part in line
    assert Placement.ON_DEMAND.value in line


# LoRAs that are not low-rank


def lora_of_all(shapes: ModelShapes, update_of: Callable[[LowRank], Update]) -> LoraAdapter:
    """A change of rank 1 of all linear layers of the transformer, without memory, made into another kind."""
    changes = []
    with torch.device("meta"):
        for layer in shapes.by_component[TRANSFORMER].values():
            if len(layer.weight) == 2:
                rows, columns = layer.weight
                update = update_of(LowRank(torch.empty(1, columns), torch.empty(rows, 1), 1.0))
                changes.append(LayerUpdate(TRANSFORMER, layer.name, "weight", update))
        changes.append(LayerUpdate(TRANSFORMER, changes[0].layer, "bias", Full(torch.empty(3072))))
    return LoraAdapter("all", "test", tuple(changes))


def test_new_weights_are_those_of_layers_that_are_changed_by_more_than_factors(flux: Sizes) -> None:
    shapes = flux_1("dev")
    low = lora_of_all(shapes, lambda inner: inner)
    dora = lora_of_all(shapes, lambda inner: Dora(inner, torch.empty(len(inner.b), 1)))
    whole = new_weights_bytes([(dora, 1.0)], shapes)
    assert whole == pytest.approx(flux.pristine[0], rel=0.001)
    assert new_weights_bytes([(low, 1.0)], shapes) == new_weights_bytes([(dora, 0.0)], shapes) == 0
    assert new_weights_bytes([(low, 1.0), (dora, 0.5), (dora, 0.5)], shapes) == whole


def test_an_80_gb_card_has_no_room_for_new_weights_of_all_layers(flux: Sizes) -> None:
    """Where weights are moved in, new ones come in their place, so there is no limit."""
    h100, *others = plans(flux)
    assert h100.spare_bytes == h100.device_bytes - h100.needed_bytes
    assert 5e9 < h100.spare_bytes < 10e9 < flux.pristine[0]
    assert f"{h100.spare_bytes / 1e9:.1f} GB are left for LoRAs that are not low-rank" in str(h100)
    assert [plan.spare_bytes for plan in (*others, plan_memory(flux, None))] == [None, None, None]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs g++")
def test_new_weights_stay_within_what_the_plan_leaves() -> None:
    """Counted while models and precisions take turns, on a card with room for half a transformer's."""
    scale = shortened(1, 1)
    sizes = flux_sizes(scale)
    spare = sizes.pristine[0] // 2
    card = replace(H100, memory_bytes=plan_memory(sizes, H100.memory_bytes).needed_bytes + spare)
    assert plan_memory(sizes, card.memory_bytes).spare_bytes == spare
    assert memory_table((card,), scale).problems == []


# Memory that does not suffice


SIZE = Size(1440, 1440)


class Held:
    """What a try leaves in memory; refers to itself, as frames and pipelines do."""

    def __init__(self) -> None:
        self.itself = self


class Making:
    """Fails as CUDA does, for the first so many times, with something held in the frame."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0
        self.held: list[weakref.ref[Held]] = []
        self.alive_at_call: list[int] = []

    def __call__(self) -> str:
        self.alive_at_call.append(sum(ref() is not None for ref in self.held))
        held = Held()
        self.held.append(weakref.ref(held))
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nmore lines")
        return "image"


@pytest.fixture
def no_automatic_collection() -> Any:
    gc.disable()
    yield
    gc.enable()


def test_an_image_that_fits_is_made_once() -> None:
    making = Making(0)
    assert retry_on_oom(making, SIZE) == "image"
    assert making.calls == 1


@pytest.mark.usefixtures("no_automatic_collection")
def test_a_second_try_finds_the_memory_of_the_first_freed(caplog: pytest.LogCaptureFixture) -> None:
    making = Making(1)
    with caplog.at_level(logging.WARNING):
        assert retry_on_oom(making, SIZE) == "image"
    assert making.alive_at_call == [0, 0]
    assert "Tried to allocate 4.00 GiB." in caplog.text
    assert "more lines" not in caplog.text


@pytest.mark.usefixtures("no_automatic_collection")
def test_after_two_tries_the_user_is_told_what_to_do_and_nothing_is_held() -> None:
    making = Making(9)
    with pytest.raises(ModelError, match=r"1440x1440 .* smaller image") as raised:
        retry_on_oom(making, SIZE)
    assert making.calls == 2
    assert all(ref() is None for ref in making.held)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyboardInterrupt()])
def test_another_error_is_not_tried_again(error: BaseException) -> None:
    calls = []

    def make() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry_on_oom(make, SIZE)
    assert len(calls) == 1
