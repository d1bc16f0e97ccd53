"""Dialling: from a target's address to a connected socket. Socket options of both sides stand here too."""

import asyncio
import errno
import os
import socket
from dataclasses import dataclass
from typing import Final

from pgauthproxy.net import sockets
from pgauthproxy.stages import Address

# macOS has it under another name.
KEEPALIVE_IDLE: Final[int] = getattr(socket, "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE")
BACKLOG_RETRY_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """Keepalive in seconds, seconds and probes; `user_timeout` in seconds, 0 leaves it to the system."""

    keepalive_idle: int
    keepalive_interval: int
    keepalive_count: int
    user_timeout: float


class DialError(Exception):
    """Nobody could be reached there; the text says what was tried."""


def tune(connection: socket.socket, options: TcpOptions, *, anew: bool = False) -> None:
    """Sets keepalive; what is accepted inherits it from its listener.

    Unix sockets need none. `anew`: it had other options before. That small messages go out at once (TCP_NODELAY) is
    seen to by the loop, whatever the listener has, and before a login has more than one to send.
    """
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE, options.keepalive_idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, options.keepalive_interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, options.keepalive_count)
    if (options.user_timeout or anew) and hasattr(socket, "TCP_USER_TIMEOUT"):
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


async def connect(address: Address, seconds: float, options: TcpOptions) -> socket.socket:
    """A non-blocking socket that is connected to one address that `resolve` gave. Raises DialError.

    It is the loop's only once it is connected: the loop's own way costs twice as much.
    """
    connection = sockets.make(_family(address))
    try:
        tune(connection, options)
        where = f"{address.host}/.s.PGSQL.{address.port}" if address.is_socket_folder else (address.host, address.port)
        error = connection.connect_ex(where)
        if error == errno.EINPROGRESS and _is_connected(connection):
            error = 0
        elif error in (errno.EINPROGRESS, errno.EAGAIN):
            async with asyncio.timeout(seconds):
                error = await _outcome(connection, where, error)
        if error:
            raise DialError(f"{address}: {os.strerror(error)}")
    except TimeoutError:
        connection.close()
        raise DialError(f"{address}: no connection in {seconds:g} s") from None
    except OSError as error:
        # Of the address itself: a path that is too long for a socket.
        connection.close()
        raise DialError(f"{address}: {error.strerror or error}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def _family(address: Address) -> socket.AddressFamily:
    if address.is_socket_folder:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


async def _outcome(connection: socket.socket, where: object, error: int) -> int:
    """The errno with which an attempt ends that was not decided at once; 0 if the connection stands."""
    while error == errno.EAGAIN:
        # The backlog of a Unix socket is full, and nothing tells when it no longer is.
        await asyncio.sleep(BACKLOG_RETRY_SECONDS)
        error = connection.connect_ex(where)  # type: ignore[arg-type]  # an address as its family has it
    if error == errno.EINPROGRESS:
        await _until_writable(connection)
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return error


def _is_connected(connection: socket.socket) -> bool:
    """Whether it is connected already, as it is at once where the target is on this machine."""
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


async def _until_writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()

    def told() -> None:
        loop.remove_writer(connection)
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(connection, told)
    try:
        await writable
    finally:
        loop.remove_writer(connection)


def is_private(address: Address) -> bool:
    """Whether nobody else can read what goes there: a Unix socket, or loopback (of an address that `resolve` gave)."""
    return address.is_socket_folder or address.host == "::1" or address.host.startswith("127.")
