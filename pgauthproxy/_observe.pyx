"""What a session is at, as its messages tell: whether the client waits for the target or the target for the client,
since when, in which transaction, and what SQL the client sends.

It follows headers and skips bodies, so that what it costs depends on messages and not on bytes. It knows no sockets,
changes nothing, and stops nobody: where bytes are no messages it no longer claims anything.

Strategy: the target owes one ReadyForQuery for each Query, FunctionCall and Sync. Those are counted, so that requests
which wait behind each other are not taken for silence when the first is answered. One case differs: while a target
takes COPY data it ignores a Sync, and drivers that copy by the extended protocol send one before the data and one
behind.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import msgspec

cdef enum:
    HEADER_BYTES = 5
    LENGTH_BYTES = 4

    # Of clients.
    QUERY = 0x51  # Q
    PARSE = 0x50  # P
    SYNC = 0x53  # S
    FUNCTION_CALL = 0x46  # F
    COPY_DATA = 0x64  # d
    COPY_DONE = 0x63  # c
    COPY_FAIL = 0x66  # f
    TERMINATE = 0x58  # X

    # Of targets.
    READY_FOR_QUERY = 0x5A  # Z
    COPY_IN_RESPONSE = 0x47  # G
    COPY_BOTH_RESPONSE = 0x57  # W

    IDLE = 0x49  # I


cdef inline double monotonic() noexcept nogil:
    """As Python's time.monotonic."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef object described(const Stream *stream):
    return (<const char *>stream.header)[:HEADER_BYTES], stream.have, stream.lost, stream.missing


cdef int put_back(Stream *stream, described) except -1:
    cdef bytes header
    header, stream.have, stream.lost, stream.missing = described
    if PyBytes_GET_SIZE(header) != HEADER_BYTES or stream.have > HEADER_BYTES:
        raise ValueError("a header has a length of its own")
    memcpy(stream.header, PyBytes_AS_STRING(header), HEADER_BYTES)
    return 0


cdef inline const uint8_t *read_header(Stream *stream, const uint8_t *at, const uint8_t *end) noexcept nogil:
    """Reads on in a header, and says where it has stopped. It is whole when `have` says so."""
    cdef uint32_t length
    while stream.have < HEADER_BYTES and at < end:
        stream.header[stream.have] = at[0]
        stream.have += 1
        at += 1
    if stream.have == HEADER_BYTES:
        length = (
            (<uint32_t>stream.header[1] << 24)
            | (<uint32_t>stream.header[2] << 16)
            | (<uint32_t>stream.header[3] << 8)
            | <uint32_t>stream.header[4]
        )
        stream.lost = length < LENGTH_BYTES
        stream.missing = length - LENGTH_BYTES
    return at


@cython.final
@cython.no_gc
cdef class Observer:
    """Follows one session from its greeting on; an `ObservedEnd` of each side that is to be followed tells it.

    `on_statement(is_prepared, text, size)` gets the SQL of each Query and Parse message before it is passed on: at most
    `max_text` bytes of it, and how many there were. It must not lead back to the session.
    """

    def __init__(self, on_statement=None, Py_ssize_t max_text=0):
        self._on_statement = on_statement
        self._max_text = max_text
        self._status = IDLE
        self._since = monotonic()

    @property
    def idle_since(self):
        """Since when the target waits for the client, by the clock of time.monotonic; None if it does not."""
        if self._unanswered or self._unfinished or self._client.lost or self._target.lost:
            return None
        return self._since

    @property
    def in_transaction(self):
        """Whether the last ReadyForQuery was one in a transaction, be it a failed one."""
        return self._status != IDLE

    @property
    def state(self):
        """All that it knows, for an observer that goes on in its place (`take_up`), maybe in another process."""
        return msgspec.msgpack.encode((
            described(&self._client),
            described(&self._target),
            self._unanswered,
            self._since,
            self._status,
            (self._unfinished, self._synced_last, self._copying, self._in_name, self._text_over),
            self._text,
            self._text_size,
        ))

    @property
    def tells_statements(self):
        """Whether somebody gets the SQL."""
        return self._on_statement is not None

    def take_up(self, bytes state not None):
        """Goes on where another observer was."""
        (
            client,
            target,
            self._unanswered,
            self._since,
            self._status,
            (self._unfinished, self._synced_last, self._copying, self._in_name, self._text_over),
            text,
            self._text_size,
        ) = msgspec.msgpack.decode(state)
        put_back(&self._client, client)
        put_back(&self._target, target)
        self._text = None if text is None or self._on_statement is None else bytearray(text)

    cdef bint is_between(self, bint target_side) noexcept:
        """Whether a side's last message was whole."""
        cdef Stream *stream = &self._target if target_side else &self._client
        return stream.have == 0 and not stream.lost

    cdef int from_target(self, const char *start, Py_ssize_t count) except -1:
        cdef Stream *stream = &self._target
        cdef const uint8_t *at = <const uint8_t *>start
        cdef const uint8_t *end = at + count
        cdef Py_ssize_t piece
        while at < end and not stream.lost:
            if stream.have < HEADER_BYTES:
                at = read_header(stream, at, end)
                if stream.have < HEADER_BYTES or stream.lost:
                    break
                if stream.header[0] == COPY_IN_RESPONSE or stream.header[0] == COPY_BOTH_RESPONSE:
                    self._copying = True
            piece = min(<Py_ssize_t>stream.missing, end - at)
            if piece and stream.header[0] == READY_FOR_QUERY:
                self._status = at[0]
            at += piece
            stream.missing -= <uint32_t>piece
            if stream.missing == 0:
                stream.have = 0
                if stream.header[0] == READY_FOR_QUERY:
                    if self._unanswered:
                        self._unanswered -= 1
                    self._copying = False
                    self._since = monotonic()
        return 0

    cdef int from_client(self, const char *start, Py_ssize_t count) except -1:
        cdef Stream *stream = &self._client
        cdef const uint8_t *at = <const uint8_t *>start
        cdef const uint8_t *end = at + count
        cdef Py_ssize_t piece
        while at < end and not stream.lost:
            if stream.have < HEADER_BYTES:
                at = read_header(stream, at, end)
                if stream.have < HEADER_BYTES or stream.lost:
                    break
                self._client_began()
            piece = min(<Py_ssize_t>stream.missing, end - at)
            if piece and self._text is not None:
                self._collect(<const char *>at, piece)
            at += piece
            stream.missing -= <uint32_t>piece
            if stream.missing == 0:
                stream.have = 0
                self._client_said()
        if not self._unanswered and not self._unfinished:
            # What asks for nothing yet: a part of a message.
            self._since = monotonic()
        return 0

    cdef int _client_began(self) except -1:
        cdef uint8_t message_type = self._client.header[0]
        if self._on_statement is not None and (message_type == QUERY or message_type == PARSE):
            self._text = bytearray()
            self._text_size = 0
            self._text_over = False
            self._in_name = message_type == PARSE
        return 0

    cdef int _client_said(self) except -1:
        """A message is whole."""
        cdef uint8_t message_type = self._client.header[0]
        if message_type == QUERY or message_type == SYNC or message_type == FUNCTION_CALL:
            self._unanswered += 1
            self._unfinished = False
            self._synced_last = message_type == SYNC
        elif message_type == COPY_DONE or message_type == COPY_FAIL:
            if self._copying and self._synced_last and self._unanswered:
                # That Sync came before the data and was ignored; there must be another.
                self._unanswered -= 1
                self._unfinished = True
            self._copying = False
        elif message_type != COPY_DATA and message_type != TERMINATE:
            self._unfinished = True
        if self._text is not None:
            self._report(message_type)
        return 0

    cdef int _collect(self, const char *at, Py_ssize_t count) except -1:
        """Takes what stands up to the NUL; in a Parse message the name of the statement stands before."""
        cdef const char *nul
        cdef Py_ssize_t room
        if self._in_name:
            nul = <const char *>memchr(at, 0, count)
            if nul == NULL:
                return 0
            self._in_name = False
            count -= nul + 1 - at
            at = nul + 1
        if self._text_over:
            return 0
        nul = <const char *>memchr(at, 0, count)
        if nul != NULL:
            self._text_over = True
            count = nul - at
        self._text_size += <unsigned long long>count
        room = min(count, self._max_text - len(self._text))
        if room > 0:
            self._text += at[:room]
        return 0

    cdef int _report(self, uint8_t message_type) except -1:
        text = bytes(self._text)
        self._text = None
        self._on_statement(message_type == PARSE, text, self._text_size)
        return 0
