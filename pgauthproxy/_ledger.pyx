"""Counts that hold for the whole gateway, however many processes it has: clients, logins, and logins that failed.

All of it lies in memory that the processes share (a memfd that they inherit, or anonymous memory for one alone), in
tables of a fixed size, under one mutex. No operation allocates or waits for anything but that mutex, which nobody holds
for longer than it takes to look through a few lines of memory. (A process that is stopped in that moment, by SIGSTOP,
holds up the others until it goes on or is killed.)

Strategy. A process may be killed at any instruction, also in the middle of an operation. So the mutex is a robust one
(the next to take it is told, and goes on), and the tables are such that no half-done operation breaks them: nothing
links one entry to another, and no sum is kept that could differ from what it is the sum of. Each count stands once for
each worker, in its slot; who sees a worker die (a supervisor, or a process that has taken over from another) clears
that slot, and with it all that the worker had.

Counts are found by open addressing with linear probing. Their entries must not move, since whoever has counted
something holds the entry's index; one that counts nothing any more may be taken over by another key, and is emptied
once no search has to go past it. Failures are found as in the cache of a processor: each key has its set of entries,
and a new one takes the place of the one in that set that was touched least lately. So a spray of addresses costs no
more memory than there is, and the oldest are forgotten.

Keys are kept as their SipHash-2-4, twice, with a secret of the table: 128 bits that nobody outside can aim at.

Where there are no robust mutexes (macOS), the memory is private and the ledger one process's.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import fcntl
import os


cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <sys/mman.h>
    #include <unistd.h>

    #if defined(__APPLE__)
    #define LEDGER_SHARED 0
    static int ledger_prepare(pthread_mutex_t *mutex) { return pthread_mutex_init(mutex, NULL); }
    static void ledger_lock(pthread_mutex_t *mutex) { (void)pthread_mutex_lock(mutex); }
    #define LEDGER_ANONYMOUS (MAP_PRIVATE | MAP_ANON)
    #else
    #define LEDGER_SHARED 1
    static int ledger_prepare(pthread_mutex_t *mutex)
    {
        pthread_mutexattr_t attributes;
        int error = pthread_mutexattr_init(&attributes);
        if (error) return error;
        error = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        if (!error) error = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        if (!error) error = pthread_mutex_init(mutex, &attributes);
        pthread_mutexattr_destroy(&attributes);
        return error;
    }
    static void ledger_lock(pthread_mutex_t *mutex)
    {
        /* Its last owner died with it: what that one left is whole, since every state of the tables is. */
        if (pthread_mutex_lock(mutex) == EOWNERDEAD) (void)pthread_mutex_consistent(mutex);
    }
    #define LEDGER_ANONYMOUS (MAP_SHARED | MAP_ANONYMOUS)
    #endif
    """
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept nogil
    int ledger_prepare(pthread_mutex_t *mutex) noexcept nogil
    void ledger_lock(pthread_mutex_t *mutex) noexcept nogil
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset) noexcept nogil
    int munmap(void *address, size_t length) noexcept nogil
    const int LEDGER_SHARED
    const int LEDGER_ANONYMOUS
    const int MAP_SHARED
    const int PROT_READ
    const int PROT_WRITE
    void *MAP_FAILED

cdef enum:
    MAGIC = 0x70676c32
    PAGE_BYTES = 4096
    MOST_SLOTS = 64
    TOTALS = 2
    LONGEST_SEARCH = 256
    WAYS = 8
    LEAST_ENTRIES = 64
    NONE = -1

CLIENTS = 0
LOGINS = 1
SLOTS = MOST_SLOTS


cdef struct Key:
    uint64_t low
    uint64_t high


cdef struct Header:
    uint64_t magic
    uint64_t entries
    uint64_t sets
    uint64_t used
    uint64_t accepting
    uint64_t[4] secret
    uint32_t[TOTALS][MOST_SLOTS] totals
    pthread_mutex_t mutex


# `since`: when the first of these failures was; `touched`: when the entry was last of use.
cdef struct Failures:
    Key key
    double since
    double touched
    double blocked
    uint32_t count
    uint32_t known


cdef inline uint64_t turned(uint64_t value, int bits) noexcept nogil:
    return (value << bits) | (value >> (64 - bits))


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = turned(v[1], 13) ^ v[0]
    v[3] = turned(v[3], 16) ^ v[2]
    v[0] = turned(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = turned(v[1], 17) ^ v[2]
    v[3] = turned(v[3], 21) ^ v[0]
    v[2] = turned(v[2], 32)


cdef uint64_t siphash(const uint64_t *secret, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    cdef uint64_t[4] v
    cdef uint64_t word
    cdef Py_ssize_t at
    v[0] = secret[0] ^ 0x736f6d6570736575ULL
    v[1] = secret[1] ^ 0x646f72616e646f6dULL
    v[2] = secret[0] ^ 0x6c7967656e657261ULL
    v[3] = secret[1] ^ 0x7465646279746573ULL
    for at in range(0, size - 7, 8):
        memcpy(&word, data + at, 8)
        v[3] ^= word
        sip_round(v)
        sip_round(v)
        v[0] ^= word
    word = 0
    memcpy(&word, data + (size - size % 8), size % 8)
    word |= <uint64_t>size << 56
    v[3] ^= word
    sip_round(v)
    sip_round(v)
    v[0] ^= word
    v[2] ^= 0xff
    for _ in range(4):
        sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef inline bint are_same(const Key *one, const Key *other) noexcept nogil:
    return one.low == other.low and one.high == other.high


cdef inline bint is_empty(const Key *key) noexcept nogil:
    return key.low == 0 and key.high == 0


cdef inline uint64_t sum_of(const uint32_t *counts) noexcept nogil:
    cdef uint64_t total = 0
    cdef int slot
    for slot in range(MOST_SLOTS):
        total += counts[slot]
    return total


cdef size_t pages(size_t size) noexcept nogil:
    return (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


@cython.final
cdef class Ledger:
    """The counts, seen from one worker: what it counts stands in its `slot`.

    `fd` is a memfd, empty for the first who opens it; its tables get the sizes that the first one asks for. Without it
    the memory is this process's (and its forks'). `entries`: how many users and addresses can be counted at once;
    with room for four times as many, each is found at once. `failures`: how many whose logins failed are remembered.
    """

    cdef Header *_header
    cdef Key *_keys
    cdef uint32_t *_counts
    cdef Failures *_failures
    cdef size_t _bytes
    cdef uint64_t _mask
    cdef int _slot

    def __init__(self, int fd=-1, int slot=0, Py_ssize_t entries=65536, Py_ssize_t failures=65536):
        cdef size_t size = LEAST_ENTRIES
        if self._header != NULL:
            raise ValueError("a ledger is opened once")
        if not 0 <= slot < MOST_SLOTS:
            raise ValueError(f"slot {slot}: there are {MOST_SLOTS}")
        while size < <size_t>max(entries, 0):
            size *= 2
        self._slot = slot
        if fd < 0 or not LEDGER_SHARED:
            self._map(-1, size, max(1, failures // WAYS))
            self._prepare(size, max(1, failures // WAYS))
            return
        # Whoever comes first makes the tables; the others wait until they stand.
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
        try:
            self._open(fd, size, max(1, failures // WAYS))
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, 0)

    def __dealloc__(self):
        if self._header != NULL:
            munmap(self._header, self._bytes)

    def suits(self, Py_ssize_t entries, Py_ssize_t failures):
        """Whether the first one could have asked for these sizes: there are so many entries, or more."""
        return self._header.entries >= <size_t>max(entries, 0) and self._header.sets == max(1, failures // WAYS)

    @property
    def slots(self):
        """Those that were counted in since they were cleared."""
        return [slot for slot in range(MOST_SLOTS) if self._header.used >> slot & 1]

    def begin(self, int total, uint64_t most):
        """Counts one more of CLIENTS or LOGINS; False, and nothing is counted, if there are `most` already."""
        cdef uint32_t *counts = self._total(total)
        cdef bint free
        ledger_lock(&self._header.mutex)
        free = sum_of(counts) < most
        if free:
            self._header.used |= <uint64_t>1 << self._slot
            counts[self._slot] += 1
        pthread_mutex_unlock(&self._header.mutex)
        return free

    def end(self, int total):
        """One less, of those that this worker has counted."""
        cdef uint32_t *counts = self._total(total)
        ledger_lock(&self._header.mutex)
        if counts[self._slot] > 0:
            counts[self._slot] -= 1
        pthread_mutex_unlock(&self._header.mutex)

    def total(self, int total):
        """How many there are, of all workers."""
        cdef uint32_t *counts = self._total(total)
        cdef uint64_t found
        ledger_lock(&self._header.mutex)
        found = sum_of(counts)
        pthread_mutex_unlock(&self._header.mutex)
        return found

    def accept(self, bint whether):
        """Says whether this worker is to be sent clients."""
        ledger_lock(&self._header.mutex)
        if whether:
            self._header.used |= <uint64_t>1 << self._slot
            self._header.accepting |= <uint64_t>1 << self._slot
        else:
            self._header.accepting &= ~(<uint64_t>1 << self._slot)
        pthread_mutex_unlock(&self._header.mutex)

    def load(self, int slot):
        """How many clients and logins a worker has counted; -1 if it is to be sent none."""
        cdef int total
        cdef uint64_t found = 0
        if not 0 <= slot < MOST_SLOTS:
            raise ValueError(f"slot {slot}: there are {MOST_SLOTS}")
        # Without the mutex: what another worker is at just now makes no difference here.
        if not self._header.accepting >> slot & 1:
            return -1
        for total in range(TOTALS):
            found += self._header.totals[total][slot]
        return found

    def take(self, bytes key not None, uint64_t most):
        """Counts one more of a key; gives the place to give back. -1, and nothing is counted, if there are `most`."""
        cdef Key wanted = self._key(key)
        cdef Py_ssize_t place
        ledger_lock(&self._header.mutex)
        place = self._find(&wanted, True)
        if place != NONE:
            if sum_of(self._row(place)) < most:
                self._header.used |= <uint64_t>1 << self._slot
                self._keys[place] = wanted
                self._row(place)[self._slot] += 1
            else:
                place = NONE
        pthread_mutex_unlock(&self._header.mutex)
        return place

    def give(self, Py_ssize_t place):
        """One less, of what `take` has counted there for this worker."""
        if place < 0 or <uint64_t>place > self._mask:
            raise IndexError(f"place {place}")
        ledger_lock(&self._header.mutex)
        if self._row(place)[self._slot] > 0:
            self._row(place)[self._slot] -= 1
        self._tidy(place)
        pthread_mutex_unlock(&self._header.mutex)

    def count(self, bytes key not None):
        """How many there are of a key, of all workers."""
        cdef Key wanted = self._key(key)
        cdef Py_ssize_t place
        cdef uint64_t found = 0
        ledger_lock(&self._header.mutex)
        place = self._find(&wanted, False)
        if place != NONE:
            found = sum_of(self._row(place))
        pthread_mutex_unlock(&self._header.mutex)
        return found

    def clear_slot(self, int slot):
        """Forgets what a worker that is no more has counted; what it knew of failures stays."""
        cdef Py_ssize_t place
        cdef int total
        if not 0 <= slot < MOST_SLOTS:
            raise ValueError(f"slot {slot}: there are {MOST_SLOTS}")
        ledger_lock(&self._header.mutex)
        self._header.used &= ~(<uint64_t>1 << slot)
        self._header.accepting &= ~(<uint64_t>1 << slot)
        for total in range(TOTALS):
            self._header.totals[total][slot] = 0
        for place in range(<Py_ssize_t>self._mask, -1, -1):
            if not is_empty(&self._keys[place]):
                self._row(place)[slot] = 0
                self._tidy(place)
        pthread_mutex_unlock(&self._header.mutex)

    def fail(self, bytes key not None, double now, uint32_t allowed, double window):
        """Notes that a login failed; how many have, that are not forgotten.

        Under `allowed`, failures are forgotten `window` seconds after the first of them; from there on, once none has
        come for so long.
        """
        cdef Key wanted = self._key(key)
        cdef Failures *entry
        cdef uint32_t count
        ledger_lock(&self._header.mutex)
        entry = self._make_failures(&wanted, now)
        if is_stale(entry, now, window) or (entry.count < allowed and now - entry.since > window):
            entry.count = 0
        if entry.count == 0:
            entry.since = now
        if entry.count < 0xffffffff:
            entry.count += 1
        entry.touched = now
        count = entry.count
        pthread_mutex_unlock(&self._header.mutex)
        return count

    def failures(self, bytes key not None, double now, double window):
        """How many logins of a key have failed, that are not forgotten."""
        cdef Key wanted = self._key(key)
        cdef Failures *entry
        cdef uint32_t count = 0
        ledger_lock(&self._header.mutex)
        entry = self._find_failures(&wanted)
        if entry != NULL and not is_stale(entry, now, window):
            count = entry.count
        pthread_mutex_unlock(&self._header.mutex)
        return count

    def block(self, bytes key not None, double now, double until):
        """Says that a key is to be refused until then."""
        cdef Key wanted = self._key(key)
        ledger_lock(&self._header.mutex)
        self._make_failures(&wanted, now).blocked = until
        pthread_mutex_unlock(&self._header.mutex)

    def is_blocked(self, bytes key not None, double now):
        """Whether a key is to be refused now."""
        cdef Key wanted = self._key(key)
        cdef Failures *entry
        cdef bint blocked
        ledger_lock(&self._header.mutex)
        entry = self._find_failures(&wanted)
        blocked = entry != NULL and now < entry.blocked
        pthread_mutex_unlock(&self._header.mutex)
        return blocked

    def know(self, bytes pair not None, bytes one not None, bytes other not None, double now, double window):
        """Notes that a login of `pair` was right, and takes its own failures back from `one` and `other`.

        Not more than the pair's own, and not those that have been forgotten there since.
        """
        cdef Key wanted = self._key(pair)
        cdef Key[2] parts
        cdef Failures *entry
        cdef Failures *part
        cdef int each
        parts[0] = self._key(one)
        parts[1] = self._key(other)
        ledger_lock(&self._header.mutex)
        entry = self._make_failures(&wanted, now)
        if entry.count > 0 and now - entry.touched <= window:
            for each in range(2):
                part = self._find_failures(&parts[each])
                if part != NULL and part.since <= entry.since:
                    part.count -= min(part.count, entry.count)
        entry.count = 0
        entry.known = 1
        entry.touched = now
        pthread_mutex_unlock(&self._header.mutex)

    def is_known(self, bytes pair not None):
        """Whether a login of this pair was right, as far as is remembered."""
        cdef Key wanted = self._key(pair)
        cdef Failures *entry
        cdef bint known
        ledger_lock(&self._header.mutex)
        entry = self._find_failures(&wanted)
        known = entry != NULL and entry.known != 0
        pthread_mutex_unlock(&self._header.mutex)
        return known

    cdef int _map(self, int fd, size_t entries, size_t sets) except -1:
        cdef size_t keys_at = pages(sizeof(Header))
        cdef size_t failures_at = keys_at + pages(entries * sizeof(Key))
        cdef size_t counts_at = failures_at + pages(sets * WAYS * sizeof(Failures))
        cdef size_t size = counts_at + pages(entries * MOST_SLOTS * sizeof(uint32_t))
        cdef uint8_t *memory
        if fd >= 0 and <size_t>os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        memory = <uint8_t *>mmap(
            NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED if fd >= 0 else LEDGER_ANONYMOUS, fd, 0
        )
        if memory == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self._header = <Header *>memory
        self._keys = <Key *>(memory + keys_at)
        self._failures = <Failures *>(memory + failures_at)
        self._counts = <uint32_t *>(memory + counts_at)
        self._bytes = size
        self._mask = entries - 1
        return 0

    cdef int _open(self, int fd, size_t entries, size_t sets) except -1:
        """Maps what is there, with the sizes that it has, or makes it."""
        cdef Header found
        head = os.pread(fd, sizeof(Header), 0)
        memset(&found, 0, sizeof(Header))
        memcpy(&found, PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head))
        if found.magic == MAGIC:
            return self._map(fd, found.entries, found.sets)
        if found.magic:
            raise ValueError("this is no ledger, or another version's")
        self._map(fd, entries, sets)
        return self._prepare(entries, sets)

    cdef int _prepare(self, size_t entries, size_t sets) except -1:
        cdef int error
        secret = os.urandom(sizeof(self._header.secret))
        memcpy(self._header.secret, PyBytes_AS_STRING(secret), sizeof(self._header.secret))
        self._header.entries = entries
        self._header.sets = sets
        error = ledger_prepare(&self._header.mutex)
        if error:
            raise OSError(error, os.strerror(error))
        self._header.magic = MAGIC
        return 0

    cdef uint32_t *_total(self, int total) except NULL:
        if not 0 <= total < TOTALS:
            raise IndexError(f"total {total}")
        return self._header.totals[total]

    cdef inline uint32_t *_row(self, Py_ssize_t place) noexcept:
        return self._counts + place * MOST_SLOTS

    cdef Key _key(self, bytes key) noexcept:
        cdef Key made
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(key)
        made.low = siphash(&self._header.secret[0], data, PyBytes_GET_SIZE(key))
        made.high = siphash(&self._header.secret[2], data, PyBytes_GET_SIZE(key))
        # Not the one that stands for none.
        made.low |= made.high == 0
        return made

    cdef Py_ssize_t _find(self, const Key *wanted, bint or_free) noexcept:
        """Where a key stands; where there is none, and `or_free`, where it could. NONE otherwise."""
        cdef Py_ssize_t free = NONE
        cdef Py_ssize_t place
        cdef int step
        for step in range(LONGEST_SEARCH):
            place = <Py_ssize_t>((wanted.low + <uint64_t>step) & self._mask)
            if is_empty(&self._keys[place]):
                if free == NONE:
                    free = place
                break
            if are_same(&self._keys[place], wanted):
                return place
            if free == NONE and or_free and sum_of(self._row(place)) == 0:
                free = place
        return free if or_free else NONE

    cdef void _tidy(self, Py_ssize_t place) noexcept:
        """Empties entries that count nothing, from there backwards, where no search goes past them."""
        cdef int steps = LONGEST_SEARCH
        if not is_empty(&self._keys[<uint64_t>(place + 1) & self._mask]):
            return
        while steps > 0 and not is_empty(&self._keys[place]) and sum_of(self._row(place)) == 0:
            steps -= 1
            memset(&self._keys[place], 0, sizeof(Key))
            place = <Py_ssize_t>(<uint64_t>(place - 1) & self._mask)

    cdef Failures *_find_failures(self, const Key *wanted) noexcept:
        cdef Failures *entries = self._failures + wanted.high % self._header.sets * WAYS
        cdef int way
        for way in range(WAYS):
            if are_same(&entries[way].key, wanted):
                return &entries[way]
        return NULL

    cdef Failures *_make_failures(self, const Key *wanted, double now) noexcept:
        """The entry of a key, in place of the one touched least lately if it has none."""
        cdef Failures *entries = self._failures + wanted.high % self._header.sets * WAYS
        cdef Failures *found = self._find_failures(wanted)
        cdef int way
        if found != NULL:
            return found
        found = entries
        for way in range(1, WAYS):
            if is_empty(&found.key):
                break
            if is_empty(&entries[way].key) or entries[way].touched < found.touched:
                found = &entries[way]
        memset(found, 0, sizeof(Failures))
        found.since = found.touched = now
        found.key = wanted[0]
        return found


cdef inline bint is_stale(const Failures *entry, double now, double window) noexcept nogil:
    return now > max(entry.touched, entry.blocked) + window
