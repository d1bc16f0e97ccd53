"""Where audit lines go to: a file, standard output, syslog.

An outlet never waits for whoever reads it: what is not taken at once stays with the caller. Only a disk is waited for.
"""

import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

STDOUT: Final = 1
LAST_STANDARD_DESCRIPTOR: Final = 2
FILE_MODE: Final = 0o600
FILE_AT_ONCE: Final = 1 << 24
SYSLOG_AT_ONCE: Final = 1 << 16
SYSLOG_SOCKET: Final = "/dev/log"
# Facility authpriv, severity informational.
SYSLOG_PRIORITY: Final = 10 << 3 | 6
SYSLOG_GONE: Final = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


class Outlet(Protocol):
    """Takes lines, each of which ends in a line feed."""

    can_be_moved: bool
    """Whether what is opened anew may be another than before."""

    @property
    def at_once(self) -> int:
        """How many bytes are worth offering; more are not taken, or take too long."""

    def open(self) -> bool:
        """Opens it, or opens it anew; says whether the last line in it lacks its end.

        Raises OSError; then what was open stays so.
        """

    def write(self, lines: Sequence[bytes]) -> int:
        """Returns how many bytes of these lines were taken. Raises OSError, BlockingIOError among them, if none was."""

    def close(self) -> None:
        """Gives back what it holds."""


def outlet_of(where: str) -> Outlet:
    """The outlet that a setting names: `stdout`, `syslog`, `syslog:/socket`, or a file's path."""
    kind, _, path = where.partition(":")
    if where == "stdout":
        return StandardOutput()
    if kind == "syslog":
        return Syslog(path or SYSLOG_SOCKET)
    return File(where)


def fault_of(where: str) -> str | None:
    """Why nothing can be written there, as far as can be told without doing it."""
    outlet = outlet_of(where)
    if not isinstance(outlet, File | Syslog):
        return None
    path = Path(outlet.path)
    if path.is_dir():
        return f"{path}: {os.strerror(errno.EISDIR)}"
    # A file that does not exist is made, which takes the right to write into its folder.
    to_write = path if path.exists() or isinstance(outlet, Syslog) else path.parent
    if not to_write.exists():
        return f"{to_write}: {os.strerror(errno.ENOENT)}"
    return None if os.access(to_write, os.W_OK) else f"{to_write}: {os.strerror(errno.EACCES)}"


class _Descriptor:
    """What is written to by write(2)."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._is_regular = False
        self._poll = select.poll()

    @property
    def at_once(self) -> int:
        # POSIX promises that a pipe that polls writable takes this many bytes without blocking.
        return FILE_AT_ONCE if self._is_regular else select.PIPE_BUF

    def write(self, lines: Sequence[bytes]) -> int:
        if not self._is_regular and not self._poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        return os.write(self._descriptor, b"".join(lines)[: self.at_once])

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _use(self, descriptor: int) -> None:
        """Writes there from here on."""
        if descriptor <= LAST_STANDARD_DESCRIPTOR:
            # Somebody started us without; whoever writes to standard error would write there.
            higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LAST_STANDARD_DESCRIPTOR + 1)
            os.close(descriptor)
            descriptor = higher
        self.close()
        self._descriptor = descriptor
        self._is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)


class File(_Descriptor):
    """A file, which is appended to, and made if there is none; or a named pipe or device."""

    can_be_moved = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def open(self) -> bool:
        # Without O_NONBLOCK a named pipe that nobody reads would be waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK
        self._use(os.open(self.path, flags, FILE_MODE))
        return self._is_regular and self._lacks_an_end()

    def write(self, lines: Sequence[bytes]) -> int:
        taken = super().write(lines)
        if not self._is_regular or taken >= min(sum(map(len, lines)), self.at_once):
            return taken
        return taken - self._take_back(b"".join(lines)[:taken])

    def _take_back(self, written: bytes) -> int:
        """Removes the part of a line that a disk had room for, or whoever writes next would go on in that line.

        Returns how much that is, nothing where others have written behind it. Raises OSError if no line is left.
        """
        part = len(written) - (written.rfind(b"\n") + 1)
        end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        if not part or os.fstat(self._descriptor).st_size != end:
            return 0
        try:
            os.ftruncate(self._descriptor, end - part)
        except OSError:
            # Nothing but appending is allowed there (chattr +a).
            return 0
        if part == len(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return part

    def _lacks_an_end(self) -> bool:
        """Whether its last line was begun and not finished, by a process that was killed or a disk that was full."""
        size = os.fstat(self._descriptor).st_size
        if size == 0:
            return False
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            # It may be written and not read: then an empty line is better than a broken one.
            return True
        try:
            return os.pread(descriptor, 1, size - 1) != b"\n"
        finally:
            os.close(descriptor)


class StandardOutput(_Descriptor):
    """Whatever the process was given as its standard output."""

    can_be_moved = False

    def open(self) -> bool:
        self._use(os.dup(STDOUT))
        return False


class Syslog:
    """A system logger behind a datagram socket; a line is a message."""

    can_be_moved = True
    at_once = SYSLOG_AT_ONCE

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket: socket.socket | None = None

    def open(self) -> bool:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            connected.setblocking(False)
            connected.connect(self.path)
        except OSError:
            connected.close()
            raise
        self.close()
        self._socket = connected
        return False

    def write(self, lines: Sequence[bytes]) -> int:
        taken = 0
        for line in lines:
            try:
                self._send(line)
            except OSError:
                if not taken:
                    raise
                break
            taken += len(line)
        return taken

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, line: bytes) -> None:
        head = f"<{SYSLOG_PRIORITY}>{time.strftime('%b %e %H:%M:%S')} pgauthproxy[{os.getpid()}]: "
        message = head.encode() + line.rstrip(b"\n")
        assert self._socket is not None  # noqa: S101 (it was opened)
        try:
            self._socket.send(message)
        except OSError as error:
            if error.errno not in SYSLOG_GONE:
                raise
            # The logger was started anew, so that its socket is another one of the same name.
            self.open()
            self._socket.send(message)
