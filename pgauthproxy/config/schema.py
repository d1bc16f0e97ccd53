"""Every setting: its type, default, bounds and meaning. `check`, docs/config.md and the loader all read this.

Times are seconds, sizes are bytes.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def _default_parallel() -> int:
    """2 for each core, at least 8"""
    return max(8, 2 * (os.cpu_count() or 1))


class AuthenticatorSettings(_Settings, frozen=True):
    """Who decides about logins."""

    cmd: Annotated[
        list[str],
        Meta(
            description="The authenticator command: a list, or one string that is split as a shell would. "
            "No shell runs it."
        ),
    ] = []
    env: Annotated[
        list[str] | None,
        Meta(
            description="Names of the environment variables that the command gets.",
            extra={"unset": "all of the gateway's"},
        ),
    ] = None
    method: Annotated[
        Literal["md5", "cleartext", "scram-sha-256", "cert"] | None,
        Meta(
            description="How clients prove who they are. `md5`: a salted MD5 of the password, which the authenticator "
            "judges. `cleartext`: the password as it is. `scram-sha-256`: the authenticator gives a verifier, the "
            "gateway compares. `cert`: by a client certificate alone.",
            extra={"unset": "md5"},
        ),
    ] = None
    cleartext_password: Annotated[bool, Meta(description="The old way to say `method: cleartext`.")] = False
    scram_iterations: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="What refused users are shown in method `scram-sha-256`; should be what your verifiers have.",
        ),
    ] = 4096
    scram_seed: Annotated[
        str,
        Meta(
            description="A secret from which the salts that refused users are shown are made, so that they stay the "
            "same. Without it they are made from `tls.key`, and where there is none they change with each start."
        ),
    ] = ""
    timeout: Annotated[
        float, Meta(gt=0, description="How long the command may run. Then TERM goes to its process group.")
    ] = 10.0
    grace: Annotated[float, Meta(ge=0, description="From TERM to KILL.")] = 1.0
    max_parallel: Annotated[
        int, Meta(ge=1, le=1024, description="How many commands run at once; other logins wait in order.")
    ] = msgspec.field(default_factory=_default_parallel)
    max_output: Annotated[
        int, Meta(ge=1, le=1 << 24, description="Bytes of output; a command that prints more is ended.")
    ] = 65_536
    max_output_lines: Annotated[int, Meta(ge=1, description="Lines of output; more are an error.")] = 256
    max_errors: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 24,
            description="Bytes of standard error that reach the log, in at most 256 lines; the rest is dropped.",
        ),
    ] = 65_536


class CertificateSettings(_Settings, frozen=True):
    """A certificate and its key."""

    cert: str
    key: str


class TlsSettings(_Settings, frozen=True):
    """TLS with clients."""

    mode: Annotated[
        Literal["disable", "allow", "require"] | None,
        Meta(
            description="`disable`: no TLS. `allow`: for clients that ask for it. `require`: for all but those on Unix "
            "sockets; others are refused with 28000 before any password.",
            extra={"unset": "allow with a certificate, else disable"},
        ),
    ] = None
    cert: Annotated[
        str, Meta(description="The gateway's certificate and what it is signed with, a PEM file. Read anew on SIGHUP.")
    ] = ""
    key: Annotated[
        str, Meta(description="Its key, a PEM file with mode 0600, or 0640 if root owns it. Read anew on SIGHUP.")
    ] = ""
    hosts: Annotated[
        dict[str, CertificateSettings],
        Meta(
            description="Certificates of their own for the host names that clients ask for (SNI): "
            "a mapping of name to `cert` and `key`."
        ),
    ] = {}
    client_ca: Annotated[
        str, Meta(description="The authorities that client certificates must be signed by, a PEM file.")
    ] = ""
    client_cert: Annotated[
        Literal["none", "optional", "require"],
        Meta(description="Whether clients are asked for a certificate. One that is given must be valid."),
    ] = "none"
    min_version: Annotated[Literal["1.2", "1.3"], Meta(description="The oldest TLS that clients may speak.")] = "1.2"
    ciphers: Annotated[
        str, Meta(description="What may be used with TLS 1.2, in OpenSSL's words. TLS 1.3 has its own.")
    ] = "ECDHE+AESGCM:ECDHE+CHACHA20"


class TargetTlsSettings(_Settings, frozen=True):
    """TLS with targets, where the authenticator says nothing else."""

    mode: Annotated[
        Literal["disable", "prefer", "require", "verify-ca", "verify-full"],
        Meta(
            description="As libpq's sslmode. `prefer` protects against nobody who can do more than listen; it falls "
            "back on plain. Unix sockets never use TLS. `_META_TARGET_TLS` is the authenticator's word for it."
        ),
    ] = "prefer"
    ca: Annotated[
        str,
        Meta(
            description="The authorities that targets' certificates must be signed by: a PEM file, or `system` with "
            "mode `verify-full`. With it, `require` means `verify-ca`. (`_META_TARGET_CA`)"
        ),
    ] = ""
    cert: Annotated[
        str, Meta(description="A certificate to log in at targets with, a PEM file. (`_META_TARGET_CERT`)")
    ] = ""
    key: Annotated[str, Meta(description="Its key, with a mode as `tls.key`. (`_META_TARGET_KEY`)")] = ""
    negotiation: Annotated[
        Literal["postgres", "direct"],
        Meta(
            description="`direct`: TLS from the first byte on, as PostgreSQL 17 and newer speak it; needs mode "
            "`require` or better. (`_META_TARGET_TLS_NEGOTIATION`)"
        ),
    ] = "postgres"
    name: Annotated[
        str,
        Meta(description="What a target's certificate must be for, if not the host's name. (`_META_TARGET_TLS_NAME`)"),
    ] = ""


class TargetSettings(_Settings, frozen=True):
    """The servers that sessions are sent to."""

    tls: TargetTlsSettings = TargetTlsSettings()
    protocol: Annotated[
        Literal["3.0", "3.2"],
        Meta(
            description="The version that targets are asked for. 3.2 gets longer cancel keys from PostgreSQL 18 and "
            "newer; some older servers refuse it. Clients get what they ask for, whatever this is."
        ),
    ] = "3.0"
    connect_timeout: Annotated[float, Meta(gt=0, description="For connecting to one address.")] = 5.0
    login_timeout: Annotated[
        float, Meta(gt=0, description="For connecting and logging in, all addresses together.")
    ] = 15.0
    error_text: Annotated[
        bool,
        Meta(
            description="Tell clients the target's own words when it refuses a session (over a local connection). "
            "Off: a neutral text with the same SQLSTATE."
        ),
    ] = False
    max_auth_request: Annotated[int, Meta(ge=12, description="Longest authentication request.")] = 2_000
    max_error: Annotated[int, Meta(ge=64, description="Longest error or notice before the session begins.")] = 30_000
    max_message: Annotated[int, Meta(ge=64, description="Longest other message before the session begins.")] = 65_536
    max_scram_iterations: Annotated[int, Meta(ge=1, description="Most SCRAM iterations that a target may ask for.")] = (
        100_000
    )


class TcpSettings(_Settings, frozen=True):
    """Options of the sockets on both sides."""

    keepalive_idle: Annotated[int, Meta(ge=1, description="Seconds of silence before the first keepalive probe.")] = 60
    keepalive_interval: Annotated[int, Meta(ge=1, description="Seconds between probes.")] = 10
    keepalive_count: Annotated[
        int, Meta(ge=1, description="Probes without an answer before the connection counts as dead.")
    ] = 6
    user_timeout: Annotated[
        float,
        Meta(
            ge=0,
            description="TCP_USER_TIMEOUT: how long sent data may go without acknowledgement. "
            "0 leaves it to the system. "
            "Above 0 it also ends peers that are alive but do not read for so long, a paused COPY for example.",
        ),
    ] = 0.0


class LogSettings(_Settings, frozen=True):
    """What is written to standard error."""

    format: Annotated[Literal["text", "json"], Meta(description="Lines to read, or one JSON object a line.")] = "text"
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="The least that is written.")] = (
        "info"
    )


class Settings(_Settings, frozen=True):
    """All settings."""

    listen: Annotated[
        list[str],
        Meta(
            description="Where clients connect: `host:port`, `:port` (all interfaces), `[v6]:port`, "
            "`unix:/folder:port`, or a list of these."
        ),
    ] = msgspec.field(default_factory=lambda: [":5432"])
    authenticator: AuthenticatorSettings = AuthenticatorSettings()
    tls: TlsSettings = TlsSettings()
    target: TargetSettings = TargetSettings()
    tcp: TcpSettings = TcpSettings()
    log: LogSettings = LogSettings()
    max_clients: Annotated[
        int,
        Meta(
            ge=1,
            description="Clients at once; more are refused with 53300. Lowered at start to what descriptors allow.",
        ),
    ] = 10_000
    max_logins: Annotated[
        int,
        Meta(
            ge=1,
            description="Logins in progress at once. When all are taken, the client that has said nothing for longest "
            "makes way; where all have said who they are, more are refused with 53300. "
            "Lowered at start to what descriptors allow.",
        ),
    ] = 512
    login_timeout: Annotated[float, Meta(gt=0, description="From accept to AuthenticationOk, all steps together.")] = (
        60.0
    )
    cancel_timeout: Annotated[float, Meta(gt=0, description="For passing on a cancel request.")] = 10.0
    drain_timeout: Annotated[float, Meta(ge=0, description="How long sessions may go on after SIGTERM or SIGINT.")] = (
        30.0
    )
    close_timeout: Annotated[
        float, Meta(gt=0, description="How long a closing side may take to accept the last bytes that it is owed.")
    ] = 60.0
    buffer_size: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 24,
            description="Bytes that a session may hold in each direction before the sender is paused.",
        ),
    ] = 65_536
    backlog: Annotated[int, Meta(ge=1, description="Connections that may wait to be accepted, for each listener.")] = (
        1_024
    )
    max_startup_packet: Annotated[int, Meta(ge=8, description="Longest startup packet.")] = 10_000
    max_password_message: Annotated[int, Meta(ge=41, description="Longest password message.")] = 65_535
    max_sasl_message: Annotated[int, Meta(ge=256, description="Longest message of a SCRAM exchange.")] = 1_024

    @property
    def method(self) -> str:
        """How clients prove who they are, in one word."""
        asked = self.authenticator
        return asked.method or ("cleartext" if asked.cleartext_password else "md5")

    @property
    def tls_mode(self) -> str:
        """The mode of TLS with clients that is in force."""
        return self.tls.mode or ("allow" if self.tls.cert else "disable")


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its dotted path, type with bounds, default (and how to say it), and meaning."""

    path: str
    type: Any
    default: object
    default_text: str
    description: str

    @property
    def environment_name(self) -> str:
        return "PGPROXY_" + self.path.replace(".", "_").upper()


def all_keys(struct: type[msgspec.Struct] = Settings, prefix: str = "") -> Iterator[Key]:
    """All settings, in the order in which they are documented."""
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from all_keys(field.type, f"{prefix}{field.name}.")
        else:
            computed = field.default is msgspec.NODEFAULT
            default = field.default_factory() if computed else field.default
            says = field.default_factory.__doc__ if field.default_factory is _default_parallel else None
            meta = next(each for each in field.type.__metadata__ if isinstance(each, Meta))
            says = says or (meta.extra or {}).get("unset")
            text = says or msgspec.json.encode(default).decode()
            yield Key(prefix + field.name, field.type, default, text, meta.description or "")


SECRET_PATHS: Final = ("authenticator.scram_seed",)
"""Settings whose values are shown to nobody."""


def conflicts(settings: Settings) -> Iterator[str]:
    """What does not go together, a line each."""
    if settings.authenticator.cleartext_password and settings.authenticator.method not in (None, "cleartext"):
        yield f"authenticator.cleartext_password: contradicts authenticator.method {settings.authenticator.method}"
    if settings.tls_mode != "disable" and not settings.tls.cert:
        yield f"tls.mode: {settings.tls_mode} needs tls.cert and tls.key"
    if bool(settings.tls.cert) != bool(settings.tls.key):
        yield "tls.cert, tls.key: need each other"
    if settings.tls.client_cert != "none" and not settings.tls.client_ca:
        yield f"tls.client_cert: {settings.tls.client_cert} needs tls.client_ca"
    if settings.method == "cert" and (settings.tls_mode == "disable" or settings.tls.client_cert == "none"):
        yield "authenticator.method: cert needs TLS, and tls.client_cert optional or require"
