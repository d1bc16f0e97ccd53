"""The one place where the parts are put together: settings in, a gateway out."""

import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy._ledger import Ledger
from pgauthproxy.auth import references
from pgauthproxy.auth.admins import AdminsAuthenticator
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.auth.networks import Networks
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import Sink, ignore
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
from pgauthproxy.kinds import build_authenticator, made_up_from, target_tls
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
        seed=made_up_from(settings),
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
        usual = build_admission(settings, AdminsAuthenticator(verifiers, made_up_from(settings)), throttle)
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
    return Ledger(fd, slot, *_ledger_sizes(settings))


def suits(ledger: Ledger, settings: Settings) -> bool:
    """Whether a ledger that was built for other settings would do."""
    return ledger.suits(*_ledger_sizes(settings))


def _ledger_sizes(settings: Settings) -> tuple[int, int]:
    return LEDGER_ENTRIES_OF_A_CLIENT * settings.max_clients, settings.throttle.max_entries


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
