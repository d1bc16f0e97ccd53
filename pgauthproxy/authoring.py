"""What an authenticator in Python works with: the request, the mapping, the refusal. Authors import it from
`pgauthproxy.authenticator`.

A command starts for each login, so this module imports next to nothing, and what a method needs is imported there.
Text is bytes that were decoded with `surrogateescape`: whatever a client sends comes in and goes out unchanged.
"""

from __future__ import annotations

import os
from _operator import _compare_digest as compare_digest  # what hmac exports, without loading OpenSSL

from pgauthproxy._digest import md5_answer, md5_password

TYPE_CHECKING = False  # as typing's, which costs a command a millisecond
if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Mapping as Pairs
    from types import CodeType

CLIENT_SETTINGS = ("client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits")
RESERVED = ("_SOURCE_", "_META_")
TLS_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")
TLS_NEGOTIATIONS = ("postgres", "direct")
MOST_SECONDS = 1e9
NO_PASSWORD = b"\0"
"""What no client can have typed."""


class Denied(Exception):
    """Raise it to refuse a client.

    `reason` goes to the gateway's log. The client gets PostgreSQL's usual words for a wrong password, or `told`.
    """

    def __init__(self, reason: str = "refused", told: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.told = told


class FieldError(ValueError):
    """What cannot be a mapping. The text names the field, and never holds a value."""


class NoPasswordError(Exception):
    """The method does not ask for a password before the authenticator: in `scram-sha-256` answer with a Mapping that
    has a `verifier`, in `cert` the certificate has proved everything."""


class Certificate:
    """A client certificate that was verified. Names are in the form of RFC 4514, `alternative_names` as
    `DNS:…,IP:…`; `fingerprint` is a SHA-256 in hex digits."""

    __slots__ = ("alternative_names", "fingerprint", "issuer", "serial", "subject")

    def __init__(
        self, subject: str, issuer: str = "", serial: str = "", alternative_names: str = "", fingerprint: str = ""
    ) -> None:
        self.subject = subject
        self.issuer = issuer
        self.serial = serial
        self.alternative_names = alternative_names
        self.fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"Certificate({self.subject!r})"


class Tls:
    """What is known of a client by TLS. `server_name` is what it asked for (SNI), often empty."""

    __slots__ = ("certificate", "server_name", "version")

    def __init__(self, version: str, server_name: str = "", certificate: Certificate | None = None) -> None:
        self.version = version
        self.server_name = server_name
        self.certificate = certificate

    def __repr__(self) -> str:
        return f"Tls({self.version!r}, {self.server_name!r}, {self.certificate!r})"


class Request:
    """A client that wants in. But for a certificate nothing of it is proved.

    - `user`, and `database`: the one that it asks for, the user's name if it names none.
    - `parameters`: all startup parameters, `user` and `database` included, in the client's order.
    - `address`: `ip:port`, `[v6]:port`, or `[local]` on a Unix socket. `session`: its id, as in the logs.
    - `method`: `md5`, `cleartext`, `scram-sha-256` or `cert`.
    - `password`: in cleartext mode, what it typed.
    - `answer` and `salt`: in md5 mode, `md5` and 32 hex digits, and the 4 bytes that went into them.
    - `tls`: None without TLS.
    """

    __slots__ = ("address", "answer", "database", "method", "parameters", "password", "salt", "session", "tls", "user")

    def __init__(
        self,
        user: str,
        database: str | None = None,
        *,
        parameters: Pairs[str, str] | None = None,
        address: str = "[local]",
        method: str = "cleartext",
        session: str = "",
        password: str | None = None,
        answer: str | None = None,
        salt: bytes = bytes(4),
        tls: Tls | None = None,
    ) -> None:
        self.user = user
        self.database = database or user
        self.parameters = dict(parameters) if parameters is not None else {"user": user, "database": self.database}
        self.address = address
        self.method = method
        self.session = session
        self.password = password
        self.answer = answer
        self.salt = salt
        self.tls = tls

    def __repr__(self) -> str:
        return (
            f"Request(user={self.user!r}, database={self.database!r}, address={self.address!r}, "
            f"method={self.method!r}, session={self.session!r})"
        )

    @property
    def client_settings(self) -> dict[str, str]:
        """Those startup parameters that only say how values are written (client_encoding, DateStyle, IntervalStyle,
        TimeZone, extra_float_digits): they may go on to the target without being looked at."""
        return {name: self.parameters[name] for name in CLIENT_SETTINGS if name in self.parameters}

    def password_is(self, expected: str | bytes | None) -> bool:
        """Whether the client knows this password, in method md5 or cleartext; in constant time.

        None, for a user who does not exist, is never right and takes as long. Neither is an empty password.
        Raises NoPasswordError in other methods.
        """
        password = _encode(expected) if expected else NO_PASSWORD
        if self.method == "md5":
            return self._answers(md5_password(password, _encode(self.user))) and bool(expected)
        return compare_digest(self._typed(), password) and bool(expected)

    def verify(self, verifier: str | bytes | None) -> bool:
        """Whether the client knows the password of this verifier, in the form of pg_authid: `md5…` (the hash of the
        password and the user's own name) in method md5 or cleartext, `SCRAM-SHA-256$…` in cleartext.

        None, for a user who does not exist, is never right; it takes as long as an MD5 in md5 mode, as a SCRAM
        verifier of 4096 iterations in cleartext mode. That is milliseconds of CPU. Raises ValueError if it is no
        verifier, or none for this method, and NoPasswordError in other methods.
        """
        text = _encode(verifier) if verifier is not None else b""
        if self.method == "md5":
            if verifier is not None and not _is_md5(text):
                raise FieldError("in method md5 a verifier is an MD5 hash")
            return self._answers(text or md5_password(NO_PASSWORD, b"")) and verifier is not None
        if _is_md5(text):
            return compare_digest(md5_password(self._typed(), _encode(self.user)), text) and bool(self.password)
        return self._fits_scram(text if verifier is not None else None)

    def _fits_scram(self, text: bytes | None) -> bool:
        from pgauthproxy.proto import scram

        password = self._typed()
        made_up = scram.Verifier.made_up(_encode(self.user), b"", scram.DEFAULT_ITERATIONS)
        verifier = scram.Verifier.parse(text) if text is not None else made_up
        if verifier is None:
            raise FieldError("not a verifier")
        return verifier.fits(scram.salted_password(password, verifier.salt, verifier.iterations)) and bool(password)

    def _typed(self) -> bytes:
        if self.password is None:
            raise NoPasswordError(self.method)
        return _encode(self.password)

    def _answers(self, stored: bytes) -> bool:
        """Whether the client's answer is the one that follows from this MD5 hash."""
        if self.answer is None:
            raise NoPasswordError(self.method)
        return compare_digest(_encode(self.answer), md5_answer(stored, self.salt))


class Mapping:
    """Where a client is sent, as whom, with which credential.

    - `host`: `host:port`, `host` (port 5432), `[v6]:port`, `/folder:port`, or several, tried in order.
    - `user`: the role there. `database`: the one that the client asked for, unless given.
    - One credential, or none: `password`; `md5_hash` (as pg_authid stores it, it answers MD5 requests alone);
      `credential_from_client` (what the client itself has proved).
    - `parameters`: all other startup parameters of the target; nothing else is taken from the client.
    - `tls`: the mode, in libpq's words; with `tls_ca`, `tls_cert`, `tls_key`, `tls_negotiation`, `tls_name`. What is
      not given is as in the gateway's configuration.
    - `verifier`: what the client must prove to know; method scram-sha-256 needs one.
    - `session_seconds`: how long the session may live. `idle_timeout`, `idle_in_transaction_timeout`: how long it may
      idle, zero for no limit. `cache_seconds`: how long this answer may be used again.

    Raises ValueError, which names the field and not its value.
    """

    __slots__ = (
        "cache_seconds",
        "credential_from_client",
        "database",
        "host",
        "idle_in_transaction_timeout",
        "idle_timeout",
        "md5_hash",
        "parameters",
        "password",
        "session_seconds",
        "tls",
        "tls_ca",
        "tls_cert",
        "tls_key",
        "tls_name",
        "tls_negotiation",
        "user",
        "verifier",
    )

    def __init__(
        self,
        host: str | Iterable[str],
        user: str | bytes,
        *,
        database: str | bytes | None = None,
        password: str | bytes | None = None,
        md5_hash: str | bytes | None = None,
        credential_from_client: bool = False,
        parameters: Pairs[str, str] | None = None,
        tls: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_negotiation: str | None = None,
        tls_name: str | None = None,
        verifier: str | bytes | None = None,
        session_seconds: float | None = None,
        idle_timeout: float | None = None,
        idle_in_transaction_timeout: float | None = None,
        cache_seconds: float | None = None,
    ) -> None:
        self.host = _needed("host", host if isinstance(host, str) else ",".join(host))
        self.user = _needed("user", user)
        self.database = _optional("database", database)
        self.password = _optional("password", password)
        self.md5_hash = _optional("md5_hash", md5_hash)
        self.credential_from_client = credential_from_client
        self.parameters = {
            _parameter_name(name): _text(f"parameter {name}", value) for name, value in (parameters or {}).items()
        }
        self.tls = _one_of("tls", tls, TLS_MODES)
        self.tls_ca = _optional("tls_ca", tls_ca)
        self.tls_cert = _optional("tls_cert", tls_cert)
        self.tls_key = _optional("tls_key", tls_key)
        self.tls_negotiation = _one_of("tls_negotiation", tls_negotiation, TLS_NEGOTIATIONS)
        self.tls_name = _optional("tls_name", tls_name)
        self.verifier = _optional("verifier", verifier)
        self.session_seconds = _seconds("session_seconds", session_seconds)
        self.idle_timeout = _seconds("idle_timeout", idle_timeout, or_zero=True)
        self.idle_in_transaction_timeout = _seconds(
            "idle_in_transaction_timeout", idle_in_transaction_timeout, or_zero=True
        )
        self.cache_seconds = _seconds("cache_seconds", cache_seconds, or_zero=True)
        if self.md5_hash is not None and not _is_md5(self.md5_hash.encode(errors="surrogateescape")):
            raise FieldError("md5_hash: not md5 and 32 hex digits")
        if (self.password is not None) + (self.md5_hash is not None) + bool(credential_from_client) > 1:
            raise FieldError("more than one of password, md5_hash and credential_from_client")

    def __repr__(self) -> str:
        return f"Mapping({self.host!r}, {self.user!r}, database={self.database!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]  # it holds a dictionary


def checked(answer: object) -> Mapping:
    """What an author's function has returned, if it is a mapping. Raises FieldError."""
    if not isinstance(answer, Mapping):
        raise FieldError(f"{type(answer).__name__} was returned, not a Mapping")
    return answer


def told_by(denied: Denied) -> bytes | None:
    """What a refused client is told instead of the usual words, on one line; None for those."""
    if not denied.told:
        return None
    text = denied.told.replace("\n", " ").replace("\r", " ").replace("\0", " ")
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


def what_failed(error: BaseException, author: CodeType | None) -> str:
    """What an author's code raised and where. Its text might hold values, and is left out unless it is ours."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    kind = type(error).__qualname__
    if isinstance(error, (FieldError, NoPasswordError)):
        kind = f"{kind} ({error})"
    if not places:
        return kind
    theirs = [place for place in places if author is not None and place[0] == author.co_filename]
    said = f"{kind} at {_shown(places[-1])}"
    return f"{said}, called from {_shown(theirs[-1])}" if theirs and theirs[-1] != places[-1] else said


def _shown(place: tuple[str, int]) -> str:
    return f"{os.path.basename(place[0])}:{place[1]}"


def _encode(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode(errors="surrogateescape")


def _is_md5(text: bytes) -> bool:
    return len(text) == 35 and text.startswith(b"md5") and not text[3:].strip(b"0123456789abcdef")


def _text(field: str, value: str | bytes) -> str:
    """The value as text, if it can stand in a line."""
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, str):
        raise FieldError(f"{field}: {type(value).__name__} is no text")
    if "\n" in value or "\r" in value or "\0" in value:
        raise FieldError(f"{field}: a line break or NUL")
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise FieldError(f"{field}: a lone surrogate") from None
    return value


def _needed(field: str, value: str | bytes) -> str:
    if not (text := _text(field, value)):
        raise FieldError(f"{field}: empty")
    return text


def _optional(field: str, value: str | bytes | None) -> str | None:
    return None if value is None else _text(field, value)


def _one_of(field: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise FieldError(f"{field}: none of {', '.join(known)}")
    return value


def _parameter_name(name: str) -> str:
    if not _text("a parameter's name", name) or "=" in name or name.upper().startswith(RESERVED):
        raise FieldError("parameters: a name that is empty, holds = or is reserved")
    if name in ("user", "database"):
        raise FieldError(f"parameters: {name} has an argument of its own")
    return name


def _seconds(field: str, value: float | None, *, or_zero: bool = False) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise FieldError(f"{field}: {type(value).__name__} is no number")
    if not (0 < value < MOST_SECONDS or (or_zero and value == 0)):
        raise FieldError(f"{field}: no number of seconds")
    return value
