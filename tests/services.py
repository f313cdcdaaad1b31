"""Stand-ins for Hugging Face, CivitAI, Replicate and a storage host: real sockets on this machine, real redirects.

They speak the JSON of `facts/LORA_SOURCES.md`. The services are reached as 127.0.0.1 and the storage as localhost, so
that a redirect from one to the other changes the host, as it does in the world. Every server records its requests and
can be told to answer otherwise first: `server.first.append(Reply(429, {"Retry-After": "0"}))`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import secrets
import ssl
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    method: str
    path: str
    """Unescaped, without the query."""
    raw_path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""

    @property
    def bearer(self) -> str | None:
        """The token, if one was sent."""
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None


@dataclass(frozen=True)
class Reply:
    """What a server answers, and how it misbehaves on the way."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""
    declared_length: int | None = None
    """Content-Length, where it is not the truth."""
    bytes_per_second: float | None = None
    cut_after: int | None = None
    """Break the connection after so many bytes of the body."""


def json_reply(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer in JSON."""
    return Reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())


HTML_WITH_200 = Reply(200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><title>Sorry</title>")


class Server:
    """A server on a free port of this machine, known as `host`; a subclass says what it answers."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.first: list[Reply] = []
        """Given to the first requests, whatever they ask."""
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.answer = self._answer
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.authority = f"{host}:{self._http.server_port}"
        self.address = f"{'http' if tls is None else 'https'}://{self.authority}"

    def reply(self, request: Request) -> Reply:
        """What to answer."""
        raise NotImplementedError

    def count(self, path: str, method: str = "GET") -> int:
        """How many requests there were for a path."""
        return sum(request.path == path and request.method == method for request in self.requests)

    def _answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            return self.first.pop(0) if self.first else self.reply(request)

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    answer: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._send(self.server.answer(Request(self.command, unquote(parts.path), parts.path, query, headers)))

    do_HEAD = do_GET  # noqa: N815

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        length = len(reply.body) if reply.declared_length is None else reply.declared_length
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(reply.body)[: reply.cut_after]
        self._send_body(body, reply.bytes_per_second)
        if len(body) != length:
            self.close_connection = True

    def _send_body(self, body: memoryview, bytes_per_second: float | None) -> None:
        if bytes_per_second is None:
            self.wfile.write(body)
            return
        step = max(1, min(CHUNK_BYTES, int(bytes_per_second / 20)))
        begin = time.monotonic()
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            ahead = (start + step) / bytes_per_second - (time.monotonic() - begin)
            if ahead > 0 and self.server.closing.wait(ahead):
                self.close_connection = True
                return

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the tests look at `requests`."""


# Storage


@dataclass
class StoredFile:
    """A file on the storage host, and how it is served."""

    content: bytes
    etag: str | None = None
    ranges: bool = True
    content_type: str = "application/octet-stream"
    bytes_per_second: float | None = None
    """Of each connection."""
    declared_length: int | None = None
    gzip: bool = False
    """Compressed, whatever the client accepts."""
    signature: str | None = None
    """What the query must hold as `signature`."""
    first: list[Reply] = field(default_factory=list)
    """Given to the first requests for this file."""
    cuts: list[int] = field(default_factory=list)
    """Each breaks one answer after so many bytes of its body."""


class Storage(Server):
    """A storage host: files by path. It rejects a forwarded Authorization header, as S3 does for signed addresses."""

    def __init__(self, host: str = "localhost", tls: ssl.SSLContext | None = None) -> None:
        super().__init__(host, tls)
        self.files: dict[str, StoredFile] = {}

    def put(self, path: str, file: StoredFile) -> str:
        """Serve a file at a path that begins with a slash; returns its address."""
        self.files[path] = file
        return f"{self.address}{path}"

    def presign(self, content: bytes, name: str = "file.safetensors", cuts: list[int] | None = None) -> str:
        """Serve content, at an address that is signed anew."""
        signature = secrets.token_hex(16)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        file = StoredFile(content, etag, signature=signature, cuts=[] if cuts is None else cuts)
        return f"{self.put(f'/{secrets.token_hex(4)}/{name}', file)}?signature={signature}"

    def reply(self, request: Request) -> Reply:
        file = self.files.get(request.path)
        if "authorization" in request.headers:
            return Reply(400, body=b"<Error>Only one auth mechanism allowed</Error>")
        if file is None:
            return Reply(404, body=b"<Error>NoSuchKey</Error>")
        if file.signature is not None and request.query.get("signature") != file.signature:
            return Reply(403, body=b"<Error>SignatureDoesNotMatch</Error>")
        return file.first.pop(0) if file.first else _serve(file, request.headers)


def _serve(file: StoredFile, headers: Mapping[str, str]) -> Reply:
    sent = {"Content-Type": file.content_type}
    sent |= {"ETag": file.etag} if file.etag else {}
    sent |= {"Accept-Ranges": "bytes"} if file.ranges else {}
    body, status = memoryview(file.content), 200
    asked = headers.get("range", "").removeprefix("bytes=")
    if file.gzip:
        body = memoryview(gzip.compress(file.content))
        sent["Content-Encoding"] = "gzip"
    elif asked and file.ranges and headers.get("if-range", file.etag) == file.etag:
        first, _, last = asked.partition("-")
        start, stop = int(first), min(int(last) + 1, len(body)) if last else len(body)
        if start >= len(body):
            return Reply(416, {"Content-Range": f"bytes */{len(body)}"})
        sent["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        body, status = body[start:stop], 206
    return Reply(
        status, sent, body, file.declared_length, file.bytes_per_second, file.cuts.pop(0) if file.cuts else None
    )


# Hugging Face


@dataclass
class Repository:
    """A model's repository on the Hub."""

    files: dict[str, bytes]
    commit: str = "1" * 40
    revisions: dict[str, str] = field(default_factory=dict)
    """Branches and tags besides main, and their commits; all hold the same files."""
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    """Tokens that may read it when it is private or gated."""
    spoiled: dict[str, list[bytes]] = field(default_factory=dict)
    """Each comes once in the place of a large file."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Each breaks one answer for a large file after so many bytes of its body."""
    listed_bytes: dict[str, int] = field(default_factory=dict)
    """What the listing says of large files' sizes, where it is not the truth."""

    def commit_of(self, revision: str) -> str | None:
        known = {"main": self.commit, self.commit: self.commit, **self.revisions}
        return known.get(revision) or (revision if revision in self.revisions.values() else None)


class HuggingFace(Server):
    """The Hub's model, tree and resolve routes. A gated model is listed to everyone, its files are not given."""

    def __init__(self, storage: Storage, page_size: int = 1000) -> None:
        super().__init__()
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        """Of accounts that exist; another is no credential."""
        self.renamed: dict[str, str] = {}
        self.page_size = page_size
        self._storage = storage

    def reply(self, request: Request) -> Reply:
        if request.bearer is not None and request.bearer not in self.tokens:
            return _hub_error(401, None, "Invalid credentials in Authorization header")
        match [unquote(segment) for segment in request.raw_path.split("/")[1:]]:
            case ["api", "models", owner, name, "revision", revision]:
                return self._model(f"{owner}/{name}", revision, request)
            case ["api", "models", owner, name, "tree", revision]:
                return self._in(f"{owner}/{name}", revision, request, None)
            case [owner, name, "resolve", revision, *path]:
                return self._in(f"{owner}/{name}", revision, request, "/".join(path))
        return Reply(404)

    def _in(self, repo: str, revision: str, request: Request, path: str | None) -> Reply:
        if repo in self.renamed:
            return Reply(307, {"Location": request.raw_path.replace(repo, self.renamed[repo], 1)})
        found = self._visible(repo, request)
        if isinstance(found, Reply):
            return found
        if found.gated and request.bearer not in found.readers:
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            return _hub_error(401 if request.bearer is None else 403, "GatedRepo", message)
        commit = found.commit_of(revision)
        if commit is None:
            return _hub_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self._tree(found, request) if path is None else self._resolve(found, commit, path)

    def _visible(self, repo: str, request: Request) -> Repository | Reply:
        found = self.repositories.get(repo)
        if found is None or (found.private and request.bearer not in found.readers):
            return _hub_error(401 if request.bearer is None else 404, "RepoNotFound", "Repository not found")
        return found

    def _model(self, repo: str, revision: str, request: Request) -> Reply:
        if repo in self.renamed:
            return Reply(307, {"Location": request.raw_path.replace(repo, self.renamed[repo], 1)})
        found = self._visible(repo, request)
        if isinstance(found, Reply):
            return found
        commit = found.commit_of(revision)
        if commit is None:
            return _hub_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entries = [_tree_entry(path, content) for path, content in found.files.items()]
        siblings = [_sibling(entry, found.listed_bytes) for entry in entries]
        if "blobs" not in request.query:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        return json_reply({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})

    def _tree(self, repository: Repository, request: Request) -> Reply:
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "samples", "oid": "0" * 40, "size": 0}]
        entries += [_tree_entry(path, content) for path, content in repository.files.items()]
        start = int(request.query.get("cursor", "0"))
        stop = start + self.page_size
        following = f"{self.address}{request.raw_path}?recursive=true&expand=false&cursor={stop}"
        link = {"Link": f'<{following}>; rel="next"'} if stop < len(entries) else {}
        return json_reply(entries[start:stop], headers=link)

    def _resolve(self, repository: Repository, commit: str, path: str) -> Reply:
        content = repository.files.get(path)
        if content is None:
            return _hub_error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if not path.endswith(".safetensors"):
            return Reply(200, {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(content)}"'}, content)
        others, cuts = repository.spoiled.get(path), repository.cuts.get(path)
        given = others.pop(0) if others else content
        headers = {
            "Location": self._storage.presign(given, path.rpartition("/")[2].replace(" ", "_"), cuts),
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
        }
        return Reply(302, headers, b"Found. Redirecting")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _sibling(entry: Mapping[str, Any], listed_bytes: Mapping[str, int]) -> dict[str, Any]:
    """A file as the model's route lists it, made from its entry in the tree."""
    path, size = entry["path"], listed_bytes.get(entry["path"], entry["size"])
    listed = {"rfilename": path, "size": size, "blobId": entry["oid"]}
    if "lfs" in entry:
        listed["lfs"] = {"sha256": entry["lfs"]["oid"], "size": size, "pointerSize": entry["lfs"]["pointerSize"]}
    return listed


def _hub_error(status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    named = {"X-Error-Code": code} if code else {}
    return json_reply({"error": message}, status, {"X-Error-Message": message, **named, **(headers or {})})


# CivitAI


@dataclass
class CivitaiFile:
    """A version's main file, and who gets it."""

    content: bytes
    login: bool = False
    readers: frozenset[str] | None = None
    """API keys that may download it; None means everyone, or everyone who is logged in."""
    refusal: Reply | None = None
    """Given to whoever may not, or to everyone: early access, archived, HTML."""


LOGIN_NEEDED = json_reply({"error": "Unauthorized", "message": "The creator of this asset requires you to log in"}, 401)
EARLY_ACCESS = json_reply(
    {"error": "Early Access", "deadline": "2031-01-02T00:00:00.000Z", "message": "Purchase early access"}, 403
)
ARCHIVED = json_reply({"error": "Gone", "message": "Model archived, not available for download"}, 410)


class Civitai(Server):
    """CivitAI's models, model-versions and download routes."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.models: dict[int, dict[str, Any]] = {}
        self.downloads: dict[int, CivitaiFile] = {}
        self.tokens: set[str] = set()
        self._storage = storage

    def add_model(self, model_id: int, versions: list[dict[str, Any]], kind: str = "LORA") -> None:
        """Publish a model; `civitai_version` makes the versions, the newest first as CivitAI lists them."""
        self.models[model_id] = {"id": model_id, "name": "A model", "type": kind, "modelVersions": versions}

    def reply(self, request: Request) -> Reply:
        if request.bearer is not None and request.bearer not in self.tokens:
            return json_reply({"error": "Unauthorized", "message": "Invalid API key"}, 401)
        match request.path.split("/")[1:]:
            case ["api", "v1", "models", number] if number.isdecimal():
                model = self.models.get(int(number))
                return json_reply(model) if model else json_reply({"error": f"No model with id {number}"}, 404)
            case ["api", "v1", "model-versions", number] if number.isdecimal():
                return self._version(int(number))
            case ["api", "download", "models", number] if number.isdecimal():
                return self._download(int(number), request)
        return Reply(404, {"Content-Type": "text/html"}, b"<!DOCTYPE html>")

    def _version(self, number: int) -> Reply:
        for model in self.models.values():
            for version in model["modelVersions"]:
                if version["id"] == number:
                    about = {"name": model["name"], "type": model["type"]}
                    return json_reply({**version, "modelId": model["id"], "model": about})
        return json_reply({"error": f"No version with id {number}"}, 404)

    def _download(self, number: int, request: Request) -> Reply:
        file = self.downloads.get(number)
        if file is None:
            return json_reply({"error": "File not found"}, 404)
        if file.login and request.bearer is None:
            return LOGIN_NEEDED
        allowed = file.readers is not None and request.bearer in file.readers
        if file.refusal is not None and not allowed:
            return file.refusal
        if file.readers is not None and not allowed:
            return json_reply({"error": "Forbidden", "message": "You do not have permission"}, 403)
        return Reply(307, {"Location": self._storage.presign(file.content)})


def civitai_version(
    version_id: int,
    content: bytes = b"",
    base_model: str = "Flux.1 D",
    published_at: str | None = "2024-09-01T00:00:00.000Z",
    trained_words: tuple[str, ...] = (),
    files: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A version's JSON; its one file is `content` unless `files` says otherwise."""
    return {
        "id": version_id,
        "name": f"v{version_id}",
        "baseModel": base_model,
        "publishedAt": published_at,
        "trainedWords": list(trained_words),
        "files": [civitai_file(version_id, content)] if files is None else files,
    }


def civitai_file(
    version_id: int,
    content: bytes = b"",
    *,
    file_id: int = 1,
    kind: str = "Model",
    form: str = "SafeTensor",
    primary: bool = True,
    query: str = "",
) -> dict[str, Any]:
    """A file's JSON; a file that is not primary carries no such field, as in the world."""
    return {
        "id": file_id,
        "name": "lora.safetensors",
        "type": kind,
        "sizeKB": len(content) / 1024,
        "hashes": {"SHA256": hashlib.sha256(content).hexdigest().upper()},
        **({"primary": True} if primary else {}),
        "metadata": {"format": form},
        "downloadUrl": f"https://civitai.com/api/download/models/{version_id}{query}",
    }


# Replicate


@dataclass
class ReplicateModel:
    """A fine-tuned model; the versions hold their tars, the last is the latest."""

    versions: dict[str, bytes]
    owner_token: str | None = None
    """Present for a private model."""


class Replicate(Server):
    """Replicate's web site and API, on one host."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.models: dict[str, ReplicateModel] = {}
        self.trainings: dict[str, list[dict[str, Any]]] = {}
        """By token, the newest first."""
        self.page_size = 100
        self._storage = storage

    def train(self, token: str, model: str, version: str, tar: bytes, status: str = "succeeded") -> str:
        """Record a training of the token's account, with its tar on the storage host; returns its id."""
        made = self.trainings.setdefault(token, [])
        training_id = f"training{len(made)}"
        weights = self._storage.put(f"/{secrets.token_hex(8)}/trained_model.tar", StoredFile(tar))
        output = {"version": f"{model}:{version}", "weights": weights} if status == "succeeded" else None
        made.insert(0, {"id": training_id, "status": status, "output": output})
        return training_id

    def reply(self, request: Request) -> Reply:
        match request.path.split("/")[1:]:
            case ["v1", *rest]:
                return self._api(rest, request)
            case [owner, name, "_weights"]:
                return self._weights(f"{owner}/{name}", None)
            case [owner, name, "versions", version, "_weights"]:
                return self._weights(f"{owner}/{name}", version)
        return Reply(404, {"Content-Type": "text/html"}, b"<!DOCTYPE html>")

    def _weights(self, name: str, version: str | None) -> Reply:
        model = self.models.get(name)
        if model is None or model.owner_token is not None:
            return Reply(404, {"Content-Type": "text/html"}, b"<!DOCTYPE html>")
        tar = model.versions.get(version or list(model.versions)[-1])
        if tar is None:
            return Reply(404)
        return Reply(302, {"Location": self._storage.presign(tar, "trained_model.tar")})

    def _api(self, rest: list[str], request: Request) -> Reply:
        token = request.bearer
        if token is None or token not in self.trainings:
            return json_reply({"title": "Unauthenticated", "detail": "You did not pass a valid token"}, 401)
        match rest:
            case ["models", owner, name]:
                model = self.models.get(f"{owner}/{name}")
                if model is None or model.owner_token not in (None, token):
                    return json_reply({"detail": "The requested resource could not be found."}, 404)
                latest = {"id": list(model.versions)[-1]} if model.versions else None
                return json_reply({"owner": owner, "name": name, "latest_version": latest})
            case ["trainings"]:
                return self._list(self.trainings[token], int(request.query.get("cursor", "0")))
            case ["trainings", training_id]:
                found = [t for t in self.trainings[token] if t["id"] == training_id]
                return json_reply(found[0]) if found else json_reply({"detail": "Not found."}, 404)
        return Reply(404)

    def _list(self, trainings: list[dict[str, Any]], start: int) -> Reply:
        stop = start + self.page_size
        following = f"https://api.replicate.com/v1/trainings?cursor={stop}" if stop < len(trainings) else None
        return json_reply({"previous": None, "next": following, "results": trainings[start:stop]})


# All of them, and what they hold


@dataclass(frozen=True)
class Services:
    """The four hosts, running."""

    storage: Storage
    hugging_face: HuggingFace
    civitai: Civitai
    replicate: Replicate

    @property
    def servers(self) -> tuple[Server, ...]:
        return (self.storage, self.hugging_face, self.civitai, self.replicate)

    @property
    def trusted_hosts(self) -> frozenset[str]:
        """For `network.Client`, since they are plain http and on this machine."""
        return frozenset(server.authority for server in self.servers)

    @property
    def requests(self) -> list[Request]:
        return [request for server in self.servers for request in server.requests]


@contextmanager
def running_services() -> Iterator[Services]:
    """Start all four; nothing is published yet."""
    with ExitStack() as stack:
        storage = stack.enter_context(Storage())
        hub = stack.enter_context(HuggingFace(storage))
        civitai = stack.enter_context(Civitai(storage))
        yield Services(storage, hub, civitai, stack.enter_context(Replicate(storage)))


def safetensors_bytes(values: int = 4, seed: int = 0) -> bytes:
    """A valid safetensors file with one float32 tensor; another seed gives other bytes."""
    header = {"lora": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + seed.to_bytes(4, "little") * values


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    """A tar of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def trained_tar(lora: bytes) -> bytes:
    """A tar as Replicate's trainer makes it."""
    folder = "output/flux_train_replicate"
    return tar_bytes({f"{folder}/lora.safetensors": lora, f"{folder}/captions/0.txt": b"a TOK", "config.yaml": b"x: 1"})
