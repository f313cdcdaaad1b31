"""Real trainers and libraries as writers: their adapters on tiny-dev, trained a little, saved by them and read by us.

Ours must give the output of the writer's own forward. PEFT and diffusers are in the ordinary environment, LyCORIS and
DiffSynth-Studio in the one of requirements-trainers.txt, which says how to make it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_loading.applying.manager import AdapterManager, ComponentAdapters
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import TRANSFORMER, adaptable_layers
from tests.tiny_models import inputs_of, tiny_pipelines

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "ff.net.2", "proj_mlp", "norm1.linear"]


@pytest.fixture
def plain() -> FluxTransformer2DModel:
    """tiny-dev's transformer in float32."""
    transformer: FluxTransformer2DModel = tiny_pipelines()["dev"].transformer.float()
    return transformer.eval().requires_grad_(False)


def inputs(model: FluxTransformer2DModel) -> dict[str, Any]:
    return {**inputs_of(model, tokens=64, text=8), "guidance": torch.tensor([3.0])}


def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given)[0]
    return found


def train(model: nn.Module, given: dict[str, Any], parameters: Iterable[nn.Parameter], steps: int = 6) -> None:
    """A few steps towards noise, so that nothing of the adapter is zero."""
    torch.manual_seed(0)
    target = torch.randn(1, 64, given["hidden_states"].shape[-1])
    optimizer = torch.optim.Adam(list(parameters), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(**given)[0] - target).square().mean().backward()
        optimizer.step()


def assert_ours_is_theirs(path: Path, plain: FluxTransformer2DModel, theirs: Tensor, config: str = "") -> LoraAdapter:
    """Apply the file to a plain model and compare the outputs; then take it off again."""
    given = inputs(plain)
    before = output(plain, given)
    assert (theirs - before).norm() > 100 * TOLERANCE * before.norm(), "the adapter changes nothing"
    manager = AdapterManager([ComponentAdapters(TRANSFORMER, plain)])
    adapter = read_adapter(path, manager.shapes, config=config)
    manager.apply([(adapter, 1.0)])
    assert (output(plain, given) - theirs).norm() <= TOLERANCE * theirs.norm()
    manager.apply([])
    assert torch.equal(output(plain, given), before)
    return adapter


# PEFT and diffusers

PEFT: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "rank-stabilised": lambda: LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=TARGETS),
    "patterns": lambda: LoraConfig(
        r=4, lora_alpha=4, target_modules=TARGETS, rank_pattern={"to_q": 2, r"ff\.net\.\d.*": 8},
        alpha_pattern={r"transformer_blocks\.[01]\.attn\.to_k": 9, "to_v": 1},
    ),
    "bias of B": lambda: LoraConfig(r=4, lora_alpha=7, lora_bias=True, target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(r=4, lora_alpha=7, use_dora=True, target_modules=TARGETS),
    "LoHa": lambda: LoHaConfig(r=4, alpha=7, target_modules=TARGETS),
    "LoKr": lambda: LoKrConfig(r=4, alpha=7, target_modules=TARGETS),
    "LoKr of both sides": lambda: LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=TARGETS
    ),
    "OFT": lambda: OFTConfig(oft_block_size=16, target_modules=TARGETS),
    "OFT, exact": lambda: OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=TARGETS),
    "BOFT": lambda: BOFTConfig(boft_block_size=16, target_modules=TARGETS),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT)
def test_peft_with_its_configuration_beside(name: str, tmp_path: Path, plain: FluxTransformer2DModel) -> None:
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(plain), PEFT[name]())
    train(model, inputs(plain), (p for p in model.parameters() if p.requires_grad))
    model.save_pretrained(str(tmp_path))
    config = (tmp_path / "adapter_config.json").read_text()
    adapter = assert_ours_is_theirs(
        tmp_path / "adapter_model.safetensors", plain, output(model.eval(), inputs(plain)), config
    )
    assert not adapter.notes


def test_diffusers_with_its_metadata(tmp_path: Path, plain: FluxTransformer2DModel) -> None:
    config = LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, alpha_pattern={"to_v": 1})
    model = copy.deepcopy(plain)
    model.add_adapter(config)
    train(model, inputs(plain), (p for p in model.parameters() if p.requires_grad))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config.to_dict())
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert not assert_ours_is_theirs(path, plain, output(model, inputs(plain))).notes


# LyCORIS

LYCORIS: dict[str, dict[str, Any]] = {
    "LoCon": {"network_module": "locon", "lora_dim": 4, "alpha": 2},
    "LoCon with a scalar": {"network_module": "locon", "lora_dim": 4, "alpha": 2, "use_scalar": True},
    "LoHa": {"network_module": "loha", "lora_dim": 4, "alpha": 2},
    "LoKr": {"network_module": "lokr", "lora_dim": 2, "alpha": 1, "factor": 8},
    "LoKr, both sides factored": {
        "network_module": "lokr", "lora_dim": 2, "alpha": 1, "factor": 16, "decompose_both": True,
    },
    "LoKr, whole": {"network_module": "lokr", "lora_dim": 4, "alpha": 1, "factor": 8, "full_matrix": True},
    "DoRA over rows": {"network_module": "locon", "lora_dim": 4, "alpha": 2, "weight_decompose": True},
    "DoRA over columns": {
        "network_module": "locon", "lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_output": False,
    },
    "DoRA of LoKr": {"network_module": "lokr", "lora_dim": 2, "alpha": 1, "factor": 8, "weight_decompose": True},
    "full": {"network_module": "full"},
    "OFT": {"network_module": "diag-oft", "lora_dim": 16},
    "OFT, limited": {"network_module": "diag-oft", "lora_dim": 16, "constraint": 1e-4},
    "BOFT": {"network_module": "boft", "lora_dim": 16},
    "BOFT, limited and rescaled": {"network_module": "boft", "lora_dim": 16, "constraint": 1e-4, "rescaled": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name: str, tmp_path: Path, plain: FluxTransformer2DModel) -> None:
    wrapper = pytest.importorskip("lycoris.wrapper", reason="requirements-trainers.txt says how to install LyCORIS")
    torch.manual_seed(2)
    blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    wrapper.LycorisNetwork.apply_preset({"enable_conv": False, "target_module": blocks, "target_name": []})
    model = copy.deepcopy(plain)
    network = wrapper.LycorisNetwork(model, multiplier=1.0, **LYCORIS[name])
    network.apply_to()
    network.requires_grad_(True)
    train(model, inputs(plain), network.parameters())
    theirs = output(model.eval(), inputs(plain))
    path = tmp_path / "x.safetensors"
    network.save_weights(str(path), torch.float32, {})
    assert_ours_is_theirs(path, plain, theirs)


# DiffSynth-Studio

DIFFSYNTH_TARGETS = "a_to_qkv,b_to_qkv,ff_a.0,ff_a.2,ff_b.0,ff_b.2,a_to_out,b_to_out,proj_out,norm.linear,norm1_a.linear,norm1_b.linear,to_qkv_mlp"  # noqa: E501
"""What its own scripts train."""


def diffsynth(module: str) -> Any:
    """A module of DiffSynth's; its packages' own imports ask for torchvision and much else, so they are passed by."""
    try:
        root = Path(str(distribution("diffsynth").locate_file("diffsynth")))
    except PackageNotFoundError:
        pytest.skip("requirements-trainers.txt says how to install DiffSynth-Studio")
    parts = module.split(".")
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*parts[1:count]))]
            sys.modules[name] = package
    return importlib.import_module(module)


class DiffSynthBlocks(nn.Module):
    """DiffSynth's own blocks at tiny-dev's size, with its names; its whole model has FLUX.1's size built in."""

    def __init__(self, plain: FluxTransformer2DModel) -> None:
        super().__init__()
        dit = diffsynth("diffsynth.models.flux_dit")
        width, heads = plain.inner_dim, plain.config.num_attention_heads
        self.blocks = nn.ModuleList(dit.FluxJointTransformerBlock(width, heads) for _ in plain.transformer_blocks)
        singles = plain.single_transformer_blocks
        self.single_blocks = nn.ModuleList(dit.FluxSingleTransformerBlock(width, heads) for _ in singles)
        converters = diffsynth("diffsynth.utils.state_dict_converters.flux_dit")
        weights = converters.FluxDiTStateDictConverterFromDiffusers(plain.state_dict())
        self.load_state_dict({k: v for k, v in weights.items() if "blocks." in k})


@pytest.mark.parametrize("opensource", [False, True])
def test_diffsynth(opensource: bool, tmp_path: Path, plain: FluxTransformer2DModel) -> None:
    """Its weights with the LoRA merged, converted by its own rules of names, against ours, layer by layer."""
    from peft import inject_adapter_in_model

    torch.manual_seed(3)
    targets = DIFFSYNTH_TARGETS.split(",")
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), DiffSynthBlocks(plain))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    if opensource:
        loras = diffsynth("diffsynth.utils.lora.flux")
        tensors = loras.FluxLoRAConverter.align_to_opensource_format(tensors)
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    manager = AdapterManager([ComponentAdapters(TRANSFORMER, plain)])
    adapter = read_adapter(path, manager.shapes)
    assert adapter.format == ("kohya: LoRA" if opensource else "DiffSynth: LoRA")
    assert_merged_alike(adapter, plain, model)


def assert_merged_alike(adapter: LoraAdapter, plain: FluxTransformer2DModel, theirs: nn.Module) -> None:
    """W + our change, in DiffSynth's names, is DiffSynth's merged weight."""
    changed = {name: layer.weight.clone() for name, layer in adaptable_layers(plain).items()}
    for u in adapter.layers:
        changed[u.layer] += u.update.delta(changed[u.layer], changed.__getitem__)
    converters = diffsynth("diffsynth.utils.state_dict_converters.flux_dit")
    state = plain.state_dict() | {f"{name}.weight": weight for name, weight in changed.items()}
    ours = converters.FluxDiTStateDictConverterFromDiffusers(state)
    compared = 0
    for name, layer in theirs.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
            merged = layer.get_base_layer().weight
            assert (ours[f"{name}.weight"] - merged).norm() <= TOLERANCE * merged.norm(), name
            compared += 1
    assert compared == 3 * 10 + 3 * 3
