"""Runs our gateway with a clock in its event loop and memory on its back, to see how long the loop stalls.

    python stalled_gateway.py --latenesses FILE [--megabytes 300] [the gateway's own arguments]

Strategy: the clock is a timerfd that the loop watches. Timers of the loop itself fire on whole milliseconds,
which is as much as the longest stall that is allowed. A timerfd counts the ticks that nobody fetched, so a
stall of 10 ms is 40 late ticks and not one: the percentile is one of time, not of chances to look. The
kernel's monotonic clock is the same in every process, so compare.py can tell which ticks fell into its
logins.

When the gateway ends, FILE gets two doubles for each tick: when it was due, and how late it was, in seconds.
"""

import argparse
import array
import ctypes
import mmap
import os
import time
from pathlib import Path

import uvloop

TICK_NANOSECONDS = 250_000
MOST_TICKS = 4_000_000  # a thousand seconds; the clock stops there

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class LoopClock:
    """Ticks in an event loop, and keeps how late each tick was."""

    def __init__(self) -> None:
        self.ticks = array.array("d")
        self._first_due = time.monotonic_ns() + TICK_NANOSECONDS
        self._seen = 0
        self._fd = _start_timer(self._first_due)

    def install(self, loop: uvloop.Loop) -> None:
        loop.add_reader(self._fd, self._tick, loop)

    def _tick(self, loop: uvloop.Loop) -> None:
        expired = int.from_bytes(os.read(self._fd, 8), "little")
        now = time.monotonic_ns()
        for number in range(self._seen, self._seen + expired):
            due = self._first_due + number * TICK_NANOSECONDS
            self.ticks.extend((due / 1e9, (now - due) / 1e9))
        self._seen += expired
        if self._seen > MOST_TICKS:
            loop.remove_reader(self._fd)


def _start_timer(first_due: int) -> int:
    """A timerfd that expires at `first_due` and then each tick. (os.timerfd_create is new in Python 3.13.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    times = _Itimerspec(_Timespec(0, TICK_NANOSECONDS), _Timespec(*divmod(first_due, 1_000_000_000)))
    if fd < 0 or libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, ctypes.byref(times), None) != 0:
        raise OSError(ctypes.get_errno(), "no timer")
    return fd


def burden(megabytes: int) -> mmap.mmap:
    """Memory of our own, each page of it in use.

    Private, and in small pages as a heap that grew slowly has them: copying their table is what makes a fork
    slow.
    """
    memory = mmap.mmap(-1, megabytes * 1_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1
    return memory


def put_into_first_loop(clock: LoopClock) -> None:
    """The first uvloop that runs gets the clock."""
    run_forever = uvloop.Loop.run_forever
    installed = False

    def run_with_clock(loop: uvloop.Loop) -> None:
        nonlocal installed
        if not installed:
            clock.install(loop)
            installed = True
        run_forever(loop)

    uvloop.Loop.run_forever = run_with_clock  # type: ignore[assignment]  # replacing it is the purpose


def main() -> None:
    parser = argparse.ArgumentParser(description="Our gateway with a clock in its event loop.")
    parser.add_argument("--latenesses", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=300)
    ours, the_gateways = parser.parse_known_args()

    from pgauthproxy.cli import main as run_gateway

    memory = burden(ours.megabytes)
    clock = LoopClock()
    put_into_first_loop(clock)
    try:
        run_gateway(the_gateways)
    finally:
        ours.latenesses.write_bytes(clock.ticks.tobytes())
        memory.close()


if __name__ == "__main__":
    main()
