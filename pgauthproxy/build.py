"""The one place where the parts are put together: settings in, a gateway out."""

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy._ledger import Ledger
from pgauthproxy.auth import references
from pgauthproxy.auth.admins import AdminsAuthenticator
from pgauthproxy.auth.cache import CachedAuthenticator
from pgauthproxy.auth.calls import CallLimits
from pgauthproxy.auth.chain import ChainAuthenticator
from pgauthproxy.auth.command import CommandAuthenticator, CommandLimits, SaidSink
from pgauthproxy.auth.http import HttpAuthenticator, HttpLimits
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.auth.networks import Networks
from pgauthproxy.auth.python import PythonAuthenticator
from pgauthproxy.auth.targets import Target, TargetFault, build_target
from pgauthproxy.auth.users import UsersAuthenticator, UsersPolicy
from pgauthproxy.auth.worker import WorkerAuthenticator, WorkerLimits
from pgauthproxy.config.load import authenticator_environment
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import AuthenticatorSaid, Noticed, Sink, ignore
from pgauthproxy.gateway.access import Access, Denials
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.console import Admin, Console
from pgauthproxy.gateway.limits import Limits
from pgauthproxy.gateway.paused import PausedClients
from pgauthproxy.gateway.rules import SessionRules
from pgauthproxy.gateway.session import Gateway, Statements
from pgauthproxy.gateway.target_leg import TargetPolicy, Targets
from pgauthproxy.gateway.throttle import Throttle, ThrottleRules
from pgauthproxy.net.dial import TcpOptions
from pgauthproxy.net.listen import ListenError, parse_admin_listen, parse_listen
from pgauthproxy.net.tls import CertificateFiles, ClientSide, TlsConfigError, build_target_context, fault_of, resolve
from pgauthproxy.ops import outlets
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.proto import client_login, scram
from pgauthproxy.proto.console import ConsoleError, Parse, Result, Statement
from pgauthproxy.proto.target_login import TargetLimits
from pgauthproxy.release import version
from pgauthproxy.secret import Secret
from pgauthproxy.stages import TargetTls

LEDGER_ENTRIES_OF_A_CLIENT: Final = 8
"""A user's and an address's, four times over, so that they are found at once."""
LEAST_TOKEN: Final = 16
"""Characters of admin.token."""


def tcp_options(settings: Settings) -> TcpOptions:
    """The options of sockets on both sides."""
    tcp = settings.tcp
    return TcpOptions(tcp.keepalive_idle, tcp.keepalive_interval, tcp.keepalive_count, tcp.user_timeout)


def authenticator_part(settings: Settings) -> tuple[object, ...]:
    """All that an authenticator is made from: as long as it is equal, the authenticator need not be made anew."""
    return settings.authenticator, settings.method, seed_part(settings), target_tls(settings)


def seed_part(settings: Settings) -> tuple[str, ...]:
    """What the salts of refused users depend on."""
    key = settings.tls.key if settings.tls_mode != "disable" else ""
    return settings.authenticator.scram_seed, key


def build_authenticator(settings: Settings, sink: Sink) -> Authenticator:
    """The authenticator that the settings ask for, not started yet. Raises AuthenticatorConfigError."""
    cache = settings.authenticator.cache
    found = _of_kind(settings, settings, sink)
    if settings.authenticator.vault.address:
        found = _vault(settings, found, sink)
    return CachedAuthenticator(found, cache.max_seconds, cache.max_entries) if cache.max_seconds else found


def _of_kind(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    """What these settings ask for; how clients prove themselves stands in the whole ones."""
    match settings.authenticator.decided_kind:
        case "command":
            return _command(settings, sink)
        case "worker":
            return _worker(settings, sink)
        case "python":
            return _python(settings, sink)
        case "http":
            return _http(settings, sink)
        case "users":
            return _users(settings, whole, sink)
        case "ldap":
            return _ldap(settings, whole, sink)
        case "jwt":
            return _jwt(settings, whole, sink)
        case "chain":
            return _chain(settings, whole, sink)
        case None:
            raise AuthenticatorConfigError("authenticator.cmd: no authenticator is configured")


def _chain(settings: Settings, whole: Settings, sink: Sink) -> ChainAuthenticator:
    links: list[tuple[str, Authenticator]] = []
    faults: list[str] = []
    for number, link in enumerate(settings.authenticator.chain, 1):
        targets = settings.authenticator.targets | link.targets
        alone = msgspec.structs.replace(settings, authenticator=msgspec.structs.replace(link, targets=targets))
        try:
            links.append((f"{number} ({link.decided_kind})", _of_kind(alone, whole, sink)))
        except AuthenticatorConfigError as error:
            faults += (f"authenticator.chain, {number}: {fault}" for fault in error.faults)
    if faults:
        raise AuthenticatorConfigError(*faults)
    return ChainAuthenticator(links)


def _command(settings: Settings, sink: Sink) -> CommandAuthenticator:
    wanted = settings.authenticator
    limits = CommandLimits(
        timeout=wanted.timeout,
        grace=wanted.grace,
        max_parallel=wanted.max_parallel,
        max_output=wanted.max_output,
        max_lines=wanted.max_output_lines,
        max_errors=wanted.max_errors,
    )
    return CommandAuthenticator(wanted.cmd, authenticator_environment(settings), limits, _said(sink))


def _worker(settings: Settings, sink: Sink) -> WorkerAuthenticator:
    wanted = settings.authenticator
    limits = WorkerLimits(
        least=wanted.workers.min,
        most=wanted.workers.max,
        timeout=wanted.timeout,
        grace=wanted.grace,
        max_output=wanted.max_output,
        max_lines=wanted.max_output_lines,
    )
    return WorkerAuthenticator(wanted.cmd, authenticator_environment(settings), limits, _said(sink))


def _said(sink: Sink) -> SaidSink:
    """Passes on what an authenticator's process writes to its standard error."""
    return lambda session, lines, dropped: sink(AuthenticatorSaid(session, lines, dropped))


def _users(settings: Settings, whole: Settings, sink: Sink) -> UsersAuthenticator:
    return UsersAuthenticator(
        Path(settings.authenticator.users.file),
        UsersPolicy(whole.method, _made_up_from(whole), whole.authenticator.scram_iterations),
        target_fault(whole),
        lambda level, what, facts: sink(Noticed(level, what, facts)),
    )


def _ldap(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.ldap import LdapAuthenticator, LdapPolicy, Rule
    except ModuleNotFoundError as error:
        raise _missing("ldap", error) from None
    wanted = settings.authenticator.ldap

    def read_policy() -> LdapPolicy:
        return LdapPolicy(
            urls=tuple(wanted.url),
            start_tls=wanted.start_tls,
            allow_plain=wanted.allow_plain,
            ca=wanted.ca,
            user_dn=wanted.user_dn,
            base=wanted.base,
            filter=wanted.filter,
            scope=wanted.scope,
            bind_dn=wanted.bind_dn,
            bind_password=_secret_of("authenticator.ldap.bind_password", wanted.bind_password),
            name_attribute=wanted.name_attribute,
            group_filter=wanted.group_filter,
            timeout=wanted.timeout,
            max_parallel=wanted.max_parallel,
        )

    rules = [Rule(rule.target, rule.group, rule.filter) for rule in wanted.rules]
    return LdapAuthenticator(read_policy, rules, lambda: _named_targets(settings, whole), sink)


def _jwt(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.jwt import JwtAuthenticator, JwtPolicy, KeySource, Rule
    except ModuleNotFoundError as error:
        raise _missing("jwt", error) from None
    wanted = settings.authenticator.jwt
    source = KeySource(
        file=wanted.jwks_file,
        url=wanted.jwks_url,
        ca=wanted.jwks_ca,
        refresh=wanted.jwks_seconds,
        interval=wanted.jwks_min_seconds,
        timeout=wanted.jwks_timeout,
    )
    policy = JwtPolicy(
        algorithms=tuple(wanted.algorithms),
        issuer=wanted.issuer,
        audience=tuple(wanted.audience),
        leeway=wanted.leeway,
        required_claims=tuple(wanted.required_claims),
        max_token=wanted.max_token,
        user_claim=wanted.user_claim,
        user_is=wanted.user_is,
        end_with_token=wanted.end_with_token,
    )
    rules = [Rule(rule.target, rule.claim, rule.equals, rule.contains) for rule in wanted.rules]
    return JwtAuthenticator(source, policy, rules, lambda: _named_targets(settings, whole), sink)


def _vault(settings: Settings, inner: Authenticator, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.vault import VaultAuthenticator
        from pgauthproxy.auth.vault_client import VaultPolicy
    except ModuleNotFoundError as error:
        raise _missing("vault", error) from None
    wanted = settings.authenticator.vault

    def read_policy() -> VaultPolicy:
        return VaultPolicy(
            address=wanted.address,
            ca=wanted.ca,
            namespace=wanted.namespace,
            token=_secret_of("authenticator.vault.token", wanted.token),
            role_id=wanted.role_id,
            secret_id=_secret_of("authenticator.vault.secret_id", wanted.secret_id),
            approle_mount=wanted.approle_mount,
            timeout=wanted.timeout,
        )

    return VaultAuthenticator(read_policy, inner, sink)


def _missing(extra: str, error: ModuleNotFoundError) -> AuthenticatorConfigError:
    return AuthenticatorConfigError(
        f"authenticator.{extra}: needs the package {error.name}: pip install 'pgauthproxy[{extra}]'"
    )


def _secret_of(key: str, text: str) -> Secret:
    """A secret that is given by reference, or as it is. Raises AuthenticatorConfigError, which names the key."""
    try:
        return references.resolve(text)
    except AuthenticatorConfigError as error:
        raise AuthenticatorConfigError(f"{key}: {error}") from None


def _named_targets(settings: Settings, whole: Settings) -> dict[str, Target]:
    """The targets that rules may name. Raises AuthenticatorConfigError with all faults."""
    targets: dict[str, Target] = {}
    faults: list[str] = []
    for name, spec in settings.authenticator.targets.items():
        try:
            targets[name] = build_target(spec, target_fault(whole))
        except AuthenticatorConfigError as error:
            faults += (f"authenticator.targets.{name}.{fault}" for fault in error.faults)
    if faults:
        raise AuthenticatorConfigError(*faults)
    return targets


def target_fault(settings: Settings) -> TargetFault:
    """Says what is wrong with a target on top of the configuration: its own TLS settings, and where it borrows.

    Reads the files that it names.
    """

    def fault(target: Target) -> str | None:
        if target.borrows and not settings.authenticator.vault.address:
            return "password: a credential of vault: is asked for, and authenticator.vault.address is not set"
        if not target.tls:
            return None
        try:
            build_target_context(resolve(target_tls(settings), target.tls))
        except AuthenticatorFault as error:
            return f"tls: {error.detail}"
        except TlsConfigError as error:
            return f"tls: {error}"
        return None

    return fault


def _python(settings: Settings, sink: Sink) -> PythonAuthenticator:
    wanted = settings.authenticator
    return PythonAuthenticator(wanted.callable, CallLimits(wanted.timeout, wanted.grace, wanted.max_parallel), sink)


def _http(settings: Settings, sink: Sink) -> HttpAuthenticator:
    wanted = settings.authenticator
    limits = HttpLimits(wanted.timeout, wanted.http.max_in_flight, wanted.max_output)
    return HttpAuthenticator(wanted.http.url, wanted.http.headers, wanted.http.ca, limits, sink)


def build_targets(settings: Settings, sink: Sink = ignore) -> Targets:
    """The way to targets, with the buffer that all sessions forward through."""
    return Targets(target_policy(settings), _relay.ForwardBuffer(settings.buffer_size), sink)


def target_policy(settings: Settings) -> TargetPolicy:
    """How targets are reached."""
    target = settings.target
    major, minor = map(int, target.protocol.split("."))
    return TargetPolicy(
        connect_timeout=target.connect_timeout,
        login_timeout=target.login_timeout,
        error_text=target.error_text,
        version=major << 16 | minor,
        tls=target_tls(settings),
        warm=target.warm,
        limits=TargetLimits(
            auth_request=target.max_auth_request,
            error=target.max_error,
            message=target.max_message,
            scram_iterations=target.max_scram_iterations,
        ),
        tcp=tcp_options(settings),
    )


def target_tls(settings: Settings) -> TargetTls:
    """TLS with targets, where the authenticator says nothing else."""
    tls = settings.target.tls
    return TargetTls(tls.decided_mode, tls.ca, tls.cert, tls.key, tls.negotiation, tls.name)


def check_target_tls(settings: Settings) -> None:
    """Reads the files that TLS with targets takes by default. Raises TlsConfigError."""
    wanted = target_tls(settings)
    if fault := fault_of(wanted):
        raise TlsConfigError(fault)
    if wanted.mode != "disable":
        build_target_context(resolve(wanted, ()))


def build_client_tls(settings: Settings) -> ClientSide | None:
    """TLS with clients; None if there is none. Reads files, raises TlsConfigError."""
    tls = settings.tls
    if settings.tls_mode == "disable":
        return None
    return ClientSide(
        default=CertificateFiles(tls.cert, tls.key),
        hosts={name: CertificateFiles(host.cert, host.key) for name, host in tls.hosts.items()},
        client_ca=tls.client_ca,
        client_cert=tls.client_cert,
        min_version=tls.min_version,
        ciphers=tls.ciphers,
    )


def build_throttle(settings: Settings, ledger: Ledger, sink: Sink) -> Throttle | None:
    """How guessing is made slow; None if it is not."""
    wanted = settings.throttle
    if not wanted.failures:
        return None
    # A login that waits must still have time to be one.
    longest = min(wanted.max_delay, settings.login_timeout / 2)
    rules = ThrottleRules(wanted.failures, wanted.window, wanted.delay, longest, wanted.block)
    return Throttle(rules, Networks(tuple(wanted.exempt)), ledger, sink)


def build_admission(settings: Settings, authenticator: Authenticator, throttle: Throttle | None = None) -> Admission:
    """How clients are let in."""
    policy = ClientPolicy(
        method=settings.method,
        max_startup_packet=settings.max_startup_packet,
        max_password_message=settings.max_password_message,
        max_sasl_message=settings.max_sasl_message,
        tls_required=settings.tls_mode == "require",
        token_error=client_login.token_error(settings.oauth_issuer, settings.authenticator.oauth.scope),
    )
    return Admission(
        authenticator=authenticator,
        policy=policy,
        seed=_made_up_from(settings),
        scram_iterations=settings.authenticator.scram_iterations,
        throttle=throttle,
    )


def admin_token(settings: Settings) -> Secret | None:
    """What opens the live page, if anything does. Raises AuthenticatorConfigError."""
    if not settings.admin.token:
        return None
    try:
        token = references.resolve(settings.admin.token)
    except AuthenticatorConfigError as error:
        raise AuthenticatorConfigError(*(f"admin.token: {fault}" for fault in error.faults)) from None
    if len(token.reveal()) < LEAST_TOKEN or not token.reveal().isascii():
        raise AuthenticatorConfigError(f"admin.token: must be {LEAST_TOKEN} characters of ASCII or more")
    return token


def admin_verifiers(settings: Settings) -> tuple[dict[bytes, Secret], list[str]]:
    """The verifiers of all who may in at the admin console, and what is wrong with others'."""
    found: dict[bytes, Secret] = {}
    faults: list[str] = []
    for section, given in (("users", settings.admin.users), ("stats_users", settings.admin.stats_users)):
        for name, text in given.items():
            try:
                verifier = references.resolve(text)
            except AuthenticatorConfigError as error:
                faults += (f"admin.{section}: {name}: {fault}" for fault in error.faults)
                continue
            if scram.Verifier.parse(verifier.reveal()) is None:
                made = "pgauthproxy hash-password makes one"
                faults.append(f"admin.{section}: {name}: is not given a SCRAM-SHA-256 verifier: {made}")
            found[name.encode(errors="surrogateescape")] = verifier
    return found, faults


def build_console(
    settings: Settings,
    parse: Parse,
    perform: Callable[[Statement, Admin], Awaitable[Result | ConsoleError]],
    throttle: Throttle | None = None,
) -> Console | None:
    """The admin console, whose passwords are guessed no faster than others; None if there is none."""
    if not settings.admin.database:
        return None
    verifiers, _ = admin_verifiers(settings)
    admission = None
    if verifiers:
        usual = build_admission(settings, AdminsAuthenticator(verifiers, _made_up_from(settings)), throttle)
        policy = dataclasses.replace(usual.policy, method="scram-sha-256")
        admission = dataclasses.replace(usual, policy=policy)
    return Console(
        database=settings.admin.database.encode(errors="surrogateescape"),
        version=version(),
        admission=admission,
        users=frozenset(name.encode(errors="surrogateescape") for name in settings.admin.users),
        parse=parse,
        perform=perform,
    )


def with_lasting_seed(settings: Settings, seed: str) -> Settings:
    """The settings with a seed for the salts of refused users, if they would be made up by each process on its own."""
    if any(seed_part(settings)):
        return settings
    authenticator = msgspec.structs.replace(settings.authenticator, scram_seed=seed)
    return msgspec.structs.replace(settings, authenticator=authenticator)


def _made_up_from(settings: Settings) -> Secret:
    """The secret that the salts of refused users are made from: as stable as the operator has made it."""
    if settings.authenticator.scram_seed:
        return Secret(settings.authenticator.scram_seed.encode())
    if settings.tls_mode != "disable":
        # What is wrong with the key is told where TLS is set up with it.
        with contextlib.suppress(OSError):
            return Secret(hashlib.sha256(Path(settings.tls.key).read_bytes()).digest())
    return Secret(secrets.token_bytes(32))


def address_faults(settings: Settings) -> list[str]:
    """Addresses and networks that are none, a line each."""
    faults = []
    for each in settings.listeners:
        try:
            parse_listen(each.address)
        except ListenError as error:
            faults.append(str(error))
    for name, texts in (
        ("allow", settings.allow),
        ("deny", settings.deny),
        ("proxy_protocol_from", settings.proxy_protocol_from),
        ("throttle.exempt", settings.throttle.exempt),
    ):
        try:
            Networks(tuple(texts))
        except ValueError as error:
            faults.append(f"{name}: {error}")
    return faults


def examine(settings: Settings, sink: Sink) -> tuple[Authenticator | None, list[str]]:
    """The authenticator, which may be long to read, and what the settings ask for and the machine does not have.

    Faults are a line each; the sink gets what is only to be noted.
    """
    authenticator, faults = None, address_faults(settings)
    try:
        if settings.admin.listen:
            parse_admin_listen(settings.admin.listen)
    except ListenError as error:
        faults.append(f"admin.{error}")
    try:
        admin_token(settings)
    except AuthenticatorConfigError as error:
        faults += error.faults
    faults += admin_verifiers(settings)[1]
    try:
        authenticator = build_authenticator(settings, sink)
    except AuthenticatorConfigError as error:
        faults += error.faults
    try:
        build_client_tls(settings)
    except TlsConfigError as error:
        faults.append(f"tls: {error}")
    try:
        check_target_tls(settings)
    except TlsConfigError as error:
        faults.append(f"target.tls: {error}")
    if settings.audit.file and (fault := outlets.fault_of(settings.audit.file)):
        faults.append(f"audit.file: {fault}")
    return authenticator, faults


def build_audit(settings: Settings, complain: Sink) -> AuditSink | None:
    """The audit log, not opened yet; None if there is to be none."""
    audit = settings.audit
    if not audit.file:
        return None
    return AuditSink(outlets.outlet_of(audit.file), audit.file, required=audit.required, complain=complain)


def build_ledger(settings: Settings, fd: int = -1, slot: int = 0) -> Ledger:
    """The counts of the gateway: those of a memfd, seen from one worker's slot, or of this process alone."""
    entries = LEDGER_ENTRIES_OF_A_CLIENT * settings.max_clients
    return Ledger(fd, slot, entries=entries, failures=settings.throttle.max_entries)


def build_limits(settings: Settings, ledger: Ledger) -> Limits:
    """How many may be here at once."""
    return Limits(
        settings.max_clients,
        settings.max_logins,
        per_user=settings.max_clients_per_user,
        per_address=settings.max_clients_per_address,
        reserved=settings.reserved_clients,
        reserved_for=frozenset(map(os.fsencode, settings.admin.users)),
        ledger=ledger,
    )


def build_access(settings: Settings) -> Access:
    """Who may connect."""
    return Access(settings.allow, settings.deny, settings.proxy_protocol_from)


def build_rules(settings: Settings) -> SessionRules:
    """How long sessions may be here."""
    return SessionRules(settings.max_session_seconds, settings.idle_timeout, settings.idle_in_transaction_timeout)


def build_statements(settings: Settings, audit: AuditSink | None) -> Statements | None:
    """Who is told what clients send; None if nobody is."""
    if audit is None or not settings.audit.statements:
        return None
    return Statements(audit.statement, settings.audit.max_statement)


def build_gateway(
    settings: Settings,
    authenticator: Authenticator,
    sink: Sink,
    ledger: Ledger,
    audit: AuditSink | None = None,
    slot: int = 0,
) -> Gateway:
    """A gateway that serves nobody yet; `slot` is its place among several. Raises TlsConfigError."""
    targets = build_targets(settings, sink)
    return Gateway(
        admission=build_admission(settings, authenticator, build_throttle(settings, ledger, sink)),
        access=build_access(settings),
        denials=Denials(sink),
        client_tls=build_client_tls(settings),
        targets=targets,
        paused=PausedClients(targets.buffer),
        limits=build_limits(settings, ledger),
        rules=build_rules(settings),
        login_timeout=settings.login_timeout,
        cancel_timeout=settings.cancel_timeout,
        close_timeout=settings.close_timeout,
        sink=sink,
        keys=CancelKeys(slot),
        check_logins=None if audit is None else audit.check,
        statements=build_statements(settings, audit),
    )
