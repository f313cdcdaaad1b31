"""The full profile's files: from folders, and from a stand-in for the Hub over real HTTP, fetched by huggingface_hub.

What is published has the layout of FLUX.1's repositories, with shards, indices and the files that nobody needs; only
the tensors are small.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import scan_cache_dir, snapshot_download
from torch import Tensor
from transformers import T5EncoderModel

from engine.loading import load_models
from engine.model_folders import fetch_profiles
from engine.profiles import TINY, ModelProfile, model_profiles
from errors import SettingsError
from fetching.hub import Hub
from fetching.hub_cache import HubCache
from request import Mode
from settings import Settings
from tests.services import Reply, Repository, Request, Services, running_services, safetensors_bytes

DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
PROFILES = model_profiles("full", Settings())
TOKEN = "hf_operatorsecret"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00007.safetensors"
BIG, BIG_PATH = safetensors_bytes(6_000_000), "transformer/diffusion_pytorch_model-00009-of-00009.safetensors"
"""24 MB that no index names: huggingface_hub writes 10 MiB at a time, so that less cannot be interrupted."""
CHUNK_BYTES = 10 * 2**20
UNNEEDED = (
    ".gitattributes", "README.md", "LICENSE.md", "dev_grid.jpg", "flux1.safetensors", "ae.safetensors",
    "transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/flax_model.msgpack", "vae/older/config.json", "transformer/README.md",
)  # fmt: skip

Files = Mapping[str, bytes]


def transformer(seed: int) -> FluxTransformer2DModel:
    """A small one that fits the tiny text encoders and VAE."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, in_channels=64,
        joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=seed == 0, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models in diffusers layout, sharded as the published ones are."""
    dev, schnell = tmp_path_factory.mktemp("dev"), tmp_path_factory.mktemp("schnell")
    shutil.copytree(TINY / "tiny-dev", dev, dirs_exist_ok=True)
    shutil.copytree(TINY / "tiny-schnell" / "scheduler", schnell / "scheduler")
    for seed, folder in enumerate((dev, schnell)):
        shutil.rmtree(folder / "transformer", ignore_errors=True)
        transformer(seed).save_pretrained(folder / "transformer", max_shard_size="200KB")
    text_encoder = T5EncoderModel.from_pretrained(dev / "text_encoder_2")
    shutil.rmtree(dev / "text_encoder_2")
    text_encoder.save_pretrained(dev / "text_encoder_2", max_shard_size="500KB")
    (dev / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderTiny"]})
    )
    return {DEV: dev, SCHNELL: schnell}


@pytest.fixture(scope="module")
def needed(folders: Mapping[str, Path]) -> dict[str, dict[str, bytes]]:
    return {name: files_below(folder) for name, folder in folders.items()}


@dataclass
class World:
    """The Hub with both models on it, and a cache on this machine."""

    services: Services
    cache: Path

    @property
    def dev(self) -> Repository:
        return self.services.hugging_face.repositories[DEV]

    @property
    def endpoint(self) -> str:
        return self.services.hugging_face.address

    def start(self, token: str | None = None, endpoint: str | None = None) -> tuple[ModelProfile, ...]:
        hub = Hub(endpoint or self.endpoint, token, sleep=lambda seconds: None)
        return fetch_profiles(PROFILES, HubCache(hub, self.cache))

    def fail(self, token: str | None = None, endpoint: str | None = None) -> str:
        """The message of a start that fails; nothing that is told of it may hold a secret or a signed address."""
        with pytest.raises(SettingsError) as caught:
            self.start(token, endpoint)
        told = "".join(traceback.format_exception(caught.value))
        assert TOKEN not in told
        assert "signature" not in told
        return str(caught.value)

    def asked(self) -> list[str]:
        """The files that were asked about so far, as <repository>:<path>, without the commit."""
        heads = [r.path.split("/", 5) for r in self.services.hugging_face.requests if r.method == "HEAD"]
        found = [parts for parts in heads if parts[3] == "resolve"]
        return sorted(f"{owner}/{name}:{path}" for _, owner, name, _, _, path in found)

    def fetched(self) -> int:
        """How many files' contents were given so far: by the Hub the small ones, by its storage the large ones."""
        small = [r for r in self.services.hugging_face.requests if r.method == "GET" and "/resolve/" in r.path]
        return len(small) + len(self.services.storage.requests)

    def forget(self) -> None:
        """Forget what was asked for so far."""
        for server in self.services.servers:
            server.requests.clear()

    def stored(self, path: str) -> Path:
        """Where a file of dev's lies in the cache."""
        return self.cache / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / self.dev.commit / path


@pytest.fixture
def world(needed: Mapping[str, Files], tmp_path: Path) -> Iterator[World]:
    with running_services() as services:
        parts_of_dev = {path: data for path, data in needed[DEV].items() if not path.startswith("transformer/")}
        unneeded = dict.fromkeys(UNNEEDED, b"of no use here")
        services.hugging_face.repositories = {
            DEV: Repository({**needed[DEV], **unneeded}, "d" * 40),
            SCHNELL: Repository({**parts_of_dev, **needed[SCHNELL], **unneeded}, "e" * 40),
        }
        services.hugging_face.tokens = {TOKEN}
        yield World(services, tmp_path / "hub")


@pytest.fixture(scope="module")
def filled(needed: Mapping[str, Files], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after a whole fetch."""
    with running_services() as services:
        world = World(services, tmp_path_factory.mktemp("filled"))
        services.hugging_face.repositories = {
            DEV: Repository(dict(needed[DEV]), "d" * 40),
            SCHNELL: Repository(dict(needed[SCHNELL]), "e" * 40),
        }
        world.start()
        return world.cache


@pytest.fixture
def later(world: World, filled: Path) -> World:
    """The world where a whole fetch has been before."""
    shutil.copytree(filled, world.cache, symlinks=True)
    return world


def all_names(needed: Mapping[str, Files]) -> list[str]:
    return sorted(f"{name}:{path}" for name, files in needed.items() for path in files)


def nowhere() -> str:
    """An address that nobody answers at."""
    with running_services() as services:
        return services.hugging_face.address


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# From the Hub


def test_models_of_the_hub_are_fetched_and_loaded_and_make_an_image(world: World) -> None:
    models = load_models(world.start(), torch.device("cpu"))
    for seed, name in enumerate(("dev", "schnell")):
        pipeline = models[name].pipelines[Mode.TXT2IMG]
        assert equal(pipeline.transformer.state_dict(), transformer(seed).state_dict())
        image = pipeline("a red circle", width=64, height=64, num_inference_steps=1, max_sequence_length=32).images[0]
        assert image.size == (64, 64)


def test_only_what_is_read_is_asked_for_at_one_commit(world: World, needed: Mapping[str, Files]) -> None:
    world.start()
    assert world.asked() == all_names(needed)
    commits = {r.path.split("/")[4] for r in world.services.hugging_face.requests if "/resolve/" in r.path}
    assert commits == {"d" * 40, "e" * 40}


def test_the_commit_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        world.start()
    assert f"{DEV}: commit {'d' * 40}" in caplog.text


def test_a_second_start_asks_for_the_listings_alone(later: World) -> None:
    later.start()
    assert {r.path for r in later.services.requests} == {f"/api/models/{name}/revision/main" for name in (DEV, SCHNELL)}


def test_a_second_start_does_not_hash_again(later: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        later.start()
    assert "hashed" not in caplog.text


def test_a_new_commit_brings_only_what_changed(later: World) -> None:
    later.dev.commit = "f" * 40
    later.dev.files["scheduler/scheduler_config.json"] += b"\n"
    assert later.start()[0].source.endswith("f" * 40)
    assert later.fetched() == 1


def test_two_starts_at_once_fetch_each_file_once(world: World, needed: Mapping[str, Files]) -> None:
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: world.start(), range(2))
    assert first == second
    assert world.fetched() == len(all_names(needed))


def test_huggingface_hub_finds_what_was_fetched(later: World, needed: Mapping[str, Files]) -> None:
    folder = Path(snapshot_download(DEV, cache_dir=later.cache, local_files_only=True))
    assert files_below(folder) == needed[DEV]
    assert not scan_cache_dir(later.cache).warnings


def test_what_huggingface_hub_fetched_is_found(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for name in (DEV, SCHNELL):
        snapshot_download(name, cache_dir=world.cache, endpoint=world.endpoint, token=False)
    world.forget()
    with caplog.at_level(logging.INFO):
        world.start()
    assert world.asked() == []
    assert f"hashed {SHARD}" in caplog.text


# Damage


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("path", [SHARD, "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [cut_off, flip_a_byte])
def test_a_damaged_file_is_named_and_fetched_again(
    later: World, damage: object, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    damage(later.stored(path))
    later.start()
    assert later.stored(path).read_bytes() == later.dev.files[path]
    assert f"{DEV}: {path} has" in caplog.text
    assert later.asked() == [f"{DEV}:{path}"]


def test_a_file_with_another_time_and_the_same_content_stays(later: World) -> None:
    os.utime(later.stored(SHARD), (1, 1))
    later.start()
    assert later.asked() == []


def test_a_file_that_comes_wrong_is_fetched_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.dev.spoiled[SHARD] = [b"x" * len(world.dev.files[SHARD])]
    world.start()
    assert f"{SHARD} has the digest" in caplog.text
    assert world.stored(SHARD).read_bytes() == world.dev.files[SHARD]


def test_a_file_that_comes_wrong_twice_ends_the_start(world: World) -> None:
    world.dev.spoiled[SHARD] = [b"x" * len(world.dev.files[SHARD])] * 2
    assert f"{SHARD} was fetched again and still differs" in world.fail()
    assert not world.stored(SHARD).exists()


# Interruptions


def test_a_broken_connection_is_resumed(later: World) -> None:
    publish(later, BIG_PATH, BIG)
    later.dev.cuts[BIG_PATH] = [CHUNK_BYTES + 1000]
    later.start()
    assert ranges(later) == [None, f"bytes={CHUNK_BYTES}-"]
    assert later.stored(BIG_PATH).read_bytes() == BIG


def test_an_interrupted_start_leaves_no_part_and_keeps_the_whole_files(world: World) -> None:
    """huggingface_hub begins the file anew at the next start; the files that came whole are not asked for again."""
    publish(world, BIG_PATH, BIG)
    world.dev.spoiled[BIG_PATH] = [BIG[:-1]] * 2
    assert "gave only a part" in world.fail()
    assert not list(world.cache.rglob("*.incomplete"))
    world.forget()
    world.start()
    assert world.stored(BIG_PATH).read_bytes() == BIG
    assert [name for name in world.asked() if name.startswith(DEV)] == [f"{DEV}:{BIG_PATH}"]


def test_a_moment_of_the_storage_being_down_is_waited_for(later: World, caplog: pytest.LogCaptureFixture) -> None:
    later.stored(SHARD).resolve().unlink()
    later.services.storage.first = [Reply(503)]
    later.start()
    assert "answered with status 503. Try again later. It is tried once more." in caplog.text


def test_a_storage_that_refuses_is_named_and_its_address_is_not(later: World) -> None:
    later.stored(SHARD).resolve().unlink()
    storage = later.services.storage
    storage.first = [Reply(403)] * 9
    assert f"{storage.authority} answered with status 403" in later.fail()


def publish(world: World, path: str, content: bytes) -> None:
    """Commit one more file."""
    world.dev.commit = "a" * 40
    world.dev.files[path] = content


def ranges(world: World) -> list[str | None]:
    return [request.headers.get("range") for request in world.services.storage.requests]


# Access


def test_a_gated_model_without_a_token_names_the_licence_and_the_token(world: World) -> None:
    world.dev.gated = True
    message = world.fail()
    assert f"https://huggingface.co/{DEV}" in message
    assert "HF_TOKEN" in message


def test_a_token_without_access_is_told_from_none(world: World) -> None:
    world.dev.gated = True
    message = world.fail(TOKEN)
    assert "the account of HF_TOKEN has no access. Accept its licence at" in message


def test_an_unknown_token_is_told(world: World) -> None:
    assert "does not know HF_TOKEN" in world.fail("hf_revoked")


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_model_that_is_not_there_is_told(world: World, token: str | None) -> None:
    world.dev.private = True
    account = "the account of HF_TOKEN has no access" if token else "HF_TOKEN is not set"
    assert f'"{DEV}" from the Hugging Face Hub: there is no such repository, or it is private and {account}' in (
        world.fail(token)
    )


def test_the_token_goes_to_the_hub_in_a_header_and_nowhere_else(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for repository in world.services.hugging_face.repositories.values():
        repository.gated, repository.readers = True, frozenset({TOKEN})
    with caplog.at_level(logging.DEBUG):
        world.start(TOKEN)
    assert {request.bearer for request in world.services.hugging_face.requests} == {TOKEN}
    assert not any(holds_token(request) for request in world.services.storage.requests)
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in content for content in files_below(world.cache).values())
    assert TOKEN not in repr(Hub(None, TOKEN))


def holds_token(request: Request) -> bool:
    return TOKEN in f"{request.raw_path}{request.query}{request.headers}"


def test_nothing_is_fetched_where_the_disk_is_too_small(world: World) -> None:
    world.dev.listed_bytes[SHARD] = 10**18
    assert "1000000000.0" in world.fail()
    assert world.asked() == []


def test_a_cache_that_cannot_be_written_is_told(world: World) -> None:
    world.cache.write_text("a file where the folder should be")
    assert "cache folder cannot be used: Not a directory" in world.fail()


# Without the Hub


def test_the_cache_serves_where_the_hub_is_away(later: World, caplog: pytest.LogCaptureFixture) -> None:
    expected = later.start()
    assert later.start(endpoint=nowhere()) == expected
    assert "cannot be reached" in caplog.text
    assert f"The cached commit {'d' * 40} is used" in caplog.text


def test_an_empty_cache_does_not_serve(world: World) -> None:
    endpoint = nowhere()
    message = world.fail(endpoint=endpoint)
    assert f"{endpoint.removeprefix('http://')} cannot be reached" in message


def test_a_cache_that_lacks_a_file_does_not_serve(later: World) -> None:
    later.stored(SHARD).unlink()
    assert f"The cache does not suffice: {SHARD} is missing" in later.fail(endpoint=nowhere())


def test_a_changed_file_does_not_serve_where_the_hub_is_away(later: World, caplog: pytest.LogCaptureFixture) -> None:
    flip_a_byte(later.stored(SHARD))
    assert f"The cache does not suffice: {SHARD} was damaged and is removed" in later.fail(endpoint=nowhere())
    assert f"{SHARD} has the digest" in caplog.text


def test_an_interrupted_update_leaves_the_commit_before_to_serve(later: World) -> None:
    later.dev.commit = "f" * 40
    later.dev.files[SHARD] = safetensors_bytes(9)
    later.dev.spoiled[SHARD] = [b"x", b"x"]
    later.fail()
    assert later.start(endpoint=nowhere())[0].source.endswith("d" * 40)


# Folders


@pytest.fixture
def copies(folders: Mapping[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Folders of dev and schnell that may be spoiled."""
    dev, schnell = (Path(shutil.copytree(folders[name], tmp_path / name)) for name in (DEV, SCHNELL))
    return dev, schnell


def from_folders(dev: Path, schnell: Path) -> tuple[ModelProfile, ...]:
    profiles = model_profiles("full", Settings(dev=str(dev), schnell=str(schnell)))
    return fetch_profiles(profiles, HubCache(Hub(nowhere()), dev / "no cache is needed"))


def test_whole_folders_are_taken_as_they_are(copies: tuple[Path, Path]) -> None:
    dev, schnell = copies
    profiles = from_folders(dev, schnell)
    assert [(p.source, p.shared_source) for p in profiles] == [(str(dev), str(dev)), (str(schnell), str(dev))]


def test_the_embedded_models_are_whole() -> None:
    profiles = model_profiles("tiny", Settings())
    assert fetch_profiles(profiles, HubCache(Hub())) == profiles


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("path", "damage", "found"),
    [
        (SHARD, remove, f"{SHARD} is missing"),
        (SHARD, cut_off, f"{SHARD} is cut off"),
        (SHARD, empty, f"{SHARD} is cut off"),
        ("vae/diffusion_pytorch_model.safetensors", remove, "vae/diffusion_pytorch_model.safetensors is missing"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", empty, "index.json is no JSON"),
        ("text_encoder/config.json", remove, "text_encoder/config.json is missing"),
        ("text_encoder_2/config.json", empty, "text_encoder_2/config.json is no JSON"),
        ("scheduler/scheduler_config.json", remove, "scheduler/scheduler_config.json is missing"),
        ("tokenizer/tokenizer.json", remove, "tokenizer/ lacks tokenizer.json or vocab.json with merges.txt"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    copies: tuple[Path, Path], path: str, damage: object, found: str
) -> None:
    assert callable(damage)
    damage(copies[0] / path)
    with pytest.raises(SettingsError, match="is not complete in") as caught:
        from_folders(*copies)
    assert found in str(caught.value)


def test_all_that_lacks_is_named_at_once(copies: tuple[Path, Path]) -> None:
    for path in (SHARD, "vae/config.json"):
        (copies[0] / path).unlink()
    with pytest.raises(SettingsError, match=r"00002-of-00007.safetensors is missing; vae/config.json is missing"):
        from_folders(*copies)


@pytest.mark.parametrize("source", ["/models/flux", "./flux", "a/b/c"])
def test_a_path_where_no_folder_is_is_told(source: str, tmp_path: Path) -> None:
    profiles = model_profiles("full", Settings(dev=source))
    with pytest.raises(SettingsError, match=f'Cannot get "{source}".*not the name of a repository.*set FLUX_DEV'):
        fetch_profiles(profiles, HubCache(Hub(nowhere()), tmp_path))
