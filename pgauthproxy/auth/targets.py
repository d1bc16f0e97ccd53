"""Named targets: where identities are sent that are mapped by rules and not by a program.

What a rule may put in the place of a client's words is a template: `{user}`, `{database}`, `{address}`, `{session}` and
`{certificate}` (the subject, empty without one) stand for what is known of the client.
"""

import string
from typing import Final

import msgspec

from pgauthproxy.auth import references
from pgauthproxy.auth.fields import MD5_CREDENTIAL, VAULT, NonsenseError, parse_hosts, parse_leased
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.stages import Leased, Mapping, Password, Started, StoredMd5

TEMPLATE_NAMES: Final = ("user", "database", "address", "session", "certificate")
PASSED_ON: Final = ("client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits")


class TargetTlsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What of the configuration's `target.tls` is not to hold for this target."""

    mode: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    negotiation: str | None = None
    name: str | None = None


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"pass_on": "pass"}):
    """A target as an operator writes it.

    `host`: one or several, tried in order. `user`, `database`, `application_name` and the values of `parameters` are
    templates; without a `database` it is the one that was asked for, without `application_name` the client's own.
    `password` is a reference, a password, an MD5 hash, or `vault:` and a path, whose user then takes the place of
    `user`. `pass`: which of the client's startup parameters go on.
    `session_seconds`: how long a session may live. `warm`: how many connections stand open before they are needed.
    """

    host: str | list[str]
    user: str
    database: str = ""
    password: str = ""
    application_name: str = ""
    parameters: dict[str, str] = {}
    pass_on: list[str] = msgspec.field(default_factory=lambda: [*PASSED_ON])
    tls: TargetTlsSpec = TargetTlsSpec()
    session_seconds: float | None = None
    warm: int | None = None


class Target:
    """A target that identities can be mapped to."""

    def __init__(self, spec: TargetSpec) -> None:
        """Resolves the credential. Raises AuthenticatorConfigError, which names the key."""
        hosts = ",".join(spec.host) if isinstance(spec.host, list) else spec.host
        try:
            self._hosts = parse_hosts(hosts.encode())
        except NonsenseError as error:
            raise AuthenticatorConfigError(f"host: {str(error).replace('_META_TARGET_HOST', 'it')}") from None
        self._templates = {"user": spec.user, "database": spec.database or "{database}"} | spec.parameters
        if spec.application_name:
            self._templates["application_name"] = spec.application_name
        for name, template in self._templates.items():
            _check_template(name, template)
        self._passed_on = frozenset(name.encode() for name in spec.pass_on) - {
            name.encode() for name in self._templates
        }
        if not spec.application_name:
            self._passed_on |= {b"application_name"}
        self._credential = _credential(spec.password)
        self._tls = tuple(
            (field, value) for field, value in msgspec.structs.asdict(spec.tls).items() if value is not None
        )
        self._session_seconds = spec.session_seconds
        self._warm = spec.warm

    def mapping(self, started: Started, session_seconds: float | None = None) -> Mapping:
        """The mapping of one client. `session_seconds` bounds its session if that is less than what the target says."""
        values = _template_values(started)
        parameters = [
            (name.encode(), template.format_map(values).encode(errors="surrogateescape"))
            for name, template in self._templates.items()
        ]
        passed = [(name, value) for name, value in started.parameters if name in self._passed_on]
        bounds = [bound for bound in (self._session_seconds, session_seconds) if bound is not None]
        return Mapping(
            hosts=self._hosts,
            parameters=(*parameters, *passed),
            credential=self._credential,
            tls=self._tls,
            session_seconds=min(bounds) if bounds else None,
            warm=self._warm,
        )


def _template_values(started: Started) -> dict[str, str]:
    certificate = started.encryption.certificate if started.encryption is not None else None
    return {
        "user": started.user.decode(errors="surrogateescape"),
        "database": started.database.decode(errors="surrogateescape"),
        "address": started.accepted.address,
        "session": started.accepted.session,
        "certificate": certificate.subject if certificate is not None else "",
    }


def _check_template(name: str, template: str) -> None:
    """Nothing but the known names may stand in braces. Raises AuthenticatorConfigError."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        template.format_map(dict.fromkeys(TEMPLATE_NAMES, ""))
    except (ValueError, KeyError, IndexError, AttributeError):
        fields = [template]
    for field in fields:
        if field not in TEMPLATE_NAMES:
            known = ", ".join(f"{{{known}}}" for known in TEMPLATE_NAMES)
            raise AuthenticatorConfigError(f"{name}: in braces stand only {known}")


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
