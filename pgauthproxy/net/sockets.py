"""Stream sockets that know their family and type.

Python's own make a member of an enumeration of each, whenever they are asked; with ten questions a login that was a
twentieth of its cost.
"""

import socket
from typing import Final


class StreamSocket(socket.socket):
    """`proxy_protocol`, of a listener: whether those it accepts begin with a header that says who they are."""

    __slots__ = ("proxy_protocol",)
    proxy_protocol: bool


class _Tcp4(StreamSocket):
    __slots__ = ()
    family = socket.AF_INET
    type = socket.SOCK_STREAM


class _Tcp6(StreamSocket):
    __slots__ = ()
    family = socket.AF_INET6
    type = socket.SOCK_STREAM


class _Unix(StreamSocket):
    __slots__ = ()
    family = socket.AF_UNIX
    type = socket.SOCK_STREAM


# macOS has no such flag.
BORN_NON_BLOCKING: Final[int] = getattr(socket, "SOCK_NONBLOCK", 0)
_OF_FAMILY: Final[dict[int, type[StreamSocket]]] = {
    socket.AF_INET: _Tcp4,
    socket.AF_INET6: _Tcp6,
    socket.AF_UNIX: _Unix,
}


def is_known(family: int) -> bool:
    """Whether there are stream sockets of this family here."""
    return family in _OF_FAMILY


def make(family: int, descriptor: int | None = None) -> StreamSocket:
    """A non-blocking stream socket: a new one, or that of a descriptor, which it owns."""
    if descriptor is None and BORN_NON_BLOCKING:
        return _OF_FAMILY[family](family, socket.SOCK_STREAM | BORN_NON_BLOCKING)
    made = _OF_FAMILY[family](family, socket.SOCK_STREAM, 0, descriptor)
    made.setblocking(False)
    return made


def accept(listening: socket.socket) -> tuple[socket.socket, object]:
    """The next connection of a listener that `make` made, and its peer's address. Raises OSError."""
    descriptor, peer = listening._accept()  # type: ignore[attr-defined]  # what socket.accept calls
    return make(listening.family, descriptor), peer
