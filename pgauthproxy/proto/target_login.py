"""The login at a target, the gateway being the client (PostgreSQL manual, "Message Flow", Start-up).

The target is not trusted either: one authentication exchange, nothing session-like before AuthenticationOk, every
length bounded, no password in clear where others can read it, and a server that speaks SCRAM must prove itself.
"""

from dataclasses import dataclass
from typing import Final

import msgspec

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.errors import (
    CONNECTION_FAILURE,
    INVALID_AUTHORIZATION,
    PROTOCOL_VIOLATION,
    TARGET_REJECTED,
    FrameError,
    TargetFault,
    TlsRefused,
)
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.steps import MORE, DeriveKey, Login, TlsPlan, next_message
from pgauthproxy.proto.target_tls import start_tls
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Encryption, Granted, Greeting, Password, ProvedKeys, StoredMd5

MAX_GREETING_BYTES: Final = 1 << 20
MAX_KEY_BYTES: Final = 4 + 256
PASSED_ON: Final = bytes((messages.PARAMETER_STATUS, messages.NOTICE_RESPONSE))
NEUTRAL_TEXTS: Final = {
    "3D000": "database does not exist",
    "53300": "sorry, too many clients already",
    "57P03": "the database system is not accepting connections",
}


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """Bounds on what a target may send before its first ReadyForQuery: length fields in bytes, SCRAM iterations."""

    auth_request: int
    error: int
    message: int
    scram_iterations: int


class Welcome(msgspec.Struct, frozen=True):
    """The target has let us in."""

    greeting: Greeting
    encryption: Encryption | None


class TargetTerms(msgspec.Struct, frozen=True):
    """On what terms one target is spoken to.

    `tls` is None for plain; `local`: nobody else can read what is sent (loopback, Unix socket); `pass_error_text`:
    clients may be told the target's own words, if it is known to be the target that says them.
    """

    version: int
    tls: TlsPlan | None
    local: bool
    pass_error_text: bool
    limits: TargetLimits


def target_login(framer: _wire.Framer, granted: Granted, terms: TargetTerms) -> Login[Welcome]:
    """Goes over to TLS and logs in with the mapping's parameters and the credential that was granted.

    Raises TargetFault.
    """
    encryption = yield from start_tls(framer, terms.tls)
    return (yield from log_in(framer, granted, terms, encryption))


def log_in(framer: _wire.Framer, granted: Granted, terms: TargetTerms, encryption: Encryption | None) -> Login[Welcome]:
    """Logs in where TLS is spoken already, or will not be. Raises TargetFault."""
    try:
        exchange = _Exchange(framer, granted, terms, encryption)
        yield messages.startup_message(terms.version, granted.mapping.parameters)
        yield from exchange.authenticate()
        return Welcome((yield from exchange.greeting()), encryption)
    except (FrameError, scram.ScramError) as error:
        raise TargetFault(
            PROTOCOL_VIOLATION, "the target server broke the protocol", f"target broke the protocol: {error}"
        ) from error


class _Exchange:
    """One login's way through the messages. States, in order: asked, answered, let in, ready."""

    __slots__ = ("_credential", "_encryption", "_framer", "_limits", "_terms", "_user")

    def __init__(
        self, framer: _wire.Framer, granted: Granted, terms: TargetTerms, encryption: Encryption | None
    ) -> None:
        self._framer = framer
        self._credential = granted.credential
        self._user = granted.mapping.user
        self._terms = terms
        self._limits = terms.limits
        self._encryption = encryption

    def authenticate(self) -> Login[None]:
        """At most one request, then AuthenticationOk."""
        limits = {
            messages.AUTHENTICATION: self._limits.auth_request,
            messages.ERROR_RESPONSE: self._limits.error,
        }
        self._framer.allow(limits | {messages.NEGOTIATE_PROTOCOL_VERSION: self._limits.message})
        first = yield from next_message(self._framer)
        self._framer.allow(limits)
        if first[0] == messages.NEGOTIATE_PROTOCOL_VERSION:
            # The target speaks an older minor version, or does not know a `_pq_.` option of the mapping.
            first = yield from next_message(self._framer)
        self._check_tls_is_wanted(first)
        kind, data = self._parse_request(first)
        if kind == messages.AUTH_OK:
            return
        if kind == messages.AUTH_SASL:
            yield from self._scram(data)
        elif kind == messages.AUTH_MD5_PASSWORD:
            if len(data) != 4:
                raise FrameError("MD5 request without 4 bytes of salt")
            yield messages.password_message(md5_answer(self._stored_md5(), data))
        elif kind == messages.AUTH_CLEARTEXT_PASSWORD:
            yield messages.password_message(self._cleartext())
        else:
            raise _cannot(f"target asks for {messages.AUTH_METHOD_NAMES.get(kind, kind)}, which the gateway cannot do")
        kind, _ = yield from self._request()
        if kind != messages.AUTH_OK:
            raise FrameError(f"authentication request {kind} after the one exchange there is")

    def _check_tls_is_wanted(self, first: tuple[int, bytes]) -> None:
        """A server whose pg_hba.conf lets this role in without TLS alone says so before it asks for anything."""
        if self._encryption is None or self._terms.tls is None or self._terms.tls.required:
            return
        kind, body = first
        if kind == messages.ERROR_RESPONSE and messages.ServerError.decode(body).sqlstate == INVALID_AUTHORIZATION:
            raise TlsRefused("target does not let this role in over TLS")

    def _request(self) -> Login[tuple[int, bytes]]:
        return self._parse_request((yield from next_message(self._framer)))

    def _parse_request(self, message: tuple[int, bytes]) -> tuple[int, bytes]:
        """The method and data of an Authentication message. An error of the target is raised."""
        kind, body = message
        if kind == messages.ERROR_RESPONSE:
            raise self._refused(body)
        return messages.parse_authentication(body)

    def greeting(self) -> Login[Greeting]:
        """All between AuthenticationOk and the first ReadyForQuery."""
        self._framer.allow(
            {
                messages.ERROR_RESPONSE: self._limits.error,
                messages.NOTICE_RESPONSE: self._limits.error,
                messages.PARAMETER_STATUS: self._limits.message,
                messages.BACKEND_KEY_DATA: self._limits.message,
                messages.READY_FOR_QUERY: 5,
            }
        )
        parts: list[bytes] = []
        before_key = key = b""
        collected = 0
        while True:
            # What only passes is not looked at message by message.
            parts.append(self._framer.run(PASSED_ON))
            collected += len(parts[-1])
            if collected > MAX_GREETING_BYTES:
                raise FrameError(f"over {MAX_GREETING_BYTES} bytes before ReadyForQuery")
            message = self._framer.message()
            if message is None:
                yield MORE
                continue
            kind, body = message
            if kind == messages.ERROR_RESPONSE:
                raise self._refused(body)
            if kind == messages.READY_FOR_QUERY:
                if not body:
                    raise FrameError("ReadyForQuery without a status")
                parts.append(_wire.message(kind, body))
                return Greeting(before_key, key, b"".join(parts))
            if key or not 8 <= len(body) <= MAX_KEY_BYTES:
                raise FrameError("a second BackendKeyData, or one of a wrong length")
            before_key, key = b"".join(parts), body
            parts.clear()

    def _scram(self, offered: bytes) -> Login[None]:
        exchange, mechanism = self._scram_client(offered.split(b"\0"))
        known = self._credential if isinstance(self._credential, ProvedKeys) else self._password("SCRAM")
        yield messages.sasl_initial_response(mechanism, exchange.first())
        challenge = exchange.challenge(
            (yield from self._sasl(messages.AUTH_SASL_CONTINUE)), self._limits.scram_iterations
        )
        keys = yield from self._keys(known, challenge)
        yield messages.sasl_response(exchange.final(challenge, keys))
        exchange.verify((yield from self._sasl(messages.AUTH_SASL_FINAL)))

    def _scram_client(self, offered: list[bytes]) -> tuple[scram.ScramClient, bytes]:
        """Our side of the exchange, and the mechanism: bound to the channel where both sides can."""
        binding = b"" if self._encryption is None else self._encryption.binding
        plus = scram.MECHANISM_PLUS in offered
        if plus and self._encryption is None:
            raise FrameError("SCRAM-SHA-256-PLUS offered without TLS")
        if plus and binding:
            return scram.ScramClient(scram.fresh_nonce(), scram.BINDS, binding), scram.MECHANISM_PLUS
        if scram.MECHANISM not in offered:
            raise _cannot("target offers no SASL mechanism that the gateway knows")
        header = scram.SERVER_CANNOT_BIND if binding else scram.CANNOT_BIND
        return scram.ScramClient(scram.fresh_nonce(), header), scram.MECHANISM

    def _keys(self, known: Secret | ProvedKeys, challenge: scram.Challenge) -> Login[scram.Keys]:
        """What proves us: derived from a password, or what the client has shown."""
        if isinstance(known, Secret):
            salted = yield DeriveKey(known, challenge.salt, challenge.iterations)
            return scram.Keys.of(salted)
        if (challenge.salt, challenge.iterations) != (known.salt, known.iterations):
            raise _cannot("target does not store the verifier that the client was held to")
        return scram.Keys(known.client_key.reveal(), known.server_key.reveal())

    def _sasl(self, expected: int) -> Login[bytes]:
        kind, data = yield from self._request()
        if kind != expected:
            raise FrameError(f"authentication request {kind} in the middle of a SASL exchange")
        return data

    def _password(self, what_for: str) -> Secret:
        if isinstance(self._credential, Password):
            return self._credential.secret
        if self._credential is None:
            raise _cannot(f"target asks for {what_for}, and the authenticator gave no credential")
        held = "an md5 credential" if isinstance(self._credential, StoredMd5) else "what the client proved"
        raise _cannot(f"target asks for {what_for}, which {held} cannot answer")

    def _cleartext(self) -> bytes:
        if not self._terms.local:
            if self._encryption is None or self._terms.tls is None:
                raise _cannot("target asks for the password in clear over a network without TLS")
            if not self._terms.tls.required:
                # Whoever stands in between ends TLS that is merely preferred, and has the password.
                raise _cannot("target asks for the password in clear over TLS that is not required")
        return self._password("a cleartext password").reveal()

    def _stored_md5(self) -> bytes:
        if isinstance(self._credential, StoredMd5):
            return self._credential.secret.reveal()
        return md5_password(self._password("MD5").reveal(), self._user)

    def _refused(self, body: bytes) -> TargetFault:
        """What an ErrorResponse of the target means for the client."""
        error = messages.ServerError.decode(body)
        detail = f"target refused: {error.sqlstate or 'no SQLSTATE'}: {error.text.decode(errors='backslashreplace')}"
        if error.sqlstate.startswith("28"):
            return _cannot(detail)
        if not error.sqlstate:
            return TargetFault(CONNECTION_FAILURE, "the target server refused the connection", detail)
        told = NEUTRAL_TEXTS.get(error.sqlstate, "the target server refused the connection")
        known = self._terms.local or (self._terms.tls is not None and self._terms.tls.verified)
        text = error.text if self._terms.pass_error_text and known else b""
        return TargetFault(error.sqlstate, text or told, detail)


def _cannot(detail: str) -> TargetFault:
    """08004: the gateway's own login failed, which is none of the client's business."""
    return TargetFault(TARGET_REJECTED, "the target server refused the gateway", detail)
