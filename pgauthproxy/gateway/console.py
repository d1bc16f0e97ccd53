"""The admin console's door: who is let in, and who of them may do more than look.

A client asks for it by the name of a database. Over a Unix socket the gateway's own operating system user, and root,
are let in as they are: they could do worse. Everybody else proves to be one of the configuration's users, by SCRAM
whatever other clients do; where there are none the database is one like any other.
"""

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.client_leg import ClientLeg
from pgauthproxy.gateway.limits import too_many
from pgauthproxy.proto.console import ConsoleError, Parse, Result, Statement
from pgauthproxy.stages import Started

MAX_OPEN: Final = 32
"""Consoles at once. They count for no other limit once they are open."""
PEER_CREDENTIALS: Final = struct.Struct("iII")
NO_USER: Final = -1


class Admin(msgspec.Struct, frozen=True):
    """Whoever sits before a console. `session` is the console's own."""

    session: str
    address: str
    user: bytes
    may_act: bool


@dataclass(slots=True)
class Console:
    """The admin console of a process. `admission` is None where only Unix sockets lead to it."""

    database: bytes
    version: str
    admission: Admission | None
    users: frozenset[bytes]
    """Those that may act; whoever else is admitted may look."""
    parse: Parse
    perform: Callable[[Statement, Admin], Awaitable[Result | ConsoleError]]
    open: int = 0

    def is_meant(self, started: Started, uid: int) -> bool:
        """Whether a client asks for the console, and not for a database of that name. `uid` as `uid_of_peer` has it."""
        return started.database == self.database and (self.admission is not None or self._is_trusted(uid))

    async def let_in(self, started: Started, uid: int, client: ClientLeg, client_left: Callable[[], object]) -> Admin:
        """Raises Fault."""
        may_act = self._is_trusted(uid)
        if not may_act:
            assert self.admission is not None  # noqa: S101 (asked only if it is meant)
            await self.admission.admit(started, client, client_left)
            client.watch(None)
            may_act = started.user in self.users
        if self.open >= MAX_OPEN:
            raise too_many(f"{self.open} consoles")
        return Admin(started.accepted.session, started.accepted.address, started.user, may_act)

    @staticmethod
    def _is_trusted(uid: int) -> bool:
        return uid in (0, os.geteuid())


def uid_of_peer(connection: socket.socket) -> int:
    """The operating system's user at the other end of a Unix socket; NO_USER where that cannot be known."""
    option = getattr(socket, "SO_PEERCRED", None)
    if connection.family != socket.AF_UNIX or option is None:
        return NO_USER
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, option, PEER_CREDENTIALS.size)
    except OSError:
        return NO_USER
    uid: int = PEER_CREDENTIALS.unpack(credentials)[1]
    return uid
