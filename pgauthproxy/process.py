"""What every process of the gateway has to see to, apart from what it serves: signals, descriptors, leaks."""

import asyncio
import os
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from pgauthproxy import _spawn
from pgauthproxy.build import tcp_options
from pgauthproxy.config.schema import AuthenticatorSettings, Settings
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.net import listen
from pgauthproxy.net.dial import tune
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops.privileges import hide_memory
from pgauthproxy.reload import OneAtATime, warn_of_cleartext
from pgauthproxy.service import Service

DESCRIPTORS_FOR_ITSELF: Final = 64
DESCRIPTORS_FOR_OPERATORS: Final = 68
DESCRIPTORS_OF_A_SESSION: Final = 2
DESCRIPTORS_OF_AN_AUTHENTICATOR: Final = 10
TellWhy = Callable[[tuple[str, object]], object]


def hear_signals(drain: TellWhy, end_now: TellWhy, reloading: OneAtATime, service: Service) -> None:
    """SIGTERM and SIGINT drain at first, and end at once when one comes again; SIGHUP reloads.

    The service manager is told of reloads.
    """
    heard: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        heard.append(number)
        (drain if len(heard) == 1 else end_now)(("signal", number.name))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)

    def reload() -> None:
        service.reloading()
        reloading.ask()

    reloading.when_done = service.ready
    loop.add_signal_handler(signal.SIGHUP, reload)


def hear_no_more() -> None:
    """Whoever asks for an end now is getting it. The loop, as it closes, would leave the signal to the kernel."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2))


def announce(settings: Settings, listening: Sequence[StreamSocket], sink: Sink) -> None:
    """Tells where clients may connect now."""
    for each in listening:
        sink(Noticed("info", "listening", (("address", listen.describe(each)),)))
    warn_of_cleartext(settings, listening, sink)


def ignore_warnings() -> None:
    """What libraries tell their developers, of a certificate that a peer shows say, is nothing for the log."""
    warnings.simplefilter("ignore")


def prepare_process(*, core_dumps: bool) -> None:
    """Closes what credentials could leak through, and raises the limit on descriptors."""
    _spawn.keep_descriptors_private()
    if not core_dumps:
        hide_memory()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_listeners(settings: Settings, inherited: Sequence[int] = ()) -> list[StreamSocket]:
    """Binds everything that is to be listened on, or nothing, unless these descriptors are it. Raises ListenError."""
    fill_standard_descriptors()
    opened: list[StreamSocket] = []
    addresses = [(listen.parse_listen(each.address), each.proxy_protocol) for each in settings.listeners]
    try:
        opened += map(listen.take_over, inherited)
        for listening in opened:
            listening.proxy_protocol = any(is_so and listen.is_at(listening, where) for where, is_so in addresses)
        for address, is_so in addresses if not inherited else ():
            opened += listen.open_sockets(address, settings.backlog, proxy_protocol=is_so)
    except listen.ListenError:
        for listening in opened:
            listening.close()
        raise
    for listening in opened:
        # What is accepted inherits it.
        tune(listening, tcp_options(settings))
    return opened


def fill_standard_descriptors() -> None:
    """Descriptors 0 to 2 are open from here on, so that no socket ever gets one of these numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def fitting(settings: Settings, sink: Sink, *, is_only: bool = True) -> tuple[Settings, int]:
    """The settings with no more clients and logins than there are descriptors for; and how many clients that are.

    A login that has not named itself holds one; there may be max_logins of them besides the clients. `is_only`: whether
    this process is the whole gateway; the clients of another are no matter of its descriptors.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return settings, settings.max_clients
    reserved = DESCRIPTORS_FOR_OPERATORS if settings.admin.listen else 0
    free = descriptors - DESCRIPTORS_FOR_ITSELF - reserved - _descriptors_of(settings.authenticator)
    if settings.max_clients * DESCRIPTORS_OF_A_SESSION + settings.max_logins <= free:
        return settings, settings.max_clients
    max_logins = min(settings.max_logins, max(1, free // 4))
    own_clients = min(settings.max_clients, max(1, (free - max_logins) // DESCRIPTORS_OF_A_SESSION))
    max_clients = own_clients if is_only else settings.max_clients
    if own_clients < max_clients:
        own = (("clients", own_clients), ("descriptors", descriptors))
        sink(Noticed("warning", "this worker has descriptors for fewer than max_clients", own))
    for name, fitting, asked_for in (
        ("max_clients", max_clients, settings.max_clients),
        ("max_logins", max_logins, settings.max_logins),
    ):
        if fitting < asked_for:
            facts = ((name, fitting), ("asked_for", asked_for), ("descriptors", descriptors))
            sink(Noticed("warning", f"{name} lowered to what the limit on descriptors allows", facts))
    return msgspec.structs.replace(settings, max_clients=max_clients, max_logins=max_logins), own_clients


def _descriptors_of(asked: AuthenticatorSettings) -> int:
    """What an authenticator holds at most."""
    match asked.decided_kind:
        case "http":
            return asked.http.max_in_flight
        case "chain":
            return sum(map(_descriptors_of, asked.chain))
        case _:
            return DESCRIPTORS_OF_AN_AUTHENTICATOR * asked.max_parallel
