"""The forwarding ends: what a session is made of once both logins are done.

Two `End`s stand back to back, each the protocol of one transport. What one reads is sent to the other's socket at
once; nothing is decoded, and a session that is silent holds no buffer, no timer and no task.

Strategy:
- All ends read into one buffer that they share. What the peer's socket does not take at once is handed to the peer's
  transport, and the sender is paused until that is gone. So a session holds at most one buffer in each direction.
- Sockets are written with send(2) directly: between reading and writing there is no Python object, unless TLS makes
  one. A side that speaks TLS is given its records in memory, and what it has to say is encrypted just before it is
  sent, so that a session with TLS holds no more than one without.
- What a transport holds is kept here as well (the same bytes, not a copy), since a transport does not give back what it
  has not written: another process that goes on with the session has to write it.
- A failed send does not close the peer that it was meant for: what that peer had sent before it went is still to be
  read, and its own read tells how it ended.

An end must never write into the middle of a message of its own accord. `at_message_boundary` says when it may.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.string cimport memcmp, memcpy, memmove

from pgauthproxy._observe cimport Observer
from pgauthproxy._tls cimport Channel

from pgauthproxy.errors import TlsError


cdef extern from "sys/socket.h" nogil:
    ssize_t send(int fd, const void *data, size_t size, int flags)

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum: POLLERR
    int poll(pollfd *fds, unsigned long count, int timeout)


cdef enum:
    # ReadyForQuery: type, length 5, transaction status
    READY_BYTES = 6
    READY_FIXED_BYTES = 5

    TERMINATE_BYTES = 5

    # The most that one TLS record says.
    RECORD_BYTES = 16384

cdef char *READY_FOR_QUERY = b"Z\x00\x00\x00\x05"
cdef char *TERMINATE = b"X\x00\x00\x00\x04"


@cython.final
cdef class ForwardBuffer:
    """The bytes between a read and its write; one for all sessions of an event loop. `size` is in bytes.

    `space` is what sockets are read into. What TLS records say is put into memory of the same size beside it, at least
    one record of the longest. `paused` holds the ends of clients that are not read at the moment, since their target
    takes nothing; `when_paused` is called when the first gets there.
    """

    cdef readonly bytearray space
    cdef readonly set paused
    cdef public object when_paused
    cdef bytearray _plain
    cdef char *_at
    cdef char *_plain_at
    cdef Py_ssize_t _plain_size

    def __cinit__(self, Py_ssize_t size):
        if size < 1:
            raise ValueError("the forwarding buffer must hold at least one byte")
        self.paused = set()
        self.space = bytearray(size)
        self._at = self.space
        self._plain_size = max(size, <Py_ssize_t>RECORD_BYTES)
        self._plain = bytearray(self._plain_size)
        self._plain_at = self._plain


@cython.no_gc
cdef class End:
    """One side of a session: reads its own transport, writes the other's.

    A protocol in asyncio's sense (BufferedProtocol). States, in order: made, joined (`join`), started (`start`), at
    end of file (its peer told, once all is written), lost. Reports to `session`: `end_lost(end, error)` once for each
    end, and `target_finished()` when the target has nothing more to say. `tls` is the transport's, if it speaks TLS.
    """

    cdef readonly object transport
    cdef object _session
    cdef End _peer
    cdef ForwardBuffer _buffer
    cdef Channel _tls
    cdef object _failure
    cdef bytes _held
    cdef readonly unsigned long long received
    cdef readonly int fd
    cdef char[READY_BYTES] _tail
    cdef readonly bint faces_target
    cdef readonly bint truncated
    cdef bint _holding
    cdef bint _at_eof
    cdef bint _broken
    cdef bint _leaving

    def __init__(
        self, session, transport, int fd, bint faces_target, ForwardBuffer buffer not None, Channel tls=None
    ):
        self._session = session
        self.transport = transport
        self.fd = fd
        self.faces_target = faces_target
        self._buffer = buffer
        self._tls = tls
        if faces_target:
            # The greeting that the client was sent ends in one.
            memcpy(self._tail, READY_FOR_QUERY, READY_FIXED_BYTES)

    def start(self, bytes rest not None, bint at_eof):
        """Begins to forward; `rest` was received by this transport before, `at_eof`: so was its end.

        The two ends are joined, and the transports' protocols, by then.
        """
        if PyBytes_GET_SIZE(rest):
            self._forward(PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))
        if at_eof:
            if not self.eof_received():
                self.transport.close()
        elif self._peer is not None and not self._peer._holding:
            # The leg before may have paused it.
            self.transport.resume_reading()

    def send(self, bytes data not None):
        """Sends a message of our own to this side, if it can still be told. See `at_message_boundary`."""
        if self._tls is None:
            self.transport.write(data)
        elif not self._broken:
            self.transport.write(self._tls.encrypt(data))

    def close(self):
        """Closes this side once it has what was sent to it."""
        if self._tls is not None and not self._broken:
            self._write(self._tls.say_goodbye())
        self.transport.close()

    @property
    def at_message_boundary(self):
        """Whether the last that was read from here was a whole ReadyForQuery, so that a message may follow it."""
        return memcmp(self._tail, READY_FOR_QUERY, READY_FIXED_BYTES) == 0

    @property
    def has_finished(self):
        """Whether this side has ended the session in order: by a Terminate, or by saying that it sends nothing more."""
        return self._at_eof or self._ends_in_terminate()

    @property
    def is_reset(self):
        """Whether the connection was reset. A transport that is not read does not tell."""
        cdef pollfd polled
        polled.fd = self.fd
        polled.events = polled.revents = 0
        return self.fd >= 0 and poll(&polled, 1, 0) > 0 and (polled.revents & POLLERR) != 0

    @property
    def holding(self):
        """Whether the transport has bytes that its socket did not take yet."""
        return self._holding

    @property
    def can_leave(self):
        """Whether another process can go on with this connection: it speaks in plain, and nothing is wrong with it."""
        return (
            self._tls is None and self.fd >= 0 and not (self._broken or self.transport.is_closing())
            and self.transport.get_write_buffer_size() <= self._held_bytes()
        )

    @property
    def tail(self):
        """The last bytes that were read from here: what `at_message_boundary` and `has_finished` look at."""
        return self._tail[:READY_BYTES]

    @property
    def unsent(self):
        """Once it has left: what is still to be sent to this side."""
        return self._held or b""

    def leave(self):
        """Reads no more from here on, and writes no more once `end_lost` is reported.

        That is only then, since until the transport is closed it may write what it holds at any time. Nobody is told
        anything by that: the connection is open for as long as the process has another descriptor of it.
        """
        self._leaving = True
        self.transport.pause_reading()
        self.transport.abort()

    def take_up(self, unsigned long long received, bytes tail not None, bytes unsent not None):
        """Continues what an end in another process has done. The two ends are joined, and neither has started yet."""
        if PyBytes_GET_SIZE(tail) != READY_BYTES:
            raise ValueError("a tail has a length of its own")
        self.received = received
        memcpy(self._tail, PyBytes_AS_STRING(tail), READY_BYTES)
        if PyBytes_GET_SIZE(unsent):
            self._hold(unsent)

    @property
    def data_received(self):
        """None. The loop looks for it, and not finding it is an exception each time."""
        return None

    def get_buffer(self, Py_ssize_t size_hint):
        return self._buffer.space

    def buffer_updated(self, Py_ssize_t count):
        try:
            if self._tls is None:
                self._forward(self._buffer._at, count)
            else:
                self._forward_decrypted(count)
        except TlsError as failure:
            self._failure = failure
            # Nothing but the alert can be said to it any more.
            self._broken = True
            self._write(failure.alert)
            if self._holding:
                # It does not read: what it has been sent may never be gone.
                self.transport.abort()
            else:
                self.transport.close()

    def eof_received(self):
        """The client's half-close goes on to the target, which may still owe an answer; the target's ends all."""
        self._at_eof = True
        if self._tls is not None and not self._tls.finished:
            # What came before is passed on all the same; that it may not be all of it is for the log.
            self.truncated = True
        if self.faces_target:
            self._session.target_finished()
            return False
        if self._broken:
            # No half-close: the send that failed took the reset, so that the read says end of file.
            return False
        # Even behind a Terminate: what looks like one may be the end of a message that was cut off.
        if self._peer is not None and not self._peer._broken:
            self._peer._say_no_more()
        return True

    def pause_writing(self):
        self._holding = True
        if self._peer is not None:
            self._peer.transport.pause_reading()
            if self.faces_target:
                self._buffer.paused.add(self._peer)
                if self._buffer.when_paused is not None and len(self._buffer.paused) == 1:
                    self._buffer.when_paused()

    def resume_writing(self):
        self._holding = False
        self._held = None
        if self._peer is not None:
            self._buffer.paused.discard(self._peer)
            if not self._peer._at_eof:
                self._peer.transport.resume_reading()

    def connection_lost(self, error):
        if error is None and (self._broken or self in self._buffer.paused and self.is_reset):
            error = ConnectionResetError(ECONNRESET, "connection reset by peer")
        if self._failure is not None:
            error = self._failure
        cdef End peer = self._peer
        cdef Py_ssize_t unsent
        session = self._session
        if self._leaving:
            # The transport is closed as soon as this returns, and writes nothing before.
            unsent = self.transport.get_write_buffer_size()
            self._held = self._held[self._held_bytes() - unsent:] if unsent else None
        self._buffer.paused.discard(self)
        self._session = None
        self._peer = None
        self.fd = -1
        if peer is not None:
            peer._peer = None
        if session is not None:
            session.end_lost(self, error)

    cdef inline bint _ends_in_terminate(self) noexcept:
        return memcmp(self._tail + READY_BYTES - TERMINATE_BYTES, TERMINATE, TERMINATE_BYTES) == 0

    cdef int _forward(self, char *at, Py_ssize_t count) except -1:
        """Sends what was received on to the peer, in the order in which it came."""
        cdef End peer = self._peer
        cdef ssize_t sent = 0
        cdef bytes records
        self.received += <unsigned long long>count
        self._keep_tail(at, count)
        if peer is None or peer._broken:
            return 0
        if peer._tls is not None:
            records = peer._tls.encrypt_from(at, count)
            at = PyBytes_AS_STRING(records)
            count = PyBytes_GET_SIZE(records)
        if not peer._holding:
            sent = send(peer.fd, at, count, 0)
            if sent == count:
                return 0
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    return self._peer_refused()
                sent = 0
        return peer._hold(at[sent:count])

    cdef int _hold(self, bytes data) except -1:
        """Leaves to this side's transport what its socket does not take, or may not."""
        if self._tls is None:
            self._held = self._held + data if self._holding and self._held is not None else data
        self.transport.write(data)
        if not self._holding:
            # It has all been taken after all.
            self._held = None
        return 0

    cdef inline Py_ssize_t _held_bytes(self) noexcept:
        return 0 if self._held is None else PyBytes_GET_SIZE(self._held)

    cdef int _forward_decrypted(self, Py_ssize_t count) except -1:
        """Does it with what TLS records say, several at once."""
        cdef char *plain = self._buffer._plain_at
        cdef Py_ssize_t size = self._buffer._plain_size
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t piece, got
        cdef Py_ssize_t have = 0
        try:
            while at < count:
                piece = min(count - at, <Py_ssize_t>RECORD_BYTES)
                self._tls.put(self._buffer._at + at, piece)
                at += piece
                while True:
                    if size - have < RECORD_BYTES:
                        self._forward(plain, have)
                        have = 0
                    got = self._tls.read_into(plain + have, size - have)
                    if got == 0:
                        break
                    have += got
        finally:
            # Also what came before a record that is broken.
            if have:
                self._forward(plain, have)
        if self._tls.has_output():
            if self.transport.get_write_buffer_size() > 2 * size:
                raise TlsError("the peer makes TLS talk and does not listen", b"")
            self._write(self._tls.take_output())
        if self._tls.finished and not self._at_eof and not self.eof_received():
            self.transport.close()
        return 0

    cdef int _say_no_more(self) except -1:
        """Half-closes this side."""
        if self._tls is not None:
            self._write(self._tls.say_goodbye())
        self.transport.write_eof()
        return 0

    cdef int _write(self, bytes data) except -1:
        """Sends what TLS itself has to say, while anything can be sent."""
        if data and not self.transport.is_closing():
            self.transport.write(data)
        return 0

    cdef int _peer_refused(self) except -1:
        self._peer._broken = True
        if self._holding or self._peer._at_eof:
            # Its reading is paused or over, so that it would never tell: there is nothing left to wait for.
            self._peer.transport.abort()
        else:
            self.transport.pause_reading()
        return 0

    cdef inline void _keep_tail(self, const char *at, Py_ssize_t count) noexcept:
        if count >= READY_BYTES:
            memcpy(self._tail, at + count - READY_BYTES, READY_BYTES)
        else:
            memmove(self._tail, self._tail + count, READY_BYTES - count)
            memcpy(self._tail + READY_BYTES - count, at, count)


@cython.final
@cython.no_gc
cdef class ObservedEnd(End):
    """An end whose messages are followed by an observer before they are passed on. Others pay nothing for it."""

    cdef Observer _observer

    def __init__(
        self,
        session,
        transport,
        int fd,
        bint faces_target,
        ForwardBuffer buffer not None,
        Channel tls,
        Observer observer not None,
    ):
        End.__init__(self, session, transport, fd, faces_target, buffer, tls)
        self._observer = observer

    @property
    def observer(self):
        """Who follows it."""
        return self._observer

    @property
    def at_message_boundary(self):
        """Whether the last message that was read from here was whole."""
        return self._observer.is_between(self.faces_target)

    cdef int _forward(self, char *at, Py_ssize_t count) except -1:
        if self.faces_target:
            self._observer.from_target(at, count)
        else:
            self._observer.from_client(at, count)
        return End._forward(self, at, count)


def join(End one not None, End other not None):
    """Sets two ends back to back and makes them the protocols of their transports, which hold nothing to be written."""
    one._peer = other
    other._peer = one
    for end in (one, other):
        end.transport.set_protocol(end)
        # Zero: the transport says at once when it holds anything, and when it holds nothing again.
        end.transport.set_write_buffer_limits(0, 0)
