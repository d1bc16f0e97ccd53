"""Running a command many times: what it gets, what ends it, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgauthproxy import _spawn
from pgauthproxy._spawn import Run, Runner

SECONDS = 20
PATH = b"PATH=" + os.environb[b"PATH"]
SLEEP = [b"sleep", b"60"]
"""Longer than any test waits."""

Start = Callable[..., Runner]


@pytest.fixture
def runner() -> Iterator[Start]:
    """Makes Runners that are closed in the end; by default with time for everything and room for a little."""
    made: list[Runner] = []

    def make(
        argv: list[bytes] | str,
        environment: list[bytes] | None = None,
        max_parallel: int = 4,
        timeout: float = SECONDS,
        grace: float = SECONDS,
        max_output: int = 1000,
        max_errors: int = 1000,
    ) -> Runner:
        command = [b"sh", b"-c", argv.encode()] if isinstance(argv, str) else argv
        made.append(
            Runner(
                command,
                [PATH] if environment is None else environment,
                max_parallel,
                timeout,
                grace,
                max_output,
                max_errors,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


def collect(runner: Runner, count: int = 1) -> list[Run]:
    """The next runs that are over."""
    runs: list[Run] = []
    while len(runs) < count:
        ready, _, _ = select.select([runner.fileno()], [], [], SECONDS)
        assert ready, f"{len(runs)} of {count} runs are over"
        runs += runner.collect()
    assert len(runs) == count
    return runs


def once(runner: Runner, data: bytes = b"") -> Run:
    run = runner.start(data)
    assert collect(runner) == [run]
    return run


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/dev/fd"))


class Fifo:
    """A named pipe that shows whether anybody who holds its other end is left."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_for(self, data: bytes) -> None:
        """Reads what a process writes once it runs."""
        read = b""
        while len(read) < len(data):
            assert select.select([self._reader], [], [], SECONDS)[0]
            with contextlib.suppress(BlockingIOError):
                read += os.read(self._reader, 100)
        assert read == data

    def wait_for_end(self) -> None:
        """Returns once nobody has it open for writing; somebody must have had."""
        assert select.select([self._reader], [], [], SECONDS)[0]
        assert os.read(self._reader, 100) == b""

    def close(self) -> None:
        os.close(self._reader)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    made = Fifo(tmp_path / "fifo")
    yield made
    made.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 16, 1 << 20])
def test_the_command_reads_its_input_up_to_the_end(runner: Start, size: int) -> None:
    run = once(runner("wc -c"), b"x" * size)
    assert (run.ended_by, run.status, int(run.output)) == (_spawn.BY_EXIT, 0, size)


def test_input_and_output_are_bytes(runner: Start) -> None:
    data = bytes(range(256)) * 3
    assert once(runner([b"cat"]), data).output == data


def test_a_command_that_does_not_read_its_input_is_fine(runner: Start) -> None:
    for script in ("exec 0<&-; echo ok", "echo ok"):
        run = once(runner(script), b"x" * (1 << 20))
        assert (run.status, run.output) == (0, b"ok\n")


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_exit_status_is_told(runner: Start, status: int) -> None:
    run = once(runner(f"exit {status}"))
    assert (run.ended_by, run.failure, run.status) == (_spawn.BY_EXIT, 0, status)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE, signal.SIGINT])
def test_a_signal_is_told_and_none_is_ignored_or_blocked_from_the_start(runner: Start, number: signal.Signals) -> None:
    run = once(runner(f"ulimit -c 0; kill -{number} $$; echo still here"))
    assert (run.ended_by, run.status, run.output) == (_spawn.BY_EXIT, -number, b"")


@pytest.mark.parametrize(
    ("name", "failure"),
    [(b"no-such-command-anywhere", errno.ENOENT), (b"/no/such/file", errno.ENOENT), (b"/", errno.EACCES)],
)
def test_a_command_that_cannot_be_started_is_a_failure(runner: Start, name: bytes, failure: int) -> None:
    run = once(runner([name]), b"some input")
    assert (run.failure, run.output, run.errors) == (failure, b"", b"")


def test_a_file_that_is_not_executable_is_a_failure(runner: Start, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert once(runner([os.fsencode(tmp_path / "script")])).failure == errno.EACCES


def test_the_command_gets_its_words_and_its_environment_and_no_other(runner: Start) -> None:
    assert once(runner([b"printf", b"<%s>", b"a b", b"", b"$HOME", b"\xff"])).output == b"<a b><><$HOME><\xff>"
    assert once(runner([b"env"], [b"A=1", b"B=\xff=2", b"C="])).output == b"A=1\nB=\xff=2\nC=\n"
    assert once(runner([b"env"], [])).output == b""


def test_the_command_gets_no_descriptor_but_its_three(runner: Start) -> None:
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        _spawn.keep_descriptors_private()
        # Not listed, since listing them opens one more.
        run = once(runner("n=0; while [ $n -lt 256 ]; do [ -e /proc/$$/fd/$n ] && echo $n; n=$((n + 1)); done; true"))
    assert run.output.split() == [b"0", b"1", b"2"]


def test_the_command_leads_a_process_group_of_its_own(runner: Start) -> None:
    pid, group = once(runner("echo $$; cut -d' ' -f5 /proc/$$/stat")).output.split()
    assert pid == group
    assert int(group) != os.getpgrp()


def test_errors_are_collected_apart_from_output(runner: Start) -> None:
    run = once(runner("echo out; echo err >&2"))
    assert (run.output, run.errors, run.errors_dropped) == (b"out\n", b"err\n", 0)


@pytest.mark.parametrize("size", [999, 1000, 1001, 5000, 300_000])
def test_errors_beyond_the_bound_are_dropped_and_counted(runner: Start, size: int) -> None:
    run = once(runner(f"head -c {size} /dev/zero >&2; echo done"))
    assert (run.ended_by, run.status, run.output) == (_spawn.BY_EXIT, 0, b"done\n")
    assert run.errors == bytes(min(size, 1000))
    assert run.errors_dropped == max(0, size - 1000)


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_output_up_to_the_bound_is_taken(runner: Start, size: int) -> None:
    run = once(runner(f"head -c {size} /dev/zero"))
    assert (run.ended_by, run.status, run.output) == (_spawn.BY_EXIT, 0, bytes(size))


@pytest.mark.parametrize("script", ["head -c 1001 /dev/zero", "yes", "head -c 1001 /dev/zero; sleep 60"])
def test_output_beyond_the_bound_ends_the_command(runner: Start, script: str) -> None:
    run = once(runner(script))
    assert run.ended_by == _spawn.BY_FLOOD
    assert len(run.output) == 1001


def test_output_may_be_large(runner: Start) -> None:
    run = once(runner("head -c 3000000 /dev/zero", max_output=3_000_000))
    assert (run.ended_by, len(run.output)) == (_spawn.BY_EXIT, 3_000_000)


def test_the_time_out_ends_the_command_with_term(runner: Start) -> None:
    run = once(runner(SLEEP, timeout=0.02))
    assert (run.ended_by, run.status) == (_spawn.BY_TIMEOUT, -signal.SIGTERM)


def test_a_command_that_catches_term_may_say_its_last_within_the_grace(runner: Start, fifo: Fifo) -> None:
    catching = runner(f"trap 'echo bye; exit 7' TERM; echo up >{fifo.path}; sleep 60 & wait")
    run = catching.start(b"")
    fifo.wait_for(b"up\n")
    run.stop()
    collect(catching)
    assert (run.ended_by, run.status) == (_spawn.BY_STOP, 7)


def test_a_command_that_ignores_term_is_killed_after_the_grace(runner: Start, fifo: Fifo) -> None:
    stubborn = runner(f"trap '' TERM; echo up >{fifo.path}; sleep 60; sleep 60", grace=0.05)
    run = stubborn.start(b"")
    fifo.wait_for(b"up\n")
    run.stop()
    collect(stubborn)
    assert (run.ended_by, run.status) == (_spawn.BY_STOP, -signal.SIGKILL)


def test_dripping_output_does_not_stretch_the_time(runner: Start) -> None:
    run = once(runner("while :; do echo x; sleep 0.01; done", timeout=0.1))
    assert (run.ended_by, run.status) == (_spawn.BY_TIMEOUT, -signal.SIGTERM)


def test_the_whole_group_is_ended(runner: Start, fifo: Fifo) -> None:
    slow = runner(
        f"(trap '' TERM; echo >{fifo.path}.ready; sleep 60; sleep 60) >{fifo.path} & sleep 60", timeout=SECONDS
    )
    with contextlib.closing(Fifo(Path(f"{fifo.path}.ready"))) as ready:
        run = slow.start(b"")
        ready.wait_for(b"\n")
        run.stop()
        assert collect(slow) == [run]
        fifo.wait_for_end()


def test_the_exit_decides_while_a_grandchild_holds_the_pipes(runner: Start, fifo: Fifo) -> None:
    os.mkfifo(f"{fifo.path}.gate")
    gate = os.open(f"{fifo.path}.gate", os.O_RDWR)
    try:
        run = once(runner(f"(read word <>{fifo.path}.gate) 9>{fifo.path} & echo done; echo told >&2"))
        assert (run.ended_by, run.status, run.output, run.errors) == (_spawn.BY_EXIT, 0, b"done\n", b"told\n")
        os.write(gate, b"go\n")
        fifo.wait_for_end()
    finally:
        os.close(gate)


def test_all_that_was_written_before_the_exit_counts(runner: Start) -> None:
    script = runner(
        "head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2; exit 3", max_output=60_000, max_errors=60_000
    )
    for _ in range(20):
        run = once(script)
        assert (run.ended_by, run.status, len(run.output), len(run.errors)) == (_spawn.BY_EXIT, 3, 60_000, 60_000)


def test_a_run_that_is_stopped_says_so(runner: Start, fifo: Fifo) -> None:
    slow = runner(f"echo up >{fifo.path}; sleep 60")
    run = slow.start(b"")
    fifo.wait_for(b"up\n")
    run.stop()
    run.stop()
    assert collect(slow) == [run]
    assert (run.ended_by, run.status) == (_spawn.BY_STOP, -signal.SIGTERM)
    run.stop()


def test_a_run_that_waits_is_stopped_without_ever_starting(runner: Start, fifo: Fifo, tmp_path: Path) -> None:
    slow = runner(f"read name; echo up >{fifo.path}; touch {tmp_path}/$name; sleep 60", max_parallel=1)
    first = slow.start(b"first\n")
    fifo.wait_for(b"up\n")
    second = slow.start(b"second\n")
    second.stop()
    first.stop()
    assert collect(slow, 2) == [first, second]
    assert [run.ended_by for run in (first, second)] == [_spawn.BY_STOP, _spawn.BY_STOP]
    assert not (tmp_path / "second").exists()


def test_stopping_one_run_leaves_the_next_on_its_thread_alone(runner: Start) -> None:
    one_by_one = runner("cat; sleep 0.01", max_parallel=1)
    for _ in range(10):
        stopped, kept = one_by_one.start(b"a"), one_by_one.start(b"b")
        stopped.stop()
        collect(one_by_one, 2)
        assert stopped.ended_by in (_spawn.BY_STOP, _spawn.BY_EXIT)
        assert (kept.ended_by, kept.output) == (_spawn.BY_EXIT, b"b")


def test_runs_that_wait_start_in_the_order_in_which_they_came(runner: Start) -> None:
    one_by_one = runner([b"cat"], max_parallel=1)
    runs = [one_by_one.start(b"%d" % number) for number in range(30)]
    assert collect(one_by_one, 30) == runs
    assert [run.output for run in runs] == [b"%d" % number for number in range(30)]


def test_no_more_run_at_once_than_allowed(runner: Start, tmp_path: Path) -> None:
    few = runner(f"echo 1 >>{tmp_path}/log; echo -1 >>{tmp_path}/log", max_parallel=3)
    for _ in range(40):
        few.start(b"")
    collect(few, 40)
    running, most = 0, 0
    for line in (tmp_path / "log").read_text().split():
        running += int(line)
        most = max(most, running)
    assert running == 0
    assert most <= 3


def test_as_many_run_at_once_as_allowed(runner: Start, fifo: Fifo) -> None:
    # Each waits for the other: one alone would never end.
    pair = runner(f"read role; [ $role = writer ] && echo met >{fifo.path}.met || cat {fifo.path}.met", max_parallel=2)
    os.mkfifo(f"{fifo.path}.met")
    runs = [pair.start(b"writer\n"), pair.start(b"reader\n")]
    collect(pair, 2)
    assert [run.output for run in runs] == [b"", b"met\n"]


def test_many_runs_leave_no_descriptor_and_no_more_threads_than_allowed(runner: Start) -> None:
    many = runner([b"true"], max_parallel=8)
    once(many)
    before = threads()
    descriptors = len(open_descriptors())
    for _ in range(3):
        for _ in range(100):
            many.start(b"input")
        assert {run.status for run in collect(many, 100)} == {0}
    assert threads() <= before + 7
    # A thread has a pipe of its own, by which its run is stopped.
    assert len(open_descriptors()) <= descriptors + 2 * 7
    many.close()
    assert threads() == before - 1


def threads() -> int:
    """All threads of this process: those of a Runner are none of Python's."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    "argv", [[b"true"], [b"/no/such/file"], [b"yes"], SLEEP], ids=["true", "missing", "flood", "slow"]
)
def test_a_closed_runner_leaves_no_descriptor(runner: Start, argv: list[bytes]) -> None:
    before = open_descriptors()
    for _ in range(3):
        short = runner(argv, timeout=0.02)
        for _ in range(4):
            short.start(b"x" * 100_000)
        collect(short, 4)
        short.close()
    assert open_descriptors() == before


def test_closing_ends_what_runs_and_starts_nothing_more(runner: Start, fifo: Fifo, tmp_path: Path) -> None:
    slow = runner(
        f"trap '' TERM; read name; touch {tmp_path}/$name; exec 9>{fifo.path}; echo up >&9; sleep 60", max_parallel=1
    )
    slow.start(b"first\n")
    fifo.wait_for(b"up\n")
    slow.start(b"second\n")
    slow.close()
    fifo.wait_for_end()
    assert not (tmp_path / "second").exists()
    slow.close()
    with pytest.raises(ValueError, match=r"^a closed Runner$"):
        slow.start(b"")


def test_a_runner_that_nobody_holds_any_more_ends_what_runs(fifo: Fifo) -> None:
    before = open_descriptors()
    forgotten = Runner(
        [b"sh", b"-c", f"exec 9>{fifo.path}; echo up >&9; sleep 60".encode()], [PATH], 1, SECONDS, SECONDS, 10, 10
    )
    run = forgotten.start(b"")
    fifo.wait_for(b"up\n")
    del forgotten
    fifo.wait_for_end()
    assert open_descriptors() == before
    run.stop()


def test_a_runner_in_a_cycle_is_collected_as_any_other(fifo: Fifo) -> None:
    before = open_descriptors()
    forgotten = Runner(
        [b"sh", b"-c", f"exec 9>{fifo.path}; echo up >&9; sleep 60".encode()], [PATH], 1, SECONDS, SECONDS, 10, 10
    )
    run = forgotten.start(b"")
    run.done = forgotten
    fifo.wait_for(b"up\n")
    del forgotten, run
    gc.collect()
    fifo.wait_for_end()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("argv", "environment", "max_parallel", "says"),
    [
        ([], [], 1, "a command needs a name"),
        ([b"a\0b"], [], 1, "a NUL"),
        ([b"a"], [b"A=\0"], 1, "a NUL"),
        ([b"a"], [], 0, "at least one run at once"),
        ([b"a"], [], -1, "at least one run at once"),
    ],
)
def test_what_cannot_be_run_is_an_error_at_once(
    argv: list[bytes], environment: list[bytes], max_parallel: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Runner(argv, environment, max_parallel, 1, 1, 1, 1)


def test_signals_are_delivered_to_other_threads_than_the_runners(runner: Start) -> None:
    # One of them that took SIGTERM would keep the event loop from ever hearing of it.
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    many = runner([b"true"], max_parallel=4)
    for _ in range(4):
        many.start(b"")
    collect(many, 4)
    started = [task for task in Path("/proc/self/task").iterdir() if task.name not in before]
    assert started
    for task in started:
        blocked = re.search(r"SigBlk:\s*([0-9a-f]+)", (task / "status").read_text())
        assert blocked is not None
        assert int(blocked[1], 16) & (1 << (signal.SIGTERM - 1))
