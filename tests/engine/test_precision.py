"""go_fast: an fp8 working copy that is always the quantised merged model, and never costs the pristine one a bit."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchao.quantization import Float8Tensor, Float8WeightOnlyConfig, PerRow, quantize_

from engine.engine import Engine
from engine.fp8 import DYNAMIC, WEIGHT_ONLY, Scheme, choose_scheme, write_fp8
from engine.memory_plan import LAYOUTS, new_weights_bytes
from engine.working_copy import BLOCKS, WorkingCopy, WorkingCopyAdapters
from lora_loading.applying.manager import ComponentAdapters, changes_by_layer
from lora_loading.reading.adapter import LoraAdapter, Stack, read_adapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER, ModelShapes, adaptable_layers, shapes_of
from lora_loading.updates import Full, LoHa, LoKr, Update, merged
from request import Mode
from tests.conftest import request_of
from tests.lora_files import adapter_of, kinds_of
from tests.paths import LORAS
from tests.tiny_models import inputs_of, narrow_transformer, weights_hash
from training.report import psnr

CPU = torch.device("cpu")


@pytest.fixture
def any_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's check of the hardware alone keeps its dynamic fp8 from a CPU."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


def two_models(dtype: torch.dtype = torch.float32) -> dict[str, FluxTransformer2DModel]:
    """As dev and schnell: other weights, and a guidance embedder in one alone."""
    dev, schnell = narrow_transformer(singles=2, seed=1), narrow_transformer(singles=2, seed=2, guidance=False)
    return {"dev": dev.to(dtype), "schnell": schnell.to(dtype)}


def views_of(working_copy: WorkingCopy) -> dict[str, WorkingCopyAdapters]:
    return {name: WorkingCopyAdapters(name, working_copy) for name in working_copy.transformers}


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model by name, copied; of an fp8 weight its numbers and its scales."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Float8Tensor):
            found[f"{name}.qdata"] = tensor.qdata.view(torch.uint8).clone()
            found[f"{name}.scale"] = tensor.scale.clone()
        else:
            found[name] = tensor.clone()
    return found


def merged_and_quantised(model: FluxTransformer2DModel, stack: Stack) -> dict[str, Tensor]:
    """The contents of a model with a stack merged into its weights in float32, and quantised by torchao afterwards."""
    whole = copy.deepcopy(model).float()
    plain = {name: layer.weight for name, layer in adaptable_layers(model).items()}
    layers = adaptable_layers(whole)
    for name, changes in changes_by_layer(stack, TRANSFORMER).items():
        layers[name].weight.copy_(merged(plain[name], changes.merging, plain.__getitem__))
        if changes.bias:
            layers[name].bias.copy_(merged(layers[name].bias, changes.bias, plain.__getitem__))
    blocks = (whole.get_submodule(part) for part in BLOCKS)
    for block in blocks:
        quantize_(block, Float8WeightOnlyConfig(granularity=PerRow()))
    dtype = next(model.parameters()).dtype
    kept = (".qdata", ".scale")
    return {name: t if name.endswith(kept) else t.to(dtype) for name, t in contents(whole).items()}


def output(model: FluxTransformer2DModel, tokens: int = 16, text: int = 4) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs_of(model, tokens, text))[0]
    return result


def every_kind(shapes: ModelShapes) -> list[LoraAdapter]:
    """Adapters of every kind of change, of blocks and of what stays in the original type."""
    torch.manual_seed(0)
    layer = "single_transformer_blocks.1.attn.to_v"
    left, right = torch.randn(32, 2) * 0.3, torch.randn(2, 32) * 0.3
    more: list[tuple[str, str, Update]] = [
        (layer, "weight", LoHa(left, right, right.T, left.T, 0.5)),
        (layer, "weight", LoKr((torch.randn(4, 4) * 0.1,), (torch.randn(8, 8) * 0.1,), 1.0)),
        (layer, "bias", Full(torch.randn(32))),
        ("x_embedder", "weight", Full(torch.randn(32, 16))),
        ("proj_out", "weight", Full(torch.randn(16, 32))),
        ("norm_out.linear", "weight", Full(torch.randn(64, 32))),
    ]
    updates = tuple(LayerUpdate(TRANSFORMER, name, parameter, update) for name, parameter, update in more)
    return [*kinds_of(shapes), LoraAdapter("more", "test", updates)]


@pytest.mark.parametrize(("scheme", "dtype"), [(WEIGHT_ONLY, torch.float32), (WEIGHT_ONLY, torch.bfloat16), (DYNAMIC, torch.bfloat16)])  # noqa: E501 # fmt: skip
def test_it_is_the_merged_model_quantised_afresh(any_hardware: None, scheme: Scheme, dtype: torch.dtype) -> None:
    """Bit by bit, for both models, every kind of change, and two adapters of their own strengths."""
    pristine = two_models(dtype)
    working_copy = WorkingCopy(pristine, scheme, CPU)
    views = views_of(working_copy)
    for model in ("dev", "schnell"):
        adapters = every_kind(shapes_of({TRANSFORMER: pristine[model]}))
        for stack in ([(adapter, 0.7) for adapter in adapters], [(adapters[-2], 1.5), (adapters[-1], -0.5)]):
            views[model].apply(stack)
            found, wanted = contents(working_copy.transformers[model]), merged_and_quantised(pristine[model], stack)
            assert found.keys() == wanted.keys()
            assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


def test_the_dynamic_scheme_multiplies_by_what_was_written(any_hardware: None) -> None:
    """After a swap its outputs are nearly the merged model's in bf16, and not the plain one's."""
    pristine = two_models(torch.bfloat16)["dev"]
    view = views_of(WorkingCopy({"dev": pristine}, DYNAMIC, CPU))["dev"]
    stack = [(adapter_of(shapes_of({TRANSFORMER: pristine}), seed=3), 1.0)]
    plain = output(pristine)
    view.apply(stack)
    ComponentAdapters(TRANSFORMER, pristine).apply(stack)
    wanted = output(pristine)
    assert (output(view.module) - wanted).norm() < 0.1 * wanted.norm() < 0.3 * (plain - wanted).norm()


def test_after_any_sequence_the_plain_copy_and_the_pristine_weights_are_the_same_bits() -> None:
    pristine = two_models()
    before = {name: weights_hash({"t": model}) for name, model in pristine.items()}
    working_copy = WorkingCopy(pristine, WEIGHT_ONLY, CPU)
    views = views_of(working_copy)
    plain = {}
    for name, view in views.items():
        view.apply([])
        plain[name] = contents(working_copy.transformers[name])
    adapters = {name: every_kind(shapes_of({TRANSFORMER: model})) for name, model in pristine.items()}
    rng = random.Random(0)
    for _ in range(60):
        name = rng.choice(("dev", "schnell"))
        views[name].apply([(rng.choice(adapters[name]), rng.choice((1.0, -0.5, 2.0))) for _ in range(rng.randrange(3))])
        if rng.random() < 0.3:
            views[name].apply([])
            now = contents(working_copy.transformers[name])
            assert all(torch.equal(tensor, plain[name][key]) for key, tensor in now.items())
    assert {name: weights_hash({"t": model}) for name, model in pristine.items()} == before


def fp8_weights(model: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Float8Tensor)}


def test_the_blocks_linear_layers_are_fp8_and_nothing_else_is() -> None:
    pristine = two_models()
    working_copy = WorkingCopy(pristine, WEIGHT_ONLY, CPU)
    linear = {f"{n}.weight" for n, layer in adaptable_layers(pristine["dev"]).items() if isinstance(layer, nn.Linear)}
    assert fp8_weights(working_copy.transformers["dev"]).keys() == {n for n in linear if n.startswith(BLOCKS)}


def test_a_swap_writes_the_touched_layers_alone_and_moves_no_tensor() -> None:
    working_copy = WorkingCopy(two_models(), WEIGHT_ONLY, CPU)
    view = views_of(working_copy)["dev"]
    weights = fp8_weights(view.module)
    addresses = {name: (weight.qdata.data_ptr(), weight.scale.data_ptr()) for name, weight in weights.items()}
    shapes = shapes_of({TRANSFORMER: view.module})
    attention, other = adapter_of(shapes, only="attn.qkv"), adapter_of(shapes, seed=1, only="linear2")
    touched, others = ({f"{layer.layer}.weight" for layer in adapter.layers} for adapter in (attention, other))
    assert 0 < len(touched | others) < len(weights)

    def written_by(stack: Stack) -> set[str]:
        for weight in weights.values():
            weight.scale.zero_()
        view.apply(stack)
        return {name for name, weight in weights.items() if weight.scale.any()}

    assert written_by([(attention, 1.0)]) == touched
    assert written_by([(attention, 1.0)]) == set()
    assert written_by([(attention, 0.5)]) == touched
    assert written_by([(other, 1.0)]) == touched | others
    assert written_by([]) == others
    views_of(working_copy)["schnell"].apply([])
    assert all(weight.scale.any() for weight in weights.values())
    assert {name: (w.qdata.data_ptr(), w.scale.data_ptr()) for name, w in weights.items()} == addresses


def test_a_failure_in_the_middle_is_mended_by_the_next_call() -> None:
    working_copy = WorkingCopy(two_models(), WEIGHT_ONLY, CPU)
    view = views_of(working_copy)["dev"]
    plain = contents(view.module)
    good = adapter_of(shapes_of({TRANSFORMER: view.module}), only="attn")
    bad = LayerUpdate(TRANSFORMER, "proj_out", "weight", Full(torch.zeros(1, 2, 3)))
    with pytest.raises(RuntimeError):
        view.apply([(LoraAdapter("bad", "test", (*good.layers, bad)), 1.0)])
    assert view.active_stack is None
    view.apply([])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in contents(view.module).items())


def test_models_of_other_blocks_share_no_copy() -> None:
    with pytest.raises(ValueError, match="differ"):
        WorkingCopy({"dev": narrow_transformer(singles=1), "schnell": narrow_transformer(singles=2)}, WEIGHT_ONLY, CPU)


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    target = WEIGHT_ONLY.quantise(torch.ones(32, 64))
    write_fp8(target, weight)
    found = target.dequantize()
    assert not found[3].any()
    assert (found - weight).norm() < 0.05 * weight.norm()


def test_a_released_copy_takes_no_memory_and_comes_back_whole() -> None:
    working_copy = WorkingCopy(two_models(), WEIGHT_ONLY, CPU)
    view = views_of(working_copy)["dev"]
    plain = contents(view.module)
    weights = fp8_weights(view.module).values()
    working_copy.release()
    working_copy.release()
    assert view.active_stack is None
    assert sum(weight.qdata.untyped_storage().nbytes() for weight in weights) == 0
    view.apply([])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in contents(view.module).items())


@pytest.mark.parametrize("size", [0.003, 0.01, 0.03, 0.1])
def test_a_small_change_is_kept(size: float) -> None:
    """The share of the wanted change that is found in the fp8 weights; merging into fp8 weights swallows it."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1024, 1024, generator=generator) * 0.02).to(torch.bfloat16)
    change = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 1024, generator=generator)
    change *= size * weight.float().norm() / change.norm()

    target = WEIGHT_ONLY.quantise(weight)

    def in_fp8(wanted: Tensor) -> Tensor:
        write_fp8(target, wanted)
        numbers: Tensor = target.dequantize(torch.float32)
        return numbers

    def kept(start: Tensor) -> float:
        gained = in_fp8(start + change) - in_fp8(start)
        return float((gained * change).sum() / change.square().sum())

    assert 0.98 < kept(weight.float()) < 1.02
    if size < 0.01:
        assert kept(in_fp8(weight)) < 0.5


def test_no_graph_is_compiled_anew_by_a_swap_or_another_model() -> None:
    """Two lengths warm the graphs; then stacks, models and lengths change."""
    torch._dynamo.reset()
    pristine = two_models()
    working_copy = WorkingCopy(pristine, WEIGHT_ONLY, CPU)
    views = views_of(working_copy)
    counter = CompileCounter()
    for name in BLOCKS:
        for block in working_copy.transformers["dev"].get_submodule(name).children():
            block.compile(backend=counter, fullgraph=True, dynamic=True)
    adapters = {name: kinds_of(shapes_of({TRANSFORMER: model})) for name, model in pristine.items()}
    for tokens in (16, 24):
        output(working_copy.transformers["dev"], tokens)
    compiled = counter.frame_count
    assert compiled > 0
    for index in range(12):
        name = ("dev", "schnell")[index // 2 % 2]
        views[name].apply([(adapters[name][index % 5], 1.0)])
        output(working_copy.transformers[name], (16, 24, 36, 64, 20)[index % 5])
    assert counter.frame_count == compiled


# In the engine


def make_image(engine: Engine, stack: Stack = (), **given: Any) -> Image.Image:
    quick = {"aspect_ratio": "1:1", "megapixels": "0.25", "num_inference_steps": 4, "seed": 7, "model": "schnell"}
    request = request_of(**{**quick, **given})
    return next(engine.generate(request, stack))


def test_a_cpu_serves_go_fast_with_fp8_weights() -> None:
    assert choose_scheme(CPU) is WEIGHT_ONLY


def test_fast_images_are_nearly_the_exact_ones_and_always_the_same(engine: Engine) -> None:
    exact, fast = make_image(engine), make_image(engine, go_fast=True)
    assert 25 < psnr(exact, fast) < math.inf
    assert make_image(engine).tobytes() == exact.tobytes()
    assert make_image(engine, go_fast=True).tobytes() == fast.tobytes()


def test_image_to_image_and_inpainting_are_served(engine: Engine, save: Callable[..., Path]) -> None:
    image = save(Image.new("RGB", (256, 256), (40, 70, 220)))
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (64, 64, 192, 192))
    for mode, more in ((Mode.IMG2IMG, {}), (Mode.INPAINT, {"mask": save(mask, "mask.png")})):
        given: dict[str, Any] = {"image": image, **more}
        assert request_of(**given, go_fast=True).mode is mode
        exact, fast = (make_image(engine, **given, go_fast=go_fast) for go_fast in (False, True))
        assert 25 < psnr(exact, fast) < math.inf


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_a_lora_acts_with_the_gain_and_leaves_nothing_behind(engine: Engine, model: str) -> None:
    style = read_adapter(LORAS / "tok-style.safetensors", engine.shapes(model))
    assert engine.fast is not None
    assert engine.fast.adapters[model].shapes == engine.exact.adapters[model].shapes
    plain = make_image(engine, go_fast=True, model=model)
    fast = make_image(engine, [(style, 0.6)], go_fast=True, model=model)
    as_asked, with_gain = (make_image(engine, [(style, 0.6 * gain)], model=model) for gain in (1.0, 1.5))
    assert psnr(fast, with_gain) > max(psnr(fast, as_asked), psnr(fast, plain))
    assert make_image(engine, go_fast=True, model=model).tobytes() == plain.tobytes()


def test_where_fp8_does_not_work_the_exact_model_serves_and_the_log_says_so(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    without = Engine(engine.exact, None, CPU)
    with caplog.at_level(logging.WARNING):
        shown = make_image(without, go_fast=True)
    assert "the original precision is used" in caplog.text
    assert shown.tobytes() == make_image(engine).tobytes()


LAYER = "single_transformer_blocks.0.attn.to_q"


def change_of_one_layer(engine: Engine, model: str) -> LoraAdapter:
    """A full difference of one linear layer, which cannot stay beside the weight."""
    size = engine.shapes(model).by_component[TRANSFORMER][LAYER].weight
    difference = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02
    return LoraAdapter(f"full, {model}", "test", (LayerUpdate(TRANSFORMER, LAYER, "weight", Full(difference)),))


def weights_of_the_layer(engine: Engine) -> dict[str, Tensor]:
    """That layer's weight in each model, in the original precision."""
    modules = {name: adapters.components[TRANSFORMER].module for name, adapters in engine.exact.adapters.items()}
    return {name: module.get_parameter(f"{LAYER}.weight") for name, module in modules.items()}


def test_a_transformer_that_does_not_run_carries_no_adapter(engine: Engine) -> None:
    """Its changed weights would take memory that the plan has given to another part."""
    changes = {model: change_of_one_layer(engine, model) for model in ("dev", "schnell")}
    plain = make_image(engine)
    make_image(engine, model="dev", num_inference_steps=1)
    pristine = weights_of_the_layer(engine)
    seen = []
    for model, go_fast in (("dev", False), ("schnell", False), ("schnell", True), ("dev", False), ("dev", True)):
        make_image(engine, [(changes[model], 1.0)], model=model, go_fast=go_fast, num_inference_steps=1)
        now = weights_of_the_layer(engine)
        seen.append([name for name in now if now[name] is not pristine[name]])
    assert seen == [["dev"], ["schnell"], [], ["dev"], []]
    assert make_image(engine).tobytes() == plain.tobytes()


def test_new_weights_that_do_not_fit_run_in_fp8_and_the_log_says_so(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """With the strengths as they were asked for; low-rank ones, and what fits, run in the original precision."""
    change = change_of_one_layer(engine, "schnell")
    style = read_adapter(LORAS / "tok-style.safetensors", engine.shapes("schnell"))
    size = new_weights_bytes([(change, 1.0)], engine.shapes("schnell"))
    full, roomy = (Engine(engine.exact, engine.fast, CPU, spare_bytes=spare) for spare in (size - 1, size))
    wanted, fast = make_image(engine, [(change, 0.9)]), make_image(engine, [(change, 0.6)], go_fast=True)
    low_rank = make_image(engine, [(style, 0.9)])
    with caplog.at_level(logging.WARNING):
        assert make_image(full, [(style, 0.9)]).tobytes() == low_rank.tobytes()
        assert make_image(roomy, [(change, 0.9)]).tobytes() == wanted.tobytes()
        assert "fp8 is used" not in caplog.text
        assert make_image(full, [(change, 0.9)]).tobytes() == fast.tobytes()
    assert "they are not low-rank" in caplog.text


def test_a_card_for_one_transformer_at_a_time_gives_the_same_images(engine: Engine) -> None:
    """The fp8 copy gives way to an exact request and comes back; the pristine weights visit the device."""
    wanted = [make_image(engine), make_image(engine, go_fast=True)]
    crowded = Engine(engine.exact, engine.fast, CPU, LAYOUTS[1])
    for go_fast in (True, False, False, True):
        assert make_image(crowded, go_fast=go_fast).tobytes() == wanted[go_fast].tobytes()


def test_a_card_for_fp8_alone_serves_exact_requests_in_fp8_and_says_so(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """With the strengths as they were asked for: the gain is go_fast's."""
    style = read_adapter(LORAS / "tok-style.safetensors", engine.shapes("schnell"))
    small = Engine(engine.exact, engine.fast, CPU, LAYOUTS[2])
    with caplog.at_level(logging.WARNING):
        assert make_image(small).tobytes() == make_image(engine, go_fast=True).tobytes()
    assert "fp8 is used" in caplog.text
    assert make_image(small, [(style, 0.9)]).tobytes() == make_image(engine, [(style, 0.6)], go_fast=True).tobytes()
