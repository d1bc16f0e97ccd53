"""What systemd is told, and what it gives: sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).

The variables are taken out of the environment: no program that the gateway starts is to speak in its name.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

FIRST_DESCRIPTOR: Final = 3
MOST_PATIENCE: Final = 0.5
"""Seconds for which a state may wait in the manager's full queue: the gateway waits too, and a lost one is missed."""


class Service:
    """The service manager that has started this process, if one has. Without one nothing here has an effect.

    `descriptors` are listening sockets that it has opened.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = _number(environment.pop("WATCHDOG_USEC", ""))
        is_watched = _number(environment.pop("WATCHDOG_PID", ""), os.getpid()) == os.getpid()
        self._watchdog_seconds = watchdog / 1e6 / 2 if is_watched else 0.0
        count = _number(environment.pop("LISTEN_FDS", ""))
        is_given = _number(environment.pop("LISTEN_PID", "")) == os.getpid()
        environment.pop("LISTEN_FDNAMES", None)
        self.descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count if is_given else FIRST_DESCRIPTOR)
        self._is_stopping = False
        self._is_watched = False

    def ready(self) -> None:
        """It serves, with the settings that there are by now. From the first time on the watchdog is kept quiet."""
        if not self._is_stopping:
            self._tell("READY=1")
        if not self._is_watched:
            self._is_watched = True
            self._keep_watchdog_quiet()

    @property
    def environment(self) -> dict[str, str]:
        """What a successor must have in its environment to speak to the same manager."""
        if not self._address:
            return {}
        watchdog = {"WATCHDOG_USEC": str(int(self._watchdog_seconds * 2e6))} if self._watchdog_seconds else {}
        return {"NOTIFY_SOCKET": self._address.replace("\0", "@"), **watchdog}

    def hand_to(self, pid: int) -> None:
        """That process is the service from here on; this one has nothing more to say."""
        self._tell(f"MAINPID={pid}")

    def reloading(self) -> None:
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._is_stopping = True
        self._tell("STOPPING=1")

    def _keep_watchdog_quiet(self) -> None:
        """Shows from here on that the event loop runs, if that is wanted."""
        if self._watchdog_seconds and self._address:
            self._tell("WATCHDOG=1", 0.0)
            asyncio.get_running_loop().call_later(self._watchdog_seconds, self._keep_watchdog_quiet)

    def _tell(self, state: str, patience: float = MOST_PATIENCE) -> None:
        if not self._address:
            return
        # It may be gone, or not read: neither is a reason not to serve.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, contextlib.suppress(OSError):
            notify.settimeout(patience)
            notify.sendto(state.encode(), self._address)


def _number(text: str, without: int = 0) -> int:
    return int(text) if text.isascii() and text.isdigit() else without
