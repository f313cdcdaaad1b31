"""Every form of a LoRA's name, every way to get one wrong, and what holds for all texts."""

from __future__ import annotations

import base64
import string
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import LoraReferenceError
from lora_loading.finding.reference import FORMS, MAX_TEXT, parse, shown
from lora_loading.finding.services import data
from lora_loading.finding.services.civitai import CivitaiReference
from lora_loading.finding.services.data import DataReference
from lora_loading.finding.services.hugging_face import HuggingFaceReference
from lora_loading.finding.services.replicate import ReplicateReference
from lora_loading.finding.services.service import LoraReference
from lora_loading.finding.services.url import UrlReference
from tests.services import safetensors_bytes, tar_bytes

VERSION = "0123456789abcdef" * 4
COMMIT = "89abcdef01" * 4
FILE = safetensors_bytes()
TAR = tar_bytes({"output/lora.safetensors": FILE})


def data_uri(content: bytes, media_type: str = "application/octet-stream") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def hub(revision: str = "main", path: str | None = None) -> HuggingFaceReference:
    return HuggingFaceReference("Owner/na.me-1", revision, path)


REPLICATE = {
    "owner/name": ReplicateReference("owner", "name"),
    "stability-ai/stable-diffusion-3.5": ReplicateReference("stability-ai", "stable-diffusion-3.5"),
    f"owner/name/{VERSION}": ReplicateReference("owner", "name", VERSION),
    f"owner/name:{VERSION}": ReplicateReference("owner", "name", VERSION),
    f"owner/name:{VERSION.upper()}": ReplicateReference("owner", "name", VERSION),
    f"owner/name/versions/{VERSION}": ReplicateReference("owner", "name", VERSION),
    "owner/name:01234567": ReplicateReference("owner", "name", "01234567"),
    "replicate.com/owner/name": ReplicateReference("owner", "name"),
    "www.replicate.com/owner/name/": ReplicateReference("owner", "name"),
    "Replicate.com/owner/name": ReplicateReference("owner", "name"),
    "http://replicate.com/owner/name": ReplicateReference("owner", "name"),
    "https://replicate.com/owner/name?input=x#api": ReplicateReference("owner", "name"),
    f"https://replicate.com/owner/name/versions/{VERSION}": ReplicateReference("owner", "name", VERSION),
    f"https://replicate.com/owner/name:{VERSION}": ReplicateReference("owner", "name", VERSION),
    f"replicate.com/owner/name/{VERSION}": ReplicateReference("owner", "name", VERSION),
    f"https://replicate.com/owner/name/versions/{VERSION}/_weights": ReplicateReference("owner", "name", VERSION),
    "https://replicate.delivery/yhqm/abc/trained_model.tar": UrlReference(
        "https://replicate.delivery/yhqm/abc/trained_model.tar"
    ),
    "https://PBXT.replicate.delivery/abc/trained_model.tar?sig=a%2Fb&x=1#part": UrlReference(
        "https://pbxt.replicate.delivery/abc/trained_model.tar?sig=a%2Fb&x=1"
    ),
    "replicate.delivery/abc/flux.tar": UrlReference("https://replicate.delivery/abc/flux.tar"),
    "https://replicate.delivery/abc/lora.safetensors": UrlReference("https://replicate.delivery/abc/lora.safetensors"),
}
HUGGING_FACE = {
    "huggingface.co/Owner/na.me-1": hub(),
    "https://huggingface.co/Owner/na.me-1/": hub(),
    "http://www.huggingface.co/Owner/na.me-1": hub(),
    "HuggingFace.co/Owner/na.me-1": hub(),
    "https://huggingface.co:443/Owner/na.me-1": hub(),
    "hf.co/Owner/na.me-1": hub(),
    "https://hf.co/Owner/na.me-1/tree/main": hub(),
    "huggingface.co/Owner/na.me-1/tree/v2": hub("v2"),
    "huggingface.co/Owner/na.me-1/tree/main/some/folder": hub(path="some/folder"),
    f"huggingface.co/Owner/na.me-1/tree/{COMMIT}/folder": hub(COMMIT, "folder"),
    "huggingface.co/Owner/na.me-1/tree/refs%2Fpr%2F1": hub("refs/pr/1"),
    "huggingface.co/Owner/na.me-1/tree/refs/pr/1/folder": hub("refs/pr/1", "folder"),
    "huggingface.co/Owner/na.me-1/blob/main/a.safetensors": hub(path="a.safetensors"),
    "huggingface.co/Owner/na.me-1/blob/refs%2Fpr%2F1/x/a.safetensors": hub("refs/pr/1", "x/a.safetensors"),
    f"huggingface.co/Owner/na.me-1/resolve/{COMMIT}/x/a.safetensors?download=true": hub(COMMIT, "x/a.safetensors"),
    "huggingface.co/Owner/na.me-1/a%20b%3F.safetensors": hub(path="a b?.safetensors"),
    "huggingface.co/Owner/na.me-1/a b.safetensors": hub(path="a b.safetensors"),
    "huggingface.co/Owner/na.me-1/a.safetensors?download=true": hub(path="a.safetensors"),
    "huggingface.co/Owner/na.me-1/sub/A.SAFETENSORS": hub(path="sub/A.SAFETENSORS"),
}
CIVITAI = {
    "civitai.com/models/123": CivitaiReference(123),
    "https://civitai.com/models/123/some-name": CivitaiReference(123),
    "https://www.civitai.com/models/0123": CivitaiReference(123),
    "https://civitai.com/models/123?modelVersionId=456": CivitaiReference(123, 456),
    "https://civitai.com/models/123/some-name?dialog=x&modelVersionId=456": CivitaiReference(123, 456),
    "civitai.com/api/download/models/456": CivitaiReference(None, 456),
    "https://civitai.com/api/download/models/456?type=Model&token=SECRET": CivitaiReference(None, 456),
    "https://civitai.red/models/123?modelVersionId=456": CivitaiReference(123, 456),
    "civitai.green/models/123": CivitaiReference(123),
    "urn:air:flux1:lora:civitai:123@456": CivitaiReference(123, 456),
    "URN:AIR:flux1:lora:civitai:123@456": CivitaiReference(123, 456),
    "urn:air:flux1:lora:civitai:123@456.safetensors": CivitaiReference(123, 456),
    "urn:air:lora:civitai:123@456:layer": CivitaiReference(123, 456),
    "air:flux1:lora:civitai:123": CivitaiReference(123),
}
ADDRESSES = {
    "https://Example.com:443/a/x.safetensors": UrlReference("https://example.com/a/x.safetensors"),
    "https://example.com:8443/x.safetensors?b=1&a=%2F#f": UrlReference(
        "https://example.com:8443/x.safetensors?b=1&a=%2F"
    ),
    "HTTPS://example.com/a b/ü.SafeTensors": UrlReference("https://example.com/a%20b/%C3%BC.SafeTensors"),
    "https://münchen.example/x.safetensors": UrlReference("https://xn--mnchen-3ya.example/x.safetensors"),
    "https://e.com/backup/trained_model.TAR?sig=1": UrlReference("https://e.com/backup/trained_model.TAR?sig=1"),
    "https://[2001:4860::1]/x.safetensors": UrlReference("https://[2001:4860::1]/x.safetensors"),
}
DATA = {
    data_uri(FILE): DataReference(FILE, is_tar=False),
    data_uri(TAR): DataReference(TAR, is_tar=True),
    data_uri(TAR, "application/x-tar"): DataReference(TAR, is_tar=True),
    data_uri(FILE).replace("data:", "DATA:").replace("base64,", "base64,\n"): DataReference(FILE, is_tar=False),
    f"data:,{quote(FILE)}": DataReference(FILE, is_tar=False),
}
EVERY_FORM = {**REPLICATE, **HUGGING_FACE, **CIVITAI, **ADDRESSES, **DATA}


def short(text: object) -> str:
    return str(text)[:60]


@pytest.mark.parametrize(("text", "reference"), EVERY_FORM.items(), ids=short)
def test_every_form_is_understood(text: str, reference: LoraReference) -> None:
    assert parse(text) == reference


@pytest.mark.parametrize("text", EVERY_FORM, ids=short)
def test_blanks_around_a_name_are_dropped(text: str) -> None:
    assert parse(f" \t{text}\n ") == parse(text)


@pytest.mark.parametrize("reference", EVERY_FORM.values(), ids=short)
def test_the_canonical_form_names_the_same(reference: LoraReference) -> None:
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(
    "spellings",
    [
        ("owner/name", "https://www.replicate.com/owner/name/", "replicate.com/owner/name#x"),
        (f"owner/name:{VERSION}", f"owner/name/{VERSION}", f"https://replicate.com/owner/name/versions/{VERSION}"),
        ("hf.co/a/b", "https://huggingface.co/a/b", "huggingface.co/a/b/tree/main"),
        ("hf.co/a/b/x.safetensors", "https://huggingface.co/a/b/resolve/main/x.safetensors?download=true"),
        ("civitai.com/models/1/name?modelVersionId=2", "civitai.red/models/1?modelVersionId=2", "urn:air:civitai:1@2"),
        ("civitai.com/api/download/models/2?token=SECRET", "https://civitai.com/api/download/models/2"),
        ("https://e.com/x.safetensors", "HTTPS://E.COM:443/x.safetensors#f"),
    ],
)
def test_spellings_of_one_name_share_a_canonical_form_and_a_key(spellings: tuple[str, ...]) -> None:
    references = [parse(spelling) for spelling in spellings]
    assert len({str(reference) for reference in references}) == 1
    assert len({reference.key for reference in references}) == 1


NAMELESS = {
    "": "the text is empty",
    "   ": "the text is empty",
    "name": "not owner/name",
    "a photo of a cat": "not owner/name",
    "owner/name/extra/parts/here": "not owner/name",
    "owner name/x": "no owner/name",
    "owner/name:latest": "not a version",
    "owner/name/train": "not a version",
    f"owner/name:{VERSION}0": "not a version",
    "owner/name:0123": "not a version",
    "owner/..": '"." or ".."',
    "/etc/passwd": "a path to a file",
    "../lora.safetensors": "a path to a file",
    "loras/x.safetensors": "a path to a file",
    "C:\\loras\\x.safetensors": "a path to a file",
    "example.com/name": "looks like a host",
    "example.com/x.safetensors": "looks like a host",
    "localhost.localdomain:80/x": "looks like a host",
    "replicate.com": "not owner/name",
    "replicate.com/owner": "not owner/name",
    "owner@/name": "no owner/name",
    "https://replicate.delivery/a/x.zip": "ends in neither .safetensors nor .tar",
    "https://replicate.delivery/../x.tar": '"." or ".."',
    "huggingface.co": "no owner/name",
    "huggingface.co/owner": "no owner/name",
    "huggingface.co/owner/na--me": "no owner/name",
    "huggingface.co/datasets/owner/x.safetensors": "hold no LoRA",
    "huggingface.co/owner/name/blob/main": "names no file",
    "huggingface.co/owner/name/blob/main/model.ckpt": "does not end in .safetensors",
    "huggingface.co/owner/name/README.md": "does not end in .safetensors",
    "huggingface.co/owner/name/blob/main/../x.safetensors": '"." or ".."',
    "huggingface.co/owner/name/blob/main/%2e%2e/x.safetensors": '"." or ".."',
    "huggingface.co/owner/name/blob/main/a%2f..%2fx.safetensors": '"." or ".."',
    "huggingface.co/owner/name/a%0ab.safetensors": "control characters or a backslash",
    "huggingface.co/owner/name/a%00b.safetensors": "control characters or a backslash",
    "huggingface.co/owner/name/a%5cb.safetensors": "control characters or a backslash",
    "huggingface.co/owner/name/a%ffb.safetensors": "not UTF-8",
    "https://huggingface.co:8443/owner/name": "ends in neither .safetensors nor .tar",
    "civitai.com": "neither /models/<id>",
    "civitai.com/models/some-name": "the model's id is not a number",
    "civitai.com/models/0": "the model's id is not a number",
    "civitai.com/models/١٢٣": "the model's id is not a number",
    "civitai.com/models/123?modelVersionId=abc": "the version's id is not a number",
    "civitai.com/models/123?modelVersionId=4&modelVersionId=5": "more than once",
    "civitai.com/images/123": "neither /models/<id>",
    "civitai.com/api/download/models/": "neither /models/<id>",
    "urn:air:flux1:lora:huggingface:owner/name": "no owner/name",
    "urn:air:flux1:lora:civitai:1@2+3": "its scheme is none that is known",
    "http://example.com/x.safetensors": "plain http",
    "http://127.0.0.1/x.safetensors": "plain http",
    "ftp://example.com/x.safetensors": "does not begin with https://",
    "file:///etc/x.safetensors": "does not begin with https://",
    "hf://owner/name": "does not begin with https://",
    "https://example.com/x.tar.gz": "ends in neither .safetensors nor .tar",
    "https://example.com/": "ends in neither .safetensors nor .tar",
    "https://example.com/?x.safetensors": "ends in neither .safetensors nor .tar",
    "https://example.com/x.safetensors/": "ends in neither .safetensors nor .tar",
    "https:///x.safetensors": "no host",
    "https://exa mple.com/x.safetensors": "no host name",
    "https://a..b/x.safetensors": "no host name",
    "https://[::1/x.safetensors": "malformed",
    "https://e.com:port/x.safetensors": "malformed",
    "https://e.com/a/../x.safetensors": '"." or ".."',
    "https://e.com/a/%2E%2E/x.safetensors": '"." or ".."',
    "https://user:SECRET@e.com/x.safetensors": "user name or password",
    "https://SECRET@huggingface.co/owner/name": "user name or password",
    "user:SECRET@huggingface.co/owner/name": "user name or password",
    "https://e.com/a\x00b.safetensors": "control characters or is not valid Unicode",
    "https://e.com/a\nb.safetensors": "control characters or is not valid Unicode",
    "owner/na\u2028me": "control characters or is not valid Unicode",
    "owner/\ud800": "control characters or is not valid Unicode",
    f"https://e.com/{'x' * MAX_TEXT}.safetensors": "characters, more than",
    "data:": "no comma",
    "data:;base64,%%%": "not base64",
    "data:;base64,ü": "not base64",
    "data:;base64,": "neither a safetensors file nor a tar",
    "data:,ü": "must be %-escaped",
    data_uri(b"\x89PNG\r\n" + bytes(600)): "neither a safetensors file nor a tar",
}


@pytest.mark.parametrize(("text", "found"), NAMELESS.items(), ids=short)
def test_anything_else_is_refused_with_what_was_found_and_the_forms(text: str, found: str) -> None:
    with pytest.raises(LoraReferenceError) as raised:
        parse(text)
    message = str(raised.value)
    assert found in message
    assert message.startswith(f'Cannot read LoRA "{shown(text.strip())}": ')
    assert all(form in message for form in FORMS)
    assert "SECRET" not in message
    assert len(message) < 1000


def test_a_model_of_civitai_is_not_taken_for_a_version() -> None:
    reference = parse("https://civitai.com/models/123")
    assert reference == CivitaiReference(model_id=123, version_id=None)


def test_a_civitai_address_without_scheme_is_not_taken_for_a_replicate_name() -> None:
    assert parse("civitai.com/models/123?modelVersionId=456") == CivitaiReference(123, 456)


def test_the_host_replicate_is_not_taken_for_an_owner() -> None:
    assert parse("replicate.com/o/n") == ReplicateReference("o", "n")


def test_plain_http_is_accepted_for_the_operators_own_hosts() -> None:
    hosts = frozenset({"mirror.internal", "127.0.0.1:8080"})
    own = parse("http://mirror.internal/x.safetensors", hosts)
    assert own == UrlReference("http://mirror.internal/x.safetensors")
    assert parse(str(own), hosts) == own
    assert parse("http://127.0.0.1:8080/x.safetensors", hosts) == UrlReference("http://127.0.0.1:8080/x.safetensors")
    with pytest.raises(LoraReferenceError):
        parse("http://127.0.0.1:8081/x.safetensors", hosts)


@pytest.mark.parametrize(
    ("text", "immutable"),
    [
        ("owner/name", False),
        ("owner/name:01234567", False),
        (f"owner/name:{VERSION}", True),
        ("hf.co/a/b/x.safetensors", False),
        (f"hf.co/a/b/tree/{COMMIT}", False),
        (f"hf.co/a/b/blob/{COMMIT}/x.safetensors", True),
        ("civitai.com/models/1", False),
        ("civitai.com/models/1?modelVersionId=2", True),
        ("https://e.com/x.safetensors", False),
        ("https://replicate.delivery/x.tar", False),
        (data_uri(FILE), True),
    ],
    ids=short,
)
def test_only_a_name_that_says_which_content_is_immutable(text: str, immutable: bool) -> None:
    assert parse(text).immutable is immutable


@pytest.mark.parametrize(
    "text",
    [
        "https://e.com/CANARY/x.safetensors?token=CANARY&X-Amz-Signature=CANARY",
        "https://replicate.delivery/CANARY/x.tar?sig=CANARY",
        "civitai.com/api/download/models/2?token=CANARY",
        "huggingface.co/a/b/x.safetensors?token=CANARY",
    ],
)
def test_no_secret_is_in_label_key_or_repr(text: str) -> None:
    reference = parse(text)
    assert "CANARY" not in f"{reference.label} {reference.key} {reference!r}"


def test_a_name_that_is_data_stays_short_in_label_key_and_repr() -> None:
    reference = parse(data_uri(safetensors_bytes(100_000)))
    assert max(map(len, (reference.label, reference.key, repr(reference)))) < 120


def test_addresses_that_differ_in_their_query_have_different_keys() -> None:
    assert parse("https://e.com/x.safetensors?id=1").key != parse("https://e.com/x.safetensors?id=2").key


@pytest.mark.parametrize(
    "text",
    [
        "https://user:CANARY@e.com/x?y",
        "https://user:CAN/CANARY?CANARY@e.com/x",
        "user:CANARY@e.com/x",
        "https://e.com/x?token=CANARY",
        "civitai.com/x&token=CANARY",
        "hf_CANARYCANARY12345",
        "data:text/plain,CANARY",
    ],
)
def test_what_is_shown_of_a_text_holds_no_secret(text: str) -> None:
    assert "CANARY" not in shown(text)


PIECES = st.sampled_from(
    [
        *("https://", "http://", "data:", "urn:air:", "civitai:", ";base64,", "models/", "api/download/models/", "@"),
        *("replicate.com/", "huggingface.co/", "hf.co/", "civitai.com/", "replicate.delivery/", "e.com", "owner/name"),
        *("/tree/", "/blob/", "/resolve/", "/versions/", "?modelVersionId=", "%2F", "%2e%2e", "%ff"),
        *(".safetensors", ".tar", "123", VERSION, "refs/pr/1", "ü", "①", " ", "[", "]", "\\", "\x00", "\ud800", "&"),
        *("..", "/", ":", "#", "%"),
    ]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=10).map("".join))


@given(TEXTS)
def test_any_text_is_a_reference_or_a_clear_error(text: str) -> None:
    try:
        reference = parse(text)
    except LoraReferenceError as error:
        assert str(error).startswith("Cannot read LoRA")
        str(error).encode()
    else:
        assert parse(str(reference)) == reference
        assert hash(parse(str(reference))) == hash(reference)
        assert len(reference.label) <= 200


NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=20).filter(str.isalnum)
PATHS = st.lists(
    st.text(
        st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="/\\"), min_size=1, max_size=8
    ),
    min_size=1,
    max_size=3,
).map("/".join)


@given(NAMES, NAMES, PATHS, PATHS, st.booleans())
def test_any_path_on_the_hub_survives_its_canonical_form(
    owner: str, name: str, revision: str, path: str, a_file: bool
) -> None:
    path = f"{path}.safetensors" if a_file else path
    parts = [*revision.split("/"), *path.split("/")]
    if any(part in (".", "..") for part in parts):
        return
    owner = f"o{owner}"  # so that it is not "datasets" and the like
    kind = "blob" if a_file else "tree"
    text = f"huggingface.co/{owner}/{name}/{kind}/{quote(revision, safe='')}/{quote(path)}"
    reference = parse(text)
    assert isinstance(reference, HuggingFaceReference)
    assert (reference.repo, reference.path) == (f"{owner}/{name}", path) or revision == "refs"
    assert parse(str(reference)) == reference


@given(st.binary(max_size=300), st.booleans())
def test_any_data_survives_its_canonical_form(content: bytes, is_tar: bool) -> None:
    content = content.ljust(257, b"\0")[:257] + b"ustar" if is_tar else bytes(8) + b"{" + content
    reference = parse(data_uri(content))
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(("head", "length"), [("data:;base64,", 1501), ("data:,", 3001)])
def test_data_too_long_is_refused_before_it_is_decoded(head: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller limit than the real one, since texts of half a gigabyte would take their time."""
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with pytest.raises(LoraReferenceError, match="its content is larger than"):
        parse(head + "!" * length)
