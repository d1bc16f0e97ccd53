"""Runs a command to its end without the GIL: the caller is a thread, and the event loop never feels it.

`Command.run` starts the process (posix_spawn, which does not copy the gateway), feeds its standard input, collects
its output, and returns when the process is gone. Four things can end it: its exit, the time-out, a `Stop` set from
another thread, too much output. All but the first send TERM to the process group and KILL after the grace.

The exit decides, not the end of the pipes: a grandchild may hold those open for ever. What is in a pipe at the moment
of the exit still counts. The process gets descriptors 0, 1 and 2 and no others (`keep_descriptors_private` at start
sees to those that the gateway inherited), default signal dispositions, an empty signal mask, and a process group
of its own.

Linux learns of the exit from a pidfd; elsewhere it is asked for every few milliseconds.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport pid_t

import os


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <signal.h>
    #include <spawn.h>
    #include <sys/wait.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/syscall.h>
    #ifndef SYS_pidfd_open
    #define SYS_pidfd_open 434
    #endif
    #endif

    static int pgap_pidfd_open(pid_t pid) {
    #if defined(__linux__)
        return (int) syscall(SYS_pidfd_open, pid, 0);
    #else
        (void) pid;
        errno = ENOSYS;
        return -1;
    #endif
    }

    /* Both ends close-on-exec from the start, our own end non-blocking. */
    static int pgap_pipe(int ends[2], int own) {
    #if defined(__linux__)
        if (pipe2(ends, O_CLOEXEC) < 0)
            return -1;
    #else
        if (pipe(ends) < 0)
            return -1;
        fcntl(ends[0], F_SETFD, FD_CLOEXEC);
        fcntl(ends[1], F_SETFD, FD_CLOEXEC);
    #endif
        return fcntl(ends[own], F_SETFL, O_NONBLOCK);
    }

    static void pgap_close(int *fd) {
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
    }

    /* Starts argv with the three given descriptors; returns 0 or an errno. */
    static int pgap_spawn(pid_t *pid, char **argv, char **envp, int in, int out, int err) {
        posix_spawn_file_actions_t actions;
        posix_spawnattr_t attributes;
        sigset_t none, all;
        int result;
        if ((result = posix_spawn_file_actions_init(&actions)) != 0)
            return result;
        if ((result = posix_spawnattr_init(&attributes)) != 0) {
            posix_spawn_file_actions_destroy(&actions);
            return result;
        }
        sigemptyset(&none);
        sigfillset(&all);
        posix_spawnattr_setsigmask(&attributes, &none);
        posix_spawnattr_setsigdefault(&attributes, &all);
        posix_spawnattr_setpgroup(&attributes, 0);
        posix_spawnattr_setflags(&attributes,
            POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
        if ((result = posix_spawn_file_actions_adddup2(&actions, in, 0)) == 0
                && (result = posix_spawn_file_actions_adddup2(&actions, out, 1)) == 0
                && (result = posix_spawn_file_actions_adddup2(&actions, err, 2)) == 0)
            result = posix_spawnp(pid, argv[0], &actions, &attributes, argv, envp);
        posix_spawn_file_actions_destroy(&actions);
        posix_spawnattr_destroy(&attributes);
        return result;
    }

    /* Whether the child is gone, without reaping it: its process group stays its own until then. */
    static int pgap_exited(pid_t pid) {
        siginfo_t info;
        info.si_pid = 0;
        return waitid(P_PID, (id_t) pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid;
    }
    """
    struct pollfd:
        int fd
        short events
        short revents
    enum: POLLIN, POLLOUT, SIGTERM, SIGKILL
    int poll(pollfd *fds, unsigned long count, int timeout) nogil
    int kill(pid_t pid, int signal) nogil
    pid_t waitpid(pid_t pid, int *status, int options) nogil
    ssize_t read(int fd, void *at, size_t count) nogil
    ssize_t write(int fd, const void *at, size_t count) nogil
    int pgap_pidfd_open(pid_t pid) nogil
    int pgap_pipe(int *ends, int own) nogil
    void pgap_close(int *fd) nogil
    int pgap_spawn(pid_t *pid, char **argv, char **envp, int in_fd, int out_fd, int err_fd) nogil
    int pgap_exited(pid_t pid) nogil


cdef enum:
    ENDED_BY_EXIT = 0
    ENDED_BY_TIMEOUT = 1
    ENDED_BY_STOP = 2
    ENDED_BY_FLOOD = 3
    DISCARD_BYTES = 16384
    POLL_WITHOUT_PIDFD_MS = 5

BY_EXIT = ENDED_BY_EXIT
BY_TIMEOUT = ENDED_BY_TIMEOUT
BY_STOP = ENDED_BY_STOP
BY_FLOOD = ENDED_BY_FLOOD


cdef struct Sink:
    # One pipe that is read: at most `room` bytes are kept, more is dropped, and counted in `dropped`.
    int fd
    char *at
    Py_ssize_t size
    Py_ssize_t room
    Py_ssize_t dropped


cdef double now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <double>time.tv_sec + <double>time.tv_nsec * 1e-9


cdef void drain(Sink *sink, Py_ssize_t at_most) noexcept nogil:
    """Reads what is there, up to `at_most` bytes; closes the pipe at its end."""
    cdef char[DISCARD_BYTES] discard
    cdef ssize_t count
    cdef Py_ssize_t seen = 0
    while sink.fd >= 0 and seen < at_most:
        if sink.size < sink.room:
            count = read(sink.fd, sink.at + sink.size, sink.room - sink.size)
        else:
            count = read(sink.fd, discard, DISCARD_BYTES)
        if count > 0:
            seen += count
            if sink.size < sink.room:
                sink.size += count
            else:
                sink.dropped += count
        elif count < 0 and errno == EINTR:
            continue
        elif count < 0 and errno == EAGAIN:
            return
        else:
            pgap_close(&sink.fd)


cdef bint feed(int *fd, const char **data, Py_ssize_t *left) noexcept nogil:
    """Writes what the pipe takes; closes it when all is written or nobody reads. True while more is to be written."""
    cdef ssize_t count
    while left[0] > 0:
        count = write(fd[0], data[0], left[0])
        if count >= 0:
            data[0] += count
            left[0] -= count
        elif errno == EINTR:
            continue
        elif errno == EAGAIN:
            return True
        else:
            # A command that does not read its input is fine.
            break
    pgap_close(fd)
    return False


@cython.final
cdef class Stop:
    """Ends one run from another thread: `set` may be called at any time, any number of times."""

    cdef int[2] _ends

    def __cinit__(self):
        self._ends[0] = self._ends[1] = -1
        if pgap_pipe(self._ends, 1) < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        pgap_close(&self._ends[0])
        pgap_close(&self._ends[1])

    def set(self):
        """Non-blocking; a second call changes nothing."""
        write(self._ends[1], b"!", 1)


@cython.final
cdef class Outcome:
    """How a run ended.

    `ended_by` is one of BY_EXIT, BY_TIMEOUT, BY_STOP, BY_FLOOD; `status` the exit status, or minus the signal's number;
    `output` and `errors` what was collected (bytes), `errors_dropped` how many bytes of errors were not.
    """

    cdef readonly int ended_by
    cdef readonly int status
    cdef readonly bytes output
    cdef readonly bytes errors
    cdef readonly Py_ssize_t errors_dropped


@cython.final
cdef class Command:
    """A command line and environment, ready to be run any number of times, from any thread.

    `argv` is looked up on PATH; `environment` holds b"NAME=value" entries. Raises ValueError on an empty argv or a NUL.
    """

    cdef list _kept
    cdef char **_argv
    cdef char **_environment

    def __cinit__(self, list argv not None, list environment not None):
        if not argv:
            raise ValueError("a command needs a name")
        if any(b"\0" in word for word in argv + environment):
            raise ValueError("a NUL in the command line or environment")
        self._kept = argv + environment
        self._argv = self._words(argv)
        self._environment = self._words(environment)

    def __dealloc__(self):
        free(self._argv)
        free(self._environment)

    cdef char **_words(self, list words) except NULL:
        cdef char **array = <char **>malloc((len(words) + 1) * sizeof(char *))
        if array is NULL:
            raise MemoryError()
        for i, word in enumerate(words):
            array[i] = word
        array[len(words)] = NULL
        return array

    def run(
        self, bytes data not None, Stop stop not None, double timeout_seconds, double grace_seconds,
        Py_ssize_t max_output, Py_ssize_t max_errors,
    ):
        """Runs the command with `data` on its standard input, blocks until it is gone, gives an Outcome.

        Output beyond `max_output` bytes ends it; errors beyond `max_errors` bytes are dropped. Raises OSError if
        it could not be started.
        """
        cdef Sink out
        cdef Sink err
        cdef int ended_by = ENDED_BY_EXIT
        cdef int status = 0
        cdef int failure
        cdef const char *left = PyBytes_AS_STRING(data)
        cdef Py_ssize_t left_size = PyBytes_GET_SIZE(data)
        # One byte of room more than allowed, so that too much is seen as such.
        output = PyBytes_FromStringAndSize(NULL, max_output + 1)
        errors = PyBytes_FromStringAndSize(NULL, max_errors)
        out.fd = err.fd = -1
        out.at = PyBytes_AS_STRING(output)
        err.at = PyBytes_AS_STRING(errors)
        out.room = max_output + 1
        err.room = max_errors
        out.size = err.size = out.dropped = err.dropped = 0
        with nogil:
            failure = self._run(
                left, left_size, stop._ends[0], timeout_seconds, grace_seconds, &out, &err, &ended_by, &status
            )
        if failure:
            raise OSError(failure, os.strerror(failure))
        outcome = Outcome()
        outcome.ended_by = ended_by
        outcome.status = os.waitstatus_to_exitcode(status)
        outcome.output = output[:out.size]
        outcome.errors = errors[:err.size]
        outcome.errors_dropped = err.dropped
        return outcome

    cdef int _run(
        self, const char *data, Py_ssize_t size, int stop_fd, double timeout, double grace,
        Sink *out, Sink *err, int *ended_by, int *status,
    ) noexcept nogil:
        """Returns 0, or the errno for which nothing was started."""
        cdef int[2] in_pipe
        cdef int[2] out_pipe
        cdef int[2] err_pipe
        cdef int failure = 0
        cdef pid_t pid = 0
        cdef int pid_fd = -1
        in_pipe[0] = in_pipe[1] = out_pipe[0] = out_pipe[1] = err_pipe[0] = err_pipe[1] = -1
        if pgap_pipe(in_pipe, 1) < 0 or pgap_pipe(out_pipe, 0) < 0 or pgap_pipe(err_pipe, 0) < 0:
            failure = errno
        if failure == 0:
            # A question is short: it fits the pipe before anyone reads it.
            feed(&in_pipe[1], &data, &size)
            failure = pgap_spawn(&pid, self._argv, self._environment, in_pipe[0], out_pipe[1], err_pipe[1])
        pgap_close(&in_pipe[0])
        pgap_close(&out_pipe[1])
        pgap_close(&err_pipe[1])
        if failure == 0:
            out.fd = out_pipe[0]
            err.fd = err_pipe[0]
            pid_fd = pgap_pidfd_open(pid)
            ended_by[0] = attend(pid, pid_fd, stop_fd, now() + timeout, &in_pipe[1], data, size, out, err)
            if ended_by[0] != ENDED_BY_EXIT:
                end_group(pid, pid_fd, grace)
            while waitpid(pid, status, 0) < 0 and errno == EINTR:
                pass
            pgap_close(&pid_fd)
            out_pipe[0] = out.fd
            err_pipe[0] = err.fd
        pgap_close(&in_pipe[1])
        pgap_close(&out_pipe[0])
        pgap_close(&err_pipe[0])
        return failure


cdef int attend(
    pid_t pid, int pid_fd, int stop_fd, double deadline, int *in_fd, const char *data, Py_ssize_t size,
    Sink *out, Sink *err,
) noexcept nogil:
    """Serves the three pipes until the process is gone or must go; returns what ended it."""
    cdef pollfd[5] polled
    cdef double left
    cdef bint exited
    while True:
        polled[0].fd = pid_fd
        polled[1].fd = stop_fd
        polled[2].fd = in_fd[0]
        polled[3].fd = out.fd
        polled[4].fd = err.fd
        polled[0].events = polled[1].events = polled[3].events = polled[4].events = POLLIN
        polled[2].events = POLLOUT
        left = deadline - now()
        if left <= 0:
            return ENDED_BY_TIMEOUT
        left = min(left * 1000 + 1, 1e6)
        if pid_fd < 0:
            left = min(left, POLL_WITHOUT_PIDFD_MS)
        polled[0].revents = polled[1].revents = polled[2].revents = polled[3].revents = polled[4].revents = 0
        poll(polled, 5, <int>left)
        # Asked before the pipes are read: what the process wrote before it went is in them by then.
        exited = polled[0].revents != 0 if pid_fd >= 0 else pgap_exited(pid) != 0
        if polled[1].revents:
            return ENDED_BY_STOP
        if polled[2].revents:
            feed(in_fd, &data, &size)
        if exited or polled[3].revents:
            drain(out, out.room + DISCARD_BYTES)
        if exited or polled[4].revents:
            drain(err, err.room + DISCARD_BYTES)
        if out.size == out.room:
            return ENDED_BY_FLOOD
        if exited:
            return ENDED_BY_EXIT


cdef void end_group(pid_t pid, int pid_fd, double grace) noexcept nogil:
    """TERM, and KILL when the leader is gone or the grace is over. It is not reaped yet: the group is still its own."""
    cdef pollfd polled
    cdef double deadline = now() + grace
    cdef double left = grace
    kill(-pid, SIGTERM)
    while left > 0:
        polled.fd = pid_fd
        polled.events = POLLIN
        polled.revents = 0
        poll(&polled, 1, <int>(left * 1000 + 1) if pid_fd >= 0 else POLL_WITHOUT_PIDFD_MS)
        if polled.revents or (pid_fd < 0 and pgap_exited(pid)):
            break
        left = deadline - now()
    kill(-pid, SIGKILL)


def keep_descriptors_private():
    """Marks every open descriptor above 2 close-on-exec, those included that the gateway was started with."""
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        if descriptor > 2:
            try:
                os.set_inheritable(descriptor, False)
            except OSError:  # the listing's own descriptor, closed by now
                continue
