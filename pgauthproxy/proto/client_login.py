"""The login of a client, the gateway being the server (PostgreSQL manual, "Message Flow", Start-up)."""

import re
from typing import Final

import msgspec

from pgauthproxy import _wire
from pgauthproxy.errors import PROTOCOL_VIOLATION, ClientFault, FrameError, wrong_password
from pgauthproxy.proto import messages
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
    if b"\n" in password or b"\r" in password:
        raise wrong_password(user, "line break in the password")
    return Proof("cleartext", Secret(password), NO_SALT)


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
