"""The lines of the authenticator contract, version 1 (docs/authenticators.md).

Lines end at LF and nowhere else, values are bytes, and what stands in a line cannot forge another: the startup parser
and the password parser have refused line breaks before anything gets here, and this module checks it once more.
"""

import functools
import re
from typing import Final

from pgauthproxy.auth.model import Question
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Address, Mapping, parameter

DEFAULT_PORT: Final = 5432
MD5_CREDENTIAL: Final = re.compile(rb"md5[0-9a-f]{32}")
HOST_NAME: Final = re.compile(r"[A-Za-z0-9_.\-:%]+")
PORT: Final = re.compile(r"[0-9]{1,5}")
SOURCE_PREFIX: Final = b"_SOURCE_"
META_PREFIX: Final = b"_META_"
WITHOUT_TLS: Final = (b"", b"disable", b"prefer", b"allow")


class NonsenseError(ValueError):
    """An answer that means nothing. The text names the field, never a value."""


def encode_question(question: Question) -> bytes:
    """What the authenticator reads on its standard input."""
    started = question.started
    pairs = [
        *started.parameters,
        (b"_SOURCE_ADDR", started.accepted.address.encode()),
        (b"_SOURCE_METHOD", question.method.encode()),
        (b"_SOURCE_SESSION", started.accepted.session.encode()),
        (b"_SOURCE_CRED", question.credential.reveal()),
        (b"_SOURCE_SALT", question.salt.hex().encode()),
    ]
    lines = [name + b"=" + value for name, value in pairs]
    if any(b"\n" in line for line in lines):
        raise ValueError("a line break in a field of the authenticator's input")
    return b"\n".join(lines) + b"\n"


def split_lines(output: bytes, max_lines: int) -> dict[bytes, bytes]:
    """The pairs of an answer; the last of a name wins. Raises NonsenseError."""
    lines = output.split(b"\n")
    if len(lines) - (lines[-1] == b"") > max_lines:
        raise NonsenseError(f"over {max_lines} lines of output")
    if b"\0" in output:
        raise NonsenseError("a NUL in the output")
    pairs: dict[bytes, bytes] = {}
    for line in lines:
        name, separator, value = line.removesuffix(b"\r").partition(b"=")
        if separator:
            pairs.pop(name, None)
            pairs[name] = value
    return pairs


def decode_error(output: bytes, max_lines: int) -> bytes | None:
    """What a refusing authenticator wants the client to be told, if anything."""
    try:
        return split_lines(output, max_lines).get(b"_META_ERROR") or None
    except NonsenseError:
        return None


def decode_mapping(output: bytes, max_lines: int) -> Mapping:
    """What an agreeing authenticator answers. Raises NonsenseError if no session can be made of it."""
    pairs = split_lines(output, max_lines)
    parameters = tuple(
        (name, value) for name, value in pairs.items() if not name.startswith((SOURCE_PREFIX, META_PREFIX))
    )
    if any(not name for name, _ in parameters):
        raise NonsenseError("a line without a name before its =")
    if not parameter(parameters, b"user"):
        raise NonsenseError("no user for the target")
    if pairs.get(b"_META_TARGET_TLS", b"") not in WITHOUT_TLS or pairs.get(b"_META_TARGET_CA"):
        raise NonsenseError("_META_TARGET_TLS or _META_TARGET_CA asks for TLS, which this version cannot do")
    credential, is_md5 = _credential(pairs)
    return Mapping(
        hosts=parse_hosts(pairs.get(b"_META_TARGET_HOST", b"")),
        parameters=parameters,
        credential=credential,
        credential_is_md5=is_md5,
        session_seconds=_seconds(pairs, b"_META_SESSION_SECONDS"),
    )


def _credential(pairs: dict[bytes, bytes]) -> tuple[Secret | None, bool]:
    if b"_META_TARGET_PASSWORD" in pairs:
        return Secret(pairs[b"_META_TARGET_PASSWORD"]), False
    value = pairs.get(b"_META_TARGET_CRED", b"")
    if not value:
        return None, False
    return Secret(value), MD5_CREDENTIAL.fullmatch(value) is not None


def _seconds(pairs: dict[bytes, bytes], name: bytes) -> float | None:
    """A positive, finite number of seconds; None if the field is missing or empty."""
    text = pairs.get(name, b"")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise NonsenseError(f"{name.decode()} is no number of seconds")
    return seconds


@functools.lru_cache(1024)
def parse_hosts(text: bytes) -> tuple[Address, ...]:
    """`host:port`, `host`, `[v6]:port`, `/folder:port`, or several of them with commas. Raises NonsenseError.

    Remembers the latest, so that sessions to the same target share its address.
    """
    if not text:
        raise NonsenseError("no _META_TARGET_HOST")
    try:
        return tuple(_parse_host(part.strip()) for part in text.decode().split(","))
    except UnicodeDecodeError:
        raise NonsenseError("_META_TARGET_HOST is not UTF-8") from None


def _parse_host(text: str) -> Address:
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise NonsenseError("_META_TARGET_HOST with an unclosed bracket")
        port = rest[1:]
    elif text.count(":") == 1 or text.startswith("/"):
        host, _, port = text.rpartition(":") if ":" in text else (text, "", "")
    if not (host.startswith("/") or HOST_NAME.fullmatch(host)):
        raise NonsenseError("_META_TARGET_HOST names no host")
    if port and not (PORT.fullmatch(port) and 0 < int(port) < 65536):
        raise NonsenseError("_META_TARGET_HOST with a port that is no port")
    return Address(host, int(port) if port else DEFAULT_PORT)
