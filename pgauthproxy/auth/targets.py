"""Named targets: where identities are sent that are mapped by rules and not by a program.

What a rule may put in the place of a client's words is a template: `{user}`, `{database}`, `{address}`, `{session}` and
`{certificate}` (the subject, empty without one) stand for what is known of the client.

Strategy: a mapping is made for each login, so all that does not depend on the client is made once, and templates are
taken apart once.
"""

import string
from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from pgauthproxy.auth import references
from pgauthproxy.auth.fields import MD5_CREDENTIAL, VAULT, NonsenseError, parse_hosts, parse_leased
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Leased, Mapping, Password, Started, StoredMd5

PASSED_ON: Final = ("client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits")
Seconds = Annotated[float, Meta(gt=0, lt=1e9)]
SecondsOrZero = Annotated[float, Meta(ge=0, lt=1e9)]


class TargetTlsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What of the configuration's `target.tls` is not to hold for this target."""

    mode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    negotiation: Literal["postgres", "direct"] | None = None
    name: str | None = None


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"pass_on": "pass"}):
    """A target as an operator writes it.

    `host`: one or several, tried in order. `user`, `database`, `application_name` and the values of `parameters` are
    templates; without a `database` it is the one that was asked for, without `application_name` the client's own.
    `password` is a reference, a password, an MD5 hash, or `vault:` and a path, whose user then takes the place of
    `user`. `pass`: which of the client's startup parameters go on.
    `session_seconds`: how long a session may live. `idle_timeout`, `idle_in_transaction_timeout`: what holds instead of
    the configuration's. `warm`: how many connections stand open before they are needed.
    """

    host: str | list[str]
    user: str
    database: str = ""
    password: str = ""
    application_name: str = ""
    parameters: dict[str, str] = {}
    pass_on: list[str] = msgspec.field(default_factory=lambda: [*PASSED_ON])
    tls: TargetTlsSpec = TargetTlsSpec()
    session_seconds: Seconds | None = None
    idle_timeout: SecondsOrZero | None = None
    idle_in_transaction_timeout: SecondsOrZero | None = None
    warm: Annotated[int, Meta(ge=0)] | None = None


def _certificate(started: Started) -> bytes:
    certificate = started.encryption.certificate if started.encryption is not None else None
    return b"" if certificate is None else certificate.subject.encode(errors="surrogateescape")


_Value = Callable[[Started], bytes]
_VALUES: Final[dict[str, _Value]] = {
    "user": lambda started: started.user,
    "database": lambda started: started.database,
    "address": lambda started: started.accepted.address.encode(),
    "session": lambda started: started.accepted.session.encode(),
    "certificate": _certificate,
}
TEMPLATE_NAMES: Final = tuple(_VALUES)


class Target:
    """A target that identities can be mapped to."""

    def __init__(self, spec: TargetSpec) -> None:
        """Resolves the credential. Raises AuthenticatorConfigError with all faults; each begins with its key."""
        faults: list[str] = []
        hosts = ",".join(spec.host) if isinstance(spec.host, list) else spec.host
        try:
            self._hosts = parse_hosts(hosts.encode())
        except NonsenseError as error:
            faults.append(f"host: {str(error).replace('_META_TARGET_HOST', 'address')}")
        templates = {"user": spec.user, "database": spec.database or "{database}"}
        if spec.application_name:
            templates["application_name"] = spec.application_name
        if not spec.user:
            faults.append("user: is empty")
        for name in spec.parameters:
            if name in ("user", "database", "application_name"):
                faults.append(f"parameters.{name}: stands beside parameters, not in them")
            elif not name or "\0" in name:
                faults.append("parameters: a name that is none")
        self._parameters: list[tuple[bytes, bytes | tuple[bytes | _Value, ...]]] = []
        for name, template in (templates | spec.parameters).items():
            try:
                self._parameters.append((name.encode(), _take_apart(template)))
            except ValueError as error:
                faults.append(f"{name if name in templates else f'parameters.{name}'}: {error}")
        self._passed_on = {name.encode() for name in spec.pass_on} - {name for name, _ in self._parameters}
        if not spec.application_name:
            self._passed_on |= {b"application_name"}
        try:
            self._credential = _credential(spec.password)
        except AuthenticatorConfigError as error:
            faults += (f"password: {fault}" for fault in error.faults)
        self.tls: Final = tuple(
            (field, value) for field, value in msgspec.structs.asdict(spec.tls).items() if value is not None
        )
        self._session_seconds = spec.session_seconds
        self._idle_timeout = spec.idle_timeout
        self._idle_in_transaction_timeout = spec.idle_in_transaction_timeout
        self._warm = spec.warm
        if faults:
            raise AuthenticatorConfigError(*faults)

    @property
    def borrows(self) -> bool:
        """Whether somebody must lend the credential."""
        return isinstance(self._credential, Leased)

    def mapping(
        self, started: Started, session_seconds: float | None = None, verifier: Secret | None = None
    ) -> Mapping:
        """The mapping of one client. `session_seconds` bounds its session if that is less than what the target says."""
        parameters = [
            (name, value if isinstance(value, bytes) else _put_together(value, started))
            for name, value in self._parameters
        ]
        passed_on = self._passed_on
        parameters += [pair for pair in started.parameters if pair[0] in passed_on]
        bound = self._session_seconds
        if session_seconds is not None and (bound is None or session_seconds < bound):
            bound = session_seconds
        return Mapping(
            hosts=self._hosts,
            parameters=tuple(parameters),
            credential=self._credential,
            verifier=verifier,
            tls=self.tls,
            session_seconds=bound,
            idle_timeout=self._idle_timeout,
            idle_in_transaction_timeout=self._idle_in_transaction_timeout,
            warm=self._warm,
        )


ReadTargets = Callable[[], dict[str, Target]]
"""Reads named targets, and what they refer to. Raises AuthenticatorConfigError with all faults."""

TargetFault = Callable[[Target], str | None]
"""What is wrong with a target as things stand here, if anything; begins with its key."""


def build_target(spec: TargetSpec, target_fault: TargetFault) -> Target:
    """A target, wherever it stands. Raises AuthenticatorConfigError with all faults; each begins with its key."""
    target = Target(spec)
    if fault := target_fault(target):
        raise AuthenticatorConfigError(fault)
    return target


def _take_apart(template: str) -> bytes | tuple[bytes | _Value, ...]:
    """What a template is made of: bytes if it is the same for all clients. Raises ValueError."""
    parts: list[bytes | _Value] = []
    known = ", ".join(f"{{{name}}}" for name in TEMPLATE_NAMES)
    if "\0" in template:
        raise ValueError("a NUL in it")
    try:
        for literal, field, layout, conversion in string.Formatter().parse(template):
            if literal:
                parts.append(literal.encode(errors="surrogateescape"))
            if field is not None:
                if layout or conversion:
                    raise KeyError(field)
                parts.append(_VALUES[field])
    except (ValueError, KeyError):
        raise ValueError(f"in braces stand only {known}") from None
    if any(type(part) is not bytes for part in parts):
        return tuple(parts)
    return b"".join(part for part in parts if type(part) is bytes)


def _put_together(parts: tuple[bytes | _Value, ...], started: Started) -> bytes:
    return b"".join([part if isinstance(part, bytes) else part(started) for part in parts])


def _credential(text: str) -> Password | StoredMd5 | Leased | None:
    if not text:
        return None
    if text.startswith(VAULT.decode()):
        try:
            return parse_leased(text.encode(errors="surrogateescape"))
        except NonsenseError as error:
            raise AuthenticatorConfigError(str(error)) from None
    secret = references.resolve(text)
    return StoredMd5(secret) if MD5_CREDENTIAL.fullmatch(secret.reveal()) else Password(secret)
