"""The places that a supervisor has for workers, and the processes in them."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from pgauthproxy import program
from pgauthproxy.config.schema import Settings
from pgauthproxy.control import Channel
from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.service import Service
from pgauthproxy.whole import Part


@dataclass(eq=False, slots=True)
class Child:
    """A worker's process."""

    slot: int
    generation: int
    pid: int
    connection: socket.socket
    born: float
    successor: socket.socket
    """Leads to it, for whichever process takes its sessions over."""
    relatives: tuple[int, int]
    """The descriptors that lead to its predecessor and its successor, as it has them."""
    channel: Channel | None = None
    is_ready: bool = False
    part: Part | None = None
    was_paused: bool = False
    """When it began."""
    silent: int = 0
    """How many times in a row it was asked for a sign of life, or was not ready to be."""


def open_inbox() -> tuple[socket.socket, socket.socket]:
    """Where to read, and where to write. Each client that is passed on is one packet."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@dataclass(slots=True)
class Slot:
    """A place for a worker, with the sockets of whoever has it."""

    listening: list[StreamSocket]
    inbox: tuple[socket.socket, socket.socket] = field(default_factory=open_inbox)
    """Where its worker gets clients that others pass on, and where these write to (neighbours.py)."""
    child: Child | None = None
    deaths: int = 0
    retry: asyncio.TimerHandle | None = None
    predecessor: int = -1
    """Leads to the process whose sessions the first worker here is to take over."""


def open_slots(settings: Settings, count: int, listening: list[StreamSocket], service: Service) -> list[Slot]:
    """Places for so many workers. Raises ListenError.

    All sockets of an address must be opened by the same user, and some ports by root: here, before anything else.
    """
    # What a service manager has opened is its own: there is one for all.
    again = (lambda each: each) if service.descriptors else (lambda each: listen.open_again(each, settings.backlog))
    return [Slot(listening), *(Slot(list(map(again, listening))) for _ in range(count - 1))]


def start_worker(
    control: socket.socket, slot: Slot, inboxes: Sequence[int], ledger: int, relatives: tuple[int, int]
) -> int:
    """Starts this program as a worker; its process's number. It inherits these descriptors, and no others.

    Raises OSError.
    """
    shared = [control.fileno(), *(each.fileno() for each in slot.listening), slot.inbox[0].fileno(), *inboxes]
    shared += (descriptor for descriptor in (ledger, *relatives) if descriptor >= 0)
    return program.start(["worker", str(control.fileno())], shared, os.environ)


def kill(child: Child) -> None:
    """Ends it at once."""
    # It is not collected yet, so that its number is its own.
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
