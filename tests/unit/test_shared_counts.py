"""Counts that processes share: each has its own part, and the dead have none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from pgauthproxy._ledger import CLIENTS, SLOTS, Ledger
from pgauthproxy.config.schema import Settings, ThrottleSettings
from pgauthproxy.shared_counts import SharedCounts, hold

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that processes could share")
SECONDS = 20
SUCCESSOR = textwrap.dedent("""
    import sys
    from pgauthproxy._ledger import CLIENTS, Ledger
    from pgauthproxy.build import build_ledger
    from pgauthproxy.config.schema import Settings, ThrottleSettings
    from pgauthproxy.shared_counts import SharedCounts, hold

    given, max_clients, max_entries = map(int, sys.argv[1:])
    settings = Settings(max_clients=max_clients, throttle=ThrottleSettings(max_entries=max_entries))
    counts = SharedCounts.share(settings, given)
    slot = counts.slots[0]
    assert hold(counts.descriptor, slot)
    ledger = build_ledger(settings, counts.descriptor, slot)
    ledger.begin(CLIENTS, 99)
    ledger.take(b"alice", 99)
    print(int(counts.descriptor == given), slot, ledger.total(CLIENTS), flush=True)
    for line in sys.stdin:
        counts.forget_the_dead()
        print(ledger.total(CLIENTS), ledger.count(b"alice"), flush=True)
""")
SETTINGS = Settings(max_clients=100)


class Successor:
    """A process that shares the counts, or has begun its own; it has counted one client, who is alice."""

    def __init__(self, descriptor: int, max_clients: int, max_entries: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SUCCESSOR, *map(str, (descriptor, max_clients, max_entries))],
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        shares, self.slot, self.total = self._read()
        self.shares = bool(shares)

    def _read(self) -> list[int]:
        assert self._process.stdout is not None
        return [int(word) for word in self._process.stdout.readline().split()]

    def counts_without_the_dead(self) -> list[int]:
        """How many clients there are, and how many of them are alice."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=SECONDS)


@pytest.fixture
def counts() -> Iterator[SharedCounts]:
    """Those of a process that was not upgraded yet, with one client."""
    made = SharedCounts.begin(SETTINGS)
    assert hold(made.descriptor, made.slots[0])
    Ledger(made.descriptor).begin(CLIENTS, 99)
    yield made
    os.close(made.descriptor)


@pytest.fixture
def start(counts: SharedCounts) -> Iterator[Callable[..., Successor]]:
    started = []

    def successor(max_clients: int = 100, max_entries: int = ThrottleSettings().max_entries) -> Successor:
        started.append(Successor(counts.descriptor, max_clients, max_entries))
        return started[-1]

    yield successor
    for each in started:
        each.kill()


def test_a_successor_has_a_part_of_its_own(counts: SharedCounts, start: Callable[..., Successor]) -> None:
    assert list(counts.slots) == [0]
    assert [(each.shares, each.slot, each.total) for each in (start(), start(max_clients=5))] == [
        (True, 1, 2),
        (True, 2, 3),
    ]


def test_what_the_dead_have_counted_counts_no_more(counts: SharedCounts, start: Callable[..., Successor]) -> None:
    ledger = Ledger(counts.descriptor)
    first, second = start(), start()
    counts.forget_the_dead()
    assert (ledger.total(CLIENTS), ledger.count(b"alice")) == (3, 2)
    first.kill()
    assert ledger.total(CLIENTS) == 3
    assert second.counts_without_the_dead() == [2, 1]
    counts.forget_the_dead()
    assert (ledger.total(CLIENTS), ledger.count(b"alice")) == (2, 1)


def test_the_next_one_gets_the_part_of_the_dead_without_what_is_in_it(start: Callable[..., Successor]) -> None:
    first, second = start(), start()
    first.kill()
    third = start()
    assert (third.slot, third.total) == (1, 3)
    assert second.counts_without_the_dead() == [3, 2]


@pytest.mark.parametrize("sizes", [{"max_clients": 10_000}, {"max_entries": 8}], ids=["clients", "throttled"])
def test_counts_that_are_too_small_for_new_settings_begin_anew(
    start: Callable[..., Successor], sizes: dict[str, int]
) -> None:
    successor = start(**sizes)
    assert (successor.shares, successor.slot, successor.total) == (False, 0, 1)


def test_counts_of_another_version_are_left_alone(counts: SharedCounts, start: Callable[..., Successor]) -> None:
    os.pwrite(counts.descriptor, b"\1", 0)
    before = os.pread(counts.descriptor, 4096, 0)
    assert not start().shares
    assert os.pread(counts.descriptor, 4096, 0) == before


def test_several_workers_get_parts_that_are_nobodys_and_not_those_of_the_workers_before(
    counts: SharedCounts, start: Callable[..., Successor]
) -> None:
    one = start()
    assert one.slot == 1
    # 2 is a worker's of the gateway that is to be succeeded, which may be starting anew just now.
    shared = SharedCounts.share(SETTINGS, os.dup(counts.descriptor), 3, [2])
    # 0 is this process's own, whose lock it can have again.
    assert list(shared.slots) == [0, 3, 4]
    one.kill()
    shared.forget_the_dead()
    assert Ledger(counts.descriptor).count(b"alice") == 0


def test_more_workers_than_there_are_parts_left_begin_anew(counts: SharedCounts) -> None:
    given = os.dup(counts.descriptor)
    shared = SharedCounts.share(SETTINGS, given, SLOTS, [2])
    assert shared.descriptor != counts.descriptor
    assert list(shared.slots) == list(range(SLOTS))
    os.close(shared.descriptor)
