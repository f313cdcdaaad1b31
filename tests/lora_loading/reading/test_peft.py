"""Files that PEFT and diffusers save themselves act as there: what their settings decide, and what no setting mends."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors import safe_open
from torch import Tensor, nn

from errors import LoraFormatError
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.reading.header import read_header
from lora_loading.reading.keys import sort_file
from lora_loading.reading.metadata import config_from
from lora_loading.reading.norms import Measured
from lora_loading.reading.scales import settings_of
from lora_loading.shapes import TRANSFORMER, ModelShapes, adaptable_layers, shapes_of
from tests.lora_files import save
from tests.tiny_models import inputs_of, narrow_transformer

TARGETS = ["to_q", "to_v", "proj_mlp"]
LAYERS = 5
"""How many layers TARGETS names in the narrow transformer."""


@pytest.fixture
def plain() -> FluxTransformer2DModel:
    return narrow_transformer()


@pytest.fixture
def shapes(plain: nn.Module) -> ModelShapes:
    return shapes_of({TRANSFORMER: plain})


def randomise(model: nn.Module) -> None:
    """As if trained: every tensor of the adapter is moved."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "lokr_")):
            parameter.data += torch.randn_like(parameter) * 0.1


def merged(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """What the library's own merge makes of the plain model's layers: new minus old, in float64."""
    old = adaptable_layers(plain)
    wanted = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
            name = name.removeprefix("base_model.model.")
            wanted[name] = (layer.get_base_layer().weight.detach() - old[name].weight).double()
    assert len(wanted) == LAYERS
    return wanted


def assert_acts_as(adapter: LoraAdapter, plain: nn.Module, wanted: dict[str, Tensor]) -> None:
    old = {name: layer.weight.double() for name, layer in adaptable_layers(plain).items()}
    found = {u.layer: u.update.delta(old[u.layer], old.__getitem__) for u in adapter.layers}
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert (found[name] - delta).norm() <= 1e-5 * delta.norm(), name


def read_with_config(folder: Path, shapes: ModelShapes) -> LoraAdapter:
    config = (folder / "adapter_config.json").read_text()
    return read_adapter(folder / "adapter_model.safetensors", shapes, config=config)


# diffusers


@pytest.mark.parametrize("pattern", [{}, {r"transformer_blocks\.0\.attn\.to_q": 3}])
def test_diffusers_save_lora_adapter_writes_settings_without_a_components_name(
    pattern: dict[str, int], tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=4, lora_alpha=16, alpha_pattern=pattern, target_modules=TARGETS))
    randomise(model)
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    adapter = read_adapter(path, shapes)
    assert_acts_as(adapter, plain, merged(model, plain))
    assert not adapter.notes


# LoKr of two whole matrices

RANK = 32
"""As large as the layers, so that PEFT factors neither side."""


def save_whole_lokr(folder: Path, plain: nn.Module, **settings: Any) -> nn.Module:
    model = get_peft_model(copy.deepcopy(plain), LoKrConfig(r=RANK, target_modules=TARGETS, **settings))
    randomise(model)
    model.save_pretrained(str(folder))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert {key.rpartition(".")[2] for key in file.keys()} == {"lokr_w1", "lokr_w2"}  # noqa: SIM118
    whole: nn.Module = model
    return whole


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 8},
        {"alpha": 32},
        {"alpha": 8, "rank_pattern": {"to_v": 64}, "alpha_pattern": {"proj_mlp": 24, r"transformer_blocks\.0.*": 2}},
    ],
)
def test_pefts_lokr_of_whole_matrices_is_scaled_by_alpha_over_its_rank(
    settings: dict[str, Any], tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    wanted = merged(save_whole_lokr(tmp_path, plain, **settings), plain)
    adapter = read_with_config(tmp_path, shapes)
    assert_acts_as(adapter, plain, wanted)
    assert not adapter.notes


def test_the_size_of_pefts_lokr_is_that_of_its_change(
    tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    wanted = merged(save_whole_lokr(tmp_path, plain, alpha=8), plain)
    path = tmp_path / "adapter_model.safetensors"
    header = read_header(path)
    settings = settings_of(header.metadata, config_from((tmp_path / "adapter_config.json").read_text()))
    sizes = Measured(path, header, sort_file(header, shapes, lambda _: False), settings).sizes()
    norms = {size.layer: size.norm for size in sizes}
    assert norms == pytest.approx({name: float(delta.norm()) for name, delta in wanted.items()}, rel=1e-5)


def test_pefts_lokr_of_whole_matrices_without_its_settings_is_said_to_be_open(
    tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    save_whole_lokr(tmp_path, plain, alpha=8)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", shapes)
    assert "the file has no alpha: alpha / rank = 1 is assumed" in adapter.notes


def test_an_alpha_tensor_beside_whole_matrices_is_of_lycoris_and_scales_nothing(
    tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    name = "transformer_blocks.0.attn.to_q"
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}
    path = save(tmp_path / "x.safetensors", {f"lycoris_{name.replace('.', '_')}.{k}": t for k, t in parts.items()})
    config = json.dumps(LoKrConfig(r=RANK, alpha=8, target_modules=TARGETS).to_dict(), default=list)
    for beside in ("", config):
        assert_acts_as(read_adapter(path, shapes, config=beside), plain, {name: torch.kron(w1.double(), w2.double())})


@pytest.mark.parametrize("config", ['{"r": 0, "alpha": 8}', '{"r": -4, "alpha": 8}', '{"alpha": 8}', '{"r": 8}'])
def test_settings_without_a_rank_or_an_alpha_leave_whole_matrices_open(
    config: str, tmp_path: Path, shapes: ModelShapes
) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lokr_w1": torch.randn(4, 8), f"{name}.lokr_w2": torch.randn(8, 4)}
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors), shapes, config=config)
    assert "the file has no alpha: alpha / rank = 1 is assumed" in adapter.notes


@pytest.mark.parametrize(("kind", "refused"), [("LORA", False), ("LOKR", True)])
def test_a_pattern_of_ranks_is_read_where_it_decides_something(
    kind: str, refused: bool, tmp_path: Path, shapes: ModelShapes
) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 32), f"{name}.lora_B.weight": torch.randn(32, 4)}
    path = save(tmp_path / "x.safetensors", tensors)
    config = json.dumps({"peft_type": kind, "lora_alpha": 4, "rank_pattern": {"(?!to_k)to_q": 4}})
    if not refused:
        assert not read_adapter(path, shapes, config=config).notes
        return
    with pytest.raises(LoraFormatError, match=r"its rank_pattern has .* one rank for all layers"):
        read_adapter(path, shapes, config=config)


# Initialisations that change the base model

INITS: dict[Any, dict[str, Any]] = {
    True: {}, "gaussian": {}, "orthogonal": {}, "mica": {}, "eva": {},
    "pissa": {}, "pissa_niter_4": {}, "olora": {},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}  # fmt: skip


def initialised(init: bool | str, plain: FluxTransformer2DModel) -> PeftModel:
    """PEFT's model at the beginning of a training; CorDA and LoRA-GA look at the model at work before."""
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=TARGETS, **INITS[init])
    model = copy.deepcopy(plain)
    inputs = inputs_of(model, tokens=128)
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: model(**inputs))
    if init == "lora_ga":
        model.requires_grad_(True)
        preprocess_loraga(model, config, lambda: model(**inputs)[0].square().mean().backward())
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", INITS)
def test_a_lora_is_refused_if_pefts_initialisation_changed_the_base_model(
    init: bool | str, tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    model = initialised(init, plain)
    bases = {
        name.removeprefix("base_model.model."): layer.get_base_layer().weight
        for name, layer in model.named_modules()
        if hasattr(layer, "get_base_layer")
    }
    old = adaptable_layers(plain)
    changed = any(not torch.equal(weight, old[name].weight) for name, weight in bases.items())
    randomise(model)
    model.save_pretrained(str(tmp_path))
    if changed:
        with pytest.raises(LoraFormatError, match=rf'init_lora_weights is "{init}".*path_initial_model_for_weight'):
            read_with_config(tmp_path, shapes)
    else:
        assert_acts_as(read_with_config(tmp_path, shapes), plain, merged(model, plain))


def test_loftq_is_refused(tmp_path: Path, shapes: ModelShapes) -> None:
    """PEFT makes such files with bitsandbytes alone, on base weights that it rounds to a few bits: `loftq_init`."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 32), f"{name}.lora_B.weight": torch.randn(32, 4)}
    config = LoraConfig(r=4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}, target_modules=["to_q"])
    text = json.dumps(config.to_dict(), default=list)
    with pytest.raises(LoraFormatError, match='init_lora_weights is "loftq"'):
        read_adapter(save(tmp_path / "x.safetensors", tensors), shapes, config=text)


def test_a_changed_base_is_seen_in_diffusers_metadata(tmp_path: Path, plain: FluxTransformer2DModel) -> None:
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="olora", target_modules=TARGETS))
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with pytest.raises(LoraFormatError, match='init_lora_weights is "olora"'):
        read_adapter(path, shapes_of({TRANSFORMER: plain}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_what_peft_converted_acts_as_its_training(
    init: str, tmp_path: Path, plain: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    """As PEFT's documentation says: save the adapter before the training, and convert with it afterwards."""
    model = initialised(init, plain)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    config.init_lora_weights = init
    randomise(model)
    model.save_pretrained(str(tmp_path), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"]) == (True, 8)
    adapter = read_with_config(tmp_path, shapes)
    assert adapter.ranks == (8, 8)
    assert_acts_as(adapter, plain, merged(model, plain))
