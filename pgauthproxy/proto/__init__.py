"""The protocol without I/O: bytes in, steps out."""
