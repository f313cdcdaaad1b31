"""The HTTP client: which addresses it dials, what it tells whom, and how it takes bad answers."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from errors import DownloadError, HttpStatusError
from fetching.network import MAX_REDIRECTS, Client, is_public
from tests.services import HTML_WITH_200, Reply, Storage, StoredFile, json_reply

TOKEN = {"Authorization": "Bearer canary-token"}


@pytest.fixture
def near() -> Iterator[Storage]:
    """A server that is known as 127.0.0.1, and does not mind a token."""
    with Storage("127.0.0.1") as server:
        yield server


@pytest.fixture
def far() -> Iterator[Storage]:
    """A server that is known as localhost."""
    with Storage("localhost") as server:
        yield server


@pytest.fixture
def client(near: Storage, far: Storage) -> Client:
    return Client(frozenset({near.authority, far.authority}), sleep=lambda seconds: None)


# Where it goes


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "192.88.99.1", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "100::1",
    ],
)  # fmt: skip
def test_inside_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


SPELLINGS = [
    "127.0.0.1", "127.1", "0x7f.1", "0177.0.0.1", "2130706433", "0x7f000001", "①②⑦.0.0.1", "127。0。0。1", "localhost",
    "LOCALHOST", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]", "0",
]  # fmt: skip


@pytest.mark.parametrize("host", SPELLINGS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_this_machine_is_reached_under_no_spelling(near: Storage, scheme: str, host: str) -> None:
    """A canary on the loopback address counts every connection, not only the requests."""
    port = near.authority.partition(":")[2]
    for path in ("/x.safetensors", "/latest/meta-data"):
        with pytest.raises(DownloadError):
            Client(sleep=lambda seconds: None).get(f"{scheme}://{host}:{port}{path}")
    assert near.requests == []


@pytest.mark.parametrize("location", [f"http://{host}" for host in SPELLINGS] + ["https://127.0.0.1", "file:///etc/x"])
def test_no_redirect_leads_inside(near: Storage, location: str) -> None:
    with Storage("127.0.0.1") as outside:
        client = Client(frozenset({outside.authority}), sleep=lambda seconds: None)
        port = near.authority.partition(":")[2]
        outside.first.append(Reply(302, {"Location": f"{location}:{port}/x".encode().decode("latin-1")}))
        with pytest.raises(DownloadError):
            client.get(f"{outside.address}/y")
    assert near.requests == []


def test_a_name_with_one_inside_address_is_refused() -> None:
    def resolve(host: str, port: int) -> list[tuple[object, object, object, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("8.8.8.8", "127.0.0.1")]

    with pytest.raises(DownloadError, match=r"evil\.example is not on the public internet"):
        Client(resolve=resolve).get("https://evil.example/x")


def test_the_address_that_was_looked_at_is_the_one_dialled(near: Storage) -> None:
    """A name that resolves to a public address first and to an inside one later gains nothing: it is asked once."""
    asked = []

    def resolve(host: str, port: int) -> list[tuple[object, object, object, str, tuple[str, int]]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    port = near.authority.partition(":")[2]
    near.put("/x", StoredFile(b"content"))
    client = Client(frozenset({f"rebinding.example:{port}"}), resolve=resolve)
    with client.get(f"http://rebinding.example:{port}/x") as response:
        assert response.read_text(100) == "content"
    assert asked == ["rebinding.example"]
    assert near.requests[0].headers["host"] == f"rebinding.example:{port}"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://example.com/x", "plain http"),
        ("ftp://example.com/x", "not a web address"),
        ("https://user:secret@example.com/x", "user name or password"),
        ("https:///x", "not a web address"),
        ("https://[::1/x", "cannot be parsed"),
        ("https://a.example:99999/x", "cannot be parsed"),
    ],
)
def test_an_address_that_is_refused_says_why(address: str, found: str) -> None:
    with pytest.raises(DownloadError, match=found) as caught:
        Client().get(address)
    assert "secret" not in str(caught.value)


def test_proxies_of_the_environment_are_ignored(near: Storage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    near.put("/x", StoredFile(b"content"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    with client.get(f"{near.address}/x") as response:
        assert response.status == 200


# What it tells whom


def test_a_token_stays_with_its_host(near: Storage, far: Storage, client: Client) -> None:
    near.first.append(Reply(302, {"Location": far.put("/x", StoredFile(b"content"))}))
    with client.get(f"{near.address}/x", TOKEN) as response:
        assert response.read_text(100) == "content"
        assert response.secret_headers == {}
    assert near.requests[0].bearer == "canary-token"
    assert "authorization" not in far.requests[0].headers


def test_a_token_does_not_come_back_by_way_of_another_host(near: Storage, far: Storage, client: Client) -> None:
    near.put("/x", StoredFile(b"content"))
    near.first.append(Reply(302, {"Location": f"{far.address}/y"}))
    far.first.append(Reply(302, {"Location": f"{near.address}/x"}))
    with client.get(f"{near.address}/first", TOKEN):
        pass
    assert [request.bearer for request in near.requests] == ["canary-token", None]


def test_a_token_is_kept_on_a_redirect_within_its_host(near: Storage, client: Client) -> None:
    near.first += [Reply(307, {"Location": "/x"}), Reply(200, body=b"content")]
    with client.get(f"{near.address}/first", TOKEN) as response:
        assert response.address == f"{near.address}/x"
    assert [request.bearer for request in near.requests] == ["canary-token"] * 2


def test_no_error_shows_a_query_or_a_token(near: Storage, client: Client) -> None:
    near.first += [Reply(403, body=b"no")]
    with pytest.raises(HttpStatusError) as caught:
        client.get(f"{near.address}/x?signature=canary-signature", TOKEN)
    assert "canary" not in f"{caught.value} {caught.value!r} {vars(caught.value)}"
    assert (caught.value.status, caught.value.body) == (403, "no")


# How it takes bad answers


def test_redirects_end(near: Storage, client: Client) -> None:
    near.first += [Reply(302, {"Location": "/again"})] * 20
    with pytest.raises(DownloadError, match=f"redirects more than {MAX_REDIRECTS} times"):
        client.get(f"{near.address}/x")
    assert len(near.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again_when_it_says(near: Storage, status: int) -> None:
    pauses: list[float] = []
    near.put("/x", StoredFile(b"content"))
    near.first += [Reply(status, {"Retry-After": "7"}), Reply(status), Reply(status, {"Retry-After": "9999"})]
    with Client(frozenset({near.authority}), sleep=pauses.append).get(f"{near.address}/x") as response:
        assert response.read_text(100) == "content"
    assert pauses == [7, 1.0, 30]


def test_a_server_that_stays_busy_is_given_up(near: Storage, client: Client) -> None:
    near.first += [Reply(503)] * 9
    with pytest.raises(HttpStatusError, match="answered 503"):
        client.get(f"{near.address}/x")
    assert len(near.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_repeated(near: Storage, client: Client, status: int) -> None:
    near.first += [Reply(status)] * 2
    with pytest.raises(HttpStatusError, match=f"answered {status}"):
        client.get(f"{near.address}/x")
    assert len(near.requests) == 1


def test_a_host_where_nobody_listens_is_named(client: Client) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        authority = f"127.0.0.1:{unused.getsockname()[1]}"
    pauses: list[float] = []
    with pytest.raises(DownloadError, match=f"connection to {authority} failed"):
        Client(frozenset({authority}), sleep=pauses.append).get(f"http://{authority}/x")
    assert len(pauses) == 3


def test_compressed_content_is_refused(near: Storage, client: Client) -> None:
    near.put("/x", StoredFile(b"content", gzip=True))
    with pytest.raises(DownloadError, match="gzip encoding"):
        client.get(f"{near.address}/x")


def test_json_is_parsed_and_anything_else_refused(near: Storage, client: Client) -> None:
    near.first += [json_reply({"a": 1}), HTML_WITH_200, Reply(body=b"[" * 100_000)]
    assert client.get_json(f"{near.address}/x") == {"a": 1}
    for _ in range(2):
        with pytest.raises(DownloadError, match="not JSON"):
            client.get_json(f"{near.address}/x")


# TLS


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for a host, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files[1].write_bytes(secret)
    return files


@pytest.mark.parametrize(("name", "trusted"), [("weights.example", True), ("weights.example", False), ("other", True)])
def test_tls_is_checked_against_the_hosts_own_name(tmp_path: Path, name: str, trusted: bool) -> None:
    """The address dialled is 127.0.0.1; the certificate must be the host's, and signed by somebody we trust."""
    crt, key = certificate(tmp_path, name)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(crt, key)
    with Storage("127.0.0.1", serving) as server:
        server.put("/x", StoredFile(b"content"))
        port = int(server.authority.partition(":")[2])

        def resolve(host: str, port: int) -> list[tuple[object, object, object, str, tuple[str, int]]]:
            assert host == "weights.example"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        tls = ssl.create_default_context(cafile=str(crt) if trusted else None)
        client = Client(frozenset({"weights.example"}), tls=tls, resolve=resolve, sleep=lambda seconds: None)
        address = f"https://weights.example:{port}/x"
        if name == "weights.example" and trusted:
            with client.get(address) as response:
                assert response.read_text(100) == "content"
        else:
            with pytest.raises(DownloadError, match=r"certificate of weights\.example"):
                client.get(address)
