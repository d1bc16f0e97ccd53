"""The one place where the parts are put together: settings in, a gateway out."""

import contextlib
import hashlib
import secrets
from pathlib import Path

import msgspec

from pgauthproxy import _relay
from pgauthproxy.auth.cache import CachedAuthenticator
from pgauthproxy.auth.chain import ChainAuthenticator
from pgauthproxy.auth.command import CommandAuthenticator, CommandLimits, SaidSink
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.auth.users import UsersAuthenticator, UsersPolicy
from pgauthproxy.auth.users_file import TlsFault
from pgauthproxy.auth.worker import WorkerAuthenticator, WorkerLimits
from pgauthproxy.config.load import authenticator_environment
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import AuthenticatorSaid, Noticed, Sink
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.limits import Limits
from pgauthproxy.gateway.paused import PausedClients
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.gateway.target_leg import TargetPolicy, Targets
from pgauthproxy.net.dial import TcpOptions
from pgauthproxy.net.listen import ListenError, parse_listen
from pgauthproxy.net.tls import CertificateFiles, ClientSide, TlsConfigError, build_target_context, fault_of, resolve
from pgauthproxy.proto.target_login import TargetLimits
from pgauthproxy.secret import Secret
from pgauthproxy.stages import TargetTls


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
    return CachedAuthenticator(found, cache.max_seconds, cache.max_entries) if cache.max_seconds else found


def _of_kind(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    """What these settings ask for; how clients prove themselves stands in the whole ones."""
    match settings.authenticator.decided_kind:
        case "command":
            return _command(settings, sink)
        case "users":
            return _users(settings, whole, sink)
        case "worker":
            return _worker(settings, sink)
        case "chain":
            return _chain(settings, sink)
        case None:
            raise AuthenticatorConfigError("authenticator.cmd: no authenticator is configured")


def _chain(settings: Settings, sink: Sink) -> ChainAuthenticator:
    links: list[tuple[str, Authenticator]] = []
    faults: list[str] = []
    for number, link in enumerate(settings.authenticator.chain, 1):
        alone = msgspec.structs.replace(settings, authenticator=link)
        try:
            links.append((f"{number} ({link.decided_kind})", _of_kind(alone, settings, sink)))
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
        fault_of_targets(whole),
        lambda level, what, facts: sink(Noticed(level, what, facts)),
    )


def fault_of_targets(settings: Settings) -> TlsFault:
    """Says what is wrong with a target's own TLS settings, on top of the configuration's; reads the files they name."""

    def fault(wishes: tuple[tuple[str, str], ...]) -> str | None:
        try:
            build_target_context(resolve(target_tls(settings), wishes))
        except AuthenticatorFault as error:
            return error.detail
        except TlsConfigError as error:
            return str(error)
        return None

    return fault


def build_targets(settings: Settings) -> Targets:
    """The way to targets, with the buffer that all sessions forward through."""
    return Targets(target_policy(settings), _relay.ForwardBuffer(settings.buffer_size))


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


def build_admission(settings: Settings, authenticator: Authenticator) -> Admission:
    """How clients are let in."""
    policy = ClientPolicy(
        method=settings.method,
        max_startup_packet=settings.max_startup_packet,
        max_password_message=settings.max_password_message,
        max_sasl_message=settings.max_sasl_message,
        tls_required=settings.tls_mode == "require",
    )
    return Admission(
        authenticator=authenticator,
        policy=policy,
        seed=_made_up_from(settings),
        scram_iterations=settings.authenticator.scram_iterations,
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


def examine(settings: Settings, sink: Sink) -> tuple[Authenticator | None, list[str]]:
    """The authenticator, which may be long to read, and what the settings ask for and the machine does not have.

    Faults are a line each; the sink gets what is only to be noted.
    """
    authenticator, faults = None, []
    for text in settings.listen:
        try:
            parse_listen(text)
        except ListenError as error:
            faults.append(str(error))
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
    return authenticator, faults


def build_gateway(settings: Settings, authenticator: Authenticator, sink: Sink, slot: int = 0) -> Gateway:
    """A gateway that serves nobody yet; `slot` is its place among several. Raises TlsConfigError."""
    targets = build_targets(settings)
    return Gateway(
        admission=build_admission(settings, authenticator),
        client_tls=build_client_tls(settings),
        targets=targets,
        paused=PausedClients(targets.buffer),
        limits=Limits(settings.max_clients, settings.max_logins),
        login_timeout=settings.login_timeout,
        cancel_timeout=settings.cancel_timeout,
        close_timeout=settings.close_timeout,
        sink=sink,
        keys=CancelKeys(slot),
    )
