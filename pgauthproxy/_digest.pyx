"""The MD5 answers of the protocol (PostgreSQL manual, "Message Flow", AuthenticationMD5Password).

    md5_password(password, user)  = "md5" + hex(md5(password + user)), as pg_authid stores it
    md5_answer(stored, salt)      = "md5" + hex(md5(hex digits of stored + salt)), as a client sends it

MD5 itself (RFC 1321) is written out here, since a build of OpenSSL in FIPS mode refuses it to hashlib,
and a gateway that must answer a server's MD5 request has no choice of digest.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef enum:
    BLOCK_BYTES = 64
    DIGEST_BYTES = 16
    SALT_BYTES = 4
    STORED_BYTES = 35  # "md5" and 32 hex digits

# RFC 1321, section 3.4: the table T is floor(2**32 * abs(sin(i))), the shifts go by round.
cdef uint32_t[64] SINES = [
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
]
cdef uint8_t[16] SHIFTS = [7, 12, 17, 22, 5, 9, 14, 20, 4, 11, 16, 23, 6, 10, 15, 21]
cdef char *HEX_DIGITS = b"0123456789abcdef"


cdef struct Md5:
    uint32_t[4] state
    uint64_t length
    uint8_t[64] block


cdef inline uint32_t load_little(const uint8_t *at) noexcept nogil:
    return <uint32_t>at[0] | (<uint32_t>at[1] << 8) | (<uint32_t>at[2] << 16) | (<uint32_t>at[3] << 24)


cdef void start(Md5 *digest) noexcept nogil:
    digest.state[0] = 0x67452301
    digest.state[1] = 0xefcdab89
    digest.state[2] = 0x98badcfe
    digest.state[3] = 0x10325476
    digest.length = 0


cdef void absorb_block(Md5 *digest, const uint8_t *block) noexcept nogil:
    cdef uint32_t a = digest.state[0]
    cdef uint32_t b = digest.state[1]
    cdef uint32_t c = digest.state[2]
    cdef uint32_t d = digest.state[3]
    cdef uint32_t mixed, turned
    cdef int i, word, shift
    for i in range(64):
        if i < 16:
            mixed = (b & c) | (~b & d)
            word = i
        elif i < 32:
            mixed = (d & b) | (~d & c)
            word = (5 * i + 1) & 15
        elif i < 48:
            mixed = b ^ c ^ d
            word = (3 * i + 5) & 15
        else:
            mixed = c ^ (b | ~d)
            word = (7 * i) & 15
        turned = a + mixed + SINES[i] + load_little(block + 4 * word)
        shift = SHIFTS[(i >> 4) * 4 + (i & 3)]
        a = d
        d = c
        c = b
        b = b + ((turned << shift) | (turned >> (32 - shift)))
    digest.state[0] += a
    digest.state[1] += b
    digest.state[2] += c
    digest.state[3] += d


cdef void absorb(Md5 *digest, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t filled = <Py_ssize_t>(digest.length & (BLOCK_BYTES - 1))
    cdef Py_ssize_t taken
    digest.length += <uint64_t>size
    while size > 0:
        taken = min(size, <Py_ssize_t>BLOCK_BYTES - filled)
        memcpy(digest.block + filled, data, taken)
        filled += taken
        data += taken
        size -= taken
        if filled == BLOCK_BYTES:
            absorb_block(digest, digest.block)
            filled = 0


cdef void finish(Md5 *digest, uint8_t *hex_digits) noexcept nogil:
    """Writes 32 hex digits."""
    cdef uint64_t bits = digest.length * 8
    cdef uint8_t[72] padding
    cdef uint8_t byte
    cdef int i
    cdef Py_ssize_t padded = 56 - <Py_ssize_t>(digest.length & (BLOCK_BYTES - 1))
    if padded <= 0:
        padded += BLOCK_BYTES
    memset(padding, 0, sizeof(padding))
    padding[0] = 0x80
    for i in range(8):
        padding[padded + i] = (bits >> (8 * i)) & 0xFF
    absorb(digest, padding, padded + 8)
    for i in range(DIGEST_BYTES):
        byte = (digest.state[i >> 2] >> (8 * (i & 3))) & 0xFF
        hex_digits[2 * i] = HEX_DIGITS[byte >> 4]
        hex_digits[2 * i + 1] = HEX_DIGITS[byte & 15]


cdef bytes md5_of_two(const uint8_t *first, Py_ssize_t first_size, const uint8_t *second, Py_ssize_t second_size):
    cdef Md5 digest
    answer = PyBytes_FromStringAndSize(NULL, STORED_BYTES)
    cdef uint8_t *at = <uint8_t *>PyBytes_AS_STRING(answer)
    memcpy(at, <const char *>b"md5", 3)
    with nogil:
        start(&digest)
        absorb(&digest, first, first_size)
        absorb(&digest, second, second_size)
        finish(&digest, at + 3)
    return answer


def md5_password(bytes password not None, bytes user not None):
    """What the server stores for a password: "md5" and 32 hex digits."""
    return md5_of_two(
        <const uint8_t *>PyBytes_AS_STRING(password), PyBytes_GET_SIZE(password),
        <const uint8_t *>PyBytes_AS_STRING(user), PyBytes_GET_SIZE(user),
    )


def md5_answer(bytes stored not None, bytes salt not None):
    """The answer to a request with `salt` (4 bytes), from what `md5_password` gives; ValueError on other sizes."""
    if PyBytes_GET_SIZE(stored) != STORED_BYTES or PyBytes_GET_SIZE(salt) != SALT_BYTES:
        raise ValueError("an MD5 answer needs 35 bytes of stored hash and 4 bytes of salt")
    return md5_of_two(
        <const uint8_t *>PyBytes_AS_STRING(stored) + 3, STORED_BYTES - 3,
        <const uint8_t *>PyBytes_AS_STRING(salt), SALT_BYTES,
    )
