"""Runs a command to its end, many times over and several at once, without the event loop feeling it.

A `Runner` has threads of its own that never touch Python: neither the interpreter's lock nor its hand-over costs a
login anything. `start` queues a run, `fileno` becomes readable when runs are over, `collect` gives them back. A thread
starts the process (posix_spawn, which does not copy the gateway), feeds its standard input, collects its output, and
waits until it is gone. Four things can end a process: its exit, the time-out, `Run.stop`, too much output. All but
the first send TERM to the process group and KILL after the grace.

The exit decides, not the end of the pipes: a grandchild may hold those open for ever. What is in a pipe at the moment
of the exit still counts. The process gets descriptors 0, 1 and 2 and no others (`keep_descriptors_private` at start
sees to those that the gateway inherited), default signal dispositions, an empty signal mask, and a process group
of its own.

Linux learns of the exit from a pidfd; elsewhere it is asked for every few milliseconds.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport calloc, free, malloc, realloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport pid_t

import os


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <pthread.h>
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

    /* A thread that no signal is delivered to: those are the main thread's. */
    static int pgap_start_thread(pthread_t *thread, void *(*main)(void *), void *argument) {
        sigset_t all, before;
        int result;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        result = pthread_create(thread, NULL, main, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
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
    pid_t getpgid(pid_t pid) nogil
    pid_t waitpid(pid_t pid, int *status, int options) nogil
    ssize_t read(int fd, void *at, size_t count) nogil
    ssize_t write(int fd, const void *at, size_t count) nogil
    int pgap_pidfd_open(pid_t pid) nogil
    int pgap_pipe(int *ends, int own) nogil
    void pgap_close(int *fd) nogil
    int pgap_spawn(pid_t *pid, char **argv, char **envp, int in_fd, int out_fd, int err_fd) nogil
    int pgap_exited(pid_t pid) nogil

    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pgap_start_thread(pthread_t *thread, void *(*main)(void *) noexcept nogil, void *argument) nogil
    int pthread_join(pthread_t thread, void **result) nogil
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) nogil
    int pthread_mutex_destroy(pthread_mutex_t *mutex) nogil
    int pthread_mutex_lock(pthread_mutex_t *mutex) nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) nogil
    int pthread_cond_init(pthread_cond_t *condition, void *attributes) nogil
    int pthread_cond_destroy(pthread_cond_t *condition) nogil
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) nogil
    int pthread_cond_signal(pthread_cond_t *condition) nogil
    int pthread_cond_broadcast(pthread_cond_t *condition) nogil


cdef enum:
    ENDED_BY_EXIT = 0
    ENDED_BY_TIMEOUT = 1
    ENDED_BY_STOP = 2
    ENDED_BY_FLOOD = 3
    DISCARD_BYTES = 16384
    PIPE_BYTES = 1 << 20  # the most that a pipe holds
    FIRST_BYTES = 1024
    POLL_WITHOUT_PIDFD_MS = 5

cdef double SOON_SECONDS = 0.05
cdef double KILL_SECONDS = 1.0

BY_EXIT = ENDED_BY_EXIT
BY_TIMEOUT = ENDED_BY_TIMEOUT
BY_STOP = ENDED_BY_STOP
BY_FLOOD = ENDED_BY_FLOOD


cdef struct Sink:
    # One pipe that is read: at most `room` bytes are kept, more is dropped, and counted in `dropped`. Memory is taken
    # as it is needed, up to `capacity`.
    int fd
    char *at
    Py_ssize_t size
    Py_ssize_t capacity
    Py_ssize_t room
    Py_ssize_t dropped


cdef double now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <double>time.tv_sec + <double>time.tv_nsec * 1e-9


cdef bint has_space(Sink *sink) noexcept nogil:
    """Makes space for more, unless the room is used up or there is no memory."""
    cdef Py_ssize_t wanted
    cdef char *grown
    if sink.size == sink.capacity and sink.capacity < sink.room:
        wanted = min(max(<Py_ssize_t>FIRST_BYTES, sink.capacity * 2), sink.room)
        grown = <char *>realloc(sink.at, wanted)
        if grown is not NULL:
            sink.at = grown
            sink.capacity = wanted
    return sink.size < sink.capacity


cdef void drain(Sink *sink, Py_ssize_t at_most) noexcept nogil:
    """Reads what is there, up to `at_most` bytes; closes the pipe at its end."""
    cdef char[DISCARD_BYTES] discard
    cdef ssize_t count
    cdef Py_ssize_t seen = 0
    cdef bint kept
    while sink.fd >= 0 and seen < at_most:
        kept = has_space(sink)
        if kept:
            count = read(sink.fd, sink.at + sink.size, sink.capacity - sink.size)
        else:
            count = read(sink.fd, discard, DISCARD_BYTES)
        if count > 0:
            seen += count
            if kept:
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


cdef struct Job:
    # One run, from `start` to `collect`. Between those it belongs to the threads, but for `stopped`, under the lock.
    Job *next
    const char *data
    Py_ssize_t size
    Sink out
    Sink err
    int ended_by
    int status
    int failure
    int stop_fd
    pid_t left_behind
    bint stopped


cdef struct Queue:
    Job *first
    Job *last


cdef struct Shared:
    # What the threads of a Runner share.
    pthread_mutex_t lock
    pthread_cond_t work
    Queue waiting
    Queue over
    int waiting_jobs
    int idle_threads
    bint closing
    int over_fd
    char **argv
    char **environment
    double timeout
    double grace


cdef void push(Queue *queue, Job *job) noexcept nogil:
    job.next = NULL
    if queue.last is NULL:
        queue.first = job
    else:
        queue.last.next = job
    queue.last = job


cdef Job *pop(Queue *queue) noexcept nogil:
    cdef Job *job = queue.first
    if job is not NULL:
        queue.first = job.next
        if queue.first is NULL:
            queue.last = NULL
    return job


cdef void stop_job(Job *job) noexcept nogil:
    """The lock is held."""
    if not job.stopped:
        job.stopped = True
        if job.stop_fd >= 0:
            write(job.stop_fd, b"!", 1)


cdef void *serve(void *argument) noexcept nogil:
    """A thread's life: takes one job after the other until the Runner closes."""
    cdef Shared *shared = <Shared *>argument
    cdef Job *job
    cdef int[2] stop_ends
    cdef char[64] discard
    stop_ends[0] = stop_ends[1] = -1
    pgap_pipe(stop_ends, 0)
    pthread_mutex_lock(&shared.lock)
    while True:
        job = pop(&shared.waiting)
        if job is NULL:
            if shared.closing:
                break
            shared.idle_threads += 1
            pthread_cond_wait(&shared.work, &shared.lock)
            shared.idle_threads -= 1
            continue
        shared.waiting_jobs -= 1
        if job.stopped:
            job.ended_by = ENDED_BY_STOP
        else:
            job.stop_fd = stop_ends[1]
            pthread_mutex_unlock(&shared.lock)
            run_process(shared, job, stop_ends[0])
            pthread_mutex_lock(&shared.lock)
            job.stop_fd = -1
            if job.stopped:
                while read(stop_ends[0], discard, sizeof(discard)) > 0:
                    pass
        push(&shared.over, job)
        write(shared.over_fd, b"!", 1)
    pthread_mutex_unlock(&shared.lock)
    pgap_close(&stop_ends[0])
    pgap_close(&stop_ends[1])
    return NULL


cdef void run_process(Shared *shared, Job *job, int stop_fd) noexcept nogil:
    """Fills in how the job ended; `failure` is the errno for which nothing was started, else 0."""
    cdef int[2] in_pipe
    cdef int[2] out_pipe
    cdef int[2] err_pipe
    cdef pid_t pid = 0
    cdef int pid_fd = -1
    cdef const char *data = job.data
    cdef Py_ssize_t size = job.size
    in_pipe[0] = in_pipe[1] = out_pipe[0] = out_pipe[1] = err_pipe[0] = err_pipe[1] = -1
    if pgap_pipe(in_pipe, 1) < 0 or pgap_pipe(out_pipe, 0) < 0 or pgap_pipe(err_pipe, 0) < 0:
        job.failure = errno
    else:
        # A question is short: it fits the pipe before anyone reads it.
        feed(&in_pipe[1], &data, &size)
        job.failure = pgap_spawn(&pid, shared.argv, shared.environment, in_pipe[0], out_pipe[1], err_pipe[1])
    pgap_close(&in_pipe[0])
    pgap_close(&out_pipe[1])
    pgap_close(&err_pipe[1])
    if job.failure == 0:
        job.out.fd = out_pipe[0]
        job.err.fd = err_pipe[0]
        pid_fd = pgap_pidfd_open(pid)
        job.ended_by = attend(pid, pid_fd, stop_fd, now() + shared.timeout, &in_pipe[1], data, size, job)
        if job.ended_by == ENDED_BY_EXIT or end_group(pid, pid_fd, 0 if shared.closing else shared.grace):
            while waitpid(pid, &job.status, 0) < 0 and errno == EINTR:
                pass
        else:
            job.left_behind = pid
        pgap_close(&pid_fd)
        out_pipe[0] = job.out.fd
        err_pipe[0] = job.err.fd
    pgap_close(&in_pipe[1])
    pgap_close(&out_pipe[0])
    pgap_close(&err_pipe[0])


cdef int attend(
    pid_t pid, int pid_fd, int stop_fd, double deadline, int *in_fd, const char *data, Py_ssize_t size, Job *job
) noexcept nogil:
    """Serves the three pipes until the process is gone or must go; returns what ended it.

    Being woken is what this costs. A command that is soon gone has what it said in the pipes, and nothing but its exit
    wakes us; one that takes longer may have filled them, and is read from then on.
    """
    cdef pollfd[5] polled
    cdef Sink *out = &job.out
    cdef Sink *err = &job.err
    cdef double started = now()
    cdef double time = started
    cdef double left
    cdef bint exited, reading
    while True:
        reading = pid_fd < 0 or time - started >= SOON_SECONDS
        polled[0].fd = pid_fd
        polled[1].fd = stop_fd
        polled[2].fd = in_fd[0]
        polled[3].fd = out.fd if reading else -1
        polled[4].fd = err.fd if reading else -1
        polled[0].events = polled[1].events = polled[3].events = polled[4].events = POLLIN
        polled[2].events = POLLOUT
        left = deadline - time
        if left <= 0:
            return ENDED_BY_TIMEOUT
        left = min(left * 1000 + 1, 1e6)
        if pid_fd < 0:
            left = min(left, POLL_WITHOUT_PIDFD_MS)
        elif not reading:
            left = min(left, SOON_SECONDS * 1000 + 1)
        polled[0].revents = polled[1].revents = polled[2].revents = polled[3].revents = polled[4].revents = 0
        poll(polled, 5, <int>left)
        # Asked before the pipes are read: what the process wrote before it went is in them by then.
        exited = polled[0].revents != 0 if pid_fd >= 0 else pgap_exited(pid) != 0
        if polled[1].revents:
            return ENDED_BY_STOP
        if polled[2].revents:
            feed(in_fd, &data, &size)
        if exited or polled[3].revents:
            drain(out, out.room + PIPE_BYTES)
        if exited or polled[4].revents:
            drain(err, err.room + PIPE_BYTES)
        if out.size == out.room:
            return ENDED_BY_FLOOD
        if exited:
            return ENDED_BY_EXIT
        time = now()


cdef bint end_group(pid_t pid, int pid_fd, double grace) noexcept nogil:
    """TERM, and KILL when the leader is gone or the grace is over. It is not reaped yet: the group is still its own.

    False if it is still there: another user's, or stuck in the kernel. Nobody waits for that.
    """
    signal_group(pid, SIGTERM)
    is_gone(pid, pid_fd, grace)
    signal_group(pid, SIGKILL)
    return is_gone(pid, pid_fd, KILL_SECONDS)


cdef bint is_gone(pid_t pid, int pid_fd, double seconds) noexcept nogil:
    """Waits so long for the exit, at most."""
    cdef pollfd polled
    cdef double deadline = now() + seconds
    cdef double left = seconds
    while True:
        polled.fd = pid_fd
        polled.events = POLLIN
        polled.revents = 0
        poll(&polled, 1, <int>(left * 1000) if pid_fd >= 0 else POLL_WITHOUT_PIDFD_MS)
        if polled.revents or (pid_fd < 0 and pgap_exited(pid)):
            return True
        left = deadline - now()
        if left <= 0:
            return False


cdef void signal_group(pid_t pid, int number) noexcept nogil:
    """The leader gets it too if it has moved to another group."""
    kill(-pid, number)
    if getpgid(pid) != pid:
        kill(pid, number)


@cython.final
cdef class Run:
    """One run of a Runner's command.

    Once collected: `ended_by` is one of BY_EXIT, BY_TIMEOUT, BY_STOP, BY_FLOOD; `failure` the errno for which the
    command could not be started, else 0; `status` the exit status, or minus the signal's number; `output` and
    `errors` what was collected (bytes), `errors_dropped` how many bytes of errors were not; `left_behind` the process
    that could not be ended, else 0. `done` is the caller's.
    """

    cdef Job _job
    cdef Shared *_shared
    cdef bytes _data
    cdef public object done

    def __dealloc__(self):
        free(self._job.out.at)
        free(self._job.err.at)

    @property
    def ended_by(self):
        return self._job.ended_by

    @property
    def failure(self):
        return self._job.failure

    @property
    def status(self):
        return os.waitstatus_to_exitcode(self._job.status)

    @property
    def output(self):
        return PyBytes_FromStringAndSize(self._job.out.at, self._job.out.size)

    @property
    def errors(self):
        return PyBytes_FromStringAndSize(self._job.err.at, self._job.err.size)

    @property
    def errors_dropped(self):
        return self._job.err.dropped

    @property
    def left_behind(self):
        return self._job.left_behind

    def stop(self):
        """Ends the run, or takes it out of the queue; it is collected as any other. Does not wait; may be repeated."""
        if self._shared is NULL:
            return
        pthread_mutex_lock(&self._shared.lock)
        stop_job(&self._job)
        pthread_mutex_unlock(&self._shared.lock)


@cython.final
cdef class Runner:
    """Runs one command line, at most `max_parallel` at once, others in the order in which they came.

    `argv` is looked up on PATH; `environment` holds b"NAME=value" entries. Output beyond `max_output` bytes ends a run;
    errors beyond `max_errors` bytes are dropped. Raises ValueError on an empty argv or a NUL. Used from one thread.
    """

    cdef Shared _shared
    cdef pthread_t *_threads
    cdef int _thread_count
    cdef int _max_parallel
    cdef Py_ssize_t _max_output
    cdef Py_ssize_t _max_errors
    cdef int[2] _over_ends
    cdef list _kept
    cdef list _left_behind
    cdef dict _runs

    def __cinit__(
        self, list argv not None, list environment not None, int max_parallel, double timeout_seconds,
        double grace_seconds, Py_ssize_t max_output, Py_ssize_t max_errors,
    ):
        self._over_ends[0] = self._over_ends[1] = -1
        self._runs = {}
        pthread_mutex_init(&self._shared.lock, NULL)
        pthread_cond_init(&self._shared.work, NULL)
        if not argv:
            raise ValueError("a command needs a name")
        if any(b"\0" in word for word in argv + environment):
            raise ValueError("a NUL in the command line or environment")
        if max_parallel < 1:
            raise ValueError("at least one run at once")
        self._kept = argv + environment
        self._left_behind = []
        self._shared.argv = words(argv)
        self._shared.environment = words(environment)
        self._shared.timeout = timeout_seconds
        self._shared.grace = grace_seconds
        self._max_parallel = max_parallel
        self._max_output = max_output
        self._max_errors = max_errors
        self._threads = <pthread_t *>calloc(max_parallel, sizeof(pthread_t))
        if self._threads is NULL:
            raise MemoryError()
        if pgap_pipe(self._over_ends, 0) < 0:
            raise OSError(errno, os.strerror(errno))
        self._shared.over_fd = self._over_ends[1]

    def __del__(self):
        # Not in __dealloc__: when that is called for a cycle, the runs may be gone, and threads are still at them.
        self.close()

    def __dealloc__(self):
        free(self._shared.argv)
        free(self._shared.environment)
        free(self._threads)
        pthread_cond_destroy(&self._shared.work)
        pthread_mutex_destroy(&self._shared.lock)

    def fileno(self):
        """Readable when there is something to collect."""
        return self._over_ends[0]

    def start(self, bytes data not None):
        """Queues a run with `data` on its standard input. Raises OSError if there is no thread for it, nor can be."""
        cdef Run run = Run()
        cdef Job *job = &run._job
        cdef int failure
        if self._shared.closing:
            raise ValueError("a closed Runner")
        run._data = data
        run._shared = &self._shared
        job.data = PyBytes_AS_STRING(data)
        job.size = PyBytes_GET_SIZE(data)
        job.out.fd = job.err.fd = job.stop_fd = -1
        # One byte of room more than allowed, so that too much is seen as such.
        job.out.room = self._max_output + 1
        job.err.room = self._max_errors
        pthread_mutex_lock(&self._shared.lock)
        if self._shared.waiting_jobs >= self._shared.idle_threads and self._thread_count < self._max_parallel:
            failure = pgap_start_thread(&self._threads[self._thread_count], serve, &self._shared)
            if failure == 0:
                self._thread_count += 1
            elif self._thread_count == 0:
                pthread_mutex_unlock(&self._shared.lock)
                raise OSError(failure, os.strerror(failure))
        self._runs[<size_t>job] = run
        push(&self._shared.waiting, job)
        self._shared.waiting_jobs += 1
        pthread_cond_signal(&self._shared.work)
        pthread_mutex_unlock(&self._shared.lock)
        return run

    def collect(self):
        """The runs that are over, in the order in which they ended."""
        cdef char[64] discard
        cdef Job *job
        cdef list collected = []
        while read(self._over_ends[0], discard, sizeof(discard)) == sizeof(discard):
            pass
        while True:
            pthread_mutex_lock(&self._shared.lock)
            job = pop(&self._shared.over)
            pthread_mutex_unlock(&self._shared.lock)
            if job is NULL:
                break
            run = <Run>self._runs.pop(<size_t>job)
            (<Run>run)._shared = NULL
            collected.append(run)
            if job.left_behind:
                self._left_behind.append(job.left_behind)
        # Whoever could not be ended may have gone by itself since.
        self._left_behind = [pid for pid in self._left_behind if os.waitpid(pid, os.WNOHANG)[0] == 0]
        return collected

    def close(self):
        """Ends what runs, at once, and waits until it is gone. What was queued is never started."""
        if self._shared.closing:
            return
        # All in one: nothing that is queued starts, and what is stopped gets no grace.
        pthread_mutex_lock(&self._shared.lock)
        self._shared.closing = True
        for run in self._runs.values():
            stop_job(&(<Run>run)._job)
        pthread_cond_broadcast(&self._shared.work)
        pthread_mutex_unlock(&self._shared.lock)
        with nogil:
            for index in range(self._thread_count):
                pthread_join(self._threads[index], NULL)
        pgap_close(&self._over_ends[0])
        pgap_close(&self._over_ends[1])
        for run in self._runs.values():
            # It may outlive this Runner, and what they shared.
            (<Run>run)._shared = NULL


cdef char **words(list given) except NULL:
    cdef char **array = <char **>malloc((len(given) + 1) * sizeof(char *))
    if array is NULL:
        raise MemoryError()
    for i, word in enumerate(given):
        array[i] = word
    array[len(given)] = NULL
    return array


def start_process(list argv not None, list environment not None):
    """Starts a process that nobody here waits for; returns its ID and our ends of its pipes: input, output, errors.

    As a Runner's in all else; the pipes are non-blocking. Raises OSError. Other threads go on meanwhile.
    """
    cdef int[2] in_pipe
    cdef int[2] out_pipe
    cdef int[2] err_pipe
    cdef pid_t pid = 0
    cdef int failure
    cdef char **arguments = words(argv)
    cdef char **variables = NULL
    in_pipe[0] = in_pipe[1] = out_pipe[0] = out_pipe[1] = err_pipe[0] = err_pipe[1] = -1
    try:
        variables = words(environment)
        with nogil:
            if pgap_pipe(in_pipe, 1) < 0 or pgap_pipe(out_pipe, 0) < 0 or pgap_pipe(err_pipe, 0) < 0:
                failure = errno
            else:
                failure = pgap_spawn(&pid, arguments, variables, in_pipe[0], out_pipe[1], err_pipe[1])
            pgap_close(&in_pipe[0])
            pgap_close(&out_pipe[1])
            pgap_close(&err_pipe[1])
        if failure:
            pgap_close(&in_pipe[1])
            pgap_close(&out_pipe[0])
            pgap_close(&err_pipe[0])
            raise OSError(failure, os.strerror(failure))
        return pid, in_pipe[1], out_pipe[0], err_pipe[0]
    finally:
        free(arguments)
        free(variables)


def keep_descriptors_private():
    """Marks every open descriptor above 2 close-on-exec, those included that the gateway was started with."""
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        if descriptor > 2:
            try:
                os.set_inheritable(descriptor, False)
            except OSError:  # the listing's own descriptor, closed by now
                continue
