"""Every setting: its type, default, bounds and meaning. The loader, `check` and docs/config.md all read this.

The text under a setting is its documentation. Times are seconds, sizes are bytes.
"""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
BoundedBytes = Annotated[int, Meta(ge=1, le=1 << 24)]
Kind = Literal["command", "worker", "users", "chain"]
Method = Literal["md5", "cleartext", "scram-sha-256", "cert"]
TargetTlsMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]
Level = Literal["debug", "info", "warning", "error"]


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def _default_parallel() -> int:
    """2 for each core, at least 8"""
    return max(8, 2 * (os.cpu_count() or 1))


class UsersSettings(_Settings, frozen=True):
    """The kind `users`."""

    file: str = ""
    """A YAML file with users and the targets that they are mapped to (docs/users.md), with a mode as `tls.key`. Read
    anew on SIGHUP."""


class WorkersSettings(_Settings, frozen=True):
    """The processes of the kind `worker`."""

    min: Count = 1
    """How many run at least."""
    max: Annotated[int, Meta(ge=1, le=1024)] = msgspec.field(default_factory=_default_parallel)
    """How many run at most. Each has one login in hand; other logins wait in order."""


class CacheSettings(_Settings, frozen=True):
    """Answers that are kept for as long as the authenticator says (`_META_CACHE_SECONDS`)."""

    max_seconds: NotNegative = 300.0
    """The longest that an answer is kept, whatever the authenticator says. 0: none is kept."""
    max_entries: Count = 10_000
    """How many are kept; the one that was used least lately goes first."""


class AuthenticatorSettings(_Settings, frozen=True):
    """Who decides about logins."""

    kind: Kind | None = None
    """What the authenticator is. `command`: `cmd` is run for each login. `worker`: `cmd` is kept running and answers
    one login after the other. `users`: a file (docs/users.md). `chain`: those of `chain`. Without it: what the other
    settings ask for, `command` if `cmd` is set, `users` if `users.file` is."""
    cmd: list[str] = []
    """The authenticator command: a list, or one string that is split as a shell would. No shell runs it."""
    env: list[str] | None = None
    """Names of the environment variables that the command gets. Without it: all of the gateway's."""
    method: Method | None = None
    """How clients prove who they are. `md5`: a salted MD5 of the password, which the authenticator judges.
    `cleartext`: the password as it is. `scram-sha-256`: the authenticator gives a verifier, the gateway compares.
    `cert`: by a client certificate alone. Without it: `scram-sha-256` with the kind `users`, else `md5`."""
    cleartext_password: bool = False
    """The old way to say `method: cleartext`."""
    scram_iterations: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    """What refused users are shown in method `scram-sha-256`; should be what your verifiers have."""
    scram_seed: str = ""
    """A secret from which the salts that refused users are shown are made, so that they stay the same. Without it they
    are made from `tls.key`, and where there is none they change with each start."""
    users: UsersSettings = UsersSettings()
    workers: WorkersSettings = WorkersSettings()
    chain: list["AuthenticatorSettings"] = []
    """Several authenticators, each with settings of this section (but not `method` and what belongs to it): the first
    that lets a client in decides, and one that fails ends the row."""
    cache: CacheSettings = CacheSettings()
    timeout: Positive = 10.0
    """How long the command may run, or a worker take to answer. Then TERM goes to its process group."""
    grace: NotNegative = 1.0
    """From TERM to KILL."""
    max_parallel: Annotated[int, Meta(ge=1, le=1024)] = msgspec.field(default_factory=_default_parallel)
    """How many commands run at once; other logins wait in order."""
    max_output: BoundedBytes = 65_536
    """Bytes of output; a command that prints more is ended."""
    max_output_lines: Count = 256
    """Lines of output; more are an error."""
    max_errors: BoundedBytes = 65_536
    """Bytes of standard error that reach the log, in at most 256 lines; the rest is dropped."""

    @property
    def decided_kind(self) -> Kind | None:
        """What the authenticator is; None if none is configured."""
        return self.kind or ("chain" if self.chain else "command" if self.cmd else "users" if self.users.file else None)


class CertificateSettings(_Settings, frozen=True):
    """A certificate and its key."""

    cert: str
    key: str


class TlsSettings(_Settings, frozen=True):
    """TLS with clients."""

    mode: Literal["disable", "allow", "require"] | None = None
    """`disable`: no TLS. `allow`: for clients that ask for it. `require`: for all but those on Unix sockets; others are
    refused with 28000 before any password. Without it: `allow` if there is a certificate, else `disable`."""
    cert: str = ""
    """The gateway's certificate and what it is signed with, a PEM file. Read anew on SIGHUP."""
    key: str = ""
    """Its key, a PEM file with mode 0600, or 0640 if root owns it. Read anew on SIGHUP."""
    hosts: dict[str, CertificateSettings] = {}
    """Certificates of their own for host names that clients ask for (SNI): a mapping of name to `cert` and `key`."""
    client_ca: str = ""
    """The authorities that client certificates must be signed by, a PEM file."""
    client_cert: Literal["none", "optional", "require"] = "none"
    """Whether clients are asked for a certificate. One that is given must be valid."""
    min_version: Literal["1.2", "1.3"] = "1.2"
    """The oldest TLS that clients may speak."""
    ciphers: str = "ECDHE+AESGCM:ECDHE+CHACHA20"
    """What may be used with TLS 1.2, in OpenSSL's words. TLS 1.3 has its own."""


class TargetTlsSettings(_Settings, frozen=True):
    """TLS with targets, where the authenticator says nothing else."""

    mode: TargetTlsMode | None = None
    """As libpq's sslmode. `prefer`, the default, protects against nobody who can do more than listen; it falls back on
    plain. With `ca: system` the default is `verify-full`. Unix sockets never use TLS. `_META_TARGET_TLS` is the
    authenticator's word for it."""
    ca: str = ""
    """The authorities that targets' certificates must be signed by: a PEM file, or `system` with mode `verify-full`.
    With it, `require` means `verify-ca`. (`_META_TARGET_CA`)"""
    cert: str = ""
    """A certificate to log in at targets with, a PEM file. (`_META_TARGET_CERT`)"""
    key: str = ""
    """Its key, with a mode as `tls.key`. (`_META_TARGET_KEY`)"""
    negotiation: Literal["postgres", "direct"] = "postgres"
    """`direct`: TLS from the first byte on, as PostgreSQL 17 and newer speak it; needs mode `require` or better.
    (`_META_TARGET_TLS_NEGOTIATION`)"""
    name: str = ""
    """What a target's certificate must be for, if not the host's name. (`_META_TARGET_TLS_NAME`)"""

    @property
    def decided_mode(self) -> TargetTlsMode:
        """The mode that is in force."""
        return self.mode or ("verify-full" if self.ca == "system" else "prefer")


class TargetSettings(_Settings, frozen=True):
    """The servers that sessions are sent to."""

    tls: TargetTlsSettings = TargetTlsSettings()
    protocol: Literal["3.0", "3.2"] = "3.0"
    """The version that targets are asked for. 3.2 gets longer cancel keys from PostgreSQL 18 and newer; some older
    servers refuse it. Clients get what they ask for, whatever this is."""
    warm: Annotated[int, Meta(ge=0, le=1000)] = 0
    """How many connections to each target used lately stand open before they are needed, TLS done and nothing else: a
    login there takes a third less time. Each serves one login. The authenticator's targets may say otherwise."""
    connect_timeout: Positive = 5.0
    """For connecting to one address."""
    login_timeout: Positive = 15.0
    """For connecting and logging in, all addresses together."""
    error_text: bool = False
    """Tell clients the target's own words when it refuses a session (over a local connection, or TLS that is verified).
    Off: a neutral text with the same SQLSTATE."""
    max_auth_request: Annotated[int, Meta(ge=12)] = 2_000
    """Longest authentication request."""
    max_error: Annotated[int, Meta(ge=64)] = 30_000
    """Longest error or notice before the session begins."""
    max_message: Annotated[int, Meta(ge=64)] = 65_536
    """Longest other message before the session begins."""
    max_scram_iterations: Count = 100_000
    """Most SCRAM iterations that a target may ask for."""


class TcpSettings(_Settings, frozen=True):
    """Options of the sockets on both sides."""

    keepalive_idle: Count = 60
    """Seconds of silence before the first keepalive probe."""
    keepalive_interval: Count = 10
    """Seconds between probes."""
    keepalive_count: Count = 6
    """Probes without an answer before the connection counts as dead."""
    user_timeout: NotNegative = 0.0
    """TCP_USER_TIMEOUT: how long sent data may go without acknowledgement. 0 leaves it to the system. Above 0 it also
    ends peers that are alive but do not read for so long, a paused COPY for example."""


class LogSettings(_Settings, frozen=True):
    """What is written to standard error."""

    format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object a line."""
    level: Level = "info"
    """The least that is written."""


class Settings(_Settings, frozen=True):
    """All settings."""

    listen: list[str] = msgspec.field(default_factory=lambda: [":5432"])
    """Where clients connect: `host:port`, `:port` (all interfaces), `[v6]:port`, `unix:/folder:port`, or a list of
    these."""
    workers: Annotated[int, Meta(ge=1, le=256)] | Literal["auto"] = 1
    """How many processes serve. `auto`: one for each core that the gateway may use. More than one have a supervisor
    above them (docs/operations.md)."""
    worker_timeout: Positive = 30.0
    """How long one of several processes may show no sign of life before it is killed and replaced."""
    authenticator: AuthenticatorSettings = AuthenticatorSettings()
    tls: TlsSettings = TlsSettings()
    target: TargetSettings = TargetSettings()
    tcp: TcpSettings = TcpSettings()
    log: LogSettings = LogSettings()
    max_clients: Count = 10_000
    """Clients at once; more are refused with 53300. Lowered at start to what descriptors allow."""
    max_logins: Count = 512
    """Logins in progress at once. When all are taken, the client that has said nothing for longest makes way; where all
    have said who they are, more are refused with 53300. Lowered at start to what descriptors allow."""
    login_timeout: Positive = 60.0
    """From accept to AuthenticationOk, all steps together."""
    cancel_timeout: Positive = 10.0
    """For passing on a cancel request."""
    drain_timeout: NotNegative = 30.0
    """How long sessions may go on after SIGTERM or SIGINT. `forever`: until the last of them has ended."""
    close_timeout: Positive = 60.0
    """How long a closing side may take to accept the last bytes that it is owed."""
    buffer_size: Annotated[int, Meta(ge=1024, le=1 << 24)] = 65_536
    """Bytes that a session may hold in each direction before the sender is paused."""
    pid_file: str = ""
    """A file that holds the process's number while it runs; `pgauthproxy reload` and `upgrade` find it by
    that."""
    backlog: Count = 1_024
    """Connections that may wait to be accepted, for each listener."""
    max_startup_packet: Annotated[int, Meta(ge=8)] = 10_000
    """Longest startup packet."""
    max_password_message: Annotated[int, Meta(ge=41)] = 65_535
    """Longest password message."""
    max_sasl_message: Annotated[int, Meta(ge=256)] = 1_024
    """Longest message of a SCRAM exchange."""

    @property
    def method(self) -> Method:
        """How clients prove who they are, in one word."""
        asked = self.authenticator
        if asked.cleartext_password:
            return asked.method or "cleartext"
        return asked.method or ("scram-sha-256" if asked.decided_kind == "users" else "md5")

    @property
    def tls_mode(self) -> str:
        """The mode of TLS with clients that is in force."""
        return self.tls.mode or ("allow" if self.tls.cert else "disable")


FIXED: Final = ("listen", "workers", "backlog", "buffer_size", "pid_file")
"""Settings that a running gateway cannot change."""
SECRET_PATHS: Final = ("authenticator.scram_seed",)
"""Settings whose values are shown to nobody."""


class Key(msgspec.Struct, frozen=True):
    """One setting: its dotted path, type with bounds, default, and the class that it stands in."""

    path: str
    type: Any
    default: object
    default_text: str
    owner: type[msgspec.Struct]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

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
            text = says or ("" if default is None else msgspec.json.encode(default).decode())
            yield Key(prefix + field.name, field.type, default, text, struct)


def in_force(settings: Settings, key: Key) -> object:
    """The value of one setting; where it is not set and something follows from that, what follows."""
    match key.path:
        case "authenticator.kind":
            return settings.authenticator.decided_kind
        case "authenticator.method":
            return settings.method
        case "tls.mode":
            return settings.tls_mode
        case "target.tls.mode":
            return settings.target.tls.decided_mode
    value: object = settings
    for name in key.path.split("."):
        value = getattr(value, name)
    return value


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
    yield from _authenticator_conflicts(settings.authenticator, "authenticator")
    if settings.method == "cert" and (settings.tls_mode == "disable" or settings.tls.client_cert == "none"):
        yield "authenticator.method: cert needs TLS, and tls.client_cert optional or require"


def _authenticator_conflicts(asked: AuthenticatorSettings, section: str) -> Iterator[str]:
    if asked.kind in ("command", "worker") and not asked.cmd:
        yield f"{section}.kind: {asked.kind} needs cmd"
    if asked.kind == "users" and not asked.users.file:
        yield f"{section}.kind: users needs users.file"
    if asked.kind is None and not asked.chain and asked.cmd and asked.users.file:
        yield f"{section}.kind: must say which, since both cmd and users.file are set"
    if asked.workers.max < asked.workers.min:
        yield f"{section}.workers: max is less than min"
    for number, link in enumerate(asked.chain, 1):
        yield from _authenticator_conflicts(link, f"{section}.chain, {number}")
