"""script/lora: what a file is, without a model and without torch."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from cli.lora import main
from cli.lora_report import compare, report_on
from lora_loading.known_models import flux_1, tiny
from lora_loading.reading.adapter import read_adapter
from lora_loading.reading.header import read_header
from lora_loading.reading.norms import read_array
from lora_loading.shapes import ModelShapes
from tests import lora_files as files
from tests.lora_files import Tensors, changes_of, save
from tests.paths import LORAS, PROJECT
from tests.services import StoredFile, running_services


@pytest.fixture(scope="module")
def shapes() -> ModelShapes:
    return tiny("dev")


def printed(*arguments: object) -> tuple[int, str]:
    output = io.StringIO()
    with redirect_stdout(output):
        status = main([str(argument) for argument in arguments])
    return status, output.getvalue()


def as_json(*arguments: object) -> Any:
    return json.loads(printed(*arguments, "--json")[1])


def test_a_lora_is_described() -> None:
    path = LORAS / "tok-style.safetensors"
    status, text = printed(path)
    assert status == 0
    factors = {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}
    changes = [up @ factors[name.replace("lora_B", "lora_A")] for name, up in factors.items() if "lora_B" in name]
    norm = math.sqrt(sum(np.square(change).sum() for change in changes))
    for part in (
        "loads          on tiny-dev, tiny-schnell",
        'not            on FLUX.1 [dev]: at "',
        "format         diffusers: LoRA, rank 6",
        "layers         45 of 88 in the transformer",
        f"size           norm {norm:.2f} at scale 1",
        "double 0-2     ",
        "note           the file has no alpha: alpha / rank = 1 is assumed",
    ):
        assert part in text


def test_no_torch_is_needed_and_it_takes_less_than_a_second() -> None:
    """Of processor time, since other work shares this machine; imports included."""
    code = (
        "import sys, time; started = time.process_time(); from cli.lora import main; "
        f"assert main([{str(LORAS / 'tok-style.safetensors')!r}]) == 0; assert 'torch' not in sys.modules; "
        "print(time.process_time() - started)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert float(run.stdout.splitlines()[-1]) < 1


def kinds(shapes: ModelShapes) -> dict[str, Tensors]:
    """A change of each kind of a fused layer and a plain one, in kohya's names."""
    torch.manual_seed(0)
    qkv, proj = (f"lora_unet_double_blocks_0_img_attn_{name}" for name in ("qkv", "proj"))
    loha = {f"hada_{w}_{s}": torch.randn(*((384, 3) if s == "a" else (3, 128))) for w in ("w1", "w2") for s in "ab"}
    return {
        "LoRA": files.kohya(changes_of(shapes)),
        "LoHa": {f"{qkv}.{part}": tensor for part, tensor in loha.items()} | {f"{qkv}.alpha": torch.tensor(1.5)},
        "LoKr": {
            f"{qkv}.lokr_w1": torch.randn(6, 4),
            f"{qkv}.lokr_w2_a": torch.randn(64, 2),
            f"{qkv}.lokr_w2_b": torch.randn(2, 32),
            f"{proj}.lokr_w1": torch.randn(8, 8),
            f"{proj}.lokr_w2": torch.randn(16, 16),
        },
        "full difference": {f"{qkv}.diff": torch.randn(384, 128), f"{proj}.diff_b": torch.randn(128)},
    }


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "full difference"])
def test_norms_are_those_of_the_changes(kind: str, tmp_path: Path, shapes: ModelShapes) -> None:
    path = save(tmp_path / "x.safetensors", kinds(shapes)[kind])
    found = {(size.component, size.layer): size.norm for size in report_on(path).sizes}
    adapter = read_adapter(path, shapes)
    assert found.keys() == {(u.component, u.layer) for u in adapter.layers}
    weight = torch.zeros(1, 1, dtype=torch.float64)
    for u in adapter.layers:
        norm = u.update.delta(weight, lambda _: torch.zeros(())).norm()
        torch.testing.assert_close(
            torch.tensor(found[u.component, u.layer]), norm, rtol=1e-5, atol=0.0, check_dtype=False
        )


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_as_torch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    every: Tensor = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn) if dtype.itemsize == 1 else torch.randn(256)  # noqa: E501 # fmt: skip
    tensor = every.view(torch.uint8).view(dtype) if dtype.itemsize == 1 else every.to(dtype)
    path = save(tmp_path / "x.safetensors", {"x": tensor})
    np.testing.assert_array_equal(read_array(path, read_header(path), "x"), tensor.double().numpy())


def test_metadata_is_shown(tmp_path: Path, shapes: ModelShapes) -> None:
    metadata = {
        "ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1", "ss_steps": "1200",
        "ss_resolution": "(512, 512)", "ss_num_train_images": "20",
        "ss_tag_frequency": json.dumps({"1_x": {"ohwx": 20}}),
    }  # fmt: skip
    path = save(tmp_path / "x.safetensors", files.kohya(changes_of(shapes)), metadata)
    found = as_json(path)
    assert found["trainer"] == "kohya's sd-scripts (networks.lora_flux)"
    assert found["base_model"] == "flux1"
    assert found["training"] == {"resolution": "(512, 512)", "steps": "1200", "images": "20"}
    assert found["trigger_words"] == ["ohwx"]
    assert found["layers"]["transformer"] == {"changed": 70, "of": 88}
    assert "made by        kohya's sd-scripts" in printed(path)[1]


def test_a_file_of_another_model_is_named_and_the_status_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"lora_unet_down_blocks_0_x.lora_down.weight": torch.ones(2, 2)})
    status, text = printed(path)
    assert status == 1
    assert "no: it is a LoRA for Stable Diffusion 1.5 or SDXL. Use a LoRA for FLUX.1." in text
    assert as_json(path)["problem"].startswith("it is a LoRA for Stable Diffusion")


def test_what_would_make_a_lora_silent_is_said(tmp_path: Path, shapes: ModelShapes) -> None:
    changes = changes_of(shapes, only="img_attn.proj")
    tensors = files.kohya(changes)
    key = next(key for key in tensors if "lora_up" in key)
    zero = save(tmp_path / "x.safetensors", tensors | {key: torch.zeros_like(tensors[key])})
    assert "1 of 3 layers change nothing, as transformer_blocks.0.attn.to_out.0" in printed(zero)[1]
    broken = save(tmp_path / "y.safetensors", tensors | {key: tensors[key] * float("nan")})
    assert "1 layers hold numbers that are not finite" in printed(broken)[1]


def test_a_folder_of_pefts_is_read_with_its_configuration(tmp_path: Path, shapes: ModelShapes) -> None:
    """PEFT keeps alpha in adapter_config.json: half the rank here, so half the norm."""
    changes = changes_of(shapes, rank=4, alpha=4.0)
    save(tmp_path / "adapter_model.safetensors", files.peft_named("base_model.model.")(changes))
    alone = as_json(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    found = as_json(tmp_path)
    assert found["norm"] == pytest.approx(alone["norm"] / 2)
    assert alone["notes"] == ["the file has no alpha: alpha / rank = 1 is assumed"]
    assert found["notes"] == []


def test_a_tar_is_looked_into(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(LORAS / "tok-style.safetensors", "output/flux_train_replicate/lora.safetensors")
    assert as_json(tmp_path / "x.tar")["format"] == "diffusers: LoRA"


def test_two_files_are_compared_whatever_their_formats(tmp_path: Path, shapes: ModelShapes) -> None:
    changes = changes_of(shapes)
    one = save(tmp_path / "a.safetensors", files.kohya(changes))
    other = save(tmp_path / "b.safetensors", files.peft_named()([*changes[:-1]]))
    found = compare(report_on(one), report_on(other))
    assert (found.both, found.only_first, found.only_second) == (69, 1, 0)
    assert found.cosine == pytest.approx(1.0)
    assert found.ratio == pytest.approx(1.0)
    unlike = save(tmp_path / "c.safetensors", files.kohya(changes_of(shapes, seed=1)))
    cosine = compare(report_on(one), report_on(unlike)).cosine
    assert cosine is not None
    assert abs(cosine) < 0.1
    assert "direction      cosine 1.0000" in printed(one, other)[1]
    assert as_json(one, other)["comparison"]["both"] == 69


def test_quick_reads_no_data(tmp_path: Path, shapes: ModelShapes) -> None:
    path = save(tmp_path / "x.safetensors", files.kohya(changes_of(shapes)))
    assert "+++  attention" in printed(path, "--quick")[1]
    assert as_json(path, "--quick")["norm"] is None


def test_a_reference_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (LORAS / "tok-style.safetensors").read_bytes()
    with running_services() as services:
        address = services.storage.put("/style.safetensors", StoredFile(content))
        monkeypatch.setenv("FLUX_TRUSTED_HOSTS", ",".join(services.trusted_hosts))
        monkeypatch.setenv("FLUX_CACHE_DIR", str(tmp_path))
        assert as_json(address)["format"] == "diffusers: LoRA"


@pytest.mark.parametrize("name", ["CHANGELOG.md", "tests", "no/such/thing/at/all"])
def test_what_is_no_lora_ends_with_a_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PROJECT / name) if "no/" not in name else name]) == 1
    assert capsys.readouterr().err.startswith("script/lora: ")


def test_a_lora_for_flux_1_loads_there(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", files.kohya(changes_of(flux_1(), rank=1, only="blocks.0.img_attn")))
    found = as_json(path)
    assert found["loads_on"] == ["FLUX.1 [dev]", "FLUX.1 [schnell]"]
    assert [len(row["counts"]) for row in found["blocks"]] == [19]
