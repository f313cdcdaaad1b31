"""HTTP to addresses that strangers name: checked before they are dialled, watched while they answer.

http.client rather than a larger library: its body comes straight from the socket, several times faster than through a
parser in Python, and its `connect` is the one place where an address is chosen. What is promised:

- https alone, and only to public addresses: every address that a name resolves to is looked at, and the one that was
  looked at is the one dialled. Hosts that the operator trusts may be plain http and private.
- Redirects are followed up to five times, each checked like the first. Secret headers stay with the host that they
  were meant for. Proxies from the environment play no part.
- No address is repeated in a message, since it may be signed; hosts are.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from errors import DownloadError, HttpStatusError

CONNECT_SECONDS = 10
READ_SECONDS = 30
MAX_REDIRECTS = 5
MAX_RETRY_SECONDS = 30
ATTEMPTS = 4
MAX_JSON_BYTES = 8 * 2**20
USER_AGENT = "flux-predictor"
REDIRECTS = (301, 302, 303, 307, 308)
NOT_PUBLIC_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")))
"""Inside 2000::/3, but relays and documentation, which may lead to inside addresses."""

Json = Any
AddressInfo = tuple[Any, Any, Any, str, tuple[Any, ...]]
Resolve = Callable[[str, int], Iterable[AddressInfo]]


def is_public(address: str) -> bool:
    """Whether an IP address, as text, is one of the public internet and leads nowhere else."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    if ip.ipv4_mapped is not None:
        return is_public(str(ip.ipv4_mapped))
    unicast = ip in ipaddress.IPv6Network("2000::/3")
    return unicast and ip.is_global and not any(ip in network for network in NOT_PUBLIC_IPV6)


def resolve_host(host: str, port: int) -> Iterable[AddressInfo]:
    """Every stream address of a host, as the system's resolver gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Response:
    """An answer whose body is still to be read. Close it, or use it in a `with`."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        answer: http.client.HTTPResponse,
        address: str,
        secret_headers: Mapping[str, str],
    ) -> None:
        self._connection = connection
        self._answer = answer
        self.address = address
        """The address that answered, after redirects."""
        self.secret_headers = secret_headers
        """Those that this address was sent."""
        self.host = host_of(urlsplit(address))
        self.status = answer.status

    def header(self, name: str) -> str | None:
        """A header's value."""
        return self._answer.getheader(name)

    @property
    def length(self) -> int | None:
        """How many bytes the body is said to have."""
        text = self.header("Content-Length")
        return int(text) if text is not None and text.isdecimal() else None

    def read_some(self, limit: int) -> bytes:
        """Return what has come, at least a byte and at most `limit`; empty at the end, maybe before `length` bytes.

        Raises:
            DownloadError: the connection broke or fell silent.
        """
        with translated(self.host):
            return self._answer.read1(limit)

    def read_text(self, limit: int) -> str:
        """At most `limit` bytes of the body as text."""
        with translated(self.host):
            return self._answer.read(limit).decode("utf-8", errors="replace")

    def abort(self) -> None:
        """Wake a thread that is reading: it meets the end of the body or an error."""
        if self._connection.sock is not None:
            with _ignored_socket_errors():
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection up."""
        self._answer.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """The one way out. `trusted_hosts` are "host" or "host:port" that may be plain http and private."""

    def __init__(
        self,
        trusted_hosts: frozenset[str] = frozenset(),
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve_host,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._trusted_hosts = trusted_hosts
        self._tls = tls or ssl.create_default_context()
        self._resolve = resolve
        self._sleep = sleep

    def get(
        self,
        address: str,
        secret_headers: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (200,),
    ) -> Response:
        """GET; redirects are followed, and 429, 5xx and failed connections tried again, as the answer asks.

        Args:
            address: https, or http to a trusted host.
            secret_headers: sent to this address's own host alone.
            headers: sent wherever a redirect leads.
            accept: the statuses that are an answer.

        Raises:
            HttpStatusError: another status.
            DownloadError: the address is refused, or no one answers.
        """
        for attempt in range(ATTEMPTS):
            try:
                response = self._follow(address, secret_headers or {}, headers or {})
            except BrokenConnectionError as failure:
                if attempt == ATTEMPTS - 1:
                    raise DownloadError(str(failure)) from failure.__cause__
                self._sleep(_pause(attempt, None))
                continue
            if response.status in accept:
                _refuse_encoding(response)
                return response
            with response:
                if attempt == ATTEMPTS - 1 or not (response.status == 429 or response.status >= 500):
                    raise _status_error(response)
                pause = _pause(attempt, response.header("Retry-After"))
            self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def get_json(self, address: str, secret_headers: Mapping[str, str] | None = None) -> Json:
        """GET and parse JSON of at most 8 MiB.

        Raises:
            HttpStatusError: any status but 200.
            DownloadError: as for `get`, or what came is no JSON.
        """
        with self.get(address, secret_headers, {"Accept": "application/json"}) as response:
            text = response.read_text(MAX_JSON_BYTES + 1)
        try:
            if len(text) > MAX_JSON_BYTES:
                raise ValueError("too long")
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DownloadError(f"{response.host} answered with something that is no JSON. Try again later.") from error

    def _follow(self, address: str, secret_headers: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        origin = _split(address)
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._checked(address)
            same_host = (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc)
            response = self._request(parts, secret_headers if same_host else {}, headers)
            target = response.header("Location")
            if response.status not in REDIRECTS or target is None:
                return response
            response.close()
            if not same_host:
                secret_headers = {}  # a way back to the first host gets none either
            address = _joined(address, target)
        raise DownloadError(
            f"{host_of(origin)} redirects more than {MAX_REDIRECTS} times. Give the file's own address."
        )

    def _checked(self, address: str) -> SplitResult:
        parts = _split(address)
        if parts.username is not None or parts.password is not None:
            raise DownloadError(f"The address of {host_of(parts)} carries a user name or password. Leave them out.")
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise DownloadError("The address is no web address. Give an https address.")
        if parts.scheme == "http" and not self._is_trusted(parts):
            raise DownloadError(f"The address of {host_of(parts)} is plain http. Give an https address.")
        return parts

    def _is_trusted(self, parts: SplitResult) -> bool:
        host = (parts.hostname or "").lower()
        return host in self._trusted_hosts or f"{host}:{_port(parts)}" in self._trusted_hosts

    def _request(self, parts: SplitResult, secrets: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        host, port = _ascii_host(parts), _port(parts)
        addresses = self._addresses(host, port, public_only=not self._is_trusted(parts))
        tls = self._tls if parts.scheme == "https" else None
        connection = _CheckedConnection(host, port, addresses, tls)
        target = quote(parts.path or "/", safe=_SAFE)
        if parts.query:
            target += "?" + quote(parts.query, safe=_SAFE)
        sent = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers, **secrets}
        try:
            with translated(host_of(parts)):
                connection.request("GET", target, headers=sent)
                return Response(connection, connection.getresponse(), parts.geturl(), secrets)
        except BaseException:
            connection.close()
            raise

    def _addresses(self, host: str, port: int, public_only: bool) -> list[AddressInfo]:
        try:
            found = list(self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            busy = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            kind = BrokenConnectionError if busy else DownloadError
            raise kind(f"The host {host} is not known. Check the address.") from error
        if public_only and not (found and all(is_public(str(info[4][0])) for info in found)):
            raise DownloadError(f"The host {host} is not on the public internet. Give a public https address.")
        return found


_SAFE = "%/:=&?~+!$,;'@()*[]"
"""What an address's path and query may hold as it is."""


class BrokenConnectionError(DownloadError):
    """No answer came, or it broke off; another try may bring it."""


class _CheckedConnection(http.client.HTTPConnection):
    """A connection to one of the given addresses, under the host's own name."""

    def __init__(self, host: str, port: int, addresses: list[AddressInfo], tls: ssl.SSLContext | None) -> None:
        default_port = 443 if tls else 80
        super().__init__(host, port, timeout=READ_SECONDS)
        self.default_port = default_port  # left out of the Host header
        self._addresses = addresses
        self._tls = tls

    def connect(self) -> None:
        """Dial the first of the addresses that answers."""
        raw = self._dial()
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self._tls.wrap_socket(raw, server_hostname=self.host) if self._tls else raw
        except BaseException:
            raw.close()
            raise
        self.sock.settimeout(READ_SECONDS)

    def _dial(self) -> socket.socket:
        failure: OSError | None = None
        for family, kind, protocol, _, address in self._addresses:
            raw = socket.socket(family, kind, protocol)
            raw.settimeout(CONNECT_SECONDS)
            try:
                raw.connect(address)
                return raw
            except OSError as error:
                raw.close()
                failure = error
        raise failure or OSError("no address")


@contextmanager
def translated(host: str) -> Iterator[None]:
    """Turn what a broken connection raises into a DownloadError that names the host."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise DownloadError(f"The certificate of {host} cannot be verified. Give another address.") from error
    except TimeoutError as error:
        raise BrokenConnectionError(f"{host} did not answer in time. Try again later.") from error
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        # ValueError and AttributeError: the answer was closed by another thread while it was read
        raise BrokenConnectionError(f"The connection to {host} failed. Try again later.") from error


@contextmanager
def _ignored_socket_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def host_of(parts: SplitResult) -> str:
    """The host of an address, for messages; no user, no port unless one is given."""
    return parts.netloc.rpartition("@")[2][:100]


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is no port
        return parts
    except ValueError as error:
        raise DownloadError("The address cannot be read as one. Give an https address.") from error


def _joined(address: str, target: str) -> str:
    try:
        return urljoin(address, target)
    except ValueError as error:
        raise DownloadError("A redirect leads to no address. Give the file's own address.") from error


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _ascii_host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise DownloadError(f"The host {host[:100]} is no host name. Check the address.") from error


def _pause(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait before the next try: what the server asks for, at most 30, else 0.5, 1, 2."""
    if retry_after is not None and retry_after.strip().isdecimal():
        return min(float(retry_after), MAX_RETRY_SECONDS)
    return 0.5 * 2.0**attempt


def _refuse_encoding(response: Response) -> None:
    encoding = (response.header("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise DownloadError(
            f"{response.host} sends the file in {encoding[:20]} encoding, though the file itself was asked for. "
            "Give an address that serves the file as it is."
        )


def _status_error(response: Response) -> HttpStatusError:
    try:
        body = response.read_text(4096)
    except DownloadError:
        body = ""
    message = f"{response.host} answered {response.status}. Check the address, or try again later."
    return HttpStatusError(message, status=response.status, host=response.host, body=body)
