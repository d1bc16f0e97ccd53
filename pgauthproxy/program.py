"""Starting this program anew."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final

UNCATCHABLE: Final = {signal.SIGKILL, signal.SIGSTOP}


def start(words: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]) -> int:
    """The number of the process. It inherits these descriptors, under their numbers, and no others. Raises OSError."""
    arguments = [sys.executable, *_import_options(), "-m", "pgauthproxy", *words]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        return os.posix_spawn(
            sys.executable, arguments, environment, setsigmask=[], setsigdef=signal.valid_signals() - UNCATCHABLE
        )
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


def _import_options() -> list[str]:
    """It must find this very package, and nothing in the working directory that this process does not look in."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
