"""The login at a target, the gateway being the client (PostgreSQL manual, "Message Flow", Start-up).

The target is not trusted either: one authentication exchange, nothing session-like before AuthenticationOk, every
length bounded, no password in clear where others can read it, and a server that speaks SCRAM must prove itself.
"""

import base64
import secrets
from dataclasses import dataclass
from typing import Final

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.errors import (
    CONNECTION_FAILURE,
    PROTOCOL_VIOLATION,
    TARGET_REJECTED,
    FrameError,
    TargetFault,
)
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.steps import MORE, DeriveKey, Login, next_message
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Greeting, Mapping

MAX_GREETING_BYTES: Final = 1 << 20
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


def target_login(
    framer: _wire.Framer, mapping: Mapping, limits: TargetLimits, *, private_channel: bool, pass_error_text: bool
) -> Login[Greeting]:
    """Logs in with the mapping's parameters and credential.

    `private_channel`: nobody else can read what is sent (loopback, Unix socket); `pass_error_text`: clients may be
    told the target's own words. Raises TargetFault.
    """
    exchange = _Exchange(framer, mapping, limits, private_channel, pass_error_text)
    try:
        yield messages.startup_message(mapping.parameters)
        yield from exchange.authenticate()
        return (yield from exchange.greeting())
    except (FrameError, scram.ScramError) as error:
        raise TargetFault(
            PROTOCOL_VIOLATION, "the target server broke the protocol", f"target broke the protocol: {error}"
        ) from error


class _Exchange:
    """One login's way through the messages. States, in order: asked, answered, let in, ready."""

    __slots__ = ("_credential", "_framer", "_limits", "_mapping", "_pass_text", "_private")

    def __init__(
        self, framer: _wire.Framer, mapping: Mapping, limits: TargetLimits, private: bool, pass_text: bool
    ) -> None:
        self._framer = framer
        self._mapping = mapping
        self._limits = limits
        self._private = private
        self._pass_text = pass_text

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
            # The target does not know a `_pq_.` option of the mapping; the protocol stays 3.0.
            first = yield from next_message(self._framer)
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
            if key or len(body) < 8:
                raise FrameError("a second or cut BackendKeyData")
            before_key, key = b"".join(parts), body
            parts.clear()

    def _scram(self, mechanisms: bytes) -> Login[None]:
        if scram.MECHANISM not in mechanisms.split(b"\0"):
            raise _cannot("target offers no SASL mechanism that the gateway knows")
        password = self._password("SCRAM")
        exchange = scram.ScramClient(base64.b64encode(secrets.token_bytes(scram.NONCE_BYTES)))
        yield messages.sasl_initial_response(scram.MECHANISM, exchange.first())
        challenge = exchange.challenge(
            (yield from self._sasl(messages.AUTH_SASL_CONTINUE)), self._limits.scram_iterations
        )
        salted = yield DeriveKey(password, challenge.salt, challenge.iterations)
        assert salted is not None  # noqa: S101 (the driver's part of the contract)
        yield messages.sasl_response(exchange.final(challenge, salted))
        exchange.verify((yield from self._sasl(messages.AUTH_SASL_FINAL)))

    def _sasl(self, expected: int) -> Login[bytes]:
        kind, data = yield from self._request()
        if kind != expected:
            raise FrameError(f"authentication request {kind} in the middle of a SASL exchange")
        return data

    def _password(self, what_for: str) -> Secret:
        if self._mapping.credential is None:
            raise _cannot(f"target asks for {what_for}, and the authenticator gave no credential")
        if self._mapping.credential_is_md5:
            raise _cannot(f"target asks for {what_for}, which an md5 credential cannot answer")
        return self._mapping.credential

    def _cleartext(self) -> bytes:
        if not self._private:
            raise _cannot("target asks for the password in clear over a network without TLS")
        return self._password("a cleartext password").reveal()

    def _stored_md5(self) -> bytes:
        if self._mapping.credential is not None and self._mapping.credential_is_md5:
            return self._mapping.credential.reveal()
        return md5_password(self._password("MD5").reveal(), self._mapping.user)

    def _refused(self, body: bytes) -> TargetFault:
        """What an ErrorResponse of the target means for the client."""
        error = messages.ServerError.decode(body)
        detail = f"target refused: {error.sqlstate or 'no SQLSTATE'}: {error.text.decode(errors='backslashreplace')}"
        if error.sqlstate.startswith("28"):
            return _cannot(detail)
        if not error.sqlstate:
            return TargetFault(CONNECTION_FAILURE, "the target server refused the connection", detail)
        told = NEUTRAL_TEXTS.get(error.sqlstate, "the target server refused the connection")
        text = error.text if self._pass_text and self._private else b""
        return TargetFault(error.sqlstate, text or told, detail)


def _cannot(detail: str) -> TargetFault:
    """08004: the gateway's own login failed, which is none of the client's business."""
    return TargetFault(TARGET_REJECTED, "the target server refused the gateway", detail)
