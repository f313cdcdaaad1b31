"""From a name to a source, against stand-ins on this machine; huggingface_hub is the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from errors import DownloadError, HttpStatusError, LoraAccessError, LoraFormatError, LoraReferenceError, PredictionError
from fetching.network import Client
from lora_loading.finding.reference import parse
from lora_loading.finding.resolve import Resolver, explain, token_for
from lora_loading.finding.services.service import Endpoints
from lora_loading.finding.tokens import Tokens
from tests.services import (
    ARCHIVED,
    EARLY_ACCESS,
    HTML_WITH_200,
    CivitaiFile,
    ReplicateModel,
    Reply,
    Repository,
    Services,
    civitai_file,
    civitai_version,
    json_reply,
    running_services,
    safetensors_bytes,
    tar_bytes,
    trained_tar,
)
from weights import Container, Source

HUB_TOKEN = "hf_canary0123456789"
CIVITAI_TOKEN = "civitaicanary0123456789"
REPLICATE_TOKEN = "r8_canary0123456789"
TOKENS = Tokens(HUB_TOKEN, CIVITAI_TOKEN, REPLICATE_TOKEN)
COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
OLD_VERSION, NEW_VERSION = "1" * 64, "2" * 64
FILE = safetensors_bytes(seed=1)
SHA256 = hashlib.sha256(FILE).hexdigest()
TAR = trained_tar(FILE)


class World:
    """The stand-ins, and a resolver that talks to them and never sleeps."""

    def __init__(self, services: Services) -> None:
        self.hub, self.civitai, self.replicate = services.hugging_face, services.civitai, services.replicate
        self.services = services
        self.pauses: list[float] = []
        self.client = Client(trusted_hosts=services.trusted_hosts, sleep=self.pauses.append)
        self.endpoints = Endpoints(*(s.address for s in (self.hub, self.civitai, self.replicate, self.replicate)))
        self.resolver = Resolver(self.client, self.endpoints, sleep=self.pauses.append)

    def resolve(self, text: str, tokens: Tokens | None = None) -> Source:
        return self.resolver.resolve(parse(text), tokens or Tokens())

    def fetch(self, source: Source) -> bytes:
        with self.client.get(source.address, dict(source.headers)) as response:
            return b"".join(iter(partial(response.read_some, 1 << 16), b""))

    def fail(self, kind: type[PredictionError], text: str, tokens: Tokens | None = None) -> str:
        with pytest.raises(kind) as raised:
            self.resolve(text, tokens)
        printed = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
        assert "canary" not in printed
        assert "signature=" not in printed
        assert isinstance(raised.value, kind)
        return str(raised.value)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("HF_TOKEN", "hf_operators_own")  # must play no part
    with running_services() as services:
        yield World(services)


def publish(world: World, *paths: str, **about: Any) -> Repository:
    """The repository owner/name on the Hub."""
    files = {path: safetensors_bytes(seed=number + 1) for number, path in enumerate(paths)}
    repository = Repository({**files, "README.md": b"# A LoRA"}, COMMIT, **about)
    world.hub.repositories["owner/name"] = repository
    return repository


# Hugging Face


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("hf.co/owner/name", "a.safetensors"),
        ("hf.co/owner/name/a.safetensors", "a.safetensors"),
        ("hf.co/owner/name/blob/main/a.safetensors", "a.safetensors"),
        ("hf.co/owner/name/resolve/main/a.safetensors?download=true", "a.safetensors"),
        ("hf.co/owner/name/tree/main", "a.safetensors"),
    ],
)
def test_a_file_on_the_hub_is_found_at_its_commit(world: World, text: str, path: str) -> None:
    publish(world, path)
    source = world.resolve(text)
    assert source == Source(
        name=str(parse(text)),
        address=f"{world.hub.address}/owner/name/resolve/{COMMIT}/{path}",
        revision=f"{COMMIT}/{path}",
        sha256=SHA256,
        size_bytes=len(FILE),
    )
    assert world.fetch(source) == FILE


@pytest.mark.parametrize("text", ["hf.co/owner/name", "hf.co/owner/name/tree/main/sub", "hf.co/owner/name/sub/adapter_model.safetensors"])  # noqa: E501 # fmt: skip
def test_pefts_configuration_comes_with_its_file(world: World, text: str) -> None:
    folder = "sub/" if "sub" in text else ""
    repository = publish(world, f"{folder}adapter_model.safetensors", private=True, readers=frozenset({HUB_TOKEN}))
    world.hub.tokens.add(HUB_TOKEN)
    decisive = {"init_lora_weights": True, "lora_alpha": 32, "peft_type": "LORA", "r": 16, "rank_pattern": {"to_q": 4}}
    config = decisive | {"base_model_name_or_path": "someone/flux", "inference_mode": True}
    repository.files[f"{folder}adapter_config.json"] = json.dumps(config).encode()
    source = world.resolve(text, TOKENS)
    assert source.facts == (("adapter_config.json", json.dumps(decisive)),)


def test_a_file_of_pefts_without_its_configuration_is_found_alone(world: World) -> None:
    publish(world, "adapter_model.safetensors")
    assert world.resolve("hf.co/owner/name").facts == ()


@pytest.mark.parametrize("content", [b"not JSON", b"[1]"])
def test_a_configuration_of_pefts_that_cannot_be_read_is_no_file_without_one(world: World, content: bytes) -> None:
    repository = publish(world, "adapter_model.safetensors")
    repository.files["adapter_config.json"] = content
    world.fail(DownloadError, "hf.co/owner/name")


@pytest.mark.parametrize("revision", ["v2", "refs%2Fpr%2F1", "refs/pr/1", OLD_COMMIT])
def test_any_revision_is_found(world: World, revision: str) -> None:
    publish(world, "sub/a b.safetensors", revisions={"v2": OLD_COMMIT, "refs/pr/1": OLD_COMMIT})
    source = world.resolve(f"huggingface.co/owner/name/tree/{revision}")
    assert source.address == f"{world.hub.address}/owner/name/resolve/{OLD_COMMIT}/sub/a%20b.safetensors"
    assert world.fetch(source) == FILE


@pytest.mark.parametrize(
    ("paths", "asked", "chosen"),
    [
        (["x.safetensors", "lora.safetensors", "pytorch_lora_weights.safetensors"], "", 2),
        (["x.safetensors", "lora.safetensors", "sub/x.safetensors"], "", 1),
        (["sub/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"], "", 1),
        (["sub/deep/only.safetensors"], "", 0),
        (["lora.safetensors", "sub/x.safetensors"], "/tree/main/sub", 1),
        (["sub2/lora.safetensors", "sub/x.safetensors", "sub/lora.safetensors"], "/tree/main/sub", 2),
    ],
)
def test_of_several_files_the_usual_names_win(world: World, paths: list[str], asked: str, chosen: int) -> None:
    publish(world, *paths)
    assert world.resolve(f"hf.co/owner/name{asked}").revision == f"{COMMIT}/{paths[chosen]}"


def test_several_files_without_a_usual_name_are_listed(world: World) -> None:
    publish(world, "b.safetensors", "a.safetensors", "sub/c.safetensors")
    message = world.fail(LoraReferenceError, "hf.co/owner/name")
    assert "a.safetensors, b.safetensors, sub/c.safetensors" in message
    assert "Name one, such as huggingface.co/owner/name/blob/main/a.safetensors." in message


def test_a_usual_name_in_a_folder_does_not_win_over_the_files_above_it(world: World) -> None:
    publish(world, "x.safetensors", "checkpoint-500/pytorch_lora_weights.safetensors")
    assert "holds 2 files" in world.fail(LoraReferenceError, "hf.co/owner/name")


@pytest.mark.parametrize("text", ["hf.co/owner/name", "hf.co/owner/name/tree/main/no/such/folder"])
def test_no_file_at_all_is_said(world: World, text: str) -> None:
    publish(world)
    assert "holds no .safetensors file" in world.fail(LoraAccessError, text)


def test_a_repository_of_many_files_is_read_to_its_end(world: World) -> None:
    publish(world, *(f"sample{number}.bin" for number in range(2000)), "z.safetensors")
    assert world.resolve("hf.co/owner/name").revision == f"{COMMIT}/z.safetensors"


def test_a_renamed_repository_is_found(world: World) -> None:
    publish(world, "a.safetensors")
    world.hub.renamed["old/name"] = "owner/name"
    source = world.resolve("hf.co/old/name")
    assert source.sha256 == SHA256
    assert world.fetch(source) == FILE


def test_a_file_at_a_commit_is_immutable_and_a_branch_is_not(world: World) -> None:
    publish(world, "a.safetensors")
    assert world.resolve(f"hf.co/owner/name/blob/{COMMIT}/a.safetensors").immutable
    assert not world.resolve("hf.co/owner/name/blob/main/a.safetensors").immutable


def test_a_branch_that_moved_gives_another_revision(world: World) -> None:
    repository = publish(world, "a.safetensors")
    before = world.resolve("hf.co/owner/name")
    repository.commit, repository.files["a.safetensors"] = OLD_COMMIT, b"new"
    after = world.resolve("hf.co/owner/name")
    assert before.name == after.name
    assert before.revision != after.revision
    assert before.sha256 != after.sha256


@pytest.mark.parametrize("closed", ["private", "gated"])
@pytest.mark.parametrize("text", ["hf.co/owner/name", "hf.co/owner/name/a.safetensors"])
def test_a_closed_repository_opens_with_its_readers_token_alone(world: World, closed: str, text: str) -> None:
    publish(world, "a.safetensors", **{closed: True}, readers=frozenset({HUB_TOKEN}))
    world.hub.tokens |= {HUB_TOKEN, "hf_stranger_canary"}
    source = world.resolve(text, Tokens(hugging_face=f" {HUB_TOKEN}\n"))
    assert source.headers == (("Authorization", f"Bearer {HUB_TOKEN}"),)
    assert world.fetch(source) == FILE
    world.hub.requests.clear()
    said = world.fail(LoraAccessError, text)
    assert closed in said
    assert "set hf_api_token" in said
    assert {request.bearer for request in world.hub.requests} == {None}
    assert "the token " in world.fail(LoraAccessError, text, Tokens(hugging_face="hf_stranger_canary"))


def test_a_token_that_the_hub_does_not_know_is_said_to_be_that(world: World) -> None:
    publish(world, "a.safetensors")
    said = world.fail(LoraAccessError, "hf.co/owner/name", TOKENS)
    assert "does not accept the token" in said
    assert "set hf_api_token" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf.co/owner/other", "there is no such repository"),
        ("hf.co/owner/name/tree/v9", 'no revision "v9"'),
        ("hf.co/owner/name/blob/v9/a.safetensors", 'no revision "v9"'),
        ("hf.co/owner/name/b.safetensors", 'no "b.safetensors" at revision "main"'),
    ],
)
def test_what_the_hub_does_not_have_is_named(world: World, text: str, found: str) -> None:
    publish(world, "a.safetensors")
    said = world.fail(LoraAccessError, text)
    assert found in said
    assert parse(text).label in said


@pytest.mark.parametrize("text", ["hf.co/owner/name", "hf.co/owner/name/a.safetensors"])
def test_the_hub_is_asked_again_when_it_is_busy(world: World, text: str) -> None:
    publish(world, "a.safetensors")
    world.hub.first += [Reply(429, {"Retry-After": "3600"}), Reply(503), Reply(500)]
    assert world.resolve(text).sha256 == SHA256
    assert world.pauses == [30, 1, 2]


def test_a_hub_that_stays_busy_is_given_up(world: World) -> None:
    world.hub.first += [Reply(429)] * 20
    assert "limits how often it is asked (status 429)" in world.fail(DownloadError, "hf.co/owner/name")
    assert len(world.hub.requests) == 4


@pytest.mark.parametrize("reply", [HTML_WITH_200, json_reply({"unexpected": 1}), json_reply([1, None])])
def test_a_hub_that_answers_nonsense_is_a_download_error(world: World, reply: Reply) -> None:
    world.hub.first += [reply]
    assert "Hugging Face answered in an unknown way" in world.fail(DownloadError, "hf.co/owner/name")


def test_a_hub_that_is_not_there_is_a_download_error(world: World) -> None:
    nowhere = replace(world.endpoints, hugging_face="http://127.0.0.1:9")
    resolver = Resolver(world.client, nowhere, sleep=world.pauses.append)
    with pytest.raises(DownloadError, match=r'"huggingface.co/owner/name": Hugging Face cannot be reached'):
        resolver.resolve(parse("hf.co/owner/name"), Tokens())


def test_a_hub_that_never_answers_is_given_up(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nowhere = replace(world.endpoints, hugging_face=f"http://127.0.0.1:{silent.getsockname()[1]}")
        resolver = Resolver(world.client, nowhere, timeout_seconds=0.1, sleep=world.pauses.append)
        for text in ("hf.co/owner/name", "hf.co/owner/name/a.safetensors"):
            with pytest.raises(DownloadError, match="Hugging Face cannot be reached"):
                resolver.resolve(parse(text), Tokens())


# CivitAI


def publish_versions(world: World, *versions: dict[str, Any], kind: str = "LORA") -> None:
    world.civitai.add_model(123, list(versions), kind)
    world.civitai.tokens.add(CIVITAI_TOKEN)
    for version in versions:
        world.civitai.downloads[version["id"]] = CivitaiFile(FILE)


def test_a_model_gives_its_newest_version_for_flux(world: World) -> None:
    publish_versions(
        world,
        civitai_version(9, FILE, base_model="SDXL 1.0", published_at="2025-09-01T00:00:00.000Z"),
        civitai_version(8, FILE, published_at=None),
        civitai_version(6, FILE, published_at="2024-12-01T00:00:00.000Z", trained_words=("TOK", "a\nstyle ")),
        civitai_version(7, FILE, base_model="Flux.1 S", published_at="2024-11-01T00:00:00.000Z"),
    )
    world.civitai.downloads[123] = CivitaiFile(b"the model's id is a version's id elsewhere")
    source = world.resolve("https://civitai.com/models/123/name")
    assert source == Source(
        name="civitai.com/models/123",
        address=f"{world.civitai.address}/api/download/models/6",
        revision="version 6, file 1",
        sha256=SHA256,
        facts=(("trigger words", "TOK, a style"),),
    )
    assert world.fetch(source) == FILE


@pytest.mark.parametrize(
    "text",
    [
        "civitai.com/models/123?modelVersionId=4",
        "civitai.com/api/download/models/4",
        "urn:air:flux1:lora:civitai:123@4",
        "civitai.red/models/123/x?modelVersionId=4",
    ],
)
def test_a_named_version_is_that_version(world: World, text: str) -> None:
    publish_versions(world, civitai_version(5, b"newer"), civitai_version(4, FILE))
    source = world.resolve(text)
    assert source.address == f"{world.civitai.address}/api/download/models/4"
    assert (source.sha256, source.immutable) == (SHA256, True)
    assert world.civitai.count("/api/v1/models/123") == 0


def test_a_version_of_another_model_is_refused(world: World) -> None:
    publish_versions(world, civitai_version(4, FILE))
    said = world.fail(LoraAccessError, "civitai.com/models/99?modelVersionId=4")
    assert "version 4 belongs to model 123, not to model 99" in said


@pytest.mark.parametrize(
    "text", ["civitai.com/models/123", "civitai.com/models/123?modelVersionId=4", "civitai.com/api/download/models/4"]
)
def test_a_lora_for_another_model_is_refused_by_name(world: World, text: str) -> None:
    publish_versions(world, civitai_version(4, FILE, base_model="SDXL 1.0"))
    assert "it is made for SDXL 1.0. Choose a LoRA for Flux.1." in world.fail(LoraFormatError, text)


@pytest.mark.parametrize("text", ["civitai.com/models/123", "civitai.com/api/download/models/4"])
def test_a_checkpoint_is_refused(world: World, text: str) -> None:
    publish_versions(world, civitai_version(4, FILE), kind="Checkpoint")
    assert "it is a Checkpoint" in world.fail(LoraFormatError, text)


def test_of_several_files_the_primary_safetensors_model_is_taken(world: World) -> None:
    files = [
        civitai_file(4, b"data", file_id=1, kind="Training Data", form="Other"),
        civitai_file(4, b"pickle", file_id=2, form="PickleTensor"),
        civitai_file(4, b"pruned", file_id=3, primary=False, query="?type=Model&format=SafeTensor&size=pruned"),
        civitai_file(4, FILE, file_id=4),
    ]
    publish_versions(world, civitai_version(4, files=files))
    assert world.resolve("civitai.com/models/123").sha256 == SHA256
    publish_versions(world, civitai_version(4, files=files[:3]))
    source = world.resolve("civitai.com/models/123")
    assert source.address.endswith("/api/download/models/4?type=Model&format=SafeTensor&size=pruned")
    publish_versions(world, civitai_version(4, files=files[:2]))
    assert "version 4 has no safetensors file" in world.fail(LoraFormatError, "civitai.com/models/123")


def test_the_civitai_token_is_a_header_for_civitai_alone(world: World) -> None:
    publish_versions(world, civitai_version(4, FILE))
    world.civitai.downloads[4] = CivitaiFile(FILE, login=True)
    source = world.resolve("civitai.com/models/123", TOKENS)
    assert source.headers == (("Authorization", f"Bearer {CIVITAI_TOKEN}"),)
    assert world.fetch(source) == FILE
    assert {request.bearer for request in world.civitai.requests} == {CIVITAI_TOKEN}
    assert not any("canary" in request.raw_path + str(request.query) for request in world.services.requests)
    assert "authorization" not in world.services.storage.requests[0].headers


def test_a_file_that_lies_elsewhere_gets_no_token(world: World) -> None:
    file = {**civitai_file(4, FILE), "downloadUrl": "https://cdn.example.com/x.safetensors"}
    publish_versions(world, civitai_version(4, files=[file]))
    source = world.resolve("civitai.com/models/123", TOKENS)
    assert (source.address, source.headers) == ("https://cdn.example.com/x.safetensors", ())


@pytest.mark.parametrize("address", ["https://[x", 7, ["https://a.example"]])
def test_an_address_that_is_none_is_an_answer_of_another_shape(world: World, address: object) -> None:
    publish_versions(world, civitai_version(4, files=[{**civitai_file(4, FILE), "downloadUrl": address}]))
    with pytest.raises(DownloadError, match="CivitAI answered with JSON of an unknown shape"):
        world.resolve("civitai.com/models/123")


@pytest.mark.parametrize("name", [None, 7, ["a.safetensors"]])
def test_a_file_of_the_hub_without_a_name_is_an_answer_of_another_shape(world: World, name: object) -> None:
    world.hub.first.append(json_reply({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name}]}))
    with pytest.raises(DownloadError, match=r"Cannot find LoRA .*owner/name"):
        world.resolve("huggingface.co/owner/name")


def download_error(world: World, text: str, tokens: Tokens | None = None) -> str:
    """What the user sees when the download itself is refused."""
    reference, tokens = parse(text), tokens or Tokens()
    with pytest.raises(HttpStatusError) as raised:
        world.fetch(world.resolver.resolve(reference, tokens))
    explained = explain(raised.value, reference, tokens)
    assert isinstance(explained, LoraAccessError)
    assert "canary" not in f"{explained} {explained!r}"
    return str(explained)


def test_early_access_is_explained_with_its_end(world: World) -> None:
    publish_versions(world, civitai_version(4, FILE))
    world.civitai.downloads[4] = CivitaiFile(FILE, readers=frozenset({CIVITAI_TOKEN}), refusal=EARLY_ACCESS)
    said = download_error(world, "civitai.com/models/123")
    assert "it is in early access until 2031-01-02" in said
    assert "civitai_api_token" in said
    assert world.fetch(world.resolve("civitai.com/models/123", TOKENS)) == FILE


def test_a_login_that_is_needed_names_the_input(world: World) -> None:
    publish_versions(world, civitai_version(4, FILE))
    world.civitai.downloads[4] = CivitaiFile(FILE, login=True)
    said = download_error(world, "civitai.com/models/123")
    assert 'asks for a login ("The creator of this asset requires you to log in")' in said
    assert "Set civitai_api_token" in said


def test_an_archived_file_is_said_to_be_archived(world: World) -> None:
    publish_versions(world, civitai_version(4, FILE))
    world.civitai.downloads[4] = CivitaiFile(FILE, refusal=ARCHIVED)
    assert "archived" in download_error(world, "civitai.com/models/123")


@pytest.mark.parametrize(
    "text", ["civitai.com/models/5", "civitai.com/api/download/models/5", "civitai.com/models/5?modelVersionId=6"]
)
def test_what_civitai_does_not_have_is_said(world: World, text: str) -> None:
    assert "has no such thing" in world.fail(LoraAccessError, text)


@pytest.mark.parametrize(
    "reply", [HTML_WITH_200, json_reply([]), json_reply({"modelVersions": [{}]}), json_reply({"modelVersions": 3})]
)
def test_a_civitai_that_answers_nonsense_is_a_download_error(world: World, reply: Reply) -> None:
    world.civitai.first += [reply]
    said = world.fail(DownloadError, "civitai.com/models/123")
    assert said.startswith('Cannot find LoRA "civitai.com/models/123": ')


# Replicate


def publish_model(world: World, owner_token: str | None = None) -> None:
    versions = {OLD_VERSION: trained_tar(b"old"), NEW_VERSION: TAR}
    world.replicate.models["owner/name"] = ReplicateModel(versions, owner_token)


def test_a_model_is_its_weights_address(world: World) -> None:
    publish_model(world)
    source = world.resolve("owner/name")
    address = f"{world.replicate.address}/owner/name/_weights"
    assert source == Source(name="replicate.com/owner/name", address=address, container=Container.TAR)
    assert world.fetch(source) == TAR


@pytest.mark.parametrize("text", [f"owner/name:{OLD_VERSION}", f"replicate.com/owner/name/versions/{OLD_VERSION}"])
def test_a_version_is_its_weights_address_and_immutable(world: World, text: str) -> None:
    publish_model(world)
    source = world.resolve(text)
    assert source.address == f"{world.replicate.address}/owner/name/versions/{OLD_VERSION}/_weights"
    assert (source.revision, source.immutable) == (OLD_VERSION, True)
    assert world.fetch(source) == trained_tar(b"old")


def train_both(world: World) -> None:
    world.replicate.train(REPLICATE_TOKEN, "owner/name", OLD_VERSION, trained_tar(b"old"))
    world.replicate.train(REPLICATE_TOKEN, "owner/name", NEW_VERSION, TAR)
    world.replicate.train(REPLICATE_TOKEN, "owner/name2", NEW_VERSION, trained_tar(b"another model"))
    world.replicate.train(REPLICATE_TOKEN, "owner/name", "3" * 64, b"", status="failed")


@pytest.mark.parametrize(
    ("text", "version", "tar"),
    [
        ("owner/name", NEW_VERSION, TAR),
        ("Owner/Name", NEW_VERSION, TAR),
        (f"owner/name:{OLD_VERSION}", OLD_VERSION, trained_tar(b"old")),
    ],
)
@pytest.mark.parametrize("page_size", [100, 1])
def test_a_private_model_is_its_trainings_tar(
    world: World, text: str, version: str, tar: bytes, page_size: int
) -> None:
    publish_model(world, owner_token=REPLICATE_TOKEN)
    world.replicate.models["Owner/Name"] = world.replicate.models["owner/name"]
    world.replicate.page_size = page_size
    train_both(world)
    source = world.resolve(text, TOKENS)
    assert source.address.startswith(world.services.storage.address)
    assert (source.revision, source.headers) == (version, ())
    assert world.fetch(source) == tar
    assert "authorization" not in world.services.storage.requests[-1].headers


def test_a_training_of_an_older_version_does_not_stand_in_for_the_latest(world: World) -> None:
    publish_model(world)
    world.replicate.train(REPLICATE_TOKEN, "owner/name", OLD_VERSION, trained_tar(b"old"))
    source = world.resolve("owner/name", TOKENS)
    assert source.address == f"{world.replicate.address}/owner/name/versions/{NEW_VERSION}/_weights"
    assert world.fetch(source) == TAR


def test_someone_elses_model_is_its_public_address_even_with_a_token(world: World) -> None:
    publish_model(world)
    world.replicate.trainings[REPLICATE_TOKEN] = []
    source = world.resolve("owner/name", TOKENS)
    assert source.revision == NEW_VERSION
    assert world.fetch(source) == TAR
    sent = [request.path for request in world.replicate.requests if request.bearer]
    assert sent == ["/v1/models/owner/name", "/v1/trainings"]


def test_a_token_that_replicate_refuses_does_not_close_a_public_model(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    publish_model(world)
    assert world.fetch(world.resolve("owner/name", TOKENS)) == TAR
    assert "Replicate's API answered 401" in caplog.text
    assert "canary" not in caplog.text


def test_a_private_model_without_a_token_tells_what_the_operator_can_do(world: World) -> None:
    publish_model(world, owner_token=REPLICATE_TOKEN)
    said = download_error(world, "owner/name")
    assert "has no such thing" in said
    assert "the operator must set REPLICATE_API_TOKEN" in said


@pytest.mark.parametrize("reply", [json_reply([]), json_reply({"latest_version": 3})])
def test_a_replicate_that_answers_nonsense_is_a_download_error(world: World, reply: Reply) -> None:
    world.replicate.first += [reply]
    assert "Replicate answered with JSON of an unknown shape" in world.fail(DownloadError, "owner/name", TOKENS)


# Addresses and data


def test_an_address_is_itself_and_its_signature_stays_out_of_the_name(world: World) -> None:
    source = world.resolve("https://e.com/a/x.safetensors?signature=canary", TOKENS)
    assert source.address == "https://e.com/a/x.safetensors?signature=canary"
    assert (source.headers, source.container, source.immutable) == ((), Container.SAFETENSORS, False)
    assert "canary" not in repr(source)


@pytest.mark.parametrize("host", ["replicate.delivery", "e.com"])
def test_a_tar_at_any_address_is_a_source(world: World, host: str) -> None:
    source = world.resolve(f"https://{host}/a/x.tar?signature=canary", TOKENS)
    assert source.address == f"https://{host}/a/x.tar?signature=canary"
    assert (source.headers, source.container) == ((), Container.TAR)
    assert "canary" not in repr(source)


@pytest.mark.parametrize("content", [FILE, tar_bytes({"lora.safetensors": FILE})], ids=["safetensors", "tar"])
def test_data_is_its_own_source(world: World, content: bytes) -> None:
    source = world.resolve(f"data:;base64,{base64.b64encode(content).decode()}")
    is_tar = content != FILE
    assert source.container is (Container.TAR if is_tar else Container.SAFETENSORS)
    assert source.content == content
    assert source.revision == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert len(source.name) < 100
    assert (source.sha256, source.size_bytes) == ((None, None) if is_tar else (SHA256, len(FILE)))
    assert source.immutable


@pytest.mark.parametrize("text", ["https://e.com/x.safetensors", "https://replicate.delivery/x.tar", "data:,12345678{"])
def test_addresses_and_data_ask_no_one(world: World, text: str) -> None:
    world.resolve(text, TOKENS)
    assert world.services.requests == []


# Tokens and refusals


def test_tokens_are_never_shown() -> None:
    assert "canary" not in repr(TOKENS)


@pytest.mark.parametrize("token", ["hf_can ary", "hf_canary\nX: y", "hf_canaryü", "hf_canary\x00"])
@pytest.mark.parametrize("text", ["hf.co/owner/name", "civitai.com/models/123", "owner/name"])
def test_a_token_that_cannot_be_sent_is_refused_unsaid(world: World, token: str, text: str) -> None:
    with pytest.raises(LoraAccessError) as raised:
        world.resolve(text, Tokens(token, token, token))
    assert "hf_can" not in str(raised.value)
    assert world.services.requests == []


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("hf.co/owner/name", HUB_TOKEN),
        ("civitai.com/models/1", CIVITAI_TOKEN),
        ("owner/name", REPLICATE_TOKEN),
        ("https://e.com/x.safetensors", None),
        ("https://replicate.delivery/x.tar", None),
    ],
)
def test_each_name_has_its_own_services_token(text: str, token: str | None) -> None:
    assert token_for(parse(text), TOKENS) == token
    assert token_for(parse(text), Tokens("", " ", None)) is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 429, 451, 500, 503])
@pytest.mark.parametrize("tokens", [Tokens(), TOKENS], ids=["without", "with"])
@pytest.mark.parametrize(
    "text", ["hf.co/o/n", "civitai.com/models/1", "owner/name", "https://e.com/x.safetensors?sig=canary"]
)
def test_every_status_is_explained_without_a_secret(text: str, tokens: Tokens, status: int) -> None:
    body = f'{{"message": "token {HUB_TOKEN} {CIVITAI_TOKEN} {REPLICATE_TOKEN} at https://x/?signature=canary\\n"}}'
    error = HttpStatusError("...", status=status, host="host.example", body=body)
    explained = explain(error, parse(text), tokens or TOKENS)
    said = str(explained)
    assert isinstance(explained, LoraAccessError if status in (401, 403, 404, 410) else DownloadError)
    assert said.startswith(f'Cannot read LoRA "{parse(text).label}": host.example ')
    assert said.endswith(".")
    assert "signature" not in said
    assert "\n" not in said
    if tokens is TOKENS:
        assert "canary" not in said


def test_a_gated_repository_that_only_the_download_refuses_is_said_to_be_gated() -> None:
    body = '{"error": "Access to model o/n is restricted and you are not in the authorized list."}'
    error = HttpStatusError("...", status=403, host="huggingface.co", body=body)
    said = str(explain(error, parse("hf.co/o/n"), TOKENS))
    assert "the repository is gated and the token has no access" in said


def test_nothing_logged_holds_a_token_or_a_signature(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)  # below that httpcore2 writes out every header that it receives
    publish(world, "a.safetensors", private=True, readers=frozenset({HUB_TOKEN}))
    publish_versions(world, civitai_version(4, FILE))
    publish_model(world, owner_token=REPLICATE_TOKEN)
    world.hub.tokens.add(HUB_TOKEN)
    train_both(world)
    for text in ("hf.co/owner/name", "civitai.com/models/123", "owner/name"):
        world.fetch(world.resolve(text, TOKENS))
    assert "canary" not in caplog.text
    assert "signature=" not in caplog.text
