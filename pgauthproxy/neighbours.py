"""Clients that the kernel has sent to a worker that has more than others, and who are passed on.

With SO_REUSEPORT the kernel deals connections out by a hash: as evenly as coins fall, and a worker that was replaced
begins with none while the others keep theirs. So a worker that has clearly more clients than another gives it what it
accepts, before a byte is read.

Strategy: the supervisor keeps a socket pair for each worker, its inbox, into which all others write. An inbox outlives
its worker, as the listening sockets do: what waits in it is served by the successor. Who has how many stands in the
counts that all share; one that does not accept is sent nothing.
"""

import array
import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from pgauthproxy._ledger import Ledger
from pgauthproxy.net import sockets

SLACK: Final = 2
"""So many clients more than another, and one eighth of them, are no reason."""
EIGHTH: Final = 3
SAID: Final = struct.Struct("=?B")
"""What goes with a connection: whether it begins with a header of the PROXY protocol, and its family."""
INT_BYTES: Final = array.array("i").itemsize
Accepted = Callable[[socket.socket, Any, bool], None]


class Neighbours:
    """What one worker has to do with the others, from `open` to `close`.

    `inbox` is its own; `inboxes` are what one writes to for each worker, and `ledger_slots` the places in which these
    count. `number` says which it is itself.
    """

    def __init__(
        self, ledger: Ledger, number: int, inbox: socket.socket, inboxes: Sequence[int], ledger_slots: Sequence[int]
    ) -> None:
        inbox.setblocking(False)
        self._ledger = ledger
        self._own_slot = ledger_slots[number]
        self._inbox = inbox
        self._others: list[tuple[int, socket.socket]] = []
        for slot, descriptor in zip(ledger_slots, inboxes, strict=True):
            other = socket.socket(fileno=descriptor)
            other.setblocking(False)
            if slot != self._own_slot:
                self._others.append((slot, other))
            else:
                other.close()

    def open(self, accepted: Accepted) -> None:
        """Takes what others pass on."""
        self._ledger.accept(True)
        asyncio.get_running_loop().add_reader(self._inbox, self._take, accepted)

    def refuse(self) -> None:
        """Is sent nothing more; what is on its way is still taken."""
        self._ledger.accept(False)

    def close(self) -> None:
        """What is still in the inbox is for the successor."""
        self._ledger.accept(False)
        if self._inbox.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._inbox)
            self._inbox.close()
        for _, other in self._others:
            other.close()
        self._others.clear()

    def pass_on(self, connection: socket.socket, proxied: bool) -> bool:
        """Whether another one has it now: then it is closed here."""
        load = self._ledger.load
        own = load(self._own_slot)
        most = own - SLACK - (own >> EIGHTH)
        least: socket.socket | None = None
        for slot, other in self._others:
            if 0 <= (found := load(slot)) < most:
                least, most = other, found
        if least is None:
            return False
        try:
            socket.send_fds(least, [SAID.pack(proxied, connection.family)], [connection.fileno()])
        except OSError:
            # Its inbox is full, or no descriptor is left: then it stays here.
            return False
        connection.close()
        return True

    def _take(self, accepted: Accepted) -> None:
        """Takes one: in a crowd all others get their turn before the next."""
        try:
            space = socket.CMSG_SPACE(INT_BYTES)
            said, ancillary, _, _ = self._inbox.recvmsg(SAID.size, space, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            # The process that has it too was faster.
            return
        if not said:
            # Supervisor and workers are gone: nobody is left who could pass anything on.
            asyncio.get_running_loop().remove_reader(self._inbox)
            return
        proxied, family = SAID.unpack(said)
        for _, _, passed in ancillary:
            (descriptor,) = array.array("i", passed)
            connection = sockets.make(family, descriptor)
            try:
                peer = connection.getpeername()
            except OSError:
                # It is gone again.
                connection.close()
            else:
                accepted(connection, peer, proxied)
