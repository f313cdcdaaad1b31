"""What is fuzzed: each subject turns a number into one spoiled input, hands it to us, and says what came of it.

A subject raises nothing but what is a fault: our own errors are caught here, as refusals.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from errors import InputError, LoraFormatError, LoraReferenceError, PredictionError
from fetching.network import Client
from fetching.store import DiskQuota
from images import open_image, open_mask
from lora_loading.applying.manager import AdapterManager, ComponentAdapters
from lora_loading.finding.reference import parse
from lora_loading.finding.resolve import Resolver
from lora_loading.finding.services.service import Endpoints
from lora_loading.finding.tokens import Tokens
from lora_loading.reading.adapter import read_adapter
from tests import lora_files
from tests.fuzz.mutate import mutated, mutated_image, mutated_json, mutated_safetensors, mutated_text
from tests.fuzz.targets import check_header, check_reference
from tests.services import (
    CivitaiFile,
    ReplicateModel,
    Reply,
    Repository,
    Request,
    Server,
    Services,
    civitai_version,
    running_services,
    trained_tar,
)
from tests.tiny_models import narrow_transformer, weights_hash
from weights import WeightsCache

ACCEPTED, REFUSED = "accepted", "refused"
Run = Callable[[int], str]
"""The outcome of one input, named by a number."""


@contextmanager
def safetensors_files() -> Iterator[Run]:
    """Files of every layout of keys, read for a small FLUX; what is accepted is applied to it and taken off again.

    At the end the model's weights are what they were.
    """
    model = narrow_transformer()
    manager = AdapterManager([ComponentAdapters("transformer", model)])
    before = weights_hash({"transformer": model})
    changes = lora_files.changes_of(manager.shapes, rank=2)
    layouts = (
        lora_files.peft_named(), lora_files.peft_with_alpha(), lora_files.kohya, lora_files.onetrainer_split,
        lora_files.bfl_named("diffusion_model.", "lora_down", "lora_up"), lora_files.flat_diffusers("lycoris_"),
        lora_files.fp8(lora_files.peft_named()),
    )  # fmt: skip
    few = [change for change in changes if "attn" in change.name]
    files = tuple(save(own(write(few))) for write in layouts)
    files += (save(own(lora_files.peft_named()(few)), metadata=lora_files.peft_metadata(few)),)

    def run(number: int) -> str:
        rng = random.Random(number)
        content = mutated_safetensors(rng, rng.choice(files), files)
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(content)
            file.flush()
            try:
                check_header(content)
                adapter = read_adapter(Path(file.name), manager.shapes)
            except LoraFormatError as error:
                assert len(str(error)) < 2000
                assert str(error).isprintable()
                return REFUSED
        manager.apply([(adapter, 0.5)])
        manager.apply([])
        return ACCEPTED

    yield run
    manager.apply([])
    assert weights_hash({"transformer": model}) == before, "the base weights have changed"


def own(tensors: lora_files.Tensors) -> lora_files.Tensors:
    """Each tensor in memory of its own, as safetensors asks."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def image_files() -> tuple[bytes, ...]:
    """Small images in each format, and in the modes that take ways of their own."""
    picture = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((24, 20)))
    upright = Image.Exif()
    upright[0x112] = 6
    saved: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, kind, {}) for kind in ("PNG", "JPEG", "BMP", "AVIF")
    ]
    saved += [(transparent, kind, {}) for kind in ("PNG", "WEBP", "AVIF")]
    saved += [(picture, "WEBP", {"lossless": True}), (picture.convert("P"), "PNG", {"transparency": 0})]
    saved += [(picture.convert("CMYK"), "JPEG", {}), (picture, "JPEG", {"exif": upright, "progressive": True})]
    saved += [(Image.new("I;16", (24, 20), 999), "PNG", {}), (picture.convert("1"), "PNG", {"exif": upright})]
    saved += [(picture.convert("P"), "GIF", {"save_all": True, "append_images": [picture.rotate(90)]})]
    files = []
    for image, kind, options in saved:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return tuple(files)


@contextmanager
def images() -> Iterator[Run]:
    """Images and masks in turn."""
    files = image_files()

    def run(number: int) -> str:
        rng = random.Random(number)
        content = mutated_image(rng, rng.choice(files), files)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                opened = (open_image, open_mask)[number % 2](Path(file.name))
            except InputError as error:
                assert file.name not in str(error)
                return REFUSED
        assert opened.mode == ("RGB", "L")[number % 2]
        return ACCEPTED

    yield run


REFERENCES = (
    "fofr/flux-pixar-cars", f"owner/name/{'0' * 64}", "huggingface.co/owner/name/tree/main/folder", "hf.co/o/n",
    "https://huggingface.co/o/n/resolve/main/x.safetensors?download=true",
    "civitai.com/models/123/name?modelVersionId=4", "urn:air:flux1:lora:civitai:123@456", "https://e.com:8443/a%20b.safetensors?signature=CANARY#x",
    "data:application/octet-stream;base64,CAAAAAAAAAB7fSAgICAgIA==", "https://replicate.delivery/x/trained_model.tar",
    "http://127.0.0.1/x.safetensors", f"replicate.com/o/n/versions/{'1' * 64}", "https://user:CANARY@e.com/x.safetensors",
    "https://civitai.com/api/download/models/5?token=CANARY", "owner/name", "https://münchen.example/ü.safetensors",
)  # fmt: skip


@contextmanager
def references() -> Iterator[Run]:
    """Texts that name LoRAs. A message or label never shows what stands in a query or before an @."""

    def run(number: int) -> str:
        rng = random.Random(number)
        text = mutated_text(rng, rng.choice(REFERENCES), REFERENCES)
        try:
            check_reference(text)
        except LoraReferenceError as error:
            str(error).encode()
            assert len(str(error)) < 4000
            return REFUSED
        return ACCEPTED

    yield run


FILE = save({"transformer.x.lora_A.weight": torch.zeros(1, 4), "transformer.x.lora_B.weight": torch.zeros(4, 1)})
TOKENS = Tokens("hf_canary0123456789", "civitaicanary0123456789", "r8_canary0123456789")
NAMES = (
    "huggingface.co/owner/name", "huggingface.co/owner/name/resolve/main/lora.safetensors", "civitai.com/models/1",
    "civitai.com/models/1?modelVersionId=2", "owner/model", f"owner/model/{'1' * 64}",
)  # fmt: skip
HEADERS: dict[str, tuple[str, ...]] = {
    "Location": ("/", "", "http://127.0.0.1:1/x", "https://[::1", "//x", "file:///etc/passwd", "/a b\u00fc", "?"),
    "Content-Length": ("-1", "9" * 30, "x", "3"),
    "Content-Type": ("text/html", "application/json; charset=utf-16", ""),
    "Content-Encoding": ("gzip", "br", "identity, gzip"),
    "Link": ('<http://127.0.0.1:1/>; rel="next"', '<>; rel="next"', ", ,", "<"),
    "ETag": ('""', "W/", '"\u00ff"', "x" * 5000),
    "X-Repo-Commit": ("", "../..", "main"),
    "X-Linked-Size": ("-1", "9" * 5000, "1e9"),
    "X-Linked-ETag": ('"0"', ""),
    "X-Error-Code": ("GatedRepo", "RepoNotFound", "\u00ff"),
    "Retry-After": ("0", "-1", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT"),
    "Transfer-Encoding": ("chunked",),
}


def mutated_reply(rng: random.Random, reply: Reply) -> Reply:
    """An answer with its status, a header, its JSON or its bytes changed."""
    body = bytes(reply.body)
    match rng.randrange(6):
        case 0:
            return replace(
                reply, status=rng.choice((200, 204, 206, 302, 307, 400, 401, 403, 404, 410, 416, 429, 500, 503))
            )
        case 1:
            name = rng.choice(list(HEADERS))
            value = rng.choice(HEADERS[name])
            return replace(reply, headers={**reply.headers, name: value.encode().decode("latin-1")})
        case 2:
            return replace(reply, body=mutated(rng, body))
        case 3:
            return replace(reply, cut_after=rng.randrange(len(body) + 1))
    try:
        return replace(reply, body=json.dumps(mutated_json(rng, json.loads(body))).encode())
    except ValueError:
        return replace(reply, body=mutated(rng, body))


def publish(services: Services) -> None:
    """Put one LoRA on each service."""
    services.hugging_face.repositories["owner/name"] = Repository({"lora.safetensors": FILE, "README.md": b"# x"})
    services.hugging_face.tokens |= {str(TOKENS.hugging_face)}
    services.civitai.tokens |= {str(TOKENS.civitai)}
    services.civitai.add_model(1, [civitai_version(2, FILE, trained_words=("TOK",)), civitai_version(1, FILE)])
    services.civitai.downloads |= {1: CivitaiFile(FILE), 2: CivitaiFile(FILE)}
    tar = trained_tar(FILE)
    services.replicate.models["owner/model"] = ReplicateModel({"1" * 64: tar})
    services.replicate.train(str(TOKENS.replicate), "owner/model", "1" * 64, tar)


def spoil(server: Server, rng: random.Random) -> None:
    """Let a server's answers be spoiled, most of them not."""
    original = type(server).reply

    def reply(request: Request) -> Reply:
        answer = original(server, request)
        if rng.random() > 0.4:
            return answer
        spoiled = mutated_reply(rng, answer)  # closed, as silent hosts are for tests/fetching/test_deadline.py
        return replace(spoiled, headers={**spoiled.headers, "Connection": "close"})

    server.reply = reply  # type: ignore[method-assign, unused-ignore]


@contextmanager
def service_answers() -> Iterator[Run]:
    """What Hugging Face, CivitAI, Replicate and a storage host answer while a LoRA is found and fetched."""
    with running_services() as services, tempfile.TemporaryDirectory() as folder:
        publish(services)
        client = Client(services.trusted_hosts, sleep=lambda seconds: None)
        hub, civitai, replicate = services.hugging_face, services.civitai, services.replicate
        endpoints = Endpoints(*(server.address for server in (hub, civitai, replicate, replicate)))
        resolver = Resolver(client, endpoints, timeout_seconds=2, sleep=lambda seconds: None)
        cache = WeightsCache(Path(folder) / "cache", client, quota=DiskQuota(0))

        def run(number: int) -> str:
            rng = random.Random(number)
            for server in services.servers:
                spoil(server, rng)
                server.requests.clear()
            reference = parse(rng.choice(NAMES))
            tokens = TOKENS if rng.random() < 0.7 else Tokens()
            try:
                with cache.open(f"{reference.key} {number}", "", lambda: resolver.resolve(reference, tokens)) as file:
                    assert file.path.read_bytes() == FILE or file.size_bytes == file.path.stat().st_size
            except PredictionError as error:
                assert "canary" not in str(error)
                assert "signature=" not in str(error)
                return REFUSED
            return ACCEPTED

        yield run


SUBJECTS: dict[str, tuple[Callable[[], Any], int]] = {
    "safetensors files": (safetensors_files, 10_000),
    "images and masks": (images, 5_000),
    "references": (references, 5_000),
    "service answers": (service_answers, 2_000),
}
"""What opens a subject, and how many inputs a full run takes."""
