"""Counts in shared memory: what is taken is given back, and no death of a process leaves anything of it behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy._ledger import CLIENTS, LOGINS, SLOTS, Ledger

SECONDS = 60
WINDOW = 60.0
linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that processes could share by its name")


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd that nobody has opened as a ledger."""
    descriptor = os.memfd_create("ledger")
    yield descriptor
    os.close(descriptor)


# Totals


@pytest.mark.parametrize("total", [CLIENTS, LOGINS])
def test_no_more_are_counted_than_there_may_be(total: int) -> None:
    ledger = Ledger()
    assert [ledger.begin(total, 2) for _ in range(3)] == [True, True, False]
    assert ledger.total(total) == 2
    ledger.end(total)
    assert ledger.begin(total, 2)
    ledger.end(total)
    ledger.end(total)
    assert ledger.total(total) == 0


def test_the_totals_are_apart() -> None:
    ledger = Ledger()
    assert ledger.begin(CLIENTS, 1)
    assert (ledger.total(CLIENTS), ledger.total(LOGINS)) == (1, 0)
    with pytest.raises(IndexError):
        ledger.begin(2, 1)


def test_giving_back_what_was_never_taken_counts_nothing() -> None:
    ledger = Ledger()
    ledger.end(CLIENTS)
    assert ledger.total(CLIENTS) == 0
    assert ledger.begin(CLIENTS, 1)


# Keys


def test_each_key_has_its_own_count() -> None:
    ledger = Ledger()
    places = [ledger.take(key, 2) for key in (b"a", b"a", b"b", b"")]
    assert all(place >= 0 for place in places)
    assert places[0] == places[1]
    assert ledger.take(b"a", 2) == -1
    assert [ledger.count(key) for key in (b"a", b"b", b"", b"c")] == [2, 1, 1, 0]
    ledger.give(places[0])
    assert ledger.take(b"a", 2) >= 0


@pytest.mark.parametrize("place", [-1, 64, 1 << 40])
def test_a_place_that_is_none_is_named(place: int) -> None:
    with pytest.raises(IndexError):
        Ledger(entries=64).give(place)


@given(st.lists(st.tuples(st.integers(0, 120), st.booleans()), max_size=400))
def test_counts_are_those_of_a_dictionary_however_full_the_table_is(steps: list[tuple[int, bool]]) -> None:
    ledger = Ledger(entries=64)
    expected: Counter[int] = Counter()
    places: dict[int, int] = {}
    for number, takes in steps:
        key = b"key %d" % number
        if takes:
            place = ledger.take(key, 3)
            if place >= 0:
                assert places.setdefault(number, place) == place
                expected[number] += 1
            else:
                # There are three, or there is no entry left.
                assert expected[number] == 3 or len(places) == 64
        elif expected[number]:
            ledger.give(places[number])
            expected[number] -= 1
            if not expected[number]:
                del places[number]
    assert {number: ledger.count(b"key %d" % number) for number in range(121)} == {n: expected[n] for n in range(121)}


def test_keys_that_come_and_go_for_ever_fill_nothing() -> None:
    ledger = Ledger(entries=64)
    kept = [ledger.take(b"kept %d" % number, 1) for number in range(20)]
    for number in range(20_000):
        place = ledger.take(b"%d" % number, 1)
        assert place >= 0
        ledger.give(place)
    assert [ledger.count(b"kept %d" % number) for number in range(20)] == [1] * 20
    for place in kept:
        ledger.give(place)


# Workers


@linux
def test_what_one_counts_all_see(memory: int) -> None:
    first, second = Ledger(memory, 0, entries=100), Ledger(memory, 63)
    assert first.begin(CLIENTS, 2)
    assert second.begin(CLIENTS, 2)
    assert not first.begin(CLIENTS, 2)
    assert first.take(b"alice", 1) >= 0
    assert second.take(b"alice", 1) == -1
    assert second.fail(b"bob", 0.0, 5, WINDOW) == 1
    assert first.fail(b"bob", 0.0, 5, WINDOW) == 2


@linux
def test_a_slot_that_is_cleared_takes_nothing_of_others_with_it(memory: int) -> None:
    workers = [Ledger(memory, slot) for slot in range(3)]
    places = [worker.take(b"alice", 9) for worker in workers]
    for worker in workers:
        assert worker.begin(LOGINS, 9)
        worker.take(b"only %d" % id(worker), 9)
    workers[1].fail(b"bob", 0.0, 5, WINDOW)
    Ledger(memory).clear_slot(1)
    assert workers[0].count(b"alice") == workers[0].total(LOGINS) == 2
    assert [workers[0].count(b"only %d" % id(worker)) for worker in workers] == [1, 0, 1]
    assert workers[0].failures(b"bob", 0.0, WINDOW) == 1
    # Who was thought dead and was not: what it gives back is nobody else's.
    workers[1].give(places[1])
    assert workers[0].count(b"alice") == 2


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_there_are_so_many_slots_and_no_more(slot: int) -> None:
    with pytest.raises(ValueError, match="there are 64"):
        Ledger(slot=slot)
    with pytest.raises(ValueError, match="there are 64"):
        Ledger().clear_slot(slot)


@linux
def test_a_table_keeps_the_size_that_the_first_gave_it(memory: int) -> None:
    small = Ledger(memory, 0, entries=64)
    size = os.fstat(memory).st_size
    large = Ledger(memory, 1, entries=1 << 20, failures=1 << 20)
    assert os.fstat(memory).st_size == size
    for number in range(64):
        assert large.take(b"%d" % number, 1) >= 0
    assert small.take(b"another", 1) == -1


def test_what_is_no_memory_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Ledger(1 << 20)


KILLED = """
    import os, random, signal, sys, time
    from pgauthproxy._ledger import CLIENTS, LOGINS, Ledger

    memory = os.memfd_create("ledger")
    ledger = Ledger(memory, 0, entries=64, failures=64)
    lasting = ledger.take(b"key 1", 1 << 20)
    ledger.begin(CLIENTS, 9)

    def work(slot):
        mine = Ledger(memory, slot)
        draw = random.Random(slot)
        places = []
        while True:
            key = b"key %d" % draw.randrange(40)
            place = mine.take(key, 1 << 20)
            if place >= 0:
                places.append(place)
            if len(places) > 30:
                mine.give(places.pop(draw.randrange(len(places))))
            mine.begin(LOGINS, 1 << 30)
            mine.fail(key, 1.0, 5, 60.0)

    def start(slot):
        pid = os.fork()
        if pid == 0:
            try:
                work(slot)
            finally:
                os._exit(1)
        return pid

    draw = random.Random(1)
    running = {slot: start(slot) for slot in (1, 2, 3)}
    for _ in range(ROUNDS):
        time.sleep(draw.random() * 0.005)
        slot = draw.choice((1, 2, 3))
        os.kill(running[slot], signal.SIGKILL)
        os.waitpid(running[slot], 0)
        ledger.clear_slot(slot)
        running[slot] = start(slot)
    for slot, pid in running.items():
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        ledger.clear_slot(slot)
    left = {n: ledger.count(b"key %d" % n) for n in range(40)}
    assert left == {n: int(n == 1) for n in range(40)}, left
    assert (ledger.total(CLIENTS), ledger.total(LOGINS)) == (1, 0)
    ledger.give(lasting)
    places = [ledger.take(b"new %d" % n, 1) for n in range(64)]
    assert min(places) >= 0 and len(set(places)) == 64, places
    print("whole")
"""


def output_of(script: str) -> str:
    """What a script prints; it and all that it started are gone then."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0
    return printed


@linux
def test_workers_that_are_killed_in_the_middle_leave_a_whole_ledger() -> None:
    script = textwrap.dedent(KILLED).replace("ROUNDS", "60")
    assert output_of(script) == "whole\n"


@linux
def test_counts_of_processes_at_work_add_up() -> None:
    script = textwrap.dedent("""
        import os, sys
        from pgauthproxy._ledger import CLIENTS, Ledger

        memory = os.memfd_create("ledger")
        ledger = Ledger(memory)
        pids = []
        for slot in (1, 2, 3, 4):
            pids.append(os.fork())
            if pids[-1] == 0:
                mine = Ledger(memory, slot)
                for number in range(20000):
                    mine.begin(CLIENTS, 1 << 30)
                    place = mine.take(b"key", 1 << 30)
                    if number % 4:
                        mine.give(place)
                        mine.end(CLIENTS)
                os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)
        print(ledger.total(CLIENTS), ledger.count(b"key"))
    """)
    assert output_of(script).split() == ["20000", "20000"]


# Failures


def test_failures_are_counted_and_forgotten_after_the_window() -> None:
    ledger = Ledger()
    assert [ledger.fail(b"a", now, 3, WINDOW) for now in (0.0, 10.0)] == [1, 2]
    assert ledger.failures(b"a", 50.0, WINDOW) == 2
    assert ledger.failures(b"a", 71.0, WINDOW) == 0
    # Too few in the time since the first of them: a new count.
    assert ledger.fail(b"a", 61.0, 3, WINDOW) == 1
    # Enough: from here on only a time without any ends it.
    assert [ledger.fail(b"a", now, 3, WINDOW) for now in (62.0, 63.0, 120.0, 175.0)] == [2, 3, 4, 5]
    assert ledger.failures(b"a", 234.0, WINDOW) == 5
    assert ledger.failures(b"a", 236.0, WINDOW) == 0
    assert ledger.fail(b"a", 236.0, 3, WINDOW) == 1
    assert ledger.failures(b"b", 236.0, WINDOW) == 0


def test_a_block_lasts_as_long_as_it_should_and_the_count_longer() -> None:
    ledger = Ledger()
    for _ in range(5):
        ledger.fail(b"a", 0.0, 3, WINDOW)
    ledger.block(b"a", 0.0, 300.0)
    assert ledger.is_blocked(b"a", 299.0)
    assert not ledger.is_blocked(b"a", 300.0)
    assert not ledger.is_blocked(b"b", 0.0)
    assert ledger.failures(b"a", 359.0, WINDOW) == 5
    assert ledger.failures(b"a", 361.0, WINDOW) == 0


def fail_as(ledger: Ledger, user: bytes, now: float) -> None:
    for key in (b"address", user, b"address " + user):
        ledger.fail(key, now, 5, WINDOW)


def test_a_right_login_takes_back_its_own_failures_and_nobody_elses() -> None:
    ledger = Ledger()
    for user in (b"alice", b"alice", b"mallory", b"alice"):
        fail_as(ledger, user, 0.0)
    assert not ledger.is_known(b"address mallory")
    for _ in range(2):
        ledger.know(b"address mallory", b"address", b"mallory", 1.0, WINDOW)
        assert ledger.failures(b"address", 1.0, WINDOW) == 3
    assert ledger.is_known(b"address mallory")
    assert not ledger.is_known(b"address alice")
    assert [ledger.failures(user, 1.0, WINDOW) for user in (b"alice", b"mallory")] == [3, 0]
    ledger.know(b"address alice", b"address", b"alice", 1.0, WINDOW)
    assert [ledger.failures(key, 1.0, WINDOW) for key in (b"address", b"alice")] == [0, 0]


def test_failures_that_are_forgotten_are_not_taken_back_from_newer_ones() -> None:
    ledger = Ledger()
    for _ in range(4):
        fail_as(ledger, b"mallory", 0.0)
    for _ in range(3):
        fail_as(ledger, b"alice", 61.0)
    assert ledger.failures(b"address", 61.0, WINDOW) == 3
    # Its own are a minute old, but not those of the address.
    ledger.know(b"address mallory", b"address", b"mallory", 59.0, WINDOW)
    assert ledger.failures(b"address", 61.0, WINDOW) == 3
    # What is not there is left alone.
    ledger.know(b"other mallory", b"", b"mallory", 61.0, WINDOW)
    assert ledger.failures(b"", 61.0, WINDOW) == 0


def test_a_spray_of_keys_forgets_the_oldest_and_takes_no_more_memory() -> None:
    ledger = Ledger(failures=64)
    for number in range(10_000):
        ledger.fail(b"%d" % number, float(number), 5, 1e9)
    remembered = [number for number in range(10_000) if ledger.failures(b"%d" % number, 10_000.0, 1e9)]
    assert 32 < len(remembered) <= 64
    assert min(remembered) > 9_000


def test_who_keeps_failing_is_not_forgotten_in_a_spray() -> None:
    ledger = Ledger(failures=64)
    draw = random.Random(1)
    for number in range(2_000):
        ledger.fail(b"%d" % draw.getrandbits(60), float(number), 5, 1e9)
        assert ledger.fail(b"a", float(number), 5, 1e9) == number + 1


def test_the_ledger_is_opened_once() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="once"):
        ledger.__init__()  # type: ignore[misc]
