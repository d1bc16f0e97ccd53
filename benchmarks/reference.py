"""What the compiled modules do, in plain Python: tests hold both to the same results, benchmarks to the clock.

Written to be read, yet as a careful Python program would be: no copy that is not needed, bound methods kept where
bytes flow. What a compiled module does for speed alone (send(2) past the transport, a shared buffer) is left out.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Protocol

from pgauthproxy.errors import FrameError

LENGTH_BYTES = 4
HEADER_BYTES = 5
STARTUP_MINIMUM = 8
LARGEST_BODY = 1 << 30
READY_BYTES = 6
READY_FOR_QUERY = b"Z\x00\x00\x00\x05"
TERMINATE = b"X\x00\x00\x00\x04"


class Framer:
    """`_wire.Framer`."""

    def __init__(self, limits: dict[int, int]) -> None:
        self._bytes = bytearray()
        self.allow(limits)

    def allow(self, limits: dict[int, int]) -> None:
        self._limits = dict(limits)

    @property
    def pending(self) -> int:
        return len(self._bytes)

    @property
    def first_byte(self) -> int:
        return self._bytes[0] if self._bytes else -1

    def byte(self) -> int | None:
        return self._bytes.pop(0) if self._bytes else None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._bytes += data

    def startup_packet(self, limit: int) -> bytes | None:
        if len(self._bytes) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._bytes[:LENGTH_BYTES])
        if not STARTUP_MINIMUM <= length <= limit:
            raise FrameError(f"startup packet of length {length}")
        if len(self._bytes) < length:
            return None
        body = bytes(self._bytes[LENGTH_BYTES:length])
        del self._bytes[:length]
        return body

    def message(self) -> tuple[int, bytes] | None:
        size = self._size_at(0)
        if size == 0:
            return None
        message_type = self._bytes[0]
        body = bytes(self._bytes[HEADER_BYTES:size])
        del self._bytes[:size]
        return message_type, body

    def run(self, types: bytes) -> bytes:
        end = 0
        while (size := self._size_at(end)) and self._bytes[end] in types:
            end += size
        whole = bytes(self._bytes[:end])
        del self._bytes[:end]
        return whole

    def _size_at(self, start: int) -> int:
        here = len(self._bytes) - start
        if here < 1:
            return 0
        message_type = self._bytes[start]
        limit = self._limits.get(message_type, 0)
        if limit == 0:
            raise FrameError(f"message of type 0x{message_type:02x}")
        if here < HEADER_BYTES:
            return 0
        length = int.from_bytes(self._bytes[start + 1 : start + HEADER_BYTES])
        if not LENGTH_BYTES <= length <= limit:
            raise FrameError(f"message of length {length}")
        return length + 1 if here > length else 0

    def take_rest(self) -> bytes:
        rest = bytes(self._bytes)
        self._bytes.clear()
        return rest


def message(message_type: int, body: bytes) -> bytes:
    """`_wire.message`."""
    if len(body) >= LARGEST_BODY:
        raise ValueError("a message body of 1 GiB or more")
    return message_type.to_bytes() + (len(body) + LENGTH_BYTES).to_bytes(4) + body


def startup_packet(code: int, body: bytes) -> bytes:
    """`_wire.startup_packet`."""
    if len(body) >= LARGEST_BODY:
        raise ValueError("a packet body of 1 GiB or more")
    return (len(body) + STARTUP_MINIMUM).to_bytes(4) + code.to_bytes(4) + body


def _md5(data: bytes) -> bytes:
    return b"md5" + hashlib.md5(data, usedforsecurity=False).hexdigest().encode()


def md5_password(password: bytes, user: bytes) -> bytes:
    """`_digest.md5_password`."""
    return _md5(password + user)


def md5_answer(stored: bytes, salt: bytes) -> bytes:
    """`_digest.md5_answer`."""
    if len(stored) != 35 or len(salt) != 4:
        raise ValueError("an MD5 answer needs 35 bytes of stored hash and 4 bytes of salt")
    return _md5(stored[3:] + salt)


class Space(Protocol):
    """What all ends read into."""

    @property
    def space(self) -> bytearray: ...


class Owner(Protocol):
    """What an end reports to."""

    def end_lost(self, end: "End", error: Exception | None) -> None: ...
    def target_finished(self) -> None: ...


class End(asyncio.BufferedProtocol):
    """`_relay.End` without TLS, writing through its peer's transport alone; `fd` is not used.

    It reads into a buffer of the same size, so that both hold no more than that in each direction.
    """

    def __init__(
        self, session: Owner, transport: asyncio.Transport, fd: int, faces_target: bool, buffer: Space
    ) -> None:
        self._session: Owner | None = session
        self._peer: End | None = None
        self.transport = transport
        self.faces_target = faces_target
        self.received = 0
        self.holding = False
        self._space = memoryview(buffer.space)
        self._at_eof = False
        self._tail = READY_FOR_QUERY + b"\0" if faces_target else bytes(READY_BYTES)

    def start(self, rest: bytes, at_eof: bool) -> None:
        assert self._peer is not None
        if rest:
            self._forward(rest)
        if at_eof:
            if not self.eof_received():
                self.transport.close()
        elif not self._peer.holding:
            self.transport.resume_reading()

    @property
    def at_message_boundary(self) -> bool:
        return self._tail.startswith(READY_FOR_QUERY)

    @property
    def has_finished(self) -> bool:
        return self._at_eof or self._ends_in_terminate()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        # What the transport keeps must not change when the buffer is read into again.
        self._forward(bytes(self._space[:nbytes]))

    def _forward(self, data: bytes) -> None:
        self.received += len(data)
        self._tail = (self._tail + data[-READY_BYTES:])[-READY_BYTES:]
        if self._peer is not None:
            self._peer.transport.write(data)

    def eof_received(self) -> bool:
        self._at_eof = True
        if self.faces_target:
            assert self._session is not None
            self._session.target_finished()
            return False
        if self._peer is not None:
            self._peer.transport.write_eof()
        return True

    def _ends_in_terminate(self) -> bool:
        return self._tail.endswith(TERMINATE)

    def pause_writing(self) -> None:
        self.holding = True
        if self._peer is not None:
            self._peer.transport.pause_reading()

    def resume_writing(self) -> None:
        self.holding = False
        if self._peer is not None and not self._peer._at_eof:
            self._peer.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        peer, session = self._peer, self._session
        self._peer = self._session = None
        if peer is not None:
            peer._peer = None
        if session is not None:
            session.end_lost(self, error)


def join(one: End, other: End) -> None:
    """`_relay.join`."""
    one._peer = other
    other._peer = one
    for end in (one, other):
        end.transport.set_protocol(end)
        end.transport.set_write_buffer_limits(0, 0)


class Observer:
    """`_observe.Observer`, which two ends tell what they read."""

    def __init__(self, on_statement: Callable[[bool, bytes, int], object] | None = None, max_text: int = 0) -> None:
        self._on_statement = on_statement
        self._max_text = max_text
        self._streams = {"client": bytearray(), "target": bytearray()}
        self._lost: set[str] = set()
        self._unanswered = 0
        self._is_unfinished = False
        self._synced_last = False
        self._is_copying = False
        self._since = time.monotonic()
        self.in_transaction = False

    @property
    def idle_since(self) -> float | None:
        return None if self._unanswered or self._is_unfinished or self._lost else self._since

    def reads(self, side: str, data: bytes) -> None:
        stream = self._streams[side]
        stream += data
        said = self._client_said if side == "client" else self._target_said
        while len(stream) >= HEADER_BYTES and side not in self._lost:
            length = int.from_bytes(stream[1:HEADER_BYTES])
            if length < LENGTH_BYTES:
                self._lost.add(side)
                break
            if side == "target" and stream[0] in b"GW":
                self._is_copying = True
            if len(stream) <= length:
                break
            said(stream[0], bytes(stream[HEADER_BYTES : length + 1]))
            del stream[: length + 1]
        if side == "client" and not self._unanswered and not self._is_unfinished:
            self._since = time.monotonic()

    def _client_said(self, kind: int, body: bytes) -> None:
        if kind in b"QSF":
            self._unanswered += 1
            self._is_unfinished = False
            self._synced_last = kind == ord("S")
        elif kind in b"cf":
            if self._is_copying and self._synced_last and self._unanswered:
                self._unanswered -= 1
                self._is_unfinished = True
            self._is_copying = False
        elif kind not in b"dX":
            self._is_unfinished = True
        if self._on_statement is not None and kind in b"QP":
            text = (body if kind == ord("Q") else body.partition(b"\0")[2]).partition(b"\0")[0]
            self._on_statement(kind == ord("P"), text[: self._max_text], len(text))

    def _target_said(self, kind: int, body: bytes) -> None:
        if kind == ord("Z"):
            self._unanswered = max(0, self._unanswered - 1)
            self._is_copying = False
            self.in_transaction = body[-1:] != b"I" if body else self.in_transaction
            self._since = time.monotonic()
