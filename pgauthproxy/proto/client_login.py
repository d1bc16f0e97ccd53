"""The login of a client, the gateway being the server (PostgreSQL manual, "Message Flow", Start-up)."""

import json
import re
from typing import Final

import msgspec

from pgauthproxy import _wire
from pgauthproxy.errors import (
    FEATURE_NOT_SUPPORTED,
    INVALID_AUTHORIZATION,
    PROTOCOL_VIOLATION,
    ClientFault,
    FrameError,
    refused_token,
    wrong_password,
)
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.startup import CARRIAGE_RETURN, LINE_FEED
from pgauthproxy.proto.steps import Login, next_message
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Attached

NO_SALT: Final = bytes(4)
MD5_ANSWER: Final = re.compile(rb"md5[0-9a-f]{32}")
OAUTHBEARER: Final = b"OAUTHBEARER"
# RFC 7628, section 3.1, and RFC 6750, section 2.1.
SEPARATOR: Final = b"\x01"
PAIR_NAME: Final = re.compile(rb"[A-Za-z]+")
PAIR_VALUE: Final = re.compile(rb"[\x21-\x7e \t\r\n]*")
BEARER: Final = re.compile(rb"bearer +([A-Za-z0-9\-._~+/]+=*)", re.IGNORECASE)


class Proof(msgspec.Struct, frozen=True):
    """What a client answered: a password as typed, or (`salt` not zero) an MD5 answer to that salt."""

    method: str
    answer: Secret
    salt: bytes


def receive_md5(framer: _wire.Framer, user: bytes, salt: bytes, max_message: int) -> Login[Proof]:
    """Asks for the MD5 of the password, salted with these 4 bytes."""
    yield messages.authentication(messages.AUTH_MD5_PASSWORD, salt)
    answer = yield from _password(framer, max_message)
    if not MD5_ANSWER.fullmatch(answer):
        raise wrong_password(user, "the answer to an MD5 request is not an MD5")
    return Proof("md5", Secret(answer), salt)


def receive_cleartext(framer: _wire.Framer, user: bytes, max_message: int) -> Login[Proof]:
    """Asks for the password as it is."""
    yield messages.authentication(messages.AUTH_CLEARTEXT_PASSWORD)
    password = yield from _password(framer, max_message)
    if not password:
        raise wrong_password(user, "empty password")
    if LINE_FEED in password or CARRIAGE_RETURN in password:
        raise wrong_password(user, "line break in the password")
    return Proof("cleartext", Secret(password), NO_SALT)


def receive_scram(
    framer: _wire.Framer, user: bytes, verifier: scram.Verifier, binding: bytes, max_message: int
) -> Login[scram.Keys]:
    """Lets the client prove that it knows the verifier's password; returns its keys.

    `binding` is the connection's, empty if it has none.
    """
    exchange = scram.ScramServer(verifier, scram.fresh_nonce(), binding)
    try:
        offered = exchange.mechanisms()
        yield messages.authentication(messages.AUTH_SASL, b"".join(name + b"\0" for name in offered) + b"\0")
        framer.allow({messages.PASSWORD_MESSAGE: max_message})
        _, body = yield from next_message(framer)
        mechanism, data = messages.parse_sasl_initial_response(body)
        if mechanism not in offered:
            raise FrameError("a SASL mechanism that was not offered")
        if data is None:
            yield messages.authentication(messages.AUTH_SASL_CONTINUE)
            _, data = yield from next_message(framer)
        yield messages.authentication(messages.AUTH_SASL_CONTINUE, exchange.first(mechanism, data))
        _, data = yield from next_message(framer)
        server_final, keys = exchange.final(data)
    except scram.WrongProofError as error:
        raise wrong_password(user, str(error)) from None
    except scram.BindingError as error:
        raise ClientFault(INVALID_AUTHORIZATION, "SCRAM channel binding check failed", str(error)) from None
    except (FrameError, scram.ScramError) as error:
        raise ClientFault(PROTOCOL_VIOLATION, "malformed SCRAM message", f"malformed SCRAM message: {error}") from error
    yield messages.authentication(messages.AUTH_SASL_FINAL, server_final)
    return keys


def receive_oauthbearer(framer: _wire.Framer, user: bytes, token_error: bytes, max_message: int) -> Login[Secret]:
    """Asks for a bearer token (RFC 7628). A client that has none is told where tokens are given, and is refused."""
    try:
        yield messages.authentication(messages.AUTH_SASL, OAUTHBEARER + b"\0\0")
        framer.allow({messages.PASSWORD_MESSAGE: max_message})
        _, body = yield from next_message(framer)
        mechanism, data = messages.parse_sasl_initial_response(body)
        if mechanism != OAUTHBEARER:
            raise FrameError("a SASL mechanism that was not offered")
        if data is None:
            yield messages.authentication(messages.AUTH_SASL_CONTINUE)
            _, data = yield from next_message(framer)
        authorization = _authorization(data)
    except FrameError as error:
        raise _malformed_token(error) from error
    token = BEARER.fullmatch(authorization)
    if token is None:
        yield from refuse_oauthbearer(framer, token_error, max_message)
        raise refused_token(user, "no bearer token" if authorization else "the client asks where tokens are given")
    return Secret(token[1])


def refuse_oauthbearer(framer: _wire.Framer, token_error: bytes, max_message: int) -> Login[None]:
    """Says in RFC 7628's way that a token will not do: the client has to answer that before it is refused for good."""
    try:
        yield messages.authentication(messages.AUTH_SASL_CONTINUE, token_error)
        framer.allow({messages.PASSWORD_MESSAGE: max_message})
        _, data = yield from next_message(framer)
        if data != SEPARATOR:
            raise FrameError("more than a separator in answer to an error")
    except FrameError as error:
        raise _malformed_token(error) from error


def token_error(issuer: str, scope: str) -> bytes:
    """What a client without a good token is told: where the issuer says how tokens are given, and what to ask for."""
    well_known = issuer if "/.well-known/" in issuer else issuer.rstrip("/") + "/.well-known/openid-configuration"
    return json.dumps({"status": "invalid_token", "openid-configuration": well_known, "scope": scope}).encode()


def _authorization(data: bytes) -> bytes:
    """The value of `auth` in a client's message: `n,,`, then `key=value` pairs, each with a separator at both ends."""
    flag, comma, rest = data.partition(b",")
    identity, second_comma, pairs = rest.partition(b",")
    if flag not in (b"n", b"y") or not comma or not second_comma:
        raise FrameError("no header, or one that binds the channel")
    if identity.startswith(b"a="):
        what = "client uses authorization identity, but it is not supported"
        raise ClientFault(FEATURE_NOT_SUPPORTED, what)
    *fields, behind = pairs[1:-1].split(SEPARATOR)
    if identity or len(pairs) < 2 or not pairs.startswith(SEPARATOR) or not pairs.endswith(SEPARATOR) or behind:
        raise FrameError("a separator is missing, or something stands where none may")
    found: list[bytes] = []
    for field in fields:
        name, equals, value = field.partition(b"=")
        if not equals or not PAIR_NAME.fullmatch(name) or not PAIR_VALUE.fullmatch(value):
            raise FrameError("a key or value that is none")
        if name == b"auth":
            found.append(value)
    if len(found) != 1:
        raise FrameError("not exactly one auth value")
    return found[0]


def _malformed_token(error: FrameError) -> ClientFault:
    return ClientFault(PROTOCOL_VIOLATION, "malformed OAUTHBEARER message", f"malformed OAUTHBEARER message: {error}")


def _password(framer: _wire.Framer, max_message: int) -> Login[bytes]:
    try:
        framer.allow({messages.PASSWORD_MESSAGE: max_message})
        _, body = yield from next_message(framer)
        return messages.parse_password_message(body)
    except FrameError as error:
        raise ClientFault(
            PROTOCOL_VIOLATION, "expected a valid password message", f"instead of a password: {error}"
        ) from error


def welcome(attached: Attached, key: bytes) -> bytes:
    """What a client is sent once the target has let the gateway in: the target's greeting with a key of our own.

    A target that issues no key cannot cancel, and so its client gets none.
    """
    greeting = attached.greeting
    our_key = messages.backend_key_data(key) if greeting.key else b""
    return messages.authentication(messages.AUTH_OK) + greeting.before_key + our_key + greeting.after_key
