"""What counts as a whole safetensors file, and what of a tar is copied; the safetensors library is the oracle."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from errors import LoraFormatError
from fetching.containers import MAX_TENSORS, check_safetensors, copy_only_safetensors

TENSORS: dict[str, np.ndarray] = {
    "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.zeros((), dtype=np.float32),
}
CONTENT = save(TENSORS, metadata={"note": "kept"})


def with_header(header: object, data: bytes = b"") -> bytes:
    """A file of this header, as text or as JSON, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: list[int] | None = None, offsets: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets or [0, 4]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_what_the_library_writes_is_accepted(path: Path) -> None:
    path.write_bytes(CONTENT)
    check_safetensors(path)


BAD = {
    "empty": (b"", "0 bytes"),
    "short": (b"1234567", "7 bytes"),
    "web page": (b"<!DOCTYPE html><html>" + b" " * 100, "a web page"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "a zip file"),
    "JSON": (b'{"error": "Unauthorized"}', "JSON"),
    "cut off": (CONTENT[:-1], "not fully covered"),
    "longer than described": (CONTENT + b"\0", "not fully covered"),
    "header longer than the file": (struct.pack("<Q", 10**6) + b"{}", "do not begin"),
    "enormous header": (struct.pack("<Q", 2**63) + b"{}", "do not begin"),
    "no JSON in the header": (with_header(b"hello!!!"), "cannot be read"),
    "deep header": (with_header(b"[" * 200_000), "cannot be read"),
    "a list": (with_header([1]), "expected struct"),
    "a number": (with_header(b"33"), "expected struct"),
    "duplicate name": (with_header(b'{"a":{},"a":{}}'), "cannot be read"),
    "name of two lines": (with_header({"a\nUsing seed: 1": entry()}, b"1234"), "unprintable characters"),
    "name that clears a terminal": (with_header({"a\x1b[2J": entry()}, b"1234"), "unprintable characters"),
    "unknown type": (with_header({"a": entry("F99")}, b"1234"), "unknown variant `F99`"),
    "entry without type": (with_header({"a": {}}), "missing field"),
    "entry is a number": (with_header({"a": 3}), "invalid type: integer"),
    "negative shape": (with_header({"a": entry(shape=[-1])}, b"1234"), "expected usize"),
    "boolean shape": (with_header({"a": entry(shape=[True])}, b"1234"), "expected usize"),
    "enormous shape": (with_header({"a": entry(shape=[2**62, 4])}, b"1234"), "overflow"),
    "shape and bytes differ": (with_header({"a": entry(shape=[2])}, b"1234"), "does not describe its content"),
    "overlap": (with_header({"a": entry(), "b": entry()}, b"1234"), "invalid offset for tensor"),
    "gap": (with_header({"a": entry(), "b": entry(offsets=[8, 12])}, b"1" * 12), "invalid offset for tensor `b`"),
    "name of a megabyte": (with_header({"a" * 2**20: entry(shape=[2])}, b"1234"), "does not describe its content"),
    "too many tensors": (
        with_header({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(MAX_TENSORS + 1)}),
        "20001 tensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_and_the_message_says_why(path: Path, name: str) -> None:
    content, found = BAD[name]
    path.write_bytes(content)
    with pytest.raises(LoraFormatError, match=found) as caught:
        check_safetensors(path)
    assert len(str(caught.value)) < 400


def test_whatever_is_accepted_the_library_opens(path: Path) -> None:
    """2,000 mutations of a good file: each is accepted or refused in words, and the library reads what is accepted."""
    rng, accepted = random.Random(0), 0
    for _ in range(2000):
        content = bytearray(CONTENT)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            check_safetensors(path)
        except LoraFormatError:
            continue
        accepted += 1
        try:
            with safe_open(path, "np") as opened:
                assert set(opened.keys())
        except SafetensorError as error:
            pytest.fail(f"accepted, but the library says {error}: {content!r}")
    assert accepted > 30  # changed data is still a sound file


# Tar


def tar_of(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar of files; `kind` and `link` make the last one something else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index, (name, content) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if index == len(members) - 1:
                member.type, member.linkname = kind, link
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def copied(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    target = path.with_suffix(".out")
    with target.open("wb") as file:
        copy_only_safetensors(path, file)
    return target.read_bytes()


@pytest.mark.parametrize(
    "name", ["output/flux_train_replicate/lora.safetensors", "../../x.safetensors", "/etc/x.SAFETENSORS"]
)
def test_the_one_member_is_copied_whatever_it_is_called(path: Path, name: str) -> None:
    tar = tar_of(("output/captions/a.txt", b"a photo"), (name, CONTENT))
    assert copied(path, tar) == CONTENT
    assert sorted(p.name for p in path.parent.iterdir()) == ["file", "file.out"]


BAD_TARS = {
    "none": (tar_of(("a.txt", b"x")), "0 safetensors files"),
    "two": (tar_of(("a.safetensors", b"x"), ("b.safetensors", b"x")), "2 safetensors files"),
    "symlink": (tar_of(("a.safetensors", b""), kind=tarfile.SYMTYPE, link="/etc/passwd"), "a link or a device"),
    "hard link": (tar_of(("a.safetensors", b""), kind=tarfile.LNKTYPE, link="/etc/passwd"), "a link or a device"),
    "device": (tar_of(("a.safetensors", b""), kind=tarfile.CHRTYPE), "a link or a device"),
    "directory": (tar_of(("a.safetensors", b""), kind=tarfile.DIRTYPE), "0 safetensors files|a link or a device"),
    "cut off": (tar_of(("a.safetensors", b"x" * 5000))[:2000], "as a tar|middle"),
    "no tar": (b"<html>", "as a tar"),
    "many members": (tar_of(*((f"{i}.txt", b"") for i in range(10_001))), "more than 10000 members"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_refused(path: Path, name: str) -> None:
    content, found = BAD_TARS[name]
    with pytest.raises(LoraFormatError, match=found):
        copied(path, content)


def test_a_header_of_absurd_size_is_not_read_into_memory(path: Path) -> None:
    """A long-name header that claims 4 GiB, in a sparse file that really has them."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4 * 2**30
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(5 * 2**30)
    with pytest.raises(LoraFormatError, match="as a tar"), path.with_suffix(".out").open("wb") as target:
        copy_only_safetensors(path, target)
