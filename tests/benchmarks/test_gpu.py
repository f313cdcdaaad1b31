"""`script/bench gpu`: its formulas against published figures and torch's own counts, and the whole of it in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTokenizer

from benchmarks.dry_run.times import NOMINAL
from benchmarks.gpu.__main__ import main, run
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.rates import floor_seconds, step_flop
from benchmarks.models import Weights, build_weights, building, clip_of, t5_of, twin, vae_of
from benchmarks.plan import CHANGES, cases
from benchmarks.scales import FULL, TINY
from benchmarks.tables import Table
from engine.profiles import TINY as TINY_MODELS
from lora_loading.shapes import COMPONENTS, TRANSFORMER, shapes_of
from tests.tiny_models import weights_hash

CPU = torch.device("cpu")


# Formulas


@pytest.mark.parametrize(("tokens", "published"), [(4608, 74.4), (4352, 69.5), (1536, 21.5), (8612, 163)])
def test_the_work_of_a_step_is_the_published_one(tokens: int, published: float) -> None:
    assert sum(step_flop(FULL, tokens)) / 1e12 == pytest.approx(published, rel=0.003)


def test_the_work_of_a_step_is_what_torch_counts() -> None:
    """But for the embedders and the modulations, which are left out."""
    image, text = 76 * 52, 512
    with building(torch.device("meta"), torch.bfloat16), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer = FluxTransformer2DModel(**FULL.transformer, guidance_embeds=True)
        transformer(
            hidden_states=torch.empty(1, image, FULL.transformer["in_channels"]),
            encoder_hidden_states=torch.empty(1, text, FULL.transformer["joint_attention_dim"]),
            pooled_projections=torch.empty(1, FULL.transformer["pooled_projection_dim"]),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            img_ids=torch.empty(image, 3),
            txt_ids=torch.empty(text, 3),
        )
    assert sum(step_flop(FULL, image + text)) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_floor_of_a_step_is_its_work_at_the_rates() -> None:
    assert floor_seconds(FULL, 4608, NOMINAL, "fast") == pytest.approx(59.5 / 1250 + 14.87 / 600, rel=0.002)
    assert floor_seconds(FULL, 4608, NOMINAL, "exact") == pytest.approx(59.5 / 700 + 14.87 / 600, rel=0.002)


def test_the_full_models_are_as_large_as_flux() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TINY_MODELS / "tiny-dev", subfolder="tokenizer")
    with building(torch.device("meta"), torch.bfloat16):
        parts: dict[str, nn.Module] = {
            "transformer": FluxTransformer2DModel(**FULL.transformer, guidance_embeds=True),
            "t5": t5_of(FULL),
            "clip": clip_of(FULL, tokenizer),
            "vae": vae_of(FULL),
        }
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6) for name, part in parts.items()}
    assert millions == {"transformer": 11901, "t5": 4762, "clip": 123, "vae": 84}
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}


# Models


@pytest.fixture(scope="module")
def weights() -> Weights:
    return build_weights(TINY, CPU)


def test_random_weights_hold_no_zeros(weights: Weights) -> None:
    modules = [*weights.transformers.values(), *(weights.shared[n] for n in ("vae", "text_encoder", "text_encoder_2"))]
    for module in modules:
        for name, parameter in module.named_parameters():
            assert torch.count_nonzero(parameter) == parameter.numel(), name


def test_a_twin_shares_its_weights_and_leaves_the_original_alone(weights: Weights) -> None:
    original = weights.transformers["dev"]
    before = weights_hash({"t": original})
    other = twin(original)
    assert {id(p) for p in other.parameters()} == {id(p) for p in original.parameters()}
    other.proj_out = nn.Identity()
    assert weights_hash({"t": original}) == before


def test_both_sides_read_the_same_lora(weights: Weights, tmp_path: Path) -> None:
    transformer = weights.transformers["dev"]
    modules = {"transformer": transformer, **weights.shared}
    loras = Loras(tmp_path, transformer, shapes_of({name: modules[name] for name in COMPONENTS}))
    theirs = loras.state_dict(0)
    ours = {layer.layer: layer.update for layer in loras.adapter(0).layers}
    linear = {n for n, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and "blocks." in n}
    assert ours.keys() == linear
    assert loras.adapter(0).count(TRANSFORMER) == len(linear) == len(theirs) / 2
    for name, update in ours.items():
        a, b = update.tensors()
        assert torch.equal(a, theirs[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(b, theirs[f"transformer.{name}.lora_B.weight"])
    assert loras.adapter(0).digest != loras.adapter(1).digest


# The command


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Table], str]:
    """What `script/bench gpu --tiny` measures and writes on a CPU."""
    torch._dynamo.reset()
    output = tmp_path_factory.mktemp("bench") / "gpu.md"
    done = run(TINY, CPU, 60, output)
    return {table.title: table for table in done}, output.read_text()


def test_the_report_has_every_row_of_the_plan(report: tuple[dict[str, Table], str]) -> None:
    """The dry run's rows, and each peer's."""
    tables, text = report
    assert [row[:5] for row in tables["Ours"].rows] == [case.name for case in cases(TINY.sizes)]
    assert [row[0] for row in tables["Changes of the fp8 copy"].rows] == [change.name for change in CHANGES]
    for peer in ("diffusers", "diffusers compiled", "diffusers fp8, hotswap"):
        assert [row[0] for row in tables[peer].rows] == ["dev", "schnell"]
    for table in tables.values():
        assert table.markdown() in text
        assert table.problems == []


def test_all_figures_are_positive(report: tuple[dict[str, Table], str]) -> None:
    tables, _ = report
    for row in tables["This machine's own kernels"].rows + tables["Changes of the fp8 copy"].rows:
        assert all(float(str(figure)) > 0 for figure in row[1:])
    for title in ("Ours", "diffusers"):
        for row in tables[title].rows:
            assert all(float(str(figure)) > 0 for figure in (row[5], row[7], row[9]))


def test_a_lora_leaves_nothing_behind(report: tuple[dict[str, Table], str]) -> None:
    rows = report[0]["What a LoRA leaves behind"].rows
    assert rows == [("exact", "equal to the bit"), ("fast", "equal to the bit")]


def test_without_time_the_first_table_is_written_and_no_more(tmp_path: Path) -> None:
    assert [table.title for table in run(TINY, CPU, 0, tmp_path / "gpu.md")] == ["This machine's own kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_the_trial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="--tiny"):
        main()
