"""The authenticator that is an HTTP service: one POST of JSON for each login (docs/http-authenticators.md).

What it answers is bounded in size and time, nothing is followed anywhere else, and a server's certificate is always
verified. aiohttp comes with the extra `http`; nothing imports it before an authenticator of this kind is made.
"""

import asyncio
import ipaddress
import os
import re
import ssl
from collections.abc import Callable
from collections.abc import Mapping as Pairs
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from pgauthproxy.auth import http_json, references
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import AuthenticatorConfigError, Load, Question
from pgauthproxy.auth.turns import Turns
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed
from pgauthproxy.stages import Mapping

if TYPE_CHECKING:
    import aiohttp

KEEPALIVE_SECONDS: Final = 30.0
REFUSALS: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
HEADER_VALUE: Final = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
OWN_HEADERS: Final = {
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "transfer-encoding",
}
Notice = Callable[[Noticed], None]


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Time in seconds, size in bytes."""

    timeout: float
    max_in_flight: int
    max_output: int


@dataclass(frozen=True, slots=True)
class _Access:
    """What is read for the way to the service, and read anew by a reload; no context without TLS."""

    headers: Pairs[str, str] = field(repr=False)
    context: ssl.SSLContext | None


class HttpAuthenticator:
    """Asks the operator's service."""

    def __init__(self, url: str, headers: Pairs[str, str], ca: str, limits: HttpLimits, notice: Notice) -> None:
        """Resolves references and reads the authorities. Raises AuthenticatorConfigError."""
        self._url = _checked_url(url)
        self._wanted = (headers, ca)
        self._access = self._read_access()
        self._limits = limits
        self._notice = notice
        self._turns = Turns(limits.max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        _check_aiohttp()

    def _read_access(self) -> "_Access":
        headers, ca = self._wanted
        return _Access(_checked_headers(headers), _build_context(ca) if self._url.scheme == "https" else None)

    async def start(self) -> None:
        import aiohttp

        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            # What one login sets must not be sent with the next.
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            trace_configs=[trace],
        )
        if self._url.scheme == "http" and not _is_loopback(self._url.hostname or ""):
            facts = (("authenticator", _shown(self._url)), ("remedy", "https"))
            self._notice(Noticed("warning", "passwords cross the network in clear", facts))

    async def ask(self, question: Question) -> Mapping:
        body = http_json.encode_request(question)
        async with self._turns:
            try:
                async with asyncio.timeout(self._limits.timeout):
                    status, answer = await self._post(body)
            except TimeoutError:
                raise AuthenticatorFault(f"authenticator took longer than {self._limits.timeout:g} s") from None
        if status in REFUSALS:
            raise http_json.decode_refusal(status, answer or b"")
        if status != HTTPStatus.OK:
            raise AuthenticatorFault(f"authenticator answered with status {status}")
        if answer is None:
            raise AuthenticatorFault(f"authenticator answered with more than {self._limits.max_output} bytes")
        try:
            return http_json.decode_mapping(answer, question.started)
        except NonsenseError as error:
            raise AuthenticatorFault(f"authenticator answered nonsense: {error}") from None

    async def reload(self) -> None:
        """Resolves references and reads the authorities anew. Raises AuthenticatorConfigError."""
        self._access = await asyncio.to_thread(self._read_access)
        self._notice(Noticed("info", "authenticator loaded anew", (("url", _shown(self._url)),)))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def load(self) -> list[Load]:
        return [self._turns.load("http")]

    async def _post(self, body: bytes) -> tuple[int, bytes | None]:
        """Status and body of the answer, None for one that is too long. Raises AuthenticatorFault."""
        import aiohttp

        while True:
            reused = _Reused()
            try:
                return await self._post_once(body, reused)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # A kept connection that the server closed just now: to ask a second time does no harm.
                gone = isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError))
                if not (gone and reused.yes):
                    raise AuthenticatorFault(f"authenticator {_what_broke(error)}") from None

    async def _post_once(self, body: bytes, reused: "_Reused") -> tuple[int, bytes | None]:
        assert self._session is not None  # noqa: S101 (it was started)
        access = self._access
        # Left before its end, an answer takes its connection with it. Connections are kept for each context apart.
        async with self._session.post(
            self._url.geturl(),
            data=body,
            headers=access.headers,
            ssl=access.context or True,
            allow_redirects=False,
            trace_request_ctx=reused,
        ) as response:
            if response.status != HTTPStatus.OK and response.status not in REFUSALS:
                return response.status, None
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise AuthenticatorFault("authenticator answered with a content encoding, which was not asked for")
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > self._limits.max_output:
                    return response.status, None
            return response.status, bytes(answer)


class _Reused:
    """Whether a request went over a connection that had been used before."""

    __slots__ = ("yes",)

    def __init__(self) -> None:
        self.yes = False


async def _note_reuse(_session: object, context: Any, _parameters: object) -> None:
    context.trace_request_ctx.yes = True


def _what_broke(error: Exception) -> str:
    """In words that hold nothing of what was sent."""
    import aiohttp

    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "")
            return f"has no valid certificate: {reason or type(error.certificate_error).__name__}"
        case aiohttp.ClientConnectorDNSError():
            return "has a host name that cannot be resolved"
        case aiohttp.ClientSSLError():
            return f"failed in TLS: {getattr(error.os_error, 'reason', '') or type(error.os_error).__name__}"
        case aiohttp.ClientConnectorError():
            number = error.os_error.errno
            return f"cannot be reached: {os.strerror(number) if number else type(error.os_error).__name__}"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | ConnectionError():
            return "closed the connection without an answer"
        case aiohttp.ClientPayloadError():
            return "broke off its answer"
        case _:
            return f"does not speak HTTP: {type(error).__name__}"


def _check_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401 (whether it is there)
    except ImportError:
        raise AuthenticatorConfigError("authenticator.http: needs aiohttp: pip install 'pgauthproxy[http]'") from None


def _checked_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        named = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        raise AuthenticatorConfigError("authenticator.http.url: not a URL") from None
    if parts.scheme not in ("http", "https") or not named or not url.isprintable() or " " in url:
        raise AuthenticatorConfigError("authenticator.http.url: not https://host[:port]/path")
    if parts.username is not None or parts.password is not None:
        raise AuthenticatorConfigError("authenticator.http.url: credentials belong into authenticator.http.headers")
    return parts


def _shown(url: SplitResult) -> str:
    """Without a query, which may hold a token."""
    return f"{url.scheme}://{url.netloc}{url.path}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_headers(headers: Pairs[str, str]) -> dict[str, str]:
    """Names, and values with references resolved. Raises AuthenticatorConfigError, which shows no value."""
    checked = {}
    for name, value in headers.items():
        where = f"authenticator.http.headers: {name}"
        if not HEADER_NAME.fullmatch(name):
            raise AuthenticatorConfigError("authenticator.http.headers: a name that no header can have")
        if name.lower() in OWN_HEADERS:
            raise AuthenticatorConfigError(f"{where}: is the gateway's own")
        try:
            text = references.resolve(value).reveal().decode()
        except AuthenticatorConfigError as error:
            raise AuthenticatorConfigError(f"{where}: {error}") from None
        except UnicodeDecodeError:
            raise AuthenticatorConfigError(f"{where}: its value is not UTF-8") from None
        if not HEADER_VALUE.fullmatch(text):
            raise AuthenticatorConfigError(f"{where}: a line break or control character in its value")
        checked[name] = text
    return checked


def _build_context(ca: str) -> ssl.SSLContext:
    """Verifies chain and host name; there is no way not to."""
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except ssl.SSLError:
        raise AuthenticatorConfigError(f"authenticator.http.ca: {ca}: no certificates in PEM") from None
    except OSError as error:
        raise AuthenticatorConfigError(f"authenticator.http.ca: {ca}: {error.strerror}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
