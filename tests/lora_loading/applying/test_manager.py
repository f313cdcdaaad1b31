"""Modules carry exactly the wanted stack of adapters, and are the plain modules again afterwards."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from benchmarks.swap import measure
from lora_loading.applying.manager import AdapterManager, ComponentAdapters, adapter_managers
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import CLIP, T5, TRANSFORMER, ModelShapes, adaptable_layers, components_of
from lora_loading.updates import Dora, Full, Gains, LoKr, LowRank, Update
from tests import lora_files as files
from tests.lora_files import adapter_of, changes_of, expected, kinds_of, save
from tests.paths import LORAS
from tests.tiny_models import inputs_of, narrow_transformer, tiny_pipelines, weights_hash


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return tiny_pipelines()


@pytest.fixture(scope="module")
def managers(pipelines: dict[str, Any]) -> dict[str, AdapterManager]:
    return adapter_managers(pipelines)


@pytest.fixture(scope="module")
def style(managers: dict[str, AdapterManager]) -> LoraAdapter:
    return read_adapter(LORAS / "tok-style.safetensors", managers["dev"].shapes)


@pytest.fixture(scope="module")
def thing(managers: dict[str, AdapterManager]) -> LoraAdapter:
    return read_adapter(LORAS / "tok-object.safetensors", managers["dev"].shapes)


def manager_of(model: nn.Module, reserved_rank: int = 0) -> AdapterManager:
    return AdapterManager([ComponentAdapters(TRANSFORMER, model, reserved_rank)])


def carried_weights(module: nn.Module) -> dict[str, Tensor]:
    """Each linear layer's weight as its outputs show it: one row of the identity at a time."""
    found = {}
    for name, layer in adaptable_layers(module).items():
        if isinstance(layer, nn.Linear):
            bias = 0 if layer.bias is None else layer.bias
            found[name] = (layer(torch.eye(layer.in_features, dtype=layer.weight.dtype)) - bias).T
    return found


def output(model: FluxTransformer2DModel, tokens: int = 16) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs_of(model, tokens))[0]
    return result


# Strength


@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (-1.0,), (0.7, 1.3), (2.0, -0.25)])
def test_the_carried_weights_are_the_oracles(strengths: tuple[float, ...]) -> None:
    """W + sum of strength * alpha / rank * B A in float64, the adapters of different ranks, alphas and layers."""
    model = narrow_transformer()
    manager = manager_of(model)
    plain = {name: layer.weight.double() for name, layer in adaptable_layers(model).items()}
    kinds = [(4, 8.0, 0, ""), (7, 3.0, 1, "double")][: len(strengths)]
    manager.apply([(adapter_of(manager.shapes, *kind), s) for kind, s in zip(kinds, strengths, strict=True)])
    for name, weight in carried_weights(model).items():
        change = torch.zeros_like(plain[name])
        for kind, strength in zip(kinds, strengths, strict=True):
            change += strength * expected(changes_of(manager.shapes, *kind)).get(name, torch.zeros(()))
        wanted = plain[name] + change
        assert (weight - wanted).norm() <= 1e-6 * wanted.norm(), name
        assert (weight - plain[name] - change).norm() <= 1e-5 * (plain[name].norm() + change.norm()), name


def test_bf16_is_within_its_rounding() -> None:
    model = narrow_transformer().to(torch.bfloat16)
    manager = manager_of(model)
    plain = {name: layer.weight.double() for name, layer in adaptable_layers(model).items()}
    manager.apply([(adapter_of(manager.shapes), 0.3)])
    for name, delta in expected(changes_of(manager.shapes)).items():
        found = carried_weights(model)[name].double()
        assert (found - plain[name] - 0.3 * delta).norm() <= 2**-7 * (plain[name] + 0.3 * delta).norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_change_is_carried(dtype: torch.dtype) -> None:
    """One layer each, the oracle being the change's own delta in float64; two kinds on one layer add."""
    torch.manual_seed(0)
    model = narrow_transformer().to(dtype)
    layers = adaptable_layers(model)
    lokr = LoKr((torch.randn(4, 4),), (torch.randn(8, 2), torch.randn(2, 8)), 0.5)
    low = LowRank(torch.randn(3, 32), torch.randn(32, 3), 0.5)
    updates: list[tuple[str, Update]] = [
        ("transformer_blocks.0.attn.to_q", lokr),
        ("transformer_blocks.0.attn.to_q", low),
        ("transformer_blocks.0.attn.to_k", Dora(low, torch.rand(32, 1))),
        ("transformer_blocks.0.attn.to_v", Full(torch.randn(32, 32))),
    ]
    wanted = {name: layers[name].weight.double() for name, _ in updates}
    for name, update in updates:
        wanted[name] = wanted[name] - 0.5 * update.delta(layers[name].weight.double(), lambda n: layers[n].weight)
    bias, norm = torch.randn(32), torch.randn(16)
    old_bias = layers["transformer_blocks.0.attn.to_q"].bias.clone()
    old_norm = layers["transformer_blocks.0.attn.norm_q"].weight.clone()
    own = [LayerUpdate(TRANSFORMER, name, "weight", update) for name, update in updates]
    own.append(LayerUpdate(TRANSFORMER, "transformer_blocks.0.attn.to_q", "bias", Full(bias)))
    own.append(LayerUpdate(TRANSFORMER, "transformer_blocks.0.attn.norm_q", "weight", Full(norm)))
    manager_of(model).apply([(LoraAdapter("x", "test", tuple(own)), -0.5)])
    found, tolerance = carried_weights(model), 1e-5 if dtype == torch.float32 else 2**-6
    for name, weight in wanted.items():
        assert (found[name].double() - weight).norm() <= tolerance * weight.norm(), name
    block = model.transformer_blocks[0].attn
    torch.testing.assert_close(block.to_q.bias, (old_bias.float() - 0.5 * bias).to(dtype))
    torch.testing.assert_close(block.norm_q.weight, (old_norm.float() - 0.5 * norm).to(dtype))


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("inner", ["LoRA", "LoKr"])
def test_another_scale_of_a_dora_reuses_its_gains(axis: str, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """magnitude / |V| needs the product with the weight, and does not depend on the scale."""
    torch.manual_seed(0)
    model, name = narrow_transformer(), "transformer_blocks.0.attn.to_q"
    change: Update = LowRank(torch.randn(3, 32), torch.randn(32, 3), 0.5)
    if inner == "LoKr":
        change = LoKr((torch.randn(4, 4),), (torch.randn(8, 8),), 0.5)
    column = ((name, change),) if axis == "column" else ()
    update = Dora(change, torch.rand(1, 32) if column else torch.rand(32, 1), column)
    adapter = LoraAdapter("dora", "test", (LayerUpdate(TRANSFORMER, name, "weight", update),))
    old = adaptable_layers(model)[name].weight.double()
    delta = update.delta(old, lambda _: old)
    manager, calls, gain = manager_of(model), [], Dora.gain

    def counted(self: Dora, *given: Any) -> Tensor:
        calls.append(self)
        return gain(self, *given)

    monkeypatch.setattr(Dora, "gain", counted)
    for scale in (1.0, 0.5, -2.0):
        manager.apply([(adapter, scale)])
        found = adaptable_layers(model)[name].weight.double()
        torch.testing.assert_close(found, old + scale * delta, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


def dora_of(name: str = "transformer_blocks.0.attn.to_q") -> LoraAdapter:
    """A DoRA of one layer, its factors views of one block, as a file's are."""
    block = torch.randn(2, 3, 32)
    update = Dora(LowRank(block[0], block[1].T, 1.0), torch.rand(32, 1) + 0.5)
    return LoraAdapter(f"dora of {name}", "test", (LayerUpdate(TRANSFORMER, name, "weight", update),))


def test_gains_keep_no_adapter_alive() -> None:
    """Neither an adapter's tensors, which are a whole file's, nor its gain once another one is used."""
    layers, gains = adaptable_layers(narrow_transformer()), Gains()
    alive, held = [], []
    for _ in range(5):
        (change,) = dora_of().layers
        assert isinstance(change.update, Dora)
        weight = layers[change.layer].weight
        gains.of(change.update, weight, lambda name: layers[name].weight)
        alive.append(ref(change.update))
        held.append(gains.bytes)
        del change
    gc.collect()
    assert [update() for update in alive] == [None] * 5
    assert held == [32 * 4] * 5


def test_gains_beyond_their_bound_are_dropped_and_made_again() -> None:
    layers, gains = adaptable_layers(narrow_transformer()), Gains(max_bytes=2 * 32 * 4)
    updates = [change.update for _ in range(3) for change in dora_of().layers]
    for _ in range(2):
        for update in updates:
            assert isinstance(update, Dora)
            weight = layers["transformer_blocks.0.attn.to_q"].weight
            found = gains.of(update, weight, lambda name: layers[name].weight)
            assert torch.equal(found, update.gain(weight, lambda name: layers[name].weight))
            assert gains.bytes <= 2 * 32 * 4


def test_strength_zero_is_none(
    pipelines: dict[str, Any], managers: dict[str, AdapterManager], style: LoraAdapter
) -> None:
    plain = output(pipelines["dev"].transformer)
    managers["dev"].apply([(style, 0.0)])
    assert torch.equal(output(pipelines["dev"].transformer), plain)


def test_twice_the_same_adds_up(
    pipelines: dict[str, Any], managers: dict[str, AdapterManager], style: LoraAdapter
) -> None:
    managers["dev"].apply([(style, 0.3), (style, 0.7)])
    twice = output(pipelines["dev"].transformer)
    managers["dev"].apply([(style, 1.0)])
    assert torch.equal(output(pipelines["dev"].transformer), twice)
    managers["dev"].apply([(style, 0.5), (style, -0.5)])
    assert managers["dev"].active_stack(TRANSFORMER) == ()


def test_the_order_of_the_stack_does_not_matter(
    pipelines: dict[str, Any], managers: dict[str, AdapterManager], style: LoraAdapter, thing: LoraAdapter
) -> None:
    managers["dev"].apply([(style, 0.5), (thing, 1.0)])
    first = output(pipelines["dev"].transformer)
    managers["dev"].apply([])
    managers["dev"].apply([(thing, 1.0), (style, 0.5)])
    assert torch.equal(output(pipelines["dev"].transformer), first)
    managers["dev"].apply([])


def test_diffusers_draws_the_same(
    style: LoraAdapter, managers: dict[str, AdapterManager], pipelines: dict[str, Any]
) -> None:
    """diffusers as the oracle of a whole file, in another copy of the model."""
    theirs = tiny_pipelines()["dev"]
    theirs.load_lora_weights(LORAS / "tok-style.safetensors")
    wanted = output(theirs.transformer)
    managers["dev"].apply([(style, 1.0)])
    torch.testing.assert_close(output(pipelines["dev"].transformer), wanted, rtol=1e-4, atol=1e-4)
    managers["dev"].apply([])


# No trace


def swap_at_random(count: int, reserved_rank: int) -> None:
    """Swap stacks of nought to three adapters and compare all weights' bytes with the first at each unload."""
    model = narrow_transformer()
    before, plain = weights_hash({"t": model}), output(model)
    manager = manager_of(model, reserved_rank)
    adapters = kinds_of(manager.shapes)
    held = {a.digest: [t.clone() for u in a.layers for t in u.update.tensors()] for a in adapters}
    rng = random.Random(0)
    for index in range(count):
        stack = [(rng.choice(adapters), rng.choice((1.0, 0.5, -1.0, 0.25))) for _ in range(rng.randrange(4))]
        manager.apply(stack)
        if index % 4 == 3:
            manager.apply([])
            assert weights_hash({"t": model}) == before
    manager.apply([])
    assert weights_hash({"t": model}) == before
    assert torch.equal(output(model), plain)
    for adapter in adapters:
        now = [t for u in adapter.layers for t in u.update.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(now, held[adapter.digest], strict=True))


@pytest.mark.parametrize("reserved_rank", [0, 16])
def test_200_swaps_leave_the_weights_bit_identical(reserved_rank: int) -> None:
    swap_at_random(200, reserved_rank)


@pytest.mark.slow
@pytest.mark.parametrize("reserved_rank", [0, 16])
def test_2000_swaps_leave_the_weights_bit_identical(reserved_rank: int) -> None:
    swap_at_random(2000, reserved_rank)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.slow
def test_2000_swaps_leave_memory_flat() -> None:
    """Less than 0.02 MiB a swap, after a warm-up of the allocator."""
    model = narrow_transformer(4, 4, heads=4, head=32)
    manager = manager_of(model)
    adapters = [adapter_of(manager.shapes, rank, seed=rank) for rank in (4, 16, 64)]
    rng, marks = random.Random(0), []
    for index in range(2000):
        manager.apply([(rng.choice(adapters), 1.0)] * rng.randrange(2))
        if index in (499, 1999):
            gc.collect()
            marks.append(resident_mib())
    assert marks[1] - marks[0] < 0.02 * 1500


def test_an_adapted_model_keeps_the_names_of_its_weights() -> None:
    model = narrow_transformer()
    names = list(model.state_dict())
    manager = manager_of(model)
    manager.apply([(adapter_of(manager.shapes), 1.0)])
    assert list(model.state_dict()) == names


# State


def test_the_same_stack_again_costs_nothing(managers: dict[str, AdapterManager], style: LoraAdapter) -> None:
    managers["dev"].apply([(style, 1.0)])
    transformer = managers["dev"].components[TRANSFORMER].module
    before = adaptable_layers(transformer)["transformer_blocks.0.attn.to_q"]
    factors = before.lora_a, before.lora_b
    managers["dev"].apply([(style, 1.0)])
    after = adaptable_layers(transformer)["transformer_blocks.0.attn.to_q"]
    assert after is before
    assert after.lora_a is factors[0]
    assert after.lora_b is factors[1]
    managers["dev"].apply([])


def test_untouched_layers_stay_the_plain_ones(managers: dict[str, AdapterManager]) -> None:
    """An adapter costs time only where it has a change."""
    transformer = managers["dev"].components[TRANSFORMER].module
    managers["dev"].apply([(adapter_of(managers["dev"].shapes, only="img_mlp.0"), 1.0)])
    changed = {name for name, layer in adaptable_layers(transformer).items() if type(layer) not in _plain_classes()}
    assert changed == {f"transformer_blocks.{i}.ff.net.0.proj" for i in range(3)}
    managers["dev"].apply([])


def _plain_classes() -> set[type]:
    return {type(layer) for layer in adaptable_layers(narrow_transformer()).values()}


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 17])
def test_a_cancellation_anywhere_is_mended_by_the_next_call(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised where the nth layer takes its place."""
    model = narrow_transformer()
    plain, before = output(model), weights_hash({"t": model})
    manager = manager_of(model)
    first, second = adapter_of(manager.shapes, 2, seed=1), adapter_of(manager.shapes, 5, seed=2)
    manager.apply([(second, 1.0)])
    wanted = output(model)
    manager.apply([(first, 1.0)])
    calls = iter(range(10**6))
    original = nn.Module.register_module

    def interrupted(self: nn.Module, name: str, module: nn.Module | None) -> None:
        if next(calls) == at:
            raise Cancelled
        original(self, name, module)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_module", interrupted)
        with pytest.raises(Cancelled):
            manager.apply([])
    assert manager.active_stack(TRANSFORMER) == ()
    assert torch.equal(output(model), plain)
    manager.apply([(second, 1.0)])
    assert torch.equal(output(model), wanted)
    manager.apply([])
    assert torch.equal(output(model), plain)
    assert weights_hash({"t": model}) == before


def cancel_at_line(count: int, call: Callable[[], None]) -> bool:
    """Call, and raise Cancelled before the nth line of ours; whether it came to that."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        ours = "/lora_loading/" in frame.f_code.co_filename
        if ours and event == "line":
            lines += 1
            if lines == count:
                raise Cancelled
        return trace if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Cancelled:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("reserved_rank", [0, 16])
def test_a_cancellation_at_any_line_is_mended_by_the_next_call(reserved_rank: int) -> None:
    """Every 41st line that a swap of three kinds runs through, in turn."""
    model = narrow_transformer()
    plain, before = output(model), weights_hash({"t": model})
    manager = manager_of(model, reserved_rank)
    dora, norms, attention, *_ = kinds_of(manager.shapes)
    manager.apply([(attention, 0.5)])
    wanted = output(model)
    count = 1
    while cancel_at_line(count, lambda: manager.apply([(dora, 1.0), (norms, 0.5), (attention, -1.0)])):
        manager.apply([(attention, 0.5)])
        assert torch.equal(output(model), wanted), count
        count += 41
    assert count > 500
    manager.apply([])
    assert torch.equal(output(model), plain)
    assert weights_hash({"t": model}) == before


def test_a_failing_change_leaves_the_next_stack_unharmed() -> None:
    model = narrow_transformer()
    plain = output(model)
    manager = manager_of(model)
    good = adapter_of(manager.shapes)
    manager.apply([(good, 1.0)])
    wanted = output(model)
    bad = LayerUpdate(TRANSFORMER, "proj_out", "weight", Full(torch.zeros(1, 2, 3)))
    with pytest.raises(RuntimeError):
        manager.apply([(LoraAdapter("bad", "test", (bad,)), 1.0)])
    manager.apply([(good, 1.0)])
    assert torch.equal(output(model), wanted)
    manager.apply([])
    assert torch.equal(output(model), plain)


@pytest.mark.parametrize("reserved_rank", [0, 16])
def test_a_stack_that_runs_out_of_memory_leaves_none_of_its_weights(
    reserved_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the layers before the lack were given is freed, and the manager knows that the model is a plain one."""
    model = narrow_transformer()
    plain, layers = output(model), adaptable_layers(model)
    manager = manager_of(model, reserved_rank)
    stack = [(adapter, 1.0) for name in layers if name.endswith((".to_q", ".to_k")) for adapter in [dora_of(name)]]
    made: list[ReferenceType[nn.Parameter]] = []
    parameter = nn.Parameter

    def lacking(*given: Any, **named: Any) -> nn.Parameter:
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 MiB")
        new = parameter(*given, **named)
        made.append(ref(new))
        return new

    with monkeypatch.context() as patch:
        patch.setattr(nn, "Parameter", lacking)
        with pytest.raises(torch.OutOfMemoryError):
            manager.apply(stack)
    gc.collect()
    assert len(made) == 2
    assert [weight for weight in made if weight() is not None] == []
    assert manager.active_stack(TRANSFORMER) == ()
    assert all(layer is layers[name] for name, layer in adaptable_layers(model).items())
    assert torch.equal(output(model), plain)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength: float) -> None:
    manager = manager_of(narrow_transformer())
    with pytest.raises(ValueError, match="scale"):
        manager.apply([(adapter_of(manager.shapes), strength)])


# Several models


def text_adapter(tmp_path: Path, shapes: ModelShapes) -> LoraAdapter:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, outputs in (
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 128),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 256),
    ):
        tensors |= {f"{path}.lora_down.weight": torch.randn(2, 128), f"{path}.lora_up.weight": torch.randn(outputs, 2)}
    return read_adapter(save(tmp_path / "text.safetensors", tensors), shapes)


def prompt_of(pipeline: FluxPipeline) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt("a red circle", None, max_sequence_length=32)
    return embeds, pooled


def test_text_encoders_are_shared_and_follow_the_last_call(
    tmp_path: Path, pipelines: dict[str, Any], managers: dict[str, AdapterManager]
) -> None:
    plain = prompt_of(pipelines["dev"])
    adapter = text_adapter(tmp_path, managers["dev"].shapes)
    managers["dev"].apply([(adapter, 1.0)])
    changed = prompt_of(pipelines["schnell"])
    assert not torch.equal(changed[0], plain[0])
    assert not torch.equal(changed[1], plain[1])
    assert managers["schnell"].active_stack(CLIP) == managers["schnell"].active_stack(T5) == ((adapter.digest, 1.0),)
    managers["schnell"].apply([])
    assert all(torch.equal(a, b) for a, b in zip(prompt_of(pipelines["dev"]), plain, strict=True))


def test_a_whole_model_of_text_and_transformer_comes_back(
    tmp_path: Path, pipelines: dict[str, Any], managers: dict[str, AdapterManager], style: LoraAdapter
) -> None:
    before = weights_hash(components_of(pipelines["dev"]))
    managers["dev"].apply([(style, 1.0), (text_adapter(tmp_path, managers["dev"].shapes), 0.5)])
    assert weights_hash(components_of(pipelines["dev"])) != before
    managers["dev"].apply([])
    assert weights_hash(components_of(pipelines["dev"])) == before


# Compilation


def test_swaps_compile_nothing_anew() -> None:
    """20 swaps of ranks 1 to 60, other layers, strengths and kinds, over 5 sizes: two graphs, made before."""
    model = narrow_transformer()
    manager = manager_of(model, reserved_rank=64)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    sizes = (16, 24, 36, 40, 64)

    def run(tokens: int) -> None:
        with torch.no_grad():
            compiled(**inputs_of(model, tokens))  # type: ignore[no-untyped-call]

    for stack in ([], [(adapter_of(manager.shapes), 1.0)]):
        manager.apply(stack)
        for tokens in sizes[:2]:
            run(tokens)
    graphs = counter.frame_count
    assert graphs <= 4  # for each of none and some: one for the first size, at most one for all others
    rng = random.Random(0)
    kinds = kinds_of(manager.shapes)
    for index in range(20):
        rank, only = rng.randrange(1, 30), rng.choice(("", "attn", "linear", "img_mlp", "double"))
        stack = [(adapter_of(manager.shapes, rank, seed=index, only=only), rng.choice((1.0, -0.5)))]
        stack += [(rng.choice(kinds), 0.5)] * rng.randrange(2)
        manager.apply(stack if index % 5 else [])
        wanted = output(model, sizes[index % 5])
        with torch.no_grad():
            found = compiled(**inputs_of(model, sizes[index % 5]))[0]  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == graphs


def test_reserved_room_gives_the_same_images() -> None:
    plain, roomy = narrow_transformer(), narrow_transformer()
    one, other = manager_of(plain), manager_of(roomy, reserved_rank=64)
    for adapter in kinds_of(one.shapes):
        one.apply([(adapter, 0.5)])
        other.apply([(adapter, 0.5)])
        torch.testing.assert_close(output(roomy), output(plain), rtol=1e-4, atol=1e-5)


def test_a_file_of_each_format_draws_the_same(tmp_path: Path) -> None:
    """From the file to the transformer's output, bit for bit, where the factors are the same."""
    model = narrow_transformer()
    manager = manager_of(model)
    changes = changes_of(manager.shapes)
    outputs = []
    for write in (files.kohya, files.bfl_named("diffusion_model.", "lora_down", "lora_up"), files.onetrainer_split):
        adapter = read_adapter(save(tmp_path / "x.safetensors", write(changes)), manager.shapes)
        manager.apply([(adapter, 1.0)])
        outputs.append(output(model))
    assert all(torch.equal(found, outputs[0]) for found in outputs)


@pytest.mark.slow
def test_a_swap_is_faster_than_diffusers() -> None:
    """On FLUX's real number of layers: see benchmarks/swap.py."""
    times = measure()
    against_loading, against_hotswap = times.ratios
    assert against_loading >= 20
    assert against_hotswap >= 5
    assert times.same_again < times.ours / 20
