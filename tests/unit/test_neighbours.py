"""Workers that pass clients on: to whom, when, and what comes with them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgauthproxy._ledger import CLIENTS, Ledger
from pgauthproxy.neighbours import Neighbours
from pgauthproxy.net import sockets
from pgauthproxy.slots import open_inbox

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that processes could share")
Taken = list[tuple[socket.socket, object, bool]]


class Gateway:
    """Three workers in one process, with places 4, 5 and 6 in the counts."""

    SLOTS = (4, 5, 6)

    def __init__(self) -> None:
        self._memory = os.memfd_create("test")
        self.ledgers = [Ledger(self._memory, slot) for slot in self.SLOTS]
        self._inboxes = [open_inbox() for _ in self.SLOTS]
        self.workers = [
            Neighbours(
                ledger,
                number,
                self._inboxes[number][0].dup(),
                [os.dup(to_write.fileno()) for _, to_write in self._inboxes],
                self.SLOTS,
            )
            for number, ledger in enumerate(self.ledgers)
        ]

    def has(self, *clients: int) -> None:
        """Each worker has so many clients."""
        for ledger, count in zip(self.ledgers, clients, strict=True):
            for _ in range(count):
                assert ledger.begin(CLIENTS, 1000)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for inbox in self._inboxes:
            for each in inbox:
                each.close()
        os.close(self._memory)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def gateway(loop: asyncio.AbstractEventLoop) -> Iterator[Gateway]:
    made = Gateway()
    yield made

    async def close() -> None:
        made.close()

    loop.run_until_complete(close())


def listener(family: int, folder: Path) -> socket.socket:
    made = sockets.make(family)
    made.bind({socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}.get(family, str(folder / "s")))  # type: ignore[arg-type]
    made.listen()
    return made


def take(loop: asyncio.AbstractEventLoop, gateway: Gateway, number: int, count: int = 1) -> Taken:
    """What a worker gets, once there are as many."""
    taken: Taken = []

    async def wait() -> None:
        enough = asyncio.Event()

        def accepted(*what: object) -> None:
            taken.append(what)  # type: ignore[arg-type]
            if len(taken) == count:
                enough.set()

        gateway.workers[number].open(accepted)
        async with asyncio.timeout(10):
            await enough.wait()

    loop.run_until_complete(wait())
    return taken


def accept_all(gateway: Gateway) -> None:
    for ledger in gateway.ledgers:
        ledger.accept(True)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=lambda family: family.name)
@pytest.mark.parametrize("proxied", [True, False])
def test_the_emptiest_gets_the_client_as_it_came(
    gateway: Gateway, loop: asyncio.AbstractEventLoop, tmp_path: Path, family: socket.AddressFamily, proxied: bool
) -> None:
    accept_all(gateway)
    gateway.has(10, 5, 4)
    with listener(family, tmp_path) as listening, socket.socket(family) as client:
        client.connect(listening.getsockname())
        connection, peer = sockets.accept(listening)
        client.sendall(b"hello")
        assert gateway.workers[0].pass_on(connection, proxied)
        assert connection.fileno() == -1
        ((passed, at, was_proxied),) = take(loop, gateway, 2)
        with passed:
            assert (passed.family, at, was_proxied) == (family, peer, proxied)
            assert passed.recv(10) == b"hello"
            assert not passed.get_inheritable()
            assert not passed.getblocking()


@pytest.mark.parametrize(
    ("clients", "whether"),
    [((0, 0, 0), False), ((2, 0, 0), False), ((3, 0, 0), True), ((40, 35, 34), False), ((40, 35, 32), True)],
)
def test_it_takes_a_clear_difference(gateway: Gateway, clients: tuple[int, ...], whether: bool) -> None:
    accept_all(gateway)
    gateway.has(*clients)
    one, other = socket.socketpair()
    with one, other:
        assert gateway.workers[0].pass_on(one, False) is whether


def test_one_that_does_not_accept_is_sent_nothing(gateway: Gateway) -> None:
    accept_all(gateway)
    gateway.has(10, 0, 0)
    gateway.workers[1].refuse()
    gateway.ledgers[0].clear_slot(Gateway.SLOTS[2])
    one, other = socket.socketpair()
    with one, other:
        assert not gateway.workers[0].pass_on(one, False)
        assert one.fileno() >= 0


def test_where_the_inbox_is_full_clients_stay(gateway: Gateway, loop: asyncio.AbstractEventLoop) -> None:
    accept_all(gateway)
    gateway.has(10, 0, 9)
    pairs = []
    while True:
        one, other = socket.socketpair()
        pairs.append((one, other))
        if not gateway.workers[0].pass_on(one, False):
            break
        assert len(pairs) < 10_000
    assert len(pairs) > 1
    assert one.fileno() >= 0
    for each, _, _ in take(loop, gateway, 1, len(pairs) - 1):
        each.close()
    assert gateway.workers[0].pass_on(one, False)
    for one, other in pairs:
        one.close()
        other.close()


def test_one_that_is_gone_by_then_is_nobody(gateway: Gateway, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    accept_all(gateway)
    gateway.has(10, 0, 9)
    with listener(socket.AF_INET, tmp_path) as listening:
        gone = socket.socket()
        gone.connect(listening.getsockname())
        connection, _ = sockets.accept(listening)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        assert gateway.workers[0].pass_on(connection, False)
        with socket.socket() as client:
            client.connect(listening.getsockname())
            connection, peer = sockets.accept(listening)
            assert gateway.workers[0].pass_on(connection, False)
            ((passed, at, _),) = take(loop, gateway, 1)
            passed.close()
            assert at == peer


def test_the_last_one_left_is_sent_nothing(gateway: Gateway, loop: asyncio.AbstractEventLoop) -> None:
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    to_read, to_write = open_inbox()
    last = Neighbours(gateway.ledgers[0], 0, to_read, [to_write.detach()], Gateway.SLOTS[:1])

    async def look() -> None:
        last.open(lambda *what: told.append(what))
        # It sees the end of the inbox in the next turn, and no more of it after that.
        for _ in range(3):
            await asyncio.sleep(0)
        last.close()

    loop.run_until_complete(look())
    assert told == []
