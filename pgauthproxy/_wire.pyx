"""Framing and message writing of the frontend/backend protocol (PostgreSQL manual, "Message Formats").

This module knows bytes and lengths, no sockets and no meanings. It must never wait for, or allocate, what a header
merely announces: each header is judged the moment its last byte is here, against a bound that the caller set.

Strategy: received bytes are appended to one bytearray and consumed from its front by an offset; the consumed front
is dropped when everything is consumed or when it outweighs what is left, so that each byte moves at most once more.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from pgauthproxy.errors import FrameError

cdef enum:
    LENGTH_BYTES = 4
    HEADER_BYTES = 5
    STARTUP_MINIMUM = 8


cdef inline uint32_t load_uint32(const uint8_t *at) noexcept nogil:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | <uint32_t>at[3]


cdef inline void store_uint32(uint8_t *at, uint32_t value) noexcept nogil:
    at[0] = value >> 24
    at[1] = (value >> 16) & 0xFF
    at[2] = (value >> 8) & 0xFF
    at[3] = value & 0xFF


@cython.final
cdef class Framer:
    """Takes received bytes in any chunking, gives whole messages.

    `limits` maps each message type that may come (its byte, as an int) to the largest length field allowed for it;
    any other type is an error. Lengths are in bytes and count the length field itself, as on the wire.
    """

    def __init__(self, dict limits not None):
        self._bytes = bytearray()
        self._start = 0
        self.allow(limits)

    def allow(self, dict limits not None):
        """Sets which message types may come from here on, each with its largest length."""
        cdef uint8_t message_type
        cdef uint32_t limit
        memset(self._limits, 0, sizeof(self._limits))
        for message_type, limit in limits.items():
            self._limits[message_type] = limit

    @property
    def pending(self):
        """How many bytes were received and not yet taken."""
        return PyByteArray_GET_SIZE(self._bytes) - self._start

    @property
    def first_byte(self):
        """The next byte as an int, left where it is; -1 if there is none."""
        return self._at()[0] if self._start < PyByteArray_GET_SIZE(self._bytes) else -1

    def byte(self):
        """Takes one byte, as an int; None if there is none."""
        if self._start == PyByteArray_GET_SIZE(self._bytes):
            return None
        taken = self._at()[0]
        self._consume(1)
        return taken

    def feed(self, data):
        """Appends what was received."""
        self._bytes += data

    def startup_packet(self, uint32_t limit):
        """The next packet without a type byte, its length field taken off; None if it is not all here.

        Raises FrameError if its length is under 8 or above `limit`.
        """
        cdef const uint8_t *at = self._at()
        cdef Py_ssize_t here = PyByteArray_GET_SIZE(self._bytes) - self._start
        cdef uint32_t length
        if here < LENGTH_BYTES:
            return None
        length = load_uint32(at)
        if length < STARTUP_MINIMUM or length > limit:
            raise FrameError(f"startup packet of length {length}, allowed are {STARTUP_MINIMUM} to {limit}")
        if here < <Py_ssize_t>length:
            return None
        body = PyBytes_FromStringAndSize(<const char *>at + LENGTH_BYTES, <Py_ssize_t>length - LENGTH_BYTES)
        self._consume(length)
        return body

    def message(self):
        """The next message as (type, body); None if it is not all here.

        Raises FrameError if its type may not come, or its length is under 4 or above the limit of its type.
        """
        cdef Py_ssize_t size = self._size_at(self._start)
        cdef const uint8_t *at = self._at()
        if size == 0:
            return None
        message_type = at[0]
        body = PyBytes_FromStringAndSize(<const char *>at + HEADER_BYTES, size - HEADER_BYTES)
        self._consume(size)
        return message_type, body

    def run(self, bytes types not None):
        """All next messages that are of these types, one behind the other as they came; empty if there are none.

        Raises FrameError as `message` does.
        """
        cdef Py_ssize_t end = self._start
        cdef Py_ssize_t size
        while True:
            size = self._size_at(end)
            if size == 0 or PyByteArray_AS_STRING(self._bytes)[end] not in types:
                break
            end += size
        whole = PyBytes_FromStringAndSize(<const char *>self._at(), end - self._start)
        self._consume(end - self._start)
        return whole

    def take_rest(self):
        """Everything that is left, in order; the framer is empty then."""
        rest = bytes(memoryview(self._bytes)[self._start:])
        self._bytes = bytearray()
        self._start = 0
        return rest

    cdef Py_ssize_t _size_at(self, Py_ssize_t start) except -1:
        """How many bytes the message that starts there takes, its header included; 0 if it is not all here."""
        cdef const uint8_t *at = <const uint8_t *>PyByteArray_AS_STRING(self._bytes) + start
        cdef Py_ssize_t here = PyByteArray_GET_SIZE(self._bytes) - start
        cdef uint32_t length
        cdef uint8_t message_type
        if here < 1:
            return 0
        message_type = at[0]
        if self._limits[message_type] == 0:
            raise FrameError(f"message of type 0x{message_type:02x}, which may not come here")
        if here < HEADER_BYTES:
            return 0
        length = load_uint32(at + 1)
        if length < LENGTH_BYTES or length > self._limits[message_type]:
            raise FrameError(
                f"message '{message_type:c}' of length {length}, "
                f"allowed are {LENGTH_BYTES} to {self._limits[message_type]}"
            )
        return <Py_ssize_t>length + 1 if here > <Py_ssize_t>length else 0

    cdef const uint8_t *_at(self) noexcept:
        return <const uint8_t *>PyByteArray_AS_STRING(self._bytes) + self._start

    cdef int _consume(self, Py_ssize_t count) except -1:
        self._start += count
        if self._start * 2 >= PyByteArray_GET_SIZE(self._bytes):
            del self._bytes[:self._start]
            self._start = 0
        return 0


def message(uint8_t message_type, bytes body not None):
    """One message: its type, its length, its body. The body must stay under 1 GiB."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    cdef uint8_t *at
    if size >= 1 << 30:
        raise ValueError("a message body of 1 GiB or more")
    framed = PyBytes_FromStringAndSize(NULL, size + HEADER_BYTES)
    at = <uint8_t *>PyBytes_AS_STRING(framed)
    at[0] = message_type
    store_uint32(at + 1, <uint32_t>(size + LENGTH_BYTES))
    memcpy(at + HEADER_BYTES, PyBytes_AS_STRING(body), size)
    return framed


def startup_packet(uint32_t code, bytes body not None):
    """One packet of the startup phase: length, code (protocol version or request), body."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    cdef uint8_t *at
    if size >= 1 << 30:
        raise ValueError("a packet body of 1 GiB or more")
    framed = PyBytes_FromStringAndSize(NULL, size + STARTUP_MINIMUM)
    at = <uint8_t *>PyBytes_AS_STRING(framed)
    store_uint32(at, <uint32_t>(size + STARTUP_MINIMUM))
    store_uint32(at + LENGTH_BYTES, code)
    memcpy(at + STARTUP_MINIMUM, PyBytes_AS_STRING(body), size)
    return framed
