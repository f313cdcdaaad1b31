"""go_fast's forward is diffusers' own, arranged otherwise: equal in float32, and near it in fp8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from engine.compilation import compile_blocks
from engine.fp8 import DYNAMIC, WEIGHT_ONLY, Scheme
from engine.lean_transformer import REQUEST, LeanBlocks, LeanTransformer, RequestState, joined_layers, joined_rows
from engine.loading import load_models
from engine.profiles import TINY, model_profiles
from engine.working_copy import WorkingCopy, WorkingCopyAdapters, _lay_out_together
from lora_loading.shapes import TRANSFORMER, shapes_of
from request import Mode
from settings import Settings
from tests.lora_files import kinds_of
from tests.tiny_models import inputs_of, narrow_transformer

CPU = torch.device("cpu")
SIZES = ((16, 4), (17, 9), (64, 24), (70, 24))


def lean_of(transformer: FluxTransformer2DModel) -> LeanTransformer:
    """The lean forward over a transformer's own float weights."""
    for group in joined_layers(transformer):
        _lay_out_together(group)
    return LeanTransformer(transformer, LeanBlocks(transformer, dynamic=False))


@torch.inference_mode()
def output(model: Any, given: dict[str, Any]) -> Tensor:
    result: Tensor = model(**given)[0]
    return result


@pytest.fixture
def any_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's check of the hardware alone keeps its dynamic fp8 from a CPU."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize(("image_tokens", "text_tokens"), SIZES)
def test_it_equals_diffusers_in_float32(guidance: bool, image_tokens: int, text_tokens: int) -> None:
    model = narrow_transformer(2, 3, guidance=guidance)
    given = inputs_of(model, image_tokens, text_tokens)
    wanted = output(model, given)
    torch.testing.assert_close(output(lean_of(model), given), wanted, atol=1e-5, rtol=0)


def test_it_equals_diffusers_in_float32_at_flux1s_widths() -> None:
    """A block of each kind, 3072 wide, with positions as an image has them."""
    model = narrow_transformer(1, 1, heads=24, head=128, text=64)
    given = inputs_of(model, 64, 24)
    given["img_ids"][:, 1], given["img_ids"][:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    wanted = output(model, given)
    torch.testing.assert_close(output(lean_of(model), given), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_it_equals_diffusers_for_the_embedded_models(name: str) -> None:
    models = load_models(model_profiles("tiny", Settings()), CPU)
    model = models[name].pipelines[Mode.TXT2IMG].transformer
    given = inputs_of(model, 64, 32)
    wanted = output(model, given)
    torch.testing.assert_close(output(lean_of(model), given), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [None, 0, 2])
def test_steps_that_share_a_request_equal_single_ones(begin: int | None) -> None:
    """Modulations of all steps at once; a given image begins at a later step."""
    model = narrow_transformer(1, 2)
    lean = lean_of(model)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "tiny-schnell", subfolder="scheduler")
    scheduler.set_timesteps(4)
    if begin is not None:
        scheduler.set_begin_index(begin)
    request = {REQUEST: RequestState(scheduler)}
    given = inputs_of(model)
    for time in scheduler.timesteps[begin or 0 :]:
        given["timestep"] = (time / 1000)[None]
        wanted = output(model, given)
        found = output(lean, {**given, "joint_attention_kwargs": request})
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        given["hidden_states"] = scheduler.step(found, time, given["hidden_states"])[0]


@pytest.mark.parametrize(("scheme", "dtype"), [(WEIGHT_ONLY, torch.float32), (DYNAMIC, torch.bfloat16)])
def test_it_runs_the_working_copys_weights(any_hardware: None, scheme: Scheme, dtype: torch.dtype) -> None:
    """As torchao runs them, layer by layer, with LoRAs of every kind and for both models, after each change."""
    dev, schnell = narrow_transformer(1, 2, seed=1), narrow_transformer(1, 2, seed=2, guidance=False)
    working_copy = WorkingCopy({"dev": dev.to(dtype), "schnell": schnell.to(dtype)}, scheme, CPU)
    for name in ("dev", "schnell", "dev"):
        model = working_copy.transformers[name]
        view = WorkingCopyAdapters(name, working_copy)
        given = inputs_of(model)
        for stack in ([], [(adapter, 1.0) for adapter in kinds_of(shapes_of({TRANSFORMER: model}))]):
            view.apply(stack)
            wanted, found = output(model, given), output(working_copy.lean[name], given)
            assert (found - wanted).norm() < (0.02 if scheme.dynamic else 1e-5) * wanted.norm()


def test_a_released_copy_runs_again_when_it_is_written() -> None:
    model = narrow_transformer(1, 1)
    working_copy = WorkingCopy({"dev": model}, WEIGHT_ONLY, CPU)
    given = inputs_of(model)
    wanted = output(working_copy.lean["dev"], given)
    working_copy.release()
    WorkingCopyAdapters("dev", working_copy).apply([])
    assert torch.equal(output(working_copy.lean["dev"], given), wanted)


def test_five_graphs_serve_both_models_and_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    pristine = {"dev": narrow_transformer(2, 3), "schnell": narrow_transformer(2, 3, guidance=False)}
    working_copy = WorkingCopy(pristine, WEIGHT_ONLY, CPU)
    for lean in working_copy.lean.values():
        compile_blocks(lean, counter)
    for image_tokens, text_tokens in ((41, 12), (16, 4), (17, 9), (32, 8), (8, 8), (300, 32)):
        for name, lean in working_copy.lean.items():
            output(lean, inputs_of(pristine[name], image_tokens, text_tokens))
    assert counter.frame_count == 5


def test_more_than_one_image_at_a_time_is_refused() -> None:
    model = narrow_transformer()
    given = inputs_of(model)
    given["hidden_states"] = given["hidden_states"].repeat(2, 1, 1)
    with pytest.raises(ValueError, match="batch of 2"):
        lean_of(model)(**given)


def test_weights_that_lie_apart_are_no_single_matrix() -> None:
    with pytest.raises(ValueError, match="one after another"):
        joined_rows([torch.zeros(2, 3), torch.zeros(2, 3)])
