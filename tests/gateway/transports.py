"""A transport that does nothing but keep what was asked of it, so that a test decides when anything happens."""

from __future__ import annotations

import asyncio
import socket
from typing import Any


class RecordingTransport(asyncio.Transport):
    """`calls` are the names of what was called, in order; `written` is all that was written.

    With a connection, what is written goes there at once. Without one it stays here: a test may say that it is held.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        super().__init__()
        self._connection = connection
        self.calls: list[str] = []
        self.written = b""
        self.protocol: asyncio.BaseProtocol | None = None
        self.reading = True
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.calls.append("write")
        self.written += bytes(data)
        if self._connection is not None:
            self._connection.sendall(data)

    def write_eof(self) -> None:
        self.calls.append("write_eof")

    def get_write_buffer_size(self) -> int:
        return len(self.written) if self._connection is None else 0

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")
        self.reading = False

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")
        self.reading = True

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def abort(self) -> None:
        self.calls.append("abort")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.calls.append("set_protocol")
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.calls.append(f"set_write_buffer_limits({high}, {low})")

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        raise AssertionError(f"nobody should ask for {name}")
