"""The files behind the inputs `image` and `mask`: fetched by our guarded client instead of Cog.

Cog 0.23 turns an address into a `cog.types.URLPath` and downloads it by itself, in `URLPath.convert`: from any host,
private ones included, through redirects, without a limit of size or time, with gzip inflated and the whole address
quoted in errors. It does so in a thread that the prediction waits for without being cancellable, and a data URI has
been decoded twice by then. There is no setting for any of this.

So the one method that makes a URLPath of text, `cog.types.Path.validate`, is replaced: an address or a data URI becomes
an `Upload`, which is only its text, and the prediction fetches it here, under the rules of LoRA addresses. Delete this
when Cog can be told what to fetch and how; `tests/test_uploads.py` fails when Cog's version or these methods change.
"""

from __future__ import annotations

import base64
import binascii
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

import cog.types

from errors import DownloadError, HttpStatusError, InputError
from fetching.deadline import Deadline
from fetching.download import Limits, download
from fetching.files import temporary_folder
from fetching.network import Client
from images import MAX_FILE_BYTES

TOTAL_SECONDS = 60
"""For `image` and `mask` together, from the name look-up to the last byte."""
FORMS = "Give an http(s) address or a data URI of an image."


@dataclass(frozen=True)
class Upload:
    """An input file that has not been fetched."""

    source: str = field(repr=False)
    """An address, which may be signed, or a data URI."""


def defer_downloads() -> None:
    """Let Cog hand addresses and data URIs of inputs to the prediction as `Upload`s. Repeatable."""
    cog.types.Path.validate = classmethod(_validate)


def _validate(cls: type, value: object) -> object:
    """Stands for `cog.types.Path.validate`: text that Cog would fetch is kept, anything else is a path as before."""
    if isinstance(value, str) and _scheme(value) in ("data", "http", "https"):
        return Upload(value)
    return value if isinstance(value, pathlib.Path) else cls(value)


def _scheme(text: str) -> str:
    try:
        return urlsplit(text[:2000]).scheme
    except ValueError:  # such as a bracket that is not closed: refused by the client, in words
        return text.partition(":")[0].lower()


class Uploads:
    """Fetches the files of one prediction's inputs."""

    def __init__(
        self, client: Client, *, max_bytes: int = MAX_FILE_BYTES, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        self._client = client
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds

    @contextmanager
    def fetched(self, image: object, mask: object) -> Iterator[tuple[pathlib.Path | None, pathlib.Path | None]]:
        """Give the files of both inputs; those that were fetched are removed at the end.

        Args:
            image: an Upload, a file that the server stored, or None; Cog passes other text through unchanged.
            mask: likewise.

        Raises:
            InputError: the input is neither, or a data URI that cannot be decoded.
            DownloadError: the address is refused, or the file cannot be fetched.
        """
        deadline = Deadline(self._total_seconds)
        with temporary_folder("flux-input-") as folder:
            yield self._file(image, folder / "image", deadline), self._file(mask, folder / "mask", deadline)

    def _file(self, given: object, target: pathlib.Path, deadline: Deadline) -> pathlib.Path | None:
        if given is None:
            return None
        if not isinstance(given, Upload):
            return stored_file(given, target.name)
        if _scheme(given.source) == "data":
            target.write_bytes(decoded_data_uri(given.source, target.name, self._max_bytes))
            return target
        try:
            self._download(given.source, target, deadline)
        except HttpStatusError as error:
            raise DownloadError(
                f"Cannot fetch the {target.name}: {error.host} answered {error.status}. {FORMS}"
            ) from None
        except DownloadError as error:
            raise DownloadError(f"Cannot fetch the {target.name}: {error}") from None
        return target

    def _download(self, address: str, target: pathlib.Path, deadline: Deadline) -> None:
        limits = Limits(max_bytes=self._max_bytes, total_seconds=self._total_seconds)
        with target.open("w+b") as file, self._client.get(address, deadline=deadline) as response:
            download(self._client, response, file, limits, deadline=deadline)


def stored_file(file: object, name: str) -> pathlib.Path:
    """Return the path of an input file that the server stored in the temporary folder.

    Raises:
        InputError: `file` is text, or lies outside the temporary folder.
    """
    if isinstance(file, pathlib.Path):
        path = pathlib.Path(file).resolve()
        if path.is_file() and path.is_relative_to(pathlib.Path(tempfile.gettempdir()).resolve()):
            return path
    raise InputError(f"{name} is not an uploaded file. {FORMS}")


def decoded_data_uri(text: str, name: str, max_bytes: int) -> bytes:
    """The content of a `data:` URI, whose length is checked before it is decoded.

    Raises:
        InputError: it cannot be decoded, is empty, or has more than `max_bytes`.
    """
    header, comma, payload = text.partition(",")
    is_base64 = header.lower().replace(" ", "").endswith(";base64")
    longest = max_bytes * 4 // 3 + 4 if is_base64 else max_bytes * 3
    if len(payload) > longest:
        raise InputError(f"The {name} has more than {max_bytes >> 20} MiB. Give a smaller one.")
    try:
        content = unquote_to_bytes(payload)
        content = base64.b64decode(content) if is_base64 else content
    except (binascii.Error, ValueError, UnicodeError) as error:
        raise InputError(f"The data URI of the {name} cannot be decoded. {FORMS}") from error
    if not comma or not content:
        raise InputError(f"The data URI of the {name} is empty. {FORMS}")
    if len(content) > max_bytes:
        raise InputError(f"The {name} has more than {max_bytes >> 20} MiB. Give a smaller one.")
    return content
