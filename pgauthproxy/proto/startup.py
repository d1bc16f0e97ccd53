"""The startup phase, seen from the server (PostgreSQL manual, "Message Flow", Start-up).

The packet has a parser of its own: it has no type byte, it comes first, and all that it says is a claim of a stranger.
"""

from typing import Final

import msgspec

from pgauthproxy import _wire
from pgauthproxy.errors import (
    FEATURE_NOT_SUPPORTED,
    INVALID_AUTHORIZATION,
    PROTOCOL_VIOLATION,
    ClientFault,
    FrameError,
)
from pgauthproxy.proto import messages
from pgauthproxy.proto.steps import MORE, Login, StartTls, TlsSide
from pgauthproxy.stages import Encryption, Parameters, parameter

RESERVED_PREFIXES: Final = (b"_SOURCE_", b"_META_")
PROTOCOL_OPTION_PREFIX: Final = b"_pq_."
TLS_HANDSHAKE: Final = 0x16
LINE_FEED: Final = 0x0A
CARRIAGE_RETURN: Final = 0x0D
EQUALS_SIGN: Final = 0x3D
APPLICATION_PROTOCOL: Final = "postgresql"


class StartupMessage(msgspec.Struct, frozen=True):
    """What a client wants. Options of the protocol itself (`_pq_.`) are answered here and are no parameters.

    `minor` is the minor version of protocol 3 that is spoken from here on.
    """

    parameters: Parameters
    minor: int
    encryption: Encryption | None


class CancelRequest(msgspec.Struct, frozen=True):
    """The key of the session to cancel: process ID and secret, as sent."""

    key: bytes


def receive_startup(
    framer: _wire.Framer, max_packet: int, tls: TlsSide | None, *, tls_required: bool
) -> Login[StartupMessage | CancelRequest]:
    """Answers the encryption requests (each at most once) until the client says what it wants.

    `max_packet` bounds the length field, in bytes. `tls` is None where there is none. A cancel request proves itself
    by its key and may come in plain even where TLS is required, as PostgreSQL has it.
    """
    encryption = yield from _direct_tls(framer, tls)
    requests_left = {messages.SSL_REQUEST: "SSL request", messages.GSSENC_REQUEST: "GSSAPI encryption request"}
    if encryption is not None:
        requests_left.clear()
    while True:
        code, body = yield from _next_packet(framer, max_packet)
        if code in requests_left:
            request = requests_left.pop(code)
            if framer.pending:
                raise ClientFault(PROTOCOL_VIOLATION, f"received unencrypted data after {request}")
            if code == messages.SSL_REQUEST and tls is not None:
                yield messages.TLS_ACCEPTED
                encryption = yield StartTls(tls)
                requests_left.clear()
            else:
                yield messages.REQUEST_REFUSED
        elif code == messages.CANCEL_REQUEST:
            return CancelRequest(body)
        elif code >> 16 != messages.PROTOCOL_3_0 >> 16:
            raise ClientFault(
                FEATURE_NOT_SUPPORTED,
                f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: server supports 3.0 to 3.2",
            )
        elif tls_required and encryption is None:
            raise ClientFault(INVALID_AUTHORIZATION, "connection requires TLS (sslmode=require or better)")
        else:
            sent = parse_parameters(body)
            refused = [name for name, _ in sent if name.startswith(PROTOCOL_OPTION_PREFIX)]
            version = min(code, messages.PROTOCOL_3_2)
            if version != code or refused:
                yield messages.negotiate_protocol_version(version, refused)
            if refused:
                sent = tuple(pair for pair in sent if pair[0] not in refused)
            return StartupMessage(sent, version & 0xFFFF, encryption)


def _direct_tls(framer: _wire.Framer, tls: TlsSide | None) -> Login[Encryption | None]:
    """TLS from the first byte on (`sslnegotiation=direct`): told apart by that byte, which begins no startup packet."""
    while not framer.pending:
        yield MORE
    if tls is None or framer.first_byte != TLS_HANDSHAKE:
        return None
    encryption: Encryption = yield StartTls(tls)
    if encryption.application_protocol != APPLICATION_PROTOCOL:
        # Whoever speaks another protocol to this port has been led here by somebody (ALPACA).
        raise ClientFault(PROTOCOL_VIOLATION, "direct TLS without the application protocol postgresql")
    return encryption


def _next_packet(framer: _wire.Framer, max_packet: int) -> Login[tuple[int, bytes]]:
    try:
        while (packet := framer.startup_packet(max_packet)) is None:
            yield MORE
    except FrameError as error:
        # PostgreSQL says nothing to what is no client of its own: HTTP, TLS, a port scan.
        raise ClientFault(PROTOCOL_VIOLATION, None, str(error)) from error
    return int.from_bytes(packet[:4]), packet[4:]


def parse_parameters(body: bytes) -> Parameters:
    """The pairs of a startup packet's body.

    Raises ClientFault on a broken layout, on a missing user, and on everything that could forge a line of the
    authenticator's input: line breaks, `=` in a name, reserved names, names that stand twice.
    """
    if body == b"\0":
        raise ClientFault(INVALID_AUTHORIZATION, "no PostgreSQL user name specified in startup packet")
    if not body.endswith(b"\0\0"):
        raise _bad_layout("expected terminator as last byte")
    # name NUL value NUL … NUL: without its two last bytes, an even number of strings.
    strings = body[:-2].split(b"\0")
    if len(strings) % 2:
        # An empty last value leaves one NUL less to split at.
        raise _bad_layout("a name without a value")
    names, values = strings[::2], strings[1::2]
    # Bytes are looked for by their numbers: looking for a bytes object is a failed conversion first.
    if LINE_FEED in body or CARRIAGE_RETURN in body:
        raise _misleading("invalid character in startup parameter")
    for name in names:
        if not name:
            raise _bad_layout("expected terminator as last byte")
        if EQUALS_SIGN in name:
            raise _misleading("invalid character in startup parameter")
        if name.upper().startswith(RESERVED_PREFIXES):
            raise _misleading("reserved name of startup parameter")
    if len(set(names)) != len(names):
        raise _misleading("startup parameter given twice")
    parameters = tuple(zip(names, values, strict=True))
    if not parameter(parameters, b"user"):
        raise ClientFault(INVALID_AUTHORIZATION, "no PostgreSQL user name specified in startup packet")
    return parameters


def _misleading(what: str) -> ClientFault:
    return ClientFault(PROTOCOL_VIOLATION, what)


def _bad_layout(what: str) -> ClientFault:
    return ClientFault(PROTOCOL_VIOLATION, f"invalid startup packet layout: {what}")
