"""HTTP to addresses that strangers name: each is checked before it is dialled, and each request has one deadline.

http.client rather than a larger library: it reads bodies straight from the socket, several times faster than a parser
in Python, and its `connect` is the one place where an IP address is chosen. What is promised:

- Only https, and only public addresses: every address that a name resolves to is checked, and a checked one is dialled.
  Hosts that the operator trusts may be plain http and private; a client for images may use plain http too.
- Redirects are followed up to five times, each checked like the first. Secret headers are sent only to the host that
  they are meant for. Proxies from the environment are ignored.
- Name look-up, connection, TLS handshake, headers, redirects and all tries together end at one deadline, and a
  cancellation ends them within a fraction of a second, wherever they are.
- No address is repeated in a message, since it may be signed; hosts are.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from errors import DownloadError, HttpStatusError
from fetching.deadline import Deadline, run_until

ANSWER_SECONDS = 60
"""For an answer's headers, from the name look-up on: redirects and all tries included."""
CONNECT_SECONDS = 10
READ_SECONDS = 30
"""For the next bytes."""
MAX_REDIRECTS = 5
MAX_RETRY_SECONDS = 30
ATTEMPTS = 4
MAX_JSON_BYTES = 8 * 2**20
USER_AGENT = "flux-predictor"
REDIRECTS = (301, 302, 303, 307, 308)
MOST_DIGITS = 18
"""Of a length that is taken as it is; more stand for "too much", and Python refuses to read 4,300 of them."""
RELAYS_IPV4 = ipaddress.IPv4Network("192.88.99.0/24")
"""6to4, deprecated by RFC 7526: it may lead to private addresses."""
NOT_PUBLIC_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")))
"""Inside 2000::/3, but for relays and documentation: they may lead to private addresses."""

Json = Any
T = TypeVar("T")
AddressInfo = tuple[Any, Any, Any, str, tuple[Any, ...]]
Resolve = Callable[[str, int], Iterable[AddressInfo]]


def is_public(address: str) -> bool:
    """Whether an IP address, as text, belongs to the public internet and is no relay to another network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and ip not in RELAYS_IPV4
    if ip.ipv4_mapped is not None:
        return is_public(str(ip.ipv4_mapped))
    unicast = ip in ipaddress.IPv6Network("2000::/3")
    return unicast and ip.is_global and not any(ip in network for network in NOT_PUBLIC_IPV6)


def resolve_host(host: str, port: int) -> Iterable[AddressInfo]:
    """Every stream address of a host, as the system's resolver gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Response:
    """An answer whose body has not been read yet. Close it, or use it in a `with`."""

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
        """The secret headers that were sent to this address."""
        self.host = host_of(urlsplit(address))
        self.status = answer.status

    def header(self, name: str) -> str | None:
        """A header's value."""
        return self._answer.getheader(name)

    @property
    def length(self) -> int | None:
        """The body's length according to the header, at most 10 ** 18."""
        text = self.header("Content-Length")
        if text is None or not text.isdecimal():
            return None
        return int(text) if len(text) <= MOST_DIGITS else 10**MOST_DIGITS

    def read_some(self, limit: int) -> bytes:
        """Return the next bytes, from 1 to `limit`; empty at the end, which may come before `length` bytes.

        Raises:
            DownloadError: the connection broke, or nothing came in time.
        """
        with translated(self.host):
            return self._answer.read1(limit)

    def read_text(self, limit: int) -> str:
        """At most `limit` bytes of the body as text."""
        with translated(self.host):
            return self._answer.read(limit).decode("utf-8", errors="replace")

    def abort(self) -> None:
        """Wake a thread that is reading: it sees the end of the body or an error."""
        _shut_down(self._connection.sock)

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """The one way to hosts that callers name. Keeps nothing between two requests."""

    def __init__(
        self,
        trusted_hosts: frozenset[str] = frozenset(),
        *,
        plain_http: bool = False,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve_host,
        sleep: Callable[[float], None] | None = None,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Make a client.

        Args:
            trusted_hosts: "host" or "host:port" that may be plain http and private.
            plain_http: whether any public host may be plain http.
            tls: what certificates are verified with.
            resolve: the name look-up.
            sleep: what waits between two tries; the default ends with the deadline.
            answer_seconds: how long an answer may take.
        """
        self._trusted_hosts = trusted_hosts
        self._plain_http = plain_http
        self._tls = tls or ssl.create_default_context()
        self._resolve = resolve
        self._sleep = sleep
        self._answer_seconds = answer_seconds

    def get(
        self,
        address: str,
        secret_headers: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (200,),
        deadline: Deadline | None = None,
    ) -> Response:
        """GET; redirects are followed, and 429, 5xx and failed connections tried again, as the answer asks.

        Args:
            address: https, or http to a trusted host.
            secret_headers: sent to this address's own host alone.
            headers: sent to every host that a redirect leads to.
            accept: the statuses that are an answer.
            deadline: one that holds besides the client's own.

        Raises:
            HttpStatusError: another status.
            DownloadError: the address is refused, or no one answers in time.
        """
        asked = _Asked(address, secret_headers or {}, headers or {}, accept)
        return self._within(deadline, address, lambda exchange: self._answer(asked, exchange))

    def get_json(self, address: str, secret_headers: Mapping[str, str] | None = None) -> Json:
        """GET and parse JSON of at most 8 MiB, the body within the same time as the headers.

        Raises:
            HttpStatusError: any status but 200.
            DownloadError: as for `get`, or the answer is not JSON.
        """
        asked = _Asked(address, secret_headers or {}, {"Accept": "application/json"}, (200,))

        def read(exchange: _Exchange) -> tuple[str, str]:
            with self._answer(asked, exchange) as response:
                return response.host, response.read_text(MAX_JSON_BYTES + 1)

        host, text = self._within(None, address, read)
        try:
            if len(text) > MAX_JSON_BYTES:
                raise ValueError("too long")
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DownloadError(f"{host} answered with something that is not JSON. Try again later.") from error

    def _within(self, deadline: Deadline | None, address: str, work: Callable[[_Exchange], T]) -> T:
        """Run one exchange in a thread of its own, so that a deadline or a cancellation ends it at any point."""
        own = Deadline(self._answer_seconds, deadline)
        exchange = _Exchange(own)
        try:
            return run_until(own, lambda: work(exchange), exchange.abort)
        except TimeoutError as error:
            host = host_of(_split(address))
            raise DownloadError(f"{host} did not answer within {own.elapsed():.0f} s. Try again later.") from error

    def _answer(self, asked: _Asked, exchange: _Exchange) -> Response:
        for attempt in range(ATTEMPTS):
            pause = 0.5 * 2.0**attempt
            try:
                response = self._follow(asked.address, asked.secret_headers, asked.headers, exchange)
            except BrokenConnectionError as failure:
                exchange.deadline.require()
                if attempt == ATTEMPTS - 1 or pause >= exchange.deadline.left():
                    raise DownloadError(str(failure)) from failure.__cause__
            else:
                if response.status in asked.accept:
                    _refuse_encoding(response)
                    return response
                with response:
                    pause = _retry_after(response) or pause
                    busy = response.status == 429 or response.status >= 500
                    if not busy or attempt == ATTEMPTS - 1 or pause >= exchange.deadline.left():
                        raise _status_error(response)
            (self._sleep or exchange.deadline.pause)(pause)
        raise AssertionError("the last attempt returns or raises")

    def _follow(
        self, address: str, secret_headers: Mapping[str, str], headers: Mapping[str, str], exchange: _Exchange
    ) -> Response:
        origin = _split(address)
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._checked(address)
            same_host = (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc)
            response = self._request(parts, secret_headers if same_host else {}, headers, exchange)
            target = response.header("Location")
            if response.status not in REDIRECTS or target is None:
                return response
            response.close()
            if not same_host:
                secret_headers = {}  # a redirect back to the first host gets none either
            address = _joined(address, target)
        raise DownloadError(
            f"{host_of(origin)} redirects more than {MAX_REDIRECTS} times. Give the file's own address."
        )

    def _checked(self, address: str) -> SplitResult:
        parts = _split(address)
        if parts.username is not None or parts.password is not None:
            raise DownloadError(f"The address of {host_of(parts)} contains a user name or password. Leave them out.")
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise DownloadError("The address is not a web address. Give an https address.")
        if parts.scheme == "http" and not (self._plain_http or self._is_trusted(parts)):
            raise DownloadError(f"The address of {host_of(parts)} is plain http. Give an https address.")
        return parts

    def _is_trusted(self, parts: SplitResult) -> bool:
        host = (parts.hostname or "").lower()
        return host in self._trusted_hosts or f"{host}:{_port(parts)}" in self._trusted_hosts

    def _request(
        self, parts: SplitResult, secrets: Mapping[str, str], headers: Mapping[str, str], exchange: _Exchange
    ) -> Response:
        host, port = _ascii_host(parts), _port(parts)
        addresses = self._addresses(host, port, public_only=not self._is_trusted(parts))
        tls = self._tls if parts.scheme == "https" else None
        exchange.deadline.require()
        connection = _CheckedConnection(host, port, addresses, tls, exchange)
        target = escaped(parts.path or "/") + (f"?{escaped(parts.query)}" if parts.query else "")
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
            raise kind(f"The host {host[:100]} cannot be found. Check the address.") from error
        if public_only and not (found and all(is_public(str(info[4][0])) for info in found)):
            raise DownloadError(f"The host {host[:100]} is not on the public internet. Give a public https address.")
        return found


def escaped(text: str) -> str:
    """A path or query with spaces and non-ASCII characters percent-encoded; what is encoded already stays so."""
    return quote(text, safe="%/:=&?~+!$,;'@()*[]")


@dataclass(frozen=True)
class _Asked:
    """What is asked for."""

    address: str
    secret_headers: Mapping[str, str]
    headers: Mapping[str, str]
    accept: tuple[int, ...]


class _Exchange:
    """One request with its redirects and tries: its deadline, and the socket in use, which another thread may shut."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def use(self, connected: socket.socket) -> None:
        """Let `abort` shut this socket down."""
        with self._lock:
            self._socket = connected
        self.deadline.require()

    def abort(self) -> None:
        """Wake the thread that is connecting, shaking hands or reading."""
        with self._lock:
            _shut_down(self._socket)


class BrokenConnectionError(DownloadError):
    """No answer came, or it broke off; another try may succeed."""


class _CheckedConnection(http.client.HTTPConnection):
    """A connection to one of the given addresses, under the host's own name."""

    def __init__(
        self,
        host: str,
        port: int,
        addresses: list[AddressInfo],
        tls: ssl.SSLContext | None,
        exchange: _Exchange,
    ) -> None:
        super().__init__(host, port, timeout=READ_SECONDS)
        self.default_port = 443 if tls else 80  # left out of the Host header
        self._exchange = exchange
        self._addresses = addresses
        self._tls = tls

    def connect(self) -> None:
        """Dial the first of the addresses that answers."""
        raw = self._dial()
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.settimeout(READ_SECONDS)
            self.sock = raw
            if self._tls is not None:  # registered before the handshake, so that it can be woken
                self.sock = self._tls.wrap_socket(raw, server_hostname=self.host, do_handshake_on_connect=False)
                self._exchange.use(self.sock)
                self.sock.do_handshake()
        except BaseException:
            (self.sock or raw).close()
            raise

    def _dial(self) -> socket.socket:
        failure: OSError | None = None
        for family, kind, protocol, _, address in self._addresses:
            raw = socket.socket(family, kind, protocol)
            raw.settimeout(CONNECT_SECONDS)
            try:
                self._exchange.use(raw)
                raw.connect(address)
                return raw
            except OSError as error:
                raw.close()
                failure = error
                self._exchange.deadline.require()
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
        # ValueError, AttributeError: another thread closed the answer while it was read
        raise BrokenConnectionError(f"The connection to {host} failed. Try again later.") from error


def _shut_down(connected: socket.socket | None) -> None:
    """Wake whatever thread uses a socket."""
    if connected is not None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


def host_of(parts: SplitResult) -> str:
    """The host of an address for messages: without user, with the port if one is given."""
    return parts.netloc.rpartition("@")[2][:100]


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is no port
        return parts
    except ValueError as error:
        raise DownloadError("The address cannot be parsed. Give an https address.") from error


def _joined(address: str, target: str) -> str:
    try:
        return urljoin(address, target)
    except ValueError as error:
        raise DownloadError(
            "A redirect leads to something that is not an address. Give the file's own address."
        ) from error


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _ascii_host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise DownloadError(f"The host {host[:100]} is not a host name. Check the address.") from error


def _retry_after(response: Response) -> float | None:
    """The seconds that a busy server asks to wait, at most 30."""
    asked = (response.header("Retry-After") or "").strip()
    return min(float(asked), MAX_RETRY_SECONDS) if asked.isdecimal() else None


def _refuse_encoding(response: Response) -> None:
    encoding = (response.header("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise DownloadError(
            f"{response.host} sends the file in {encoding[:20]} encoding, which is not accepted. "
            "Give an address that serves the file unencoded."
        )


def _status_error(response: Response) -> HttpStatusError:
    try:
        body = response.read_text(4096)
    except DownloadError:
        body = ""
    message = f"{response.host} answered {response.status}. Check the address, or try again later."
    return HttpStatusError(message, status=response.status, host=response.host, body=body)
