cdef class Channel:
    cdef readonly object tls
    cdef readonly bint established
    cdef readonly bint finished
    cdef readonly bint past_the_costly
    cdef object _incoming
    cdef object _outgoing
    cdef object _take
    cdef object _give
    cdef object _read
    cdef object _write
    cdef bint _said_goodbye

    cdef int put(self, const char *at, Py_ssize_t count) except -1
    cdef Py_ssize_t read_into(self, char *at, Py_ssize_t room) except -1
    cdef bint has_output(self) except -1
    cdef bytes encrypt_from(self, const char *at, Py_ssize_t count)
