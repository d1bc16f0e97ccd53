from libc.stdint cimport uint8_t, uint32_t


cdef struct Stream:
    # The header of the message that is being read, as far as it is here, and then how much of its body is not.
    uint8_t[5] header
    uint8_t have
    bint lost
    uint32_t missing


cdef class Observer:
    cdef object _on_statement
    cdef bytearray _text
    cdef Py_ssize_t _max_text
    cdef unsigned long long _text_size
    cdef Stream _client
    cdef Stream _target
    cdef unsigned long long _unanswered
    cdef double _since
    cdef uint8_t _status
    cdef bint _unfinished
    cdef bint _synced_last
    cdef bint _copying
    cdef bint _in_name
    cdef bint _text_over

    cdef int from_client(self, const char *start, Py_ssize_t count) except -1
    cdef int from_target(self, const char *start, Py_ssize_t count) except -1
    cdef bint is_between(self, bint target_side) noexcept
    cdef int _client_began(self) except -1
    cdef int _client_said(self) except -1
    cdef int _collect(self, const char *at, Py_ssize_t count) except -1
    cdef int _report(self, uint8_t message_type) except -1
