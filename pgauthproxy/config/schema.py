"""Every setting: its type, default, bounds and meaning. The loader, `check` and docs/config.md all read this.

The text under a setting is its documentation. Times are seconds, sizes are bytes.
"""

import math
import operator
import os
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from pgauthproxy.auth.targets import TargetSpec

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
NotNegativeCount = Annotated[int, Meta(ge=0)]
BoundedBytes = Annotated[int, Meta(ge=1, le=1 << 24)]
Kind = Literal["command", "worker", "python", "http", "users", "ldap", "jwt", "chain"]
Method = Literal["md5", "cleartext", "scram-sha-256", "cert", "oauth"]
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "ES256K", "EdDSA"]
TargetTlsMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]
Level = Literal["debug", "info", "warning", "error"]

NEEDED: Final[dict[Kind, str]] = {
    "chain": "chain",
    "command": "cmd",
    "worker": "cmd",
    "python": "callable",
    "http": "http.url",
    "users": "users.file",
}
"""What must be set for a kind. Of those that need the same, the first is what is meant without a word; kinds that are
not here are always meant by name."""


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def _default_parallel() -> int:
    """2 for each core, at least 8"""
    return max(8, 2 * (os.cpu_count() or 1))


class HttpSettings(_Settings, frozen=True):
    """An authenticator that is an HTTP service."""

    url: str = ""
    """Where each login is posted to, as JSON: `https://host[:port]/path`. `http://` warns unless it is loopback."""
    headers: dict[str, str] = {}
    """Headers that go with it. A value may be `env:NAME` or `file:/path`, so that no secret stands here."""
    max_in_flight: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """How many requests are under way at once; other logins wait in order."""
    ca: str = ""
    """The authorities that the server's certificate must be signed by, a PEM file. Without it: the system's."""


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


class LdapRule(_Settings, frozen=True):
    """Who is sent where. Without `group` and `filter` it is for everybody."""

    target: str
    group: str = ""
    """The DN of a group that the user must be in."""
    filter: str = ""
    """A filter that the user's entry must match."""


class LdapSettings(_Settings, frozen=True):
    """A directory that knows the passwords."""

    url: list[str] = []
    """`ldaps://host:port` or `ldap://host:port`, or several that are tried in order."""
    start_tls: bool = False
    """Begin TLS on `ldap://` connections before anything is said there."""
    allow_plain: bool = False
    """Send passwords over `ldap://` without TLS to others than loopback. Warned about at each start."""
    ca: str = ""
    """The authorities that the directory's certificate must be signed by, a PEM file. Without it: the system's."""
    user_dn: str = ""
    """The user's DN, `{user}` in the place of the name: `uid={user},ou=people,dc=example,dc=com`. The other way is to
    look for it, with `base` and `filter`."""
    base: str = ""
    """Where users are looked for."""
    filter: str = "(uid={user})"
    """What finds exactly the one entry of a user, `{user}` in the place of the name."""
    scope: Literal["sub", "one"] = "sub"
    """How deep below `base` users may be."""
    bind_dn: str = ""
    """Who looks for users and their groups, over connections that are kept. Without it users are looked for by nobody
    in particular (anonymously), and look for their groups themselves."""
    bind_password: str = ""
    """Its password: `env:NAME`, `file:/path`, or the password."""
    name_attribute: str | None = None
    """The attribute of a user's entry that must be the name that the client gave, to the letter: a directory finds
    `Alice` for `alice`, PostgreSQL knows two roles. Without it: the one before `={user}` in `user_dn` or `filter`.
    Empty: not looked at."""
    group_filter: str = "(|(member={dn})(uniqueMember={dn})(memberUid={user}))"
    """What the entry of a group must match for a user to be in it."""
    rules: list[LdapRule] = []
    """Who is sent where, the first that fits: a list of `{group: DN, target: NAME}`, `{filter: FILTER, target: NAME}`
    and, for everybody, `{target: NAME}`."""
    timeout: Positive = 5.0
    """For each step: connecting with TLS, a bind, a search."""
    max_parallel: Annotated[int, Meta(ge=1, le=256)] = 16
    """How many logins are asked about at once; others wait."""


class JwtRule(_Settings, frozen=True):
    """Who is sent where. Without `claim` it is for everybody."""

    target: str
    claim: str = ""
    """The name of a claim, or a path with dots: `realm_access.roles`."""
    equals: str | None = None
    """What it must be."""
    contains: str | None = None
    """What must be in it: in a list, or a word of a text."""


class JwtSettings(_Settings, frozen=True):
    """Tokens in the place of passwords."""

    jwks_file: str = ""
    """The issuer's keys, a JSON Web Key Set. Read anew as a URL is."""
    jwks_url: str = ""
    """Where the issuer publishes its keys, `https://…` (`http://` to loopback only)."""
    jwks_ca: str = ""
    """The authorities that its certificate must be signed by, a PEM file. Without it: the system's."""
    jwks_seconds: Positive = 300.0
    """How old keys may be before they are read anew. The old ones serve meanwhile, and as long as that fails."""
    jwks_min_seconds: Positive = 10.0
    """The least time between two readings, however many tokens name keys that are not known."""
    jwks_timeout: Positive = 5.0
    """For one reading."""
    algorithms: Annotated[list[Algorithm], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["RS256", "ES256", "EdDSA"]
    )
    """What tokens may be signed with; public-key algorithms only."""
    issuer: str = ""
    """What `iss` must be."""
    audience: list[str] = []
    """`aud` must hold one of these."""
    leeway: NotNegative = 10.0
    """How far clocks may be apart."""
    required_claims: list[str] = []
    """What a token must have besides `iss`, `aud`, `exp` and the user's claim."""
    max_token: Annotated[int, Meta(ge=64, le=65_531)] = 16_384
    """Longest token."""
    user_claim: str = "sub"
    """The claim that says who the user is (as in a rule)."""
    user_is: str = "{user}"
    """What that claim must be, to the letter, `{user}` being the PostgreSQL user that the client asks for:
    `{user}@example.com`."""
    end_with_token: bool = False
    """End the session when its token expires."""
    rules: list[JwtRule] = []
    """Who is sent where, the first that fits: a list of `{claim: NAME, equals: VALUE, target: NAME}`,
    `{claim: NAME, contains: VALUE, target: NAME}` and, for everybody, `{target: NAME}`."""


class OauthSettings(_Settings, frozen=True):
    """What clients of method `oauth` are told."""

    issuer: str = ""
    """Who gives tokens: the issuer's URL, as libpq's `oauth_issuer` has it. Without it: `authenticator.jwt.issuer`."""
    scope: str = ""
    """The scopes that a token needs, with spaces between."""


class VaultSettings(_Settings, frozen=True):
    """HashiCorp Vault, where credentials `vault:PATH` come from, whatever the kind of the authenticator."""

    address: str = ""
    """`https://host:port` (`http://` to loopback only). Without it there is no Vault."""
    ca: str = ""
    """The authorities that its certificate must be signed by, a PEM file. Without it: the system's."""
    namespace: str = ""
    """The namespace, in Vault Enterprise."""
    token: str = ""
    """The gateway's token: `env:NAME`, `file:/path`, or the token. It is renewed as long as it can be."""
    role_id: str = ""
    """With AppRole in the place of a token: the role's id."""
    secret_id: str = ""
    """With AppRole: `env:NAME`, `file:/path`, or the secret id. Empty if the role needs none."""
    approle_mount: str = "approle"
    """Where AppRole is mounted."""
    timeout: Positive = 10.0
    """For getting a credential, all tries together, and for giving it back. Should be below `login_timeout`."""


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
    one login after the other. `python`: the function of `callable`. `http`: the service at `http.url`. `users`: a file
    (docs/users.md). `ldap`: a directory (docs/ldap.md). `jwt`: tokens (docs/jwt.md). `chain`: those of `chain`. Without
    it: what the other settings ask for, `command` if `cmd` is set, `python` if `callable` is, `http` if `http.url` is,
    `users` if `users.file` is."""
    cmd: list[str] = []
    """The authenticator command: a list, or one string that is split as a shell would. No shell runs it."""
    callable: str = ""
    """A function in Python, `package.module:function` with modules of the working directory first, or the name under
    which an installed package has one (its entry point in the group `pgauthproxy.authenticators`)."""
    http: HttpSettings = HttpSettings()
    env: list[str] | None = None
    """Names of the environment variables that the command gets. Without it: all of the gateway's."""
    method: Method | None = None
    """How clients prove who they are. `md5`: a salted MD5 of the password, which the authenticator judges.
    `cleartext`: the password as it is. `scram-sha-256`: the authenticator gives a verifier, the gateway compares.
    `cert`: by a client certificate alone. `oauth`: by a bearer token, over TLS alone. Without it: `scram-sha-256` with
    the kind `users`, else `md5`."""
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
    """Several authenticators, each with settings of this section (but not `method` and what belongs to it, `cache` and
    `vault`; its `targets` are added to those here): the first that lets a client in decides, and one that fails ends
    the row."""
    targets: dict[str, TargetSpec] = {}
    """Named targets for the rules of the kinds `ldap` and `jwt`: a mapping of name to `host`, `user` and so on, as in a
    file of users (docs/users.md)."""
    ldap: LdapSettings = LdapSettings()
    jwt: JwtSettings = JwtSettings()
    oauth: OauthSettings = OauthSettings()
    vault: VaultSettings = VaultSettings()
    cache: CacheSettings = CacheSettings()
    timeout: Positive = 10.0
    """How long the command may run, or a worker, function or service take to answer. Then TERM goes to the process
    group of the command or worker."""
    grace: NotNegative = 1.0
    """From TERM to KILL; from cancelling an async function to leaving it."""
    max_parallel: Annotated[int, Meta(ge=1, le=1024)] = msgspec.field(default_factory=_default_parallel)
    """How many commands, or calls of a function, run at once; other logins wait in order."""
    max_output: BoundedBytes = 65_536
    """Bytes of output; a command that prints more is ended, a service's longer answer is an error."""
    max_output_lines: Count = 256
    """Lines of output; more are an error."""
    max_errors: BoundedBytes = 65_536
    """Bytes of standard error that reach the log, in at most 256 lines; the rest is dropped."""

    @property
    def decided_kind(self) -> Kind | None:
        """What the authenticator is; None if none is configured."""
        return self.kind or next((kind for kind, needed in NEEDED.items() if needed in self.kinds_given), None)

    @property
    def kinds_given(self) -> list[str]:
        """Those settings that are there and ask for a kind."""
        return [name for name in dict.fromkeys(NEEDED.values()) if operator.attrgetter(name)(self)]


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


THIS_MACHINE: Final = ("127.0.0.0/8", "::1", "local")


class ThrottleSettings(_Settings, frozen=True):
    """What is done about those who guess passwords (docs/access.md)."""

    failures: NotNegativeCount = 5
    """So many refused logins of one address (of IPv6, one /64) or one user within `throttle.window` make further ones
    wait. 0: none ever does."""
    window: Positive = 60.0
    """Seconds. Once they wait, it takes so long without a refusal until they do not any more."""
    delay: Positive = 1.0
    """How long the first of them waits; each further refusal doubles it."""
    max_delay: Positive = 10.0
    """The longest wait; at most half of `login_timeout`."""
    block: NotNegative = 300.0
    """How long an address whose wait would grow beyond that is refused with 28000. 0: it never is. A user never is."""
    exempt: list[str] = msgspec.field(default_factory=lambda: [*THIS_MACHINE])
    """Networks whose logins are neither counted nor held up; `local` is Unix sockets. This machine is exempt by itself:
    what comes from it without a PROXY header may be a balancer with all its clients."""
    max_entries: Annotated[int, Meta(ge=8, le=1 << 24)] = 65_536
    """How many addresses and users are remembered, of 48 bytes each; the oldest are forgotten first."""


class LogSettings(_Settings, frozen=True):
    """What is written to standard error."""

    format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object a line."""
    level: Level = "info"
    """The least that is written."""


class AuditSettings(_Settings, frozen=True):
    """A log that is neither filtered nor capped (docs/audit.md)."""

    file: str = ""
    """Where it goes: a file's path, `stdout`, `syslog`, or `syslog:/path` of another socket. Without it there is none.
    A file is made with mode 0600 and opened anew on SIGHUP."""
    required: bool = False
    """Whether logins are refused (57P03) while it cannot be written. Otherwise lines are lost, and counted."""
    statements: bool = False
    """Whether it has the SQL of clients' Query and Parse messages, with whatever stands in that."""
    max_statement: BoundedBytes = 65_536
    """Bytes of a statement; longer ones are cut."""


class ListenSettings(_Settings, frozen=True):
    """One listener."""

    address: str = ""
    proxy_protocol: bool = False

    def __str__(self) -> str:
        return f"{self.address} (PROXY protocol)" if self.proxy_protocol else self.address


class AdminSettings(_Settings, frozen=True):
    """What operators see of a running gateway."""

    listen: str = ""
    """Where metrics, health and the live page are served by HTTP (docs/admin.md): `host:port`, `:port`, `[v6]:port` or
    `unix:/path/to/socket`. Without it nothing is. It is not encrypted."""
    token: str = ""
    """What whoever looks at the live page must know, and who acts there: at least 16 characters, or `env:NAME` or
    `file:/path` that hold them. Without it the page is shown on loopback and Unix sockets alone, and nobody acts."""
    hosts: list[str] = []
    """Names of hosts by which that may be asked for, besides `localhost` and IP addresses."""
    database: str = "pgauthproxy"
    """The name of the database that is the admin console (docs/admin.md), for the gateway's own operating system user
    and root over Unix sockets, and for those below. Without a name there is no console."""
    users: dict[str, str] = {}
    """Who may look and act on the console: a mapping of name to SCRAM verifier (`pgauthproxy hash-password`), or to
    `env:NAME` or `file:/path` that hold one. For the same names `reserved_clients` are kept."""
    stats_users: dict[str, str] = {}
    """Who may look, and do nothing else."""


class Settings(_Settings, frozen=True):
    """All settings."""

    listen: list[str | ListenSettings] = msgspec.field(default_factory=lambda: list[str | ListenSettings]([":5432"]))
    """Where clients connect: `host:port`, `:port` (all interfaces), `[v6]:port`, `unix:/folder:port`, or a list of
    these. In the file one of a list may be a mapping, `{address: ":6432", proxy_protocol: true}`: there a load balancer
    says in a header of the PROXY protocol, version 1 or 2, where each client comes from (docs/access.md)."""
    proxy_protocol_from: list[str] = []
    """Networks of the load balancers that may do so, `local` for Unix sockets. Others are closed upon there."""
    allow: list[str] = []
    """Networks (`10.0.0.0/8`, `2001:db8::/32`, single addresses) that may connect; empty: all. Others are closed upon
    before a byte is read (docs/access.md). Unix sockets may always, unless `local` is in `deny`."""
    deny: list[str] = []
    """Networks that may not connect, whatever `allow` says; `local` is Unix sockets."""
    workers: Annotated[int, Meta(ge=1, le=64)] | Literal["auto"] = 1
    """How many processes serve. `auto`: one for each core that the gateway may use. More than one have a supervisor
    above them (docs/operations.md)."""
    worker_timeout: Positive = 30.0
    """How long one of several processes may show no sign of life before it is killed and replaced."""
    authenticator: AuthenticatorSettings = AuthenticatorSettings()
    tls: TlsSettings = TlsSettings()
    target: TargetSettings = TargetSettings()
    tcp: TcpSettings = TcpSettings()
    log: LogSettings = LogSettings()
    audit: AuditSettings = AuditSettings()
    throttle: ThrottleSettings = ThrottleSettings()
    admin: AdminSettings = AdminSettings()
    max_clients: Count = 10_000
    """Clients at once; more are refused with 53300. Lowered at start to what descriptors allow; with several workers
    each takes no more than it has descriptors for."""
    max_clients_per_user: NotNegativeCount = 0
    """The same for one user, as it logs in here (whatever it becomes at its target), once it has proved who it is.
    0: no limit of its own."""
    max_clients_per_address: NotNegativeCount = 0
    """The same for one address, of IPv6 for one /64. Unix sockets are not counted. 0: no limit of its own."""
    reserved_clients: NotNegativeCount = 0
    """How many of `max_clients` are kept for the users of `admin.users`."""
    max_logins: Count = 512
    """Logins in progress at once. When all are taken, the client that has said nothing for longest makes way; where all
    have said who they are, more are refused with 53300. Lowered at start to what descriptors allow."""
    login_timeout: Positive = 60.0
    """From accept to AuthenticationOk, all steps together."""
    cancel_timeout: Positive = 10.0
    """For passing on a cancel request."""
    user: str = ""
    """Who the gateway becomes once it listens, if root starts it. All that it reads (certificates, users file) must be
    readable for this user, and authenticators run as it."""
    group: str = ""
    """Its group there. Without it: the user's own."""
    core_dumps: bool = False
    """Whether processes may leave core dumps, and debuggers of their own user look into them. Both show credentials."""
    no_new_privs: bool = False
    """Linux: nothing that the gateway starts gets more rights than it has, by set-user-ID programs for example."""
    drain_timeout: NotNegative = 30.0
    """How long sessions may go on after SIGTERM or SIGINT. `forever`: until the last of them has ended."""
    max_session_seconds: NotNegative = 0.0
    """How long a session may live; then it ends with 57P01. 0: for ever. An authenticator may give a session less
    (`_META_SESSION_SECONDS`), not more. docs/sessions.md has more on this and the next two."""
    idle_timeout: NotNegative = 0.0
    """How long a session may idle outside a transaction; then it ends with 57P05. 0: for ever. The authenticator's word
    goes before (`_META_IDLE_TIMEOUT`)."""
    idle_in_transaction_timeout: NotNegative = 0.0
    """How long a session may idle in a transaction; then it ends with 25P03. 0: for ever. The authenticator's word goes
    before (`_META_IDLE_IN_TRANSACTION_TIMEOUT`)."""
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
    def listeners(self) -> tuple[ListenSettings, ...]:
        """`listen`, in one form."""
        return tuple(ListenSettings(address=each) if isinstance(each, str) else each for each in self.listen)

    @property
    def method(self) -> Method:
        """How clients prove who they are, in one word."""
        asked = self.authenticator
        if asked.cleartext_password:
            return asked.method or "cleartext"
        return asked.method or ("scram-sha-256" if asked.decided_kind == "users" else "md5")

    @property
    def oauth_issuer(self) -> str:
        """Who gives bearer tokens."""
        asked = self.authenticator
        links = (link.jwt.issuer for link in (asked, *asked.chain) if link.jwt.issuer)
        return asked.oauth.issuer or next(links, "")

    @property
    def tls_mode(self) -> str:
        """The mode of TLS with clients that is in force."""
        return self.tls.mode or ("allow" if self.tls.cert else "disable")


FIXED: Final = (
    "listen",
    "workers",
    "user",
    "group",
    "core_dumps",
    "no_new_privs",
    "backlog",
    "buffer_size",
    "pid_file",
    "admin",
    "audit.file",
    "audit.required",
    "throttle.max_entries",
)
"""Settings that a running gateway cannot change; a section is all that stands in it."""
SECRET_PATHS: Final = (
    "authenticator.scram_seed",
    "admin.token",
    "authenticator.ldap.bind_password",
    "authenticator.vault.token",
    "authenticator.vault.secret_id",
)
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
    def holds_structs(self) -> bool:
        """Whether it is a list or a mapping of what has settings of its own; as text it is YAML."""
        inner = get_args(self.type)[-1:]
        return bool(inner) and isinstance(inner[0], type) and issubclass(inner[0], msgspec.Struct)

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
        case "authenticator.oauth.issuer":
            return settings.oauth_issuer
        case "tls.mode":
            return settings.tls_mode
        case "target.tls.mode":
            return settings.target.tls.decided_mode
    value: object = settings
    for name in key.path.split("."):
        value = getattr(value, name)
    return value


def shown(key: Key, value: Any) -> str:
    """A setting's value as people may see it."""
    if value is None:
        return "(not set)"
    if value and key.path in SECRET_PATHS:
        return "***"
    if value == math.inf:
        return "forever"
    if isinstance(value, bool):
        return "true" if value else "false"
    if key.path == "authenticator.chain":
        return ", ".join(link.decided_kind or "nothing" for link in value)
    if isinstance(value, dict):
        return ", ".join(value)
    if isinstance(value, list):
        return ", ".join(map(_shown_item, value))
    return f"{value}"


def _shown_item(item: Any) -> str:
    if isinstance(item, str | ListenSettings):
        return str(item)
    return msgspec.json.encode(item).decode()


def conflicts(settings: Settings) -> Iterator[str]:
    """What does not go together, a line each."""
    if settings.authenticator.cleartext_password and settings.authenticator.method not in (None, "cleartext"):
        yield f"authenticator.cleartext_password: contradicts authenticator.method {settings.authenticator.method}"
    if any(each.proxy_protocol for each in settings.listeners) and not settings.proxy_protocol_from:
        yield "listen: proxy_protocol needs proxy_protocol_from"
    if settings.group and not settings.user:
        yield "group: needs user"
    if settings.throttle.max_delay < settings.throttle.delay:
        yield "throttle.max_delay: is less than throttle.delay"
    if settings.reserved_clients >= settings.max_clients:
        yield "reserved_clients: leaves nothing of max_clients"
    if settings.reserved_clients and not settings.admin.users:
        yield "reserved_clients: needs admin.users"
    if settings.tls_mode != "disable" and not settings.tls.cert:
        yield f"tls.mode: {settings.tls_mode} needs tls.cert and tls.key"
    if bool(settings.tls.cert) != bool(settings.tls.key):
        yield "tls.cert, tls.key: need each other"
    if settings.tls.client_cert != "none" and not settings.tls.client_ca:
        yield f"tls.client_cert: {settings.tls.client_cert} needs tls.client_ca"
    for name in ("required", "statements"):
        if getattr(settings.audit, name) and not settings.audit.file:
            yield f"audit.{name}: needs audit.file"
    for name in settings.admin.users.keys() & settings.admin.stats_users.keys():
        yield f"admin.stats_users: {name} is one of admin.users"
    yield from _authenticator_conflicts(settings.authenticator, "authenticator", settings.method)
    if settings.method == "cert" and (settings.tls_mode == "disable" or settings.tls.client_cert == "none"):
        yield "authenticator.method: cert needs TLS, and tls.client_cert optional or require"
    if settings.method == "oauth" and settings.tls_mode == "disable":
        yield "authenticator.method: oauth needs TLS"
    if settings.method == "oauth" and not settings.oauth_issuer:
        yield "authenticator.oauth.issuer: oauth needs it"


def _authenticator_conflicts(asked: AuthenticatorSettings, section: str, method: Method) -> Iterator[str]:
    kind, given = asked.decided_kind, asked.kinds_given
    needed = None if asked.kind is None else NEEDED.get(asked.kind)
    if needed is not None and needed not in given:
        yield f"{section}.kind: {asked.kind} needs {needed}"
    if asked.kind is None and "chain" not in given and len(given) > 1:
        yield f"{section}.kind: must say which, since {' and '.join(given)} are set"
    if kind == "users" and method == "oauth":
        yield f"{section}.kind: users knows no tokens, and authenticator.method is oauth"
    if kind == "ldap" and method != "cleartext":
        yield "authenticator.method: kind ldap needs cleartext: the directory takes nothing but the password itself"
    if kind == "jwt" and method not in ("cleartext", "oauth"):
        yield "authenticator.method: kind jwt needs cleartext or oauth, for the token to come as it is"
    if asked.workers.max < asked.workers.min:
        yield f"{section}.workers: max is less than min"
    for number, link in enumerate(asked.chain, 1):
        yield from _authenticator_conflicts(link, f"{section}.chain, {number}", method)
        if link.vault.address:
            yield f"{section}.chain, {number}.vault: stands beside chain, not in it"
