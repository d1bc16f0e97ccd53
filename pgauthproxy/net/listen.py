"""Listening: addresses as operators write them, and an accept loop that running out of descriptors cannot spin."""

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pgauthproxy.net import sockets
from pgauthproxy.net.sockets import StreamSocket

PAUSE_SECONDS: Final = 0.5
OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
UNIX_PREFIX: Final = "unix:"
MAX_PORT: Final = 65_535
LOCAL_CLIENT: Final = "[local]"
MAPPED_PREFIX: Final = "::ffff:"


class ListenError(Exception):
    """An address that cannot be listened on; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """`host` is empty for all interfaces; `folder` is set for a Unix socket.

    Its `name` is the one that PostgreSQL's clients know, unless it is given; `mode` says who may connect.
    """

    host: str
    port: str
    folder: str = ""
    name: str = ""
    mode: int = 0o777

    @property
    def socket_path(self) -> str:
        return os.path.join(self.folder, self.name or f".s.PGSQL.{self.port}")


def parse_listen(text: str) -> ListenAddress:
    """Reads `host:port`, `:port`, `[v6]:port` or `unix:/folder:port`; a port may be a service's name."""
    if text.startswith(UNIX_PREFIX):
        folder, _, port = text.removeprefix(UNIX_PREFIX).rpartition(":")
        if not folder.startswith("/") or not port.isdigit():
            raise ListenError(f"listen: {text}: a Unix socket is written unix:/path/to/folder:5432")
        return ListenAddress("", port, folder)
    matched = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([^:]+)", text)
    if matched is None:
        raise ListenError(f"listen: {text}: an address is written host:port, :port or [v6]:port")
    # The resolver would take it modulo 65536.
    if matched[3].isdecimal() and int(matched[3]) > MAX_PORT:
        raise ListenError(f"listen: {text}: a port is at most {MAX_PORT}")
    return ListenAddress(matched[1] or matched[2] or "", matched[3])


def parse_admin_listen(text: str) -> ListenAddress:
    """Reads `host:port`, `:port`, `[v6]:port` or `unix:/path/to/socket`. Raises ListenError."""
    if text.startswith(UNIX_PREFIX):
        folder, name = os.path.split(text.removeprefix(UNIX_PREFIX))
        if not folder.startswith("/") or not name:
            raise ListenError(f"listen: {text}: a Unix socket is written unix:/path/to/socket")
        return ListenAddress("", "", folder, name, 0o660)
    return parse_listen(text)


def open_sockets(address: ListenAddress, backlog: int, *, proxy_protocol: bool = False) -> list[StreamSocket]:
    """Binds and listens; several sockets for a name with several addresses. Raises ListenError."""
    opened = _open(address, backlog)
    for listening in opened:
        listening.proxy_protocol = proxy_protocol
    return opened


def _open(address: ListenAddress, backlog: int) -> list[StreamSocket]:
    try:
        if address.folder:
            return [_open_unix(address, backlog)]
        if not address.host:
            return [_open_all_interfaces(address, backlog)]
        return _open_named(address, backlog)
    except (OSError, OverflowError) as error:
        where = address.socket_path if address.folder else f"{address.host}:{address.port}"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ListenError(f"listen: {where}: {reason}") from error


def _open_named(address: ListenAddress, backlog: int) -> list[StreamSocket]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[StreamSocket] = []
    try:
        for family, where in dict.fromkeys((family, where) for family, _, _, _, where in found):
            opened.append(_open_tcp(family, where, backlog, v6_only=True))
    except OSError:
        for listening in opened:
            listening.close()
        raise
    return opened


def _open_all_interfaces(address: ListenAddress, backlog: int) -> StreamSocket:
    """One socket for both address families, or for IPv4 alone where there is no other."""
    port = int(address.port) if address.port.isdigit() else socket.getservbyname(address.port, "tcp")
    if socket.has_dualstack_ipv6():
        return _open_tcp(socket.AF_INET6, ("::", port), backlog, v6_only=False)
    return _open_tcp(socket.AF_INET, ("0.0.0.0", port), backlog, v6_only=False)  # noqa: S104 (asked for)


def _open_tcp(family: int, where: object, backlog: int, *, v6_only: bool, shares: bool = False) -> StreamSocket:
    listening = sockets.make(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        listening.bind(where)  # type: ignore[arg-type]  # an address as getaddrinfo gives it
        listening.listen(backlog)
    except BaseException:
        listening.close()
        raise
    return listening


def _open_unix(address: ListenAddress, backlog: int) -> StreamSocket:
    """Like PostgreSQL's, that for clients may be used by everybody: who gets in is decided at login."""
    path = address.socket_path
    _remove_stale(path)
    listening = sockets.make(socket.AF_UNIX)
    try:
        listening.bind(path)
        os.chmod(path, address.mode)
        listening.listen(backlog)
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    """Removes a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def open_again(listening: StreamSocket, backlog: int) -> StreamSocket:
    """Another socket for the same address, to which the kernel sends a share of the connections. Raises ListenError.

    For a Unix socket there is no such thing: it is the same one. So `listening` must not be closed before the other.
    """
    if listening.family == socket.AF_UNIX:
        return listening
    v6_only = listening.family == socket.AF_INET6 and listening.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) != 0
    try:
        # Only now: whoever asked for it from the start would share a port with a stranger, and not be told.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened = _open_tcp(listening.family, listening.getsockname(), backlog, v6_only=v6_only, shares=True)
    except OSError as error:
        raise ListenError(f"listen: {describe(listening)}: {error.strerror}") from error
    opened.proxy_protocol = listening.proxy_protocol
    return opened


def take_over(descriptor: int, *, proxy_protocol: bool = False) -> StreamSocket:
    """A listening socket that was opened by somebody else. Raises ListenError if it is none."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as found:
            family = found.family
            listens = found.type == socket.SOCK_STREAM and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"listen: descriptor {descriptor} that was given: {error.strerror}") from error
    if not listens or not sockets.is_known(family):
        raise ListenError(f"listen: descriptor {descriptor} that was given is no socket that listens")
    taken = sockets.make(family, descriptor)
    taken.proxy_protocol = proxy_protocol
    return taken


def is_at(listening: StreamSocket, address: ListenAddress) -> bool:
    """Whether it listens there; of an address with a host, only if that is written as a number."""
    if listening.family == socket.AF_UNIX:
        return bool(address.folder) and listening.getsockname() == address.socket_path
    host, port = listening.getsockname()[:2]
    return not address.folder and address.port == str(port) and address.host in ("", host)


def remove_file(path: str) -> None:
    """Removes a Unix socket's file."""
    # It may be gone, or its folder not be ours to write: whoever listens there next removes what is stale.
    with contextlib.suppress(OSError):
        os.unlink(path)


def describe(listening: socket.socket) -> str:
    """The address as an operator would write it."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_local(listening: StreamSocket) -> bool:
    """Whether nobody but this machine reaches it; whom a load balancer brings may come from anywhere."""
    if listening.proxy_protocol:
        return False
    if listening.family == socket.AF_UNIX:
        return True
    host: str = listening.getsockname()[0]
    return host == "::1" or host.startswith("127.")


def close(listening: socket.socket) -> None:
    """Stops listening. A Unix socket's file is removed."""
    path = listening.getsockname() if listening.family == socket.AF_UNIX else ""
    listening.close()
    if path:
        remove_file(path)


class Listener:
    """Accepts on one socket and hands each connection on. States, in order: accepting or pausing, closed."""

    def __init__(
        self,
        listening: StreamSocket,
        accepted: Callable[[socket.socket, Any, bool], None],
        starved: Callable[[OSError], None],
        *,
        removes_file: bool = True,
    ) -> None:
        self._listening = listening
        self._accepted = accepted
        self._starved = starved
        self._path = listening.getsockname() if removes_file and listening.family == socket.AF_UNIX else ""
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._loop.add_reader(listening, self._accept)

    def _accept(self) -> None:
        """Takes one: in a crowd all others get their turn before the next."""
        try:
            connection, peer = sockets.accept(self._listening)
        except BlockingIOError:
            # That one client is gone again, or another process was faster.
            return
        except OSError as error:
            # Otherwise its reset came before its turn.
            if error.errno in OUT_OF_RESOURCES:
                self._pause(error)
            return
        self._accepted(connection, peer, self._listening.proxy_protocol)

    def _pause(self, error: OSError) -> None:
        """Leaves clients in the backlog for a while instead of being woken for each at once."""
        self._loop.remove_reader(self._listening)
        self._resume = self._loop.call_later(PAUSE_SECONDS, self._go_on)
        self._starved(error)

    def _go_on(self) -> None:
        self._resume = None
        self._loop.add_reader(self._listening, self._accept)

    def stop(self) -> None:
        """Stops accepting; the socket stays open, for whoever has it too."""
        if self._resume is not None:
            self._resume.cancel()
        else:
            self._loop.remove_reader(self._listening)

    def close(self) -> None:
        """Ends it. A Unix socket's file is removed, if that is to be done here."""
        self.stop()
        self._listening.close()
        if self._path:
            remove_file(self._path)


def address_of(peer: Any) -> str:
    """`ip:port`, `[v6]:port`, or `[local]` on a Unix socket, from what accept gave."""
    if not isinstance(peer, tuple):
        return LOCAL_CLIENT
    host, port = peer[:2]
    host = host.removeprefix(MAPPED_PREFIX)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
