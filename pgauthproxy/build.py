"""The one place where the parts are put together: settings in, a gateway out."""

import hashlib
import secrets
from pathlib import Path

from pgauthproxy import _relay
from pgauthproxy.auth.command import CommandAuthenticator, CommandLimits, missing_command
from pgauthproxy.auth.model import Authenticator
from pgauthproxy.config.load import authenticator_environment
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import AuthenticatorSaid, Sink
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.limits import Limits
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.gateway.target_leg import TargetPolicy, Targets
from pgauthproxy.net.dial import TcpOptions
from pgauthproxy.net.listen import ListenError, parse_listen
from pgauthproxy.net.tls import CertificateFiles, ClientSide, TlsConfigError, build_target_context, fault_of
from pgauthproxy.proto.target_login import TargetLimits
from pgauthproxy.secret import Secret
from pgauthproxy.stages import TargetTls


def tcp_options(settings: Settings) -> TcpOptions:
    """The options of sockets on both sides."""
    tcp = settings.tcp
    return TcpOptions(tcp.keepalive_idle, tcp.keepalive_interval, tcp.keepalive_count, tcp.user_timeout)


def build_authenticator(settings: Settings, sink: Sink) -> Authenticator:
    """The authenticator that the settings ask for."""
    wanted = settings.authenticator
    limits = CommandLimits(
        timeout=wanted.timeout,
        grace=wanted.grace,
        max_parallel=wanted.max_parallel,
        max_output=wanted.max_output,
        max_lines=wanted.max_output_lines,
        max_errors=wanted.max_errors,
    )
    return CommandAuthenticator(
        wanted.cmd,
        authenticator_environment(settings),
        limits,
        lambda session, lines, dropped: sink(AuthenticatorSaid(session, lines, dropped)),
    )


def build_targets(settings: Settings) -> Targets:
    """The way to targets, with the buffer that all sessions forward through."""
    target = settings.target
    major, minor = map(int, target.protocol.split("."))
    policy = TargetPolicy(
        connect_timeout=target.connect_timeout,
        login_timeout=target.login_timeout,
        error_text=target.error_text,
        version=major << 16 | minor,
        tls=target_tls(settings),
        limits=TargetLimits(
            auth_request=target.max_auth_request,
            error=target.max_error,
            message=target.max_message,
            scram_iterations=target.max_scram_iterations,
        ),
        tcp=tcp_options(settings),
    )
    return Targets(policy, _relay.ForwardBuffer(settings.buffer_size))


def target_tls(settings: Settings) -> TargetTls:
    """TLS with targets, where the authenticator says nothing else."""
    tls = settings.target.tls
    return TargetTls(tls.mode, tls.ca, tls.cert, tls.key, tls.negotiation, tls.name)


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


def build_admission(settings: Settings, sink: Sink) -> Admission:
    """How clients are let in."""
    policy = ClientPolicy(
        method=settings.method,
        max_startup_packet=settings.max_startup_packet,
        max_password_message=settings.max_password_message,
        max_sasl_message=settings.max_sasl_message,
        tls_required=settings.tls_mode == "require",
    )
    return Admission(
        authenticator=build_authenticator(settings, sink),
        policy=policy,
        seed=_made_up_from(settings),
        scram_iterations=settings.authenticator.scram_iterations,
    )


def _made_up_from(settings: Settings) -> Secret:
    """The secret that the salts of refused users are made from: as stable as the operator has made it."""
    if settings.authenticator.scram_seed:
        return Secret(settings.authenticator.scram_seed.encode())
    if settings.tls_mode != "disable":
        return Secret(hashlib.sha256(Path(settings.tls.key).read_bytes()).digest())
    return Secret(secrets.token_bytes(32))


def faults_of(settings: Settings) -> list[str]:
    """What the settings ask for and the machine does not have, a line each."""
    faults = []
    for text in settings.listen:
        try:
            parse_listen(text)
        except ListenError as error:
            faults.append(str(error))
    argv = settings.authenticator.cmd
    if not argv:
        faults.append("authenticator.cmd: no authenticator is configured")
    elif (missing := missing_command(argv)) is not None:
        faults.append(f"authenticator.cmd: {missing}")
    try:
        build_client_tls(settings)
    except TlsConfigError as error:
        faults.append(f"tls: {error}")
    if fault := fault_of(target_tls(settings)):
        faults.append(f"target.tls: {fault}")
    elif settings.target.tls.mode != "disable":
        try:
            build_target_context(target_tls(settings))
        except TlsConfigError as error:
            faults.append(f"target.tls: {error}")
    return faults


def build_gateway(settings: Settings, sink: Sink) -> Gateway:
    """A gateway that serves nobody yet. Raises TlsConfigError."""
    return Gateway(
        admission=build_admission(settings, sink),
        client_tls=build_client_tls(settings),
        targets=build_targets(settings),
        limits=Limits(settings.max_clients, settings.max_logins),
        login_timeout=settings.login_timeout,
        cancel_timeout=settings.cancel_timeout,
        close_timeout=settings.close_timeout,
        sink=sink,
    )
