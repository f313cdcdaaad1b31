"""Ways to spoil bytes, text and JSON, each drawn from a given generator of random numbers."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, -1, 2, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1, 2**64, 10**30, -(2**63))
PIECES = (
    "https://", "http://", "//", "data:", ";base64,", "urn:air:", "civitai:", "models/", "?modelVersionId=", "@",
    "/tree/", "/resolve/", "/versions/", "..", "/../", "%2e%2e", "%2F", "%00", "%ff", "%", "\\", "\0", "\n",
    "\ud800", "\u202e", "①", "ü", " ", "[", "]", "[::1]", ":", ":0", ":99999", "#", "?", "&", "0x7f.1", "127.0.0.1",
    "localhost", "xn--",
    "user:CANARY@", "hf_CANARY0123456789", ".safetensors", ".tar", "0" * 64, "9" * 400, "a" * 9000,
    "refs/pr/1", "datasets/", ".",
)  # fmt: skip


def mutated(rng: random.Random, content: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """Change bytes, cut, repeat, insert, splice with another file, one to eight times."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 | 1 | 2 if data:
                data[at % len(data)] = rng.randrange(256)
            case 3 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 4:
                del data[at:]
            case 5:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 6:
                width = rng.choice((2, 4, 8))
                value = rng.choice(NUMBERS) % 256**width
                data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
            case 7 if others:
                other = rng.choice(others)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


def mutated_text(rng: random.Random, text: str, others: tuple[str, ...]) -> str:
    """Insert, delete, replace, repeat and splice, one to six times."""
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0 | 1:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 2:
                text = text[:at] + text[at + rng.choice((1, 2, 9)) :]
            case 3:
                text = text[:at] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x3000)))) + text[at + 1 :]
            case 4:
                other = rng.choice(others)
                text = text[:at] + other[rng.randrange(len(other) + 1) :]
            case 5:
                text = text.swapcase() if rng.random() < 0.5 else text[:at] * 2 + text[at:]
    return text


ODD: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: None,
    lambda rng: rng.choice(NUMBERS),
    lambda rng: rng.random() * 10 ** rng.choice((0, 9, 300)),
    lambda rng: rng.choice(("", "x", "x" * 100_000, "http://127.0.0.1/", "file:///etc/passwd", "\ud800", "a\r\nb: c")),
    lambda rng: [],
    lambda rng: {},
    lambda rng: True,
    lambda rng: [[[]]] * 50,
    lambda rng: {"a": {"b": [1, 2, None]}},
)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """The value with one node replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        match rng.randrange(5):
            case 0:
                return {key: item for key, item in value.items() if key != name}
            case 1:
                return {**value, name: rng.choice(ODD)(rng)}
            case 2:
                end = rng.choice(("x", "\n", "\x1b[2J", "\u202e", ".0", "q" * 5000))
                return {(f"{key}{end}" if key == name else key): item for key, item in value.items()}
        return {**value, name: mutated_json(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return value + [value[index]] * rng.choice((1, 5))
        return [*value[:index], mutated_json(rng, value[index]), *value[index + 1 :]]
    return rng.choice(ODD)(rng)


def mutated_safetensors(rng: random.Random, content: bytes, others: tuple[bytes, ...]) -> bytes:
    """Spoil the bytes of a safetensors file, or its header's meaning, or the numbers in its tensors."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        return mutated(rng, content, others)
    if kind == 1:
        header = mutated(rng, header)
    elif kind == 2:
        values = bytearray(body)
        for _ in range(rng.choice((1, 4))):  # NaN and infinities of each width among them
            at = rng.randrange(len(values) + 1)
            values[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\x7f\xff\x7f", rng.randbytes(4)))
        body = bytes(values)
    else:
        table = json.loads(header)
        for _ in range(rng.choice((1, 1, 3))):
            table = mutated_json(rng, table)
        header = json.dumps(table).encode()
    if rng.random() < 0.05:
        length = rng.choice(NUMBERS) % 2**64
        return length.to_bytes(8, "little") + header + body
    return len(header).to_bytes(8, "little") + header + body


def mutated_image(rng: random.Random, content: bytes, others: tuple[bytes, ...]) -> bytes:
    """Spoil an image; PNG's checksums are mended half of the time, so that the decoder sees the damage."""
    spoiled = mutated(rng, content, others)
    return with_right_checksums(spoiled) if rng.random() < 0.5 else spoiled


def with_right_checksums(png: bytes) -> bytes:
    """The PNG with the checksum of each chunk that is whole made right; anything else unchanged."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    mended, at = bytearray(png), 8
    while at + 12 <= len(mended):
        end = at + 8 + int.from_bytes(mended[at : at + 4], "big")
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = zlib.crc32(mended[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mended)
