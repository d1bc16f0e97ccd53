"""Files with secrets in them: what others may read or write is not used, as PostgreSQL has it with keys."""

import os
import stat
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 26


class PrivateFileError(Exception):
    """A file that is not there, or not private. The text is for the operator and begins without the file's name."""


def check(found: os.stat_result) -> None:
    """In libpq's terms: mode 0600, or 0640 if root owns it. Raises PrivateFileError."""
    if not stat.S_ISREG(found.st_mode):
        raise PrivateFileError("not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise PrivateFileError("must belong to root or to the gateway's user")
    too_open = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO if found.st_uid == 0 else stat.S_IRWXG | stat.S_IRWXO
    if found.st_mode & too_open:
        raise PrivateFileError("others may read it; it must have mode 0600, or 0640 if root owns it")


def read(path: Path) -> bytes:
    """A private file's content. Raises PrivateFileError."""
    try:
        # What is opened is what is judged; a pipe in its place holds nobody up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            check(os.fstat(descriptor))
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise PrivateFileError(f"{error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise PrivateFileError(f"more than {MAX_BYTES} bytes")
    return content
