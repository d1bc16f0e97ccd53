"""One connection to an LDAP directory (RFC 4511): a request, its answer, the next request.

Strategy: sansldap puts messages together and takes them apart, and knows no sockets. So TLS, time-outs and cancelling
are the loop's, as everywhere in the gateway, and no thread waits for a directory. The bindings of libldap (python-ldap,
bonsai) wait without bound in a TLS handshake that a server never answers, and ldap3 blocks a thread at every step.
"""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import urlsplit

import sansldap

from pgauthproxy.auth.model import AuthenticatorConfigError

START_TLS: Final = "1.3.6.1.4.1.1466.20037"
PORTS: Final = {"ldap": 389, "ldaps": 636}
MAX_ANSWER: Final = 1 << 20
"""Bytes of all that comes in answer to one request."""
NO_ATTRIBUTES: Final = "1.1"


class DirectoryError(Exception):
    """A directory that cannot be reached, breaks the protocol, or does not answer in time."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a directory listens. `encrypted`: TLS from the first byte on."""

    host: str
    port: int
    encrypted: bool

    @classmethod
    def parse(cls, url: str) -> "Server":
        """`ldaps://host:port` or `ldap://host:port`, and nothing behind. Raises AuthenticatorConfigError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise AuthenticatorConfigError(f"{url}: not a URL") from None
        if parts.scheme not in PORTS or not host or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise AuthenticatorConfigError(f"{url}: neither ldaps://host:port nor ldap://host:port")
        return cls(host, port or PORTS[parts.scheme], parts.scheme == "ldaps")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found: its DN, and the values of the attributes that were asked for, by name in lower case."""

    dn: str
    attributes: dict[str, list[bytes]]


class Connection(asyncio.Protocol):
    """States, in order: connecting, open, closed (`failure` says why, if it was not us)."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds for each step."""
        self.failure: str | None = None
        self._timeout = timeout
        self._ldap = sansldap.LDAPClient()
        self._transport: asyncio.Transport | None = None
        self._answers: list[Any] = []
        self._received = 0
        self._waiting: asyncio.Future[None] | None = None
        self._starting_tls = False

    @classmethod
    async def open(cls, server: Server, context: ssl.SSLContext, *, start_tls: bool, seconds: float) -> "Connection":
        """Connects, with TLS from the first byte on or with StartTLS; `seconds` is for each step.

        Raises DirectoryError.
        """
        loop = asyncio.get_running_loop()
        connection = cls(seconds)
        encryption = {"ssl": context, "server_hostname": server.host} if server.encrypted else {}
        try:
            async with asyncio.timeout(seconds):
                await loop.create_connection(lambda: connection, server.host, server.port, **cast(Any, encryption))
                if start_tls and not server.encrypted:
                    await connection._start_tls(context, server.host)
        except TimeoutError:
            connection.abort()
            raise DirectoryError(f"{server}: no connection in {seconds:g} s") from None
        except ssl.SSLCertVerificationError as error:
            connection.abort()
            raise DirectoryError(f"{server}: certificate is not good: {error.verify_message}") from None
        except (OSError, DirectoryError) as error:
            connection.abort()
            raise DirectoryError(f"{server}: {getattr(error, 'strerror', None) or error}") from None
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """RFC 4511, section 4.14. What a stranger may have put behind the answer in plain is not read."""
        assert self._transport is not None  # noqa: S101 (it is connected)
        self._starting_tls = True
        *_, answer = await self._request(self._ldap.extended_request(START_TLS), sansldap.ExtendedResponse)
        if answer.result.result_code != sansldap.LDAPResultCode.SUCCESS:
            raise DirectoryError(f"StartTLS refused: {_reason(answer)}")
        self._starting_tls = False
        self._ldap = sansldap.LDAPClient()
        transport = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_hostname=host)
        assert transport is not None  # noqa: S101 (only a transport that is closing gives none)
        self._transport = transport

    async def bind(self, dn: str, password: str) -> tuple[sansldap.LDAPResultCode, str]:
        """Says who asks from here on; the result, and why for the log. Raises DirectoryError."""
        if not dn or not password:
            # That would be an anonymous bind, which succeeds.
            raise DirectoryError("a bind without a DN or a password is no proof of anything")
        *_, answer = await self._request(self._ldap.bind_simple(dn, password), sansldap.BindResponse)
        return answer.result.result_code, _reason(answer)

    async def search(
        self, base: str, condition: sansldap.LDAPFilter, *, scope: str, attribute: str = "", limit: int = 1
    ) -> list[Entry]:
        """Up to `limit` entries with one of their attributes. What is not there is not found. Raises DirectoryError."""
        scopes = {"base": sansldap.SearchScope.BASE, "one": sansldap.SearchScope.ONE_LEVEL}
        *found, done = await self._request(
            self._ldap.search_request(
                base,
                scopes.get(scope, sansldap.SearchScope.SUBTREE),
                size_limit=limit,
                time_limit=max(1, int(self._timeout)),
                filter=condition,
                attributes=[attribute or NO_ATTRIBUTES],
            ),
            sansldap.SearchResultDone,
        )
        codes = sansldap.LDAPResultCode
        if done.result.result_code not in (codes.SUCCESS, codes.SIZE_LIMIT_EXCEEDED, codes.NO_SUCH_OBJECT):
            raise DirectoryError(f"search in {base} failed: {_reason(done)}")
        return [
            Entry(each.object_name, {pair.name.lower(): pair.values for pair in each.attributes})
            for each in found
            if isinstance(each, sansldap.SearchResultEntry)
        ]

    async def _request(self, number: int, ends_with: type) -> list[Any]:
        """Sends what was put together as this message, and waits for all that answers it. Raises DirectoryError."""
        if self.failure is not None or self._transport is None:
            raise DirectoryError(self.failure or "not connected")
        self._answers.clear()
        self._received = 0
        self._transport.write(self._ldap.data_to_send())
        try:
            async with asyncio.timeout(self._timeout):
                while not self._answers or isinstance(
                    self._answers[-1], sansldap.SearchResultEntry | sansldap.SearchResultReference
                ):
                    if self.failure is not None:
                        raise DirectoryError(self.failure)
                    self._waiting = asyncio.get_running_loop().create_future()
                    await self._waiting
        except TimeoutError:
            self._fail(f"no answer in {self._timeout:g} s")
            raise DirectoryError(f"no answer in {self._timeout:g} s") from None
        except asyncio.CancelledError:
            self._fail("given up")
            raise
        finally:
            self._waiting = None
        answers = list(self._answers)
        if not isinstance(answers[-1], ends_with) or any(answer.message_id != number for answer in answers):
            self._fail("an answer to what was not asked")
            raise DirectoryError("an answer to what was not asked")
        return answers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > MAX_ANSWER:
            self._fail(f"an answer of more than {MAX_ANSWER} bytes")
            return
        try:
            self._answers += self._ldap.receive(data)
        except Exception as error:  # whatever a parser makes of what a stranger sends
            what = error if isinstance(error, sansldap.LDAPError) else type(error).__name__
            self._fail(f"broke the protocol: {what}")
            return
        if self._starting_tls and self._answers and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._fail("closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"closed the connection{f': {error}' if error else ''}")

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Says good-bye and closes."""
        if self.failure is None and self._transport is not None:
            self._ldap.unbind()
            self._transport.write(self._ldap.data_to_send())
            self._transport.close()
        self.failure = self.failure or "closed"

    def abort(self) -> None:
        self._fail("closed")


def _reason(answer: Any) -> str:
    """A result's code and what the directory says of it."""
    said = answer.result.diagnostics_message
    name = answer.result.result_code.name.lower().replace("_", " ")
    return f"{name}: {said}" if said else name
