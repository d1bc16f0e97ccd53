"""The one place where the parts are put together: settings in, a gateway out."""

from pgauthproxy import _relay
from pgauthproxy.auth.command import CommandAuthenticator, CommandLimits
from pgauthproxy.auth.model import Authenticator
from pgauthproxy.config.load import authenticator_environment
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import AuthenticatorSaid, Sink
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.limits import Limits
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.gateway.target_leg import TargetPolicy, Targets
from pgauthproxy.net.dial import TcpOptions
from pgauthproxy.proto.target_login import TargetLimits


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
    policy = TargetPolicy(
        connect_timeout=target.connect_timeout,
        login_timeout=target.login_timeout,
        error_text=target.error_text,
        limits=TargetLimits(
            auth_request=target.max_auth_request,
            error=target.max_error,
            message=target.max_message,
            scram_iterations=target.max_scram_iterations,
        ),
        tcp=tcp_options(settings),
    )
    return Targets(policy, _relay.ForwardBuffer(settings.buffer_size))


def build_gateway(settings: Settings, sink: Sink) -> Gateway:
    """A gateway that serves nobody yet."""
    return Gateway(
        authenticator=build_authenticator(settings, sink),
        client=ClientPolicy(
            method="cleartext" if settings.authenticator.cleartext_password else "md5",
            max_startup_packet=settings.max_startup_packet,
            max_password_message=settings.max_password_message,
        ),
        targets=build_targets(settings),
        limits=Limits(settings.max_clients, settings.max_logins),
        login_timeout=settings.login_timeout,
        cancel_timeout=settings.cancel_timeout,
        close_timeout=settings.close_timeout,
        sink=sink,
    )
