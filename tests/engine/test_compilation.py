"""Three graphs for every size, model and mode; what was compiled is kept for the next process, or compiled again."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.compiler._cache import CacheArtifactManager, _serialize_single_cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from engine.compilation import (
    SEAL_BYTES,
    WARM_UP_SIZE,
    CompileCache,
    compile_blocks,
    compiled_parts,
    run_uncompiled,
    should_compile,
    torch_folder,
)
from engine.loading import load_models
from engine.profiles import model_profiles
from errors import SettingsError
from request import Mode
from settings import Settings
from tests.paths import PROJECT
from tests.tiny_models import inputs_of, narrow_transformer

CPU = torch.device("cpu")
WIDTH = 32
"""Of `narrow_transformer`; its heads are 16 wide."""
OTHER_SIZES = ((16, 4), (17, 9), (WIDTH, 8), (8, 8), (7, 3), (300, WIDTH), (129, 16))
"""Image and text tokens: odd ones, equal ones, and ones that equal a width."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def two_models(blocks: int, singles: int) -> dict[str, FluxTransformer2DModel]:
    """As dev and schnell: of the same widths, and a guidance embedder in one alone."""
    return {
        "dev": narrow_transformer(blocks, singles, seed=1),
        "schnell": narrow_transformer(blocks, singles, seed=2, guidance=False),
    }


def run(model: FluxTransformer2DModel, image_tokens: int, text_tokens: int) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(**inputs_of(model, image_tokens, text_tokens))[0]
    return result


# Whether


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_auto_compiles_with_cuda_alone(setting: str, device: str, expected: bool) -> None:
    assert should_compile(setting, torch.device(device)) is expected


# How often


def test_three_graphs_serve_both_models_and_all_sizes() -> None:
    counter = CompileCounter()
    models = two_models(2, 3)
    plain = {name: run(model, 17, 9) for name, model in models.items()}
    for model in models.values():
        compile_blocks(model, counter)
    run(models["dev"], 41, 12)
    assert counter.frame_count == 3
    for image_tokens, text_tokens in OTHER_SIZES:
        for model in models.values():
            run(model, image_tokens, text_tokens)
    assert counter.frame_count == 3
    for name, model in models.items():
        torch.testing.assert_close(run(model, 17, 9), plain[name])


def test_blocks_of_two_transformers_are_compiled_once() -> None:
    counter, other = CompileCounter(), CompileCounter()
    models = two_models(0, 2)
    for part in ("transformer_blocks", "single_transformer_blocks"):
        setattr(models["schnell"], part, getattr(models["dev"], part))
    compile_blocks(models["dev"], counter)
    run(models["dev"], 41, 12)
    compile_blocks(models["dev"], other)
    compile_blocks(models["schnell"], other)
    run(models["dev"], 16, 4)
    run(models["schnell"], 17, 9)
    assert (counter.frame_count, other.frame_count) == (2, 0)


def test_another_thread_than_the_first_calls_compiles_nothing() -> None:
    """Cog may predict in another thread than it sets up."""
    counter = CompileCounter()
    model = narrow_transformer(0, 1)
    compile_blocks(model, counter)
    run(model, 41, 12)
    in_thread(lambda: run(model, 16, 4))
    assert counter.frame_count == 1


def in_thread(call: Any) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not failures, failures


@pytest.mark.parametrize(
    ("first", "graphs"),
    [
        ((41, 12), 1),
        ((12, 12), 2),
        pytest.param((WIDTH, 12), 2, marks=pytest.mark.slow),
        pytest.param((41, WIDTH), 2, marks=pytest.mark.slow),
        pytest.param((WIDTH - 12, 12), 2, marks=pytest.mark.slow),
        pytest.param((41, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_sizes_that_are_equal_in_the_first_call_are_one_variable(first: tuple[int, int], graphs: int) -> None:
    counter = CompileCounter()
    model = narrow_transformer(0, 1)
    compile_blocks(model, counter)
    for image_tokens, text_tokens in (first, *OTHER_SIZES):
        run(model, image_tokens, text_tokens)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("text_tokens", [512, 256])
def test_the_warm_up_has_no_two_sizes_alike(text_tokens: int) -> None:
    """What the test above asks for, with FLUX.1's widths."""
    image_tokens = WARM_UP_SIZE.width * WARM_UP_SIZE.height // 16**2
    assert len({1, image_tokens, text_tokens, image_tokens + text_tokens, 24 * 128, 128}) == 6


def test_the_three_modes_and_both_models_share_their_graphs() -> None:
    counter = CompileCounter()
    image, mask = Image.new("RGB", (64, 96)), Image.new("L", (64, 96), 255)
    given: dict[Mode, dict[str, Any]] = {
        Mode.TXT2IMG: {},
        Mode.IMG2IMG: {"image": image, "strength": 1.0},
        Mode.INPAINT: {"image": image, "mask_image": mask, "strength": 1.0},
    }
    for pipelines in (model.pipelines for model in load_models(model_profiles("tiny", Settings()), CPU).values()):
        compile_blocks(pipelines[Mode.TXT2IMG].transformer, counter)
        for mode, extra in given.items():
            with torch.inference_mode():
                pipelines[mode]("a circle", width=64, height=96, num_inference_steps=1, max_sequence_length=32, **extra)
    assert counter.frame_count == 3


class Numbered(nn.Module):
    """A block whose graph depends on a number of its own."""

    def __init__(self, number: str) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + len(self.number)


class Many(nn.Module):
    """As many graphs as blocks, of one class."""

    _repeated_blocks = ("Numbered",)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Numbered("x" * index) for index in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_more_kinds_of_blocks_than_torch_allows_are_no_error_in_any_thread() -> None:
    """By itself, torch allows eight."""
    counter = CompileCounter()
    model = Many(12)
    compile_blocks(model, counter)
    in_thread(lambda: model(torch.zeros(3)))
    assert counter.frame_count == len(model.blocks)


# What cannot be compiled


def test_a_graph_that_cannot_be_compiled_runs_eagerly(log: pytest.LogCaptureFixture) -> None:
    model = Many(1)
    given = torch.ones(3)
    plain = model(given)
    compile_blocks(model)
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        torch.testing.assert_close(model(given), plain)
    (line,) = warnings_in(log)
    assert line.startswith("compiling a graph failed, so it runs uncompiled and slower: ")
    assert "\n" not in line


def test_uncompiled_blocks_call_no_compiler() -> None:
    counter = CompileCounter()
    model = narrow_transformer(1, 1)
    compile_blocks(model, counter)
    run_uncompiled(compiled_parts(model))
    run(model, 17, 9)
    assert counter.frame_count == 0


# What is kept


class Process:
    """As a process that starts: nothing compiled, nothing in inductor's own folder."""

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        self.cache = CompileCache(folder, device)
        self.hits = self.misses = 0

    def start(self, *, compiles: bool = True) -> bool:
        """Load, compile one layer, save; what `load` said."""
        torch._dynamo.reset()
        counters.clear()
        with fresh_cache(), CacheArtifactManager.with_fresh_cache():
            loaded = self.cache.load()
            if compiles:
                layer = nn.Linear(8, 8).requires_grad_(False)
                torch.compile(layer, fullgraph=True, dynamic=True)(torch.zeros(3, 8))
            self.cache.save()
        self.hits, self.misses = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
        return loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "compiled"


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "engine.compilation"):
        yield caplog


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def test_the_next_process_compiles_nothing(folder: Path, log: pytest.LogCaptureFixture) -> None:
    first, second = Process(folder), Process(folder)
    assert (first.start(), first.misses) == (False, 1)
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    assert (second.start(), second.hits, second.misses) == (True, 1, 0)
    assert file.stat().st_mtime_ns == written, "nothing new, yet written again"
    assert warnings_in(log) == []
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("harm", ["emptied", "cut", "changed"])
def test_a_damaged_file_is_made_anew(folder: Path, log: pytest.LogCaptureFixture, harm: str) -> None:
    Process(folder).start()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 1])
    harmed = {"emptied": b"", "cut": whole[:middle], "changed": whole[:middle] + flipped + whole[middle + 1 :]}
    file.write_bytes(harmed[harm])
    second = Process(folder)
    assert (second.start(), second.misses) == (False, 1)
    assert len(warnings_in(log)) == 1
    assert "damaged" in warnings_in(log)[0]
    assert Process(folder).start()


def test_graphs_of_other_versions_or_devices_go_when_new_ones_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Process(folder).start()
    (file,) = folder.iterdir()
    (folder / "cut-off.partial").write_bytes(b"1")
    (folder / "notes.txt").write_bytes(b"1")
    monkeypatch.setattr(torch, "__version__", "0.1")
    second = Process(folder)
    assert (second.start(), second.misses) == (False, 1)
    left = {path.name for path in folder.iterdir()}
    assert len(left) == 2
    assert "notes.txt" in left
    assert file.name not in left


def test_a_folder_that_cannot_be_made_costs_one_line(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    process = Process(tmp_path / "file" / "compiled")
    assert not process.start()
    assert all("compiled graphs: cannot be" in line for line in warnings_in(log))
    assert len(warnings_in(log)) == 2, "one for loading, one for saving"


def test_a_file_that_cannot_take_its_place_leaves_nothing_behind(folder: Path, log: pytest.LogCaptureFixture) -> None:
    Process(folder).start()
    (file,) = folder.iterdir()
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    Process(folder).start()
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert "cannot be written" in warnings_in(log)[-1]


class Harm:
    """What a forged pickle holds: it makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def forge(file: Path, canary: Path) -> None:
    """Put a harmful pickle in the place of each kept graph, under a seal that fits."""
    found = CacheArtifactManager.deserialize(file.read_bytes()[SEAL_BYTES:])
    assert found
    harmful = pickle.dumps(Harm(canary))
    forged = {kind: [replace(artifact, content=harmful) for artifact in artifacts] for kind, artifacts in found.items()}
    serializer: Any = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
    serializer.extend(forged.items())
    content = serializer.to_bytes()
    file.write_bytes(hashlib.sha256(content).digest() + content)


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_graphs_are_not_loaded_from_a_folder_that_others_can_write_to(
    folder: Path, tmp_path: Path, log: pytest.LogCaptureFixture, mode: int
) -> None:
    Process(folder).start()
    (file,) = folder.iterdir()
    forge(file, tmp_path / "canary")
    folder.chmod(mode)
    second = Process(folder)
    assert (second.start(), second.misses) == (False, 1)
    assert not (tmp_path / "canary").exists()
    assert [line for line in warnings_in(log) if "cannot be loaded" in line and "other users can write to it" in line]


def test_no_error_comes_from_a_file_that_cannot_be_unpickled(folder: Path, log: pytest.LogCaptureFixture) -> None:
    Process(folder).start()
    (file,) = folder.iterdir()
    content = b"\x80\x04cno_such_module\nno_such_class\n."
    file.write_bytes(hashlib.sha256(content).digest() + content)
    assert not Process(folder).start()
    assert warnings_in(log)


# torch's own folder


def test_torch_keeps_code_in_a_private_folder(tmp_path: Path) -> None:
    folder = torch_folder(None, tmp_path)
    assert folder == tmp_path / "torch"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert torch_folder(str(tmp_path / "named"), tmp_path) == tmp_path / "named"


def test_a_folder_for_torch_that_others_can_write_to_stops_the_setup(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch").chmod(0o777)
    with pytest.raises(SettingsError, match=r"other users can write to it .*Set TORCHINDUCTOR_CACHE_DIR"):
        torch_folder(None, tmp_path)


def test_without_anything_compiled_nothing_is_kept(folder: Path) -> None:
    assert not Process(folder).start(compiles=False)
    assert not folder.exists()


SCRIPT = """
import sys, time, torch
from pathlib import Path
from torch._dynamo.utils import counters
from engine.compilation import CompileCache, compile_blocks
from tests.tiny_models import inputs_of, narrow_transformer
cache = CompileCache(Path(sys.argv[1]), torch.device("cpu"))
loaded = cache.load()
model = narrow_transformer(1, 2)
compile_blocks(model)
with torch.inference_mode():
    model(**inputs_of(model, 41, 12))
    compiled = counters["stats"]["unique_graphs"]
    for image_tokens, text_tokens in ((16, 4), (17, 9), (8, 8), (300, 16)):
        model(**inputs_of(model, image_tokens, text_tokens))
cache.save()
found = counters["inductor"]
print(loaded, compiled, counters["stats"]["unique_graphs"], found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_fresh_process_takes_a_transformers_graphs_over(tmp_path: Path) -> None:
    """With inductor's real kernels, which need a C++ compiler on a CPU, and are not remade for other sizes."""

    def start(name: str) -> str:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "kept")],
            env=environment, cwd=PROJECT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip().splitlines()[-1]

    assert start("first") == "False 3 3 0 3"
    assert start("second") == "True 3 3 3 0"
