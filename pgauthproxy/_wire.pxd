from libc.stdint cimport uint8_t, uint32_t


cdef class Framer:
    cdef bytearray _bytes
    cdef Py_ssize_t _start
    cdef uint32_t[256] _limits

    cdef Py_ssize_t _size_at(self, Py_ssize_t start) except -1
    cdef const uint8_t *_at(self) noexcept
    cdef int _consume(self, Py_ssize_t count) except -1
