"""The login of a client, the gateway being the server (PostgreSQL manual, "Message Flow", Start-up)."""

import re
from typing import Final

import msgspec

from pgauthproxy import _wire
from pgauthproxy.errors import INVALID_AUTHORIZATION, PROTOCOL_VIOLATION, ClientFault, FrameError, wrong_password
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.startup import CARRIAGE_RETURN, LINE_FEED
from pgauthproxy.proto.steps import Login, next_message
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Attached

NO_SALT: Final = bytes(4)
MD5_ANSWER: Final = re.compile(rb"md5[0-9a-f]{32}")


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
