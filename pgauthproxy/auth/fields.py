"""The lines of the authenticator contract, version 1 (docs/authenticators.md).

Lines end at LF and nowhere else, values are bytes, and what stands in a line cannot forge another: the startup parser
and the password parser have refused line breaks before anything gets here, and this module checks it once more.
"""

import functools
import re
from collections.abc import Iterator
from typing import Final

from pgauthproxy.auth.model import Question
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Address, Encryption, FromClient, Leased, Mapping, Password, StoredMd5, parameter

DEFAULT_PORT: Final = 5432
MD5_CREDENTIAL: Final = re.compile(rb"md5[0-9a-f]{32}")
HOST_NAME: Final = re.compile(r"[A-Za-z0-9_.\-:%]+")
PORT: Final = re.compile(r"[0-9]{1,5}")
# As numbers: looking for a bytes object in another is a failed conversion first.
NUL: Final = 0x00
CARRIAGE_RETURN: Final = 0x0D
OWN_PREFIXES: Final = (b"_SOURCE_", b"_META_")
WHAT_THE_CLIENT_PROVED: Final = b"client"
VAULT: Final = b"vault:"
VAULT_PATH: Final = re.compile(rb"[A-Za-z0-9_\-]+(?:/[A-Za-z0-9_.\-]*[A-Za-z0-9_\-])+")
TARGET_TLS: Final = {
    b"_META_TARGET_TLS": "mode",
    b"_META_TARGET_CA": "ca",
    b"_META_TARGET_CERT": "cert",
    b"_META_TARGET_KEY": "key",
    b"_META_TARGET_TLS_NEGOTIATION": "negotiation",
    b"_META_TARGET_TLS_NAME": "name",
}


class NonsenseError(ValueError):
    """An answer that means nothing. The text names the field, never a value."""


def encode_question(question: Question) -> bytes:
    """What the authenticator reads on its standard input."""
    lines = [b"%s=%s\n" % pair for pair in question_pairs(question)]
    written = b"".join(lines)
    if written.count(b"\n") != len(lines):
        raise ValueError("a line break in a field of the authenticator's input")
    return written


def question_pairs(question: Question) -> list[tuple[bytes, bytes]]:
    """The fields of a question, in the order of their lines."""
    started = question.started
    pairs = [
        *started.parameters,
        (b"_SOURCE_ADDR", started.accepted.address.encode()),
        (b"_SOURCE_METHOD", question.method.encode()),
        (b"_SOURCE_SESSION", started.accepted.session.encode()),
    ]
    if started.encryption is not None:
        pairs += _encryption(started.encryption)
    if question.credential is not None:
        pairs += [(b"_SOURCE_CRED", question.credential.reveal()), (b"_SOURCE_SALT", question.salt.hex().encode())]
    return pairs


def _encryption(encryption: Encryption) -> Iterator[tuple[bytes, bytes]]:
    """What is known of the client by TLS; what is not known has no line."""
    yield b"_SOURCE_TLS", encryption.version.encode()
    if encryption.server_name:
        yield b"_SOURCE_TLS_SNI", encryption.server_name.encode()
    if (certificate := encryption.certificate) is not None:
        yield b"_SOURCE_TLS_SUBJECT", certificate.subject.encode()
        yield b"_SOURCE_TLS_ISSUER", certificate.issuer.encode()
        yield b"_SOURCE_TLS_SERIAL", certificate.serial.encode()
        yield b"_SOURCE_TLS_SAN", certificate.alternative_names.encode()
        yield b"_SOURCE_TLS_FINGERPRINT", certificate.fingerprint.encode()


def split_lines(output: bytes, max_lines: int) -> dict[bytes, bytes]:
    """The pairs of an answer; the last of a name wins. Raises NonsenseError."""
    lines = output.split(b"\n")
    if len(lines) - (lines[-1] == b"") > max_lines:
        raise NonsenseError(f"over {max_lines} lines of output")
    if NUL in output:
        raise NonsenseError("a NUL in the output")
    pairs: dict[bytes, bytes] = {}
    has_returns = CARRIAGE_RETURN in output
    for line in lines:
        name, separator, value = line.partition(b"=")
        if separator:
            pairs.pop(name, None)
            pairs[name] = value.removesuffix(b"\r") if has_returns else value
    return pairs


def decode_error(output: bytes, max_lines: int) -> bytes | None:
    """What a refusing authenticator wants the client to be told, if anything."""
    try:
        return split_lines(output, max_lines).get(b"_META_ERROR") or None
    except NonsenseError:
        return None


def decode_failure(output: bytes, max_lines: int) -> bytes | None:
    """What an authenticator that could not judge says of that, for the log; None if it says nothing of the kind."""
    try:
        return split_lines(output, max_lines).get(b"_META_FAILED")
    except NonsenseError:
        return None


def decode_mapping(output: bytes, max_lines: int) -> Mapping:
    """What an agreeing authenticator answers. Raises NonsenseError if no session can be made of it."""
    pairs = split_lines(output, max_lines)
    parameters = tuple([pair for pair in pairs.items() if not pair[0].startswith(OWN_PREFIXES)])
    if b"" in pairs:
        raise NonsenseError("a line without a name before its =")
    if not parameter(parameters, b"user"):
        raise NonsenseError("no user for the target")
    verifier = pairs.get(b"_META_SOURCE_VERIFIER", b"")
    return Mapping(
        hosts=parse_hosts(pairs.get(b"_META_TARGET_HOST", b"")),
        parameters=parameters,
        credential=_credential(pairs),
        verifier=Secret(verifier) if verifier else None,
        tls=_target_tls(pairs),
        session_seconds=_seconds(pairs, b"_META_SESSION_SECONDS"),
        idle_timeout=_seconds(pairs, b"_META_IDLE_TIMEOUT", or_zero=True),
        idle_in_transaction_timeout=_seconds(pairs, b"_META_IDLE_IN_TRANSACTION_TIMEOUT", or_zero=True),
        cache_seconds=_seconds(pairs, b"_META_CACHE_SECONDS", or_zero=True),
    )


def _credential(pairs: dict[bytes, bytes]) -> Password | StoredMd5 | FromClient | Leased | None:
    if b"_META_TARGET_PASSWORD" in pairs:
        return Password(Secret(pairs[b"_META_TARGET_PASSWORD"]))
    value = pairs.get(b"_META_TARGET_CRED", b"")
    if not value:
        return None
    if value == WHAT_THE_CLIENT_PROVED:
        return FromClient()
    if value.startswith(VAULT):
        return parse_leased(value)
    return StoredMd5(Secret(value)) if MD5_CREDENTIAL.fullmatch(value) else Password(Secret(value))


def parse_leased(text: bytes) -> Leased:
    """`vault:` and the path of a secret. Raises NonsenseError."""
    path = text.removeprefix(VAULT)
    if not VAULT_PATH.fullmatch(path):
        raise NonsenseError("vault: without the path of a secret, such as database/creds/ROLE")
    return Leased(path.decode())


def _target_tls(pairs: dict[bytes, bytes]) -> tuple[tuple[str, str], ...]:
    """The TLS settings that the answer gives, by the names of TargetTls's fields."""
    if TARGET_TLS.keys().isdisjoint(pairs):
        return ()
    try:
        return tuple((field, pairs[name].decode()) for name, field in TARGET_TLS.items() if pairs.get(name))
    except UnicodeDecodeError:
        raise NonsenseError("a _META_TARGET_ field for TLS that is not UTF-8") from None


def _seconds(pairs: dict[bytes, bytes], name: bytes, *, or_zero: bool = False) -> float | None:
    """A positive, finite number of seconds, `or_zero`; None if the field is missing or empty."""
    text = pairs.get(name, b"")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (0 < seconds < 1e9 or (or_zero and seconds == 0)):
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
