"""The messages of login and error, encode and decode beside each other (PostgreSQL manual, "Message Formats").

Nothing here reads a message of a running session. Errors of decoding name the field, never its value.
"""

import re
from dataclasses import dataclass
from typing import Final

from pgauthproxy import _wire
from pgauthproxy.errors import FrameError
from pgauthproxy.stages import Parameters

PROTOCOL_3_0: Final = 3 << 16
PROTOCOL_3_2: Final = 3 << 16 | 2
CANCEL_REQUEST: Final = 80877102
SSL_REQUEST: Final = 80877103
GSSENC_REQUEST: Final = 80877104
TLS_ACCEPTED: Final = b"S"
REQUEST_REFUSED: Final = b"N"
SQLSTATE: Final = re.compile(rb"[0-9A-Z]{5}")
# libpq shows nothing of an error above 30,000 bytes that comes before the session.
MAX_ERROR_TEXT: Final = 16_384

AUTHENTICATION: Final = ord("R")
BACKEND_KEY_DATA: Final = ord("K")
ERROR_RESPONSE: Final = ord("E")
NEGOTIATE_PROTOCOL_VERSION: Final = ord("v")
NOTICE_RESPONSE: Final = ord("N")
PARAMETER_STATUS: Final = ord("S")
PASSWORD_MESSAGE: Final = ord("p")  # also SASLInitialResponse and SASLResponse
READY_FOR_QUERY: Final = ord("Z")
TERMINATE: Final = ord("X")

AUTH_OK: Final = 0
AUTH_CLEARTEXT_PASSWORD: Final = 3
AUTH_MD5_PASSWORD: Final = 5
AUTH_SASL: Final = 10
AUTH_SASL_CONTINUE: Final = 11
AUTH_SASL_FINAL: Final = 12
AUTH_METHOD_NAMES: Final = {
    2: "Kerberos V5",
    3: "cleartext password",
    5: "MD5 password",
    6: "SCM credentials",
    7: "GSSAPI",
    8: "GSSAPI continuation",
    9: "SSPI",
    10: "SASL",
    11: "SASL continuation",
    12: "SASL final",
}


def authentication(kind: int, data: bytes = b"") -> bytes:
    """An Authentication message of one kind (AUTH_…)."""
    return _wire.message(AUTHENTICATION, kind.to_bytes(4) + data)


def parse_authentication(body: bytes) -> tuple[int, bytes]:
    """Splits the body of an Authentication message into its kind and data. Raises FrameError if it is cut short."""
    if len(body) < 4:
        raise FrameError("authentication request without a method")
    return int.from_bytes(body[:4]), body[4:]


def fatal(sqlstate: str, text: bytes) -> bytes:
    """An ErrorResponse of severity FATAL, as every error of a gateway is. A text that is too long is cut."""
    shown = text[:MAX_ERROR_TEXT].replace(b"\0", b"?")
    fields = b"SFATAL\0VFATAL\0C" + sqlstate.encode() + b"\0M" + shown + b"\0\0"
    return _wire.message(ERROR_RESPONSE, fields)


@dataclass(frozen=True, slots=True)
class ServerError:
    """What a target's ErrorResponse said; fields that are missing or broken are empty."""

    sqlstate: str
    text: bytes

    @classmethod
    def decode(cls, body: bytes) -> "ServerError":
        """Reads the fields C and M of any body, however broken."""
        fields = {field[:1]: field[1:] for field in body.split(b"\0") if field}
        sqlstate = fields.get(b"C", b"")
        return cls(sqlstate.decode() if SQLSTATE.fullmatch(sqlstate) else "", fields.get(b"M", b""))


def parameter_status(greeting: bytes, name: bytes) -> bytes:
    """What a greeting (whole messages) says of one parameter of the server; empty if nothing."""
    framer = _wire.Framer(dict.fromkeys(range(1, 256), len(greeting) + 4))
    framer.feed(greeting)
    while (message := framer.message()) is not None:
        kind, body = message
        if kind == PARAMETER_STATUS and body.startswith(name + b"\0"):
            return body[len(name) + 1 :].rstrip(b"\0")
    return b""


def terminate() -> bytes:
    """A Terminate."""
    return _wire.message(TERMINATE, b"")


def negotiate_protocol_version(version: int, refused_options: list[bytes]) -> bytes:
    """This version is spoken, and none of these `_pq_.` options is known."""
    body = version.to_bytes(4) + len(refused_options).to_bytes(4)
    return _wire.message(NEGOTIATE_PROTOCOL_VERSION, body + b"".join(name + b"\0" for name in refused_options))


def startup_message(version: int, parameters: Parameters) -> bytes:
    """A StartupMessage of this protocol version."""
    pairs = b"".join(name + b"\0" + value + b"\0" for name, value in parameters)
    return _wire.startup_packet(version, pairs + b"\0")


def ssl_request() -> bytes:
    """An SSLRequest."""
    return _wire.startup_packet(SSL_REQUEST, b"")


def cancel_request(key: bytes) -> bytes:
    """A CancelRequest for a key as BackendKeyData gave it: process ID and secret."""
    return _wire.startup_packet(CANCEL_REQUEST, key)


def backend_key_data(key: bytes) -> bytes:
    """A BackendKeyData: 4 bytes of process ID, then the secret."""
    return _wire.message(BACKEND_KEY_DATA, key)


def password_message(password: bytes) -> bytes:
    """A PasswordMessage: a password, or the answer to an MD5 request."""
    return _wire.message(PASSWORD_MESSAGE, password + b"\0")


def parse_password_message(body: bytes) -> bytes:
    """The string of a PasswordMessage. Raises FrameError unless its one NUL is its last byte."""
    if not body.endswith(b"\0") or body.count(b"\0") != 1:
        raise FrameError("password message without exactly one NUL, at its end")
    return body[:-1]


def sasl_initial_response(mechanism: bytes, data: bytes) -> bytes:
    """A SASLInitialResponse with data."""
    return _wire.message(PASSWORD_MESSAGE, mechanism + b"\0" + len(data).to_bytes(4) + data)


def parse_sasl_initial_response(body: bytes) -> tuple[bytes, bytes | None]:
    """The mechanism and the data of a SASLInitialResponse, None if it has none. Raises FrameError."""
    mechanism, terminator, rest = body.partition(b"\0")
    if not terminator or len(rest) < 4:
        raise FrameError("SASL initial response that is cut short")
    length = int.from_bytes(rest[:4], signed=True)
    if length == -1 and len(rest) == 4:
        return mechanism, None
    if length < 0 or length != len(rest) - 4:
        raise FrameError("SASL initial response with a length that is not its own")
    return mechanism, rest[4:]


def sasl_response(data: bytes) -> bytes:
    """A SASLResponse."""
    return _wire.message(PASSWORD_MESSAGE, data)
