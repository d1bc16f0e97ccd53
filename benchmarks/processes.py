"""Starting, ending and reading processes.

Whatever is started here has a log or captured output, a time limit and an owner that ends it; nothing is ever
ended by name, or without having been started here. Reading /proc makes this Linux only.
"""

import contextlib
import ctypes
import os
import pwd
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.02
LOG_TAIL_LINES = 15

# Linux hands out ephemeral ports from 32,768 up: below, no outgoing connection takes the port that was just
# found free.
PORTS = range(15_000, 32_000)

END_ORDERLY = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
END_SECONDS = 10.0

PR_SET_CHILD_SUBREAPER = 36

_owned: set[int] = set()
"""Children that have somebody here who ends them."""


class MeasurementFailed(Exception):
    """One figure could not be taken; the others still can."""


class NotPossibleHere(MeasurementFailed):
    """This machine does not have what it takes."""


def run(
    command: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    cwd: Path | None = None,
    discard_output: bool = False,
) -> str:
    """Runs a command to its end and returns its standard output."""
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if discard_output else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
            env=env,
            cwd=cwd,
            user=user,
            group=group_of(user),
            extra_groups=None if user is None else [],
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementFailed(f"{Path(command[0]).name} did not end within {timeout:g} s") from error
    except OSError as error:
        raise MeasurementFailed(f"{command[0]} could not be started: {error}") from error
    if ended.returncode != 0:
        raise MeasurementFailed(
            f"{Path(command[0]).name} ended with status {ended.returncode}: {ended.stderr.strip()[-500:]}"
        )
    return ended.stdout or ""


@contextlib.contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    end_with: Sequence[signal.Signals] = END_ORDERLY,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that lives as long as the block, its output in `log`.

    It leads a session of its own, so that Ctrl-C reaches only us and the children end in order.
    """
    try:
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=None if user is None else log.parent,  # ours may be closed to that user
                user=user,
                group=group_of(user),
                extra_groups=None if user is None else [],
                start_new_session=True,
            )
    except OSError as error:
        raise MeasurementFailed(f"{command[0]} could not be started: {error}") from error
    _owned.add(child.pid)
    try:
        yield child
    finally:
        end(child, end_with)
        _owned.discard(child.pid)


def adopt_orphans() -> None:
    """Makes us the parent of whatever our children leave behind, so that `end_orphans` finds it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans(*, and_all_others: bool = False) -> None:
    """Ends what a child that was killed, or replaced by a process of its own making, has left behind.

    `and_all_others`: every child there is, for when nobody is left who would end it.
    """
    if and_all_others:
        _owned.clear()
    for sent in (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL):
        for pid in _orphans():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        with contextlib.suppress(MeasurementFailed):
            wait_until(lambda: not _orphans(), "the orphans end", timeout=END_SECONDS)


def _orphans() -> list[int]:
    """Children that nobody here owns and that run; those that do not are collected."""
    running = []
    for pid in children_of(os.getpid()):
        if pid not in _owned:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    running.append(pid)
    return running


def children_of(pid: int) -> list[int]:
    """The children of a process, of all its threads, those included that have ended and were not collected."""
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.extend(map(int, file.read_text().split()))
    return children


def same_program(pid: int) -> list[int]:
    """The process, and those of its children that run the same program: a supervisor's workers, say."""
    program = _program_of(pid)
    return [pid, *(child for child in children_of(pid) if program and _program_of(child) == program)]


def _program_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def need_descriptors(count: int) -> None:
    """Raises NotPossibleHere if a process cannot have so many."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < count:
        raise NotPossibleHere(f"a process needs {count:,} descriptors, and may have {limit:,}")


def descriptors_of(pid: int) -> int:
    """How many a process has open."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise MeasurementFailed(f"process {pid} cannot be looked at: {error}") from error


def machine_times() -> tuple[int, int]:
    """What all cores together have worked, and have been there for, since the machine started; in the same unit."""
    fields = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]  # waiting for a disk is idle too
    return sum(fields) - idle, sum(fields)


def end(
    child: subprocess.Popen[bytes] | subprocess.Popen[str], signals: Sequence[signal.Signals] = END_ORDERLY
) -> None:
    """Ends the child, with the next signal each time it does not heed the last."""
    for sent in signals:
        if child.poll() is not None:
            return
        child.send_signal(sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_SECONDS)


def group_of(user: str | None) -> int | None:
    """The user's own group; None for no user."""
    return None if user is None else pwd.getpwnam(user).pw_gid


def unprivileged_user() -> str | None:
    """Whom to run servers as that refuse root; None when we are not root ourselves."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    raise MeasurementFailed("PostgreSQL refuses root, and there is neither a user `postgres` nor `nobody`")


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float) -> None:
    """Polls; a condition that never comes true is a failure that says what was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise MeasurementFailed(f"waited {timeout:g} s in vain: {what}")
        time.sleep(POLL_SECONDS)


def wait_for_port(port: int, child: subprocess.Popen[bytes], name: str, *, timeout: float = 30.0) -> None:
    """Waits until the child accepts connections, or has ended without."""

    def accepts() -> bool:
        if child.poll() is not None:
            raise MeasurementFailed(f"{name} ended with status {child.returncode} instead of listening")
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            return True
        return False

    wait_until(accepts, f"{name} accepts connections", timeout=timeout)


def free_port() -> int:
    """A port of the loopback address that nobody has."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise MeasurementFailed("no free port found in 100 tries")


def log_tail(log: Path) -> str:
    """The end of a log, indented, or that there is none."""
    if not log.exists():
        return "    (no log)"
    lines = log.read_text(errors="backslashreplace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (the log is empty)"


def cpu_seconds(pid: int) -> float:
    """CPU time of the process, all its threads included, those of its children not.

    That is utime + stime of /proc/PID/stat, read from the process's CPU clock instead, which does not round
    to hundredths of a second. The clock's number is Linux's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED).
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError as error:
        raise MeasurementFailed(f"process {pid} is gone") from error


def resident_bytes(pid: int) -> int:
    """Resident memory. Not Pss: that changes whenever a stranger maps the same libraries."""
    try:
        return _kilobytes_of(Path(f"/proc/{pid}/smaps_rollup"), "Rss:")
    except PermissionError:  # the process is not dumpable and we are not root; VmRSS is open but less exact
        return _kilobytes_of(Path(f"/proc/{pid}/status"), "VmRSS:")


def peak_bytes(pid: int) -> int:
    """The most resident memory since the process started, or since `forget_peak`."""
    return _kilobytes_of(Path(f"/proc/{pid}/status"), "VmHWM:")


def forget_peak(pid: int) -> None:
    """Lets the peak begin again at what is resident now."""
    # Without the right to it the peak since the start stands, which for a fresh process is about the same.
    with contextlib.suppress(PermissionError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _kilobytes_of(file: Path, label: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MeasurementFailed(f"{file}: the process is gone") from error
    for line in lines:
        if line.startswith(label):
            return int(line.split()[1]) * 1024
    raise MeasurementFailed(f"{file} has no {label}")
