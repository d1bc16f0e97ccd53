"""Upgrade in place: a new process of the program that is installed by now takes over from this one.

Strategy:
- The new process reads the settings and starts its authenticator before anything else happens. Until it serves, this
  one can go on as if nothing had been.
- It gets the listening sockets, so that nobody is refused in between.
- Then it gets sessions, one by one: both sockets, what is known of them, and what was read from one side and could not
  be written to the other yet. How much that is, is asked once the transports are closed and write no more. So nothing
  can be lost or doubled.
- What an observer knows of a session goes along, be it in the middle of a message.
- A session that speaks TLS stays: its keys are in this process's memory. So does a login in progress, until it is done.
  The lease of a credential stays too, when its session moves (kept_leases.py).
  The admin console ends: it is the new process's to answer.
  This process lives for as long as it has any, and as long as that which it has itself taken over from.
- Logins that are paused are so in both, and go on in both.
- Both count in the same memory (shared_counts.py), so that limits and throttle hold for what is in either.
- A cancel request goes to whichever of the two has the session.
"""

import asyncio
import contextlib
import functools
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final

from pgauthproxy import program
from pgauthproxy.control import CancelAsked, CancelDone, CancelQuestions
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.gateway import cancel
from pgauthproxy.gateway.moving import HandedOver
from pgauthproxy.gateway.session import Gateway, Session
from pgauthproxy.kept_leases import KeptLeases, LeaseElsewhere
from pgauthproxy.link import (
    Hello,
    LeaseEnded,
    LeaseOver,
    Link,
    Resumed,
    Serving,
    TakeGateway,
    TakeListening,
    Taken,
    TakeSession,
    TakeSlot,
)
from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops.acts import Pause, Resume, act_on
from pgauthproxy.pid_file import PidFile, PidFileError
from pgauthproxy.stages import Lease

START_SECONDS: Final = 60.0
"""How long a new process may take until it could serve, and then until it does."""
FIRST_PAUSE_SECONDS: Final = 0.005
LONGEST_PAUSE_SECONDS: Final = 1.0
GROWTH: Final = 1.2
"""How often is looked for sessions that can be handed over by now."""
TAKE_OVER: Final = "take-over"
"""The command that the new process is started with."""


class Relatives:
    """The process that this one has taken over from, and the one that takes over from it, as far as there are any.

    Each may have sessions whose cancel requests come here.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._questions: dict[Link, CancelQuestions] = {}
        self._answering: set[asyncio.Task[object]] = set()
        self._kept: dict[Link, KeptLeases] = {}
        self._leased: dict[int, LeaseElsewhere] = {}
        gateway.ask_elsewhere = self.ask

    async def ask(self, key: bytes, besides: Link | None = None) -> tuple[str, str]:
        for link, questions in list(self._questions.items()):
            if link is not besides:
                found, outcome = await questions.ask(key, self._gateway.cancel_timeout)
                if found:
                    return found, outcome
        return "", cancel.NOBODYS

    def pause(self, link: Link) -> None:
        """Has logins wait here, as they do in the process at the other end, which is told when they may go on."""
        act_on(self._gateway, Pause())
        assert self._gateway.held is not None  # noqa: S101 (they wait)
        self.tell_resumed(link, self._gateway.held)

    def tell_resumed(self, link: Link, held: asyncio.Event) -> None:
        """Tells the process at the other end once these logins may go on."""
        self._do(self._tell_resumed(held, link))

    def keep(self, link: Link, session: int, lease: Lease) -> None:
        """Keeps the lease of a session that goes to the process at the other end."""
        kept = self._kept.setdefault(link, KeptLeases(self._gateway.give_back))
        kept.keep(session, lease, lambda: self._do(link.send(LeaseEnded(session))))

    def lost(self, link: Link, session: int) -> None:
        """The session did not get there."""
        if link in self._kept:
            self._kept[link].over(session)

    async def until_all_is_given_back(self) -> None:
        """Waits until no lease is kept for another process any more."""
        for kept in list(self._kept.values()):
            await kept.until_none()

    def _lease_of(self, handed: HandedOver, link: Link) -> LeaseElsewhere | None:
        if not handed.is_leased:
            return None

        async def tell_over() -> None:
            self._leased.pop(handed.number, None)
            await link.send(LeaseOver(handed.number))

        lease = self._leased[handed.number] = LeaseElsewhere(tell_over)
        return lease

    def _do(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _tell_resumed(self, held: asyncio.Event, link: Link) -> None:
        await held.wait()
        link.send_now(Resumed())

    async def attend(self, link: Link) -> None:
        """Answers a relative, and takes its sessions, until it is gone."""
        questions = self._questions[link] = CancelQuestions(link.send_now)
        try:
            while (received := await link.receive()) is not None:
                match received:
                    case CancelAsked() as asked, _:
                        self._do(self._answer(link, asked))
                    case CancelDone() as done, _:
                        questions.answered(done)
                    case Resumed(), _:
                        act_on(self._gateway, Resume())
                    case TakeSession(session), [client, target]:
                        lease = self._lease_of(session, link)
                        await Session.take_up(self._gateway, session, _connected(client), _connected(target), lease)
                    case TakeSession(session), descriptors:
                        # The kernel passes none where this process may have no more.
                        for descriptor in descriptors:
                            os.close(descriptor)
                        facts = (("session", f"{session.number:x}"), ("reason", "no descriptors are left for it"))
                        self._gateway.sink(Noticed("error", "session lost on its way here", facts))
                        if session.is_leased:
                            await link.send(LeaseOver(session.number))
                    case LeaseOver(number), _ if link in self._kept:
                        self._kept[link].over(number)
                    case LeaseEnded(number), _ if number in self._leased:
                        self._leased[number].end()
        finally:
            del self._questions[link]
            if link in self._kept:
                # Its sessions are gone with it.
                self._kept[link].over_all()
            questions.give_up("the other process is gone")
            link.close()

    async def _answer(self, link: Link, asked: CancelAsked) -> None:
        found, outcome = await self._gateway.cancel(asked.key)
        if not found:
            found, outcome = await self.ask(asked.key, link)
        link.send_now(CancelDone(asked.ticket, found, outcome))


def _connected(descriptor: int) -> socket.socket:
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(False)
    return connection


class UpgradeError(Exception):
    """The new process does not serve; the text says why."""


async def start_successor(
    words: Sequence[str],
    environment: dict[str, str],
    ledger: int,
    when_gone: Callable[[], object],
    workers: int = 0,
) -> tuple[int, Link]:
    """Starts the program that is installed by now; returns once it could serve. Raises UpgradeError.

    Nothing is left of it if this fails or is cancelled. It counts in this `ledger`, if there is one (not -1), and is a
    supervisor if it is to have `workers`. `when_gone` is called should it end before this process does.
    """
    if not hasattr(os, "pidfd_open"):
        raise UpgradeError("this system has no such thing")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(ours)
    with theirs:
        try:
            descriptors = [theirs.fileno(), *([ledger] if ledger >= 0 else [])]
            arguments = [*words, TAKE_OVER, str(theirs.fileno()), str(ledger), str(workers)]
            pid = program.start(arguments, descriptors, {**os.environ, **environment})
        except OSError as error:
            link.close()
            raise UpgradeError(f"it cannot be started: {error.strerror}") from None

    def collect() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        when_gone()

    when_exited(pid, collect)
    try:
        await expect(link, Hello)
    except BaseException:
        abandon(pid, link)
        raise
    return pid, link


async def offer_all(
    pid: int, link: Link, offer: Callable[[Link], Awaitable[object]], pid_file: PidFile, is_leaving: Callable[[], bool]
) -> None:
    """Has a successor that could serve do so, with what `offer` sends it. Raises UpgradeError: then it is no more.

    Nor is it if this is cancelled. If this process is told to leave meanwhile, so is the successor.
    """
    if is_leaving():
        abandon(pid, link)
        raise UpgradeError("this process is on its way out")
    pid_file.give_up()
    try:
        await offer(link)
        await expect(link, Serving)
    except UpgradeError:
        abandon(pid, link)
        # It may have the lock of the file.
        await until_exited(pid)
        with contextlib.suppress(PidFileError):
            pid_file.take()
        raise
    except BaseException:
        abandon(pid, link)
        raise
    if is_leaving():
        os.kill(pid, signal.SIGTERM)


async def hand_over(relatives: Relatives, gateway: Gateway, link: Link, sink: Sink) -> None:
    """Hands over what can be, and is the successor's relative for as long as that is there."""
    attending = asyncio.get_running_loop().create_task(relatives.attend(link))
    try:
        await _hand_over_sessions(relatives, gateway, link, lambda: not attending.done(), sink)
        await attending
    finally:
        attending.cancel()
        await asyncio.wait([attending])


async def expect(link: Link, frame: type[Hello] | type[Serving]) -> None:
    """Waits for a frame of this kind. Raises UpgradeError."""
    try:
        async with asyncio.timeout(START_SECONDS):
            received = await link.receive()
    except TimeoutError:
        raise UpgradeError(f"it does not serve after {START_SECONDS:g} s") from None
    if received is None or not isinstance(received[0], frame):
        raise UpgradeError("it has ended; what it said is above")


def abandon(pid: int, link: Link) -> None:
    """Ends a process that was to take over."""
    link.close()
    # Until it is collected its number is its own.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def when_exited(pid: int, call: Callable[[], object]) -> None:
    """Calls once the process has ended, if that is before this one does."""
    loop = asyncio.get_running_loop()
    try:
        exited = os.pidfd_open(pid)
    except ProcessLookupError:
        call()
        return

    def tell() -> None:
        loop.remove_reader(exited)
        os.close(exited)
        call()

    loop.add_reader(exited, tell)


async def until_exited(pid: int) -> None:
    """Waits until the process is gone, and with it what it has held: locks, sockets."""
    exited = asyncio.Event()
    when_exited(pid, exited.set)
    await exited.wait()


async def _hand_over_sessions(
    relatives: Relatives, gateway: Gateway, link: Link, is_there: Callable[[], bool], sink: Sink
) -> None:
    """Hands over all sessions that can be, some of them later; returns when there are none, or no successor: then
    those that are left go on here."""

    async def send(session: HandedOver, descriptors: tuple[int, int]) -> bool:
        return await link.send(TakeSession(session), descriptors)

    pause = FIRST_PAUSE_SECONDS
    while gateway.sessions and is_there():
        count = 0
        for session in list(gateway.sessions):
            session.leave_console()
            if session.can_move and is_there():
                # A session stays where it is for as long as the other process does not read.
                await link.until_writable()
            if not session.can_move or not is_there():
                continue
            try:
                is_sent = await session.hand_over(send, functools.partial(relatives.keep, link))
            except OSError:
                # No descriptor is free at the moment.
                break
            if not is_sent:
                sink(Noticed("error", "session lost: the new process is gone", (("session", session.id),)))
                relatives.lost(link, session.number)
                return
            count += 1
        if count:
            sink(Noticed("info", "sessions handed over", (("sessions", count), ("left", len(gateway.sessions)))))
        await asyncio.sleep(pause)
        pause = min(GROWTH * pause, LONGEST_PAUSE_SECONDS)


async def take_listening(link: Link) -> tuple[TakeListening, list[StreamSocket], list[StreamSocket]]:
    """Offers to take over; what is said to that, and the sockets for clients and operators. Raises UpgradeError."""
    await link.send(Hello())
    said, descriptors = await _receive(link, TakeListening)
    marks = (*said.proxy_protocol, *([False] * said.admin))
    marked = zip(descriptors, marks, strict=True)
    taken = [listen.take_over(descriptor, proxy_protocol=is_so) for descriptor, is_so in marked]
    clients = len(said.proxy_protocol)
    return said, taken[:clients], taken[clients:]


async def take_gateway(
    link: Link,
) -> tuple[TakeGateway, list[StreamSocket], list[tuple[list[StreamSocket], tuple[socket.socket, socket.socket], int]]]:
    """Offers to take over from a supervisor: what TakeGateway says, the sockets for operators, and for each slot its
    own with its inbox, and what leads to its worker, -1 if there is none. Raises UpgradeError."""
    await link.send(Hello())
    said, admin = await _receive(link, TakeGateway)
    slots = []
    for _ in range(said.slots):
        slot, descriptors = await _receive(link, TakeSlot)
        worker = descriptors.pop() if slot.has_worker else -1
        *descriptors, to_read, to_write = descriptors
        marked = zip(descriptors, slot.proxy_protocol, strict=True)
        listening = [listen.take_over(each, proxy_protocol=is_so) for each, is_so in marked]
        slots.append((listening, (socket.socket(fileno=to_read), socket.socket(fileno=to_write)), worker))
    return said, [listen.take_over(each) for each in admin], slots


async def _receive(link: Link, kind: type[Taken]) -> tuple[Taken, list[int]]:
    """The next frame, which must be of this kind, with its descriptors. Raises UpgradeError."""
    received = await link.receive()
    if received is None:
        raise UpgradeError("the process to take over from is gone")
    said, descriptors = received
    if not isinstance(said, kind):
        raise UpgradeError("the process to take over from says what was not expected")
    return said, descriptors
