"""A TLS connection without I/O: what the peer sent goes in, what is to be sent to it comes out.

OpenSSL does the work, the one that Python's ssl module came with or that the system keeps up to date; nothing is linked
here. Contexts, certificates and policy are the caller's (net/tls.py).

Strategy: OpenSSL's memory between us and it (two MemoryBIOs) never shrinks, so that it is given, and asked for, one
record's worth at a time: a session that has moved gigabytes is as small as one that has not. Whether there is more to
read is asked before it is read: OpenSSL's "not yet" is an exception, which costs more than a small record.
"""

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory

import ssl

from pgauthproxy.errors import TlsError

cdef extern from "Python.h":
    enum: PyBUF_READ, PyBUF_WRITE

cdef enum:
    RECORD = 16384


@cython.final
cdef class Channel:
    """One connection. States, in order: made, established, finished (the peer has said that it sends no more).

    `context` and the other arguments are those of ssl.SSLContext.wrap_bio; `tls` is the SSLObject, to be asked for
    facts. `past_the_costly`: whether what is left of the handshake takes microseconds. Not to be used by two threads at
    once.
    """

    def __init__(self, context, bint server_side, server_hostname=None, session=None):
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname, session)
        self._give = self._incoming.write
        self._take = self._outgoing.read
        self._read = self.tls.read
        self._write = self.tls.write

    def handshake(self, data):
        """Goes on with the handshake, given what the peer sent; returns what is to be sent to it.

        Raises TlsError if it fails; what the peer should still get stands in that.
        """
        self._give(data)
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            output = self._take()
            # A server that has answered has signed; only a client's certificate would be work again.
            self.past_the_costly = bool(output) and self.tls.server_side and not self.tls.context.verify_mode
            return output
        except (ssl.SSLError, ValueError) as error:
            raise TlsError(describe(error), self._take()) from None
        self.established = True
        return self._take()

    def decrypt(self, data):
        """All that can be read, given what the peer sent. Raises TlsError. See `take_output`.

        What it sends behind its close_notify is dropped.
        """
        cdef bytearray plain = bytearray()
        view = memoryview(data)
        while not self.finished:
            self._give(view[:RECORD])
            view = view[RECORD:]
            while not self.finished and (self._incoming.pending or self.tls.pending()):
                try:
                    piece = self._read(RECORD)
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError:
                    piece = b""
                except ssl.SSLError as error:
                    raise TlsError(describe(error), self._take()) from None
                # Nothing, where there is something to read, is the peer's close_notify.
                self.finished = not piece
                plain += piece
            if not view:
                break
        return bytes(plain)

    def encrypt(self, bytes data not None):
        """The records that say this. Raises TlsError."""
        return self.encrypt_from(data, PyBytes_GET_SIZE(data))

    def take_output(self):
        """What OpenSSL has to say of its own accord: an alert, a new key."""
        return self._take()

    def say_goodbye(self):
        """The close_notify, empty if it was sent before. Nothing is encrypted from here on."""
        if self._said_goodbye or not self.established:
            return b""
        self._said_goodbye = True
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            # The peer's own close_notify is not here, or nothing can be said any more.
            return self._take()
        return self._take()

    cdef int put(self, const char *at, Py_ssize_t count) except -1:
        """Takes at most RECORD bytes that the peer sent; drops what comes behind its close_notify."""
        if self.finished:
            return 0
        self._give(PyMemoryView_FromMemory(<char *>at, count, PyBUF_READ))
        return 0

    cdef Py_ssize_t read_into(self, char *at, Py_ssize_t room) except -1:
        """Reads one record, as far as there is room; 0 if none is whole yet or the peer has finished."""
        cdef Py_ssize_t got
        if self.finished or not self._incoming.pending:
            return 0
        try:
            got = self._read(room, PyMemoryView_FromMemory(at, room, PyBUF_WRITE))
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLZeroReturnError:
            got = 0
        except ssl.SSLError as error:
            raise TlsError(describe(error), self._take()) from None
        # Nothing, where there is something to read, is the peer's close_notify.
        self.finished = got == 0
        return got

    cdef bint has_output(self) except -1:
        return self._outgoing.pending != 0

    cdef bytes encrypt_from(self, const char *at, Py_ssize_t count):
        cdef Py_ssize_t piece
        cdef list records = []
        try:
            while True:
                piece = min(count, <Py_ssize_t>RECORD)
                self._write(PyMemoryView_FromMemory(<char *>at, piece, PyBUF_READ))
                data = self._take()
                if piece == count and not records:
                    return data
                records.append(data)
                at += piece
                count -= piece
                if count == 0:
                    return b"".join(records)
        except ssl.SSLError as error:
            raise TlsError(describe(error), b"") from None


def describe(error):
    """What went wrong, in OpenSSL's words and for the log."""
    reason = getattr(error, "reason", None) or type(error).__name__
    detail = getattr(error, "verify_message", "")
    return f"{reason}: {detail}" if detail else str(reason)
