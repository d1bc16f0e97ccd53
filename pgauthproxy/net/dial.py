"""Dialling: from a target's address to a connected transport. Socket options of both sides stand here too."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from pgauthproxy.stages import Address

# macOS has it under another name.
KEEPALIVE_IDLE: Final[int] = getattr(socket, "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE")
P = TypeVar("P", bound=asyncio.BaseProtocol)


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """Keepalive in seconds, seconds and probes; `user_timeout` in seconds, 0 leaves it to the system."""

    keepalive_idle: int
    keepalive_interval: int
    keepalive_count: int
    user_timeout: float


class DialError(Exception):
    """Nobody could be reached there; the text says what was tried."""


def tune(connection: socket.socket, options: TcpOptions) -> None:
    """Sets keepalive, and that small messages go out at once; what is accepted inherits it from its listener.

    Unix sockets need neither.
    """
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE, options.keepalive_idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, options.keepalive_interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, options.keepalive_count)
    if options.user_timeout and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.user_timeout * 1000))


async def resolve(address: Address, seconds: float) -> list[Address]:
    """The addresses behind a name, in the resolver's order; a folder or IP address is its own. Raises DialError."""
    if address.is_socket_folder or _is_ip(address.host):
        return [address]
    try:
        async with asyncio.timeout(seconds):
            found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise DialError(f"{address}: no answer to the name's look-up in {seconds:g} s") from None
    except OSError as error:
        raise DialError(f"{address}: {error.strerror or error}") from None
    except UnicodeError:
        # Of the encoding that names of hosts have: a label that is empty, or too long.
        raise DialError(f"{address}: not a name that a host can have") from None
    return list(dict.fromkeys(Address(str(where[0]), int(where[1])) for _, _, _, _, where in found))


def _is_ip(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        return False
    return True


async def connect(address: Address, protocol: Callable[[], P], seconds: float, options: TcpOptions) -> P:
    """Connects to one address that `resolve` gave. Raises DialError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            if address.is_socket_folder:
                path = f"{address.host}/.s.PGSQL.{address.port}"
                transport, made = await loop.create_unix_connection(protocol, path)
            else:
                transport, made = await loop.create_connection(protocol, address.host, address.port)
    except TimeoutError:
        raise DialError(f"{address}: no connection in {seconds:g} s") from None
    except OSError as error:
        raise DialError(f"{address}: {error.strerror or error}") from None
    handle = transport.get_extra_info("socket")
    # uvloop's own object duplicates the descriptor for each option.
    connection = socket.socket(handle.family, handle.type, handle.proto, fileno=handle.fileno())
    try:
        tune(connection, options)
    finally:
        connection.detach()
    return made


def is_private(address: Address) -> bool:
    """Whether nobody else can read what goes there: a Unix socket, or loopback (of an address that `resolve` gave)."""
    return address.is_socket_folder or address.host == "::1" or address.host.startswith("127.")
