"""The file that tells who runs.

The process that it names holds a lock on it, which ends with the process however that ends: a number that was left
behind is never taken for that of a gateway, whoever has it by now.
"""

import contextlib
import fcntl
import os
from typing import Final, Self

MODE: Final = 0o644


class PidFileError(Exception):
    """It cannot be written, or names nobody; the text is one line for the operator."""


class PidFile:
    """Exists between `take` and `give_up`, or for a `with` block. An empty path is no file."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path) if path else ""
        self._descriptor = -1

    def take(self) -> None:
        """Raises PidFileError, also if another process holds the file."""
        if not self._path:
            return
        try:
            holder = running(self._path)
        except PidFileError:
            holder = 0
        if holder:
            raise PidFileError(f"pid_file: {self._path}: process {holder} runs already")
        written = f"{self._path}.{os.getpid()}"
        try:
            self._descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, MODE)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._descriptor, b"%d\n" % os.getpid())
            os.rename(written, self._path)
        except OSError as error:
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(written)
            raise PidFileError(f"pid_file: {self._path}: {error.strerror}") from None

    def give_up(self) -> None:
        """Removes it, if it is there and still ours."""
        if self._descriptor >= 0:
            # By now it may be a successor's.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                    os.unlink(self._path)
        self._close()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def running(path: str) -> int:
    """The process that a file names. Raises PidFileError if there is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(32)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(text)
    except OSError as error:
        raise PidFileError(f"pid_file: {path}: {error.strerror}") from None
    except ValueError:
        raise PidFileError(f"pid_file: {path}: holds no number of a process") from None
    raise PidFileError(f"pid_file: {path}: the process that it names does not run any more")
