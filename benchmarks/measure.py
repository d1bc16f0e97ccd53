"""The measurements: each takes a running peer and yields its readings.

Strategy: the load comes from programs that cost the same whatever stands between (pgbench, psql, login_load),
and the proxy's own cost is read from its process, before and after. A measurement warms the peer up with
logins where the first ones cost more than the later, and waits for a quiet PostgreSQL before it looks.

What is measured over TLS is the same with figures of its own: the bench makes every client ask for TLS. login_load
has none, so that there pgbench logs in, with libpq's costs, and tls_sessions.py holds what is held.
"""

import array
import contextlib
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from kinds import four_workers, kind_peers, tls_target_peers
from peers import (
    DATABASE,
    HERE,
    LOGIN_ROLES,
    PASSWORD,
    Bench,
    Peer,
    Recipe,
    latenesses_file,
    stalled_gateway,
    watching_gateways,
)
from processes import (
    END_SECONDS,
    MeasurementFailed,
    cpu_seconds,
    end,
    forget_peak,
    need_descriptors,
    peak_bytes,
    resident_bytes,
)
from tls import TlsFiles, negotiated

PGBENCH_SCALE = 5
COPY_ROWS = 300_000
COPY_ROUNDS = 4  # of 300 MB: about two seconds
ROW_BYTES = 200_000_000

WARMING_LOGINS = 100
IDLE_SESSIONS = 1_000
IDLE_CPU_SESSIONS = 2_000
IDLE_CPU_SECONDS = 5.0
DESCRIPTORS_BESIDES = 700
"""What a proxy has besides its sessions: more than ours keeps for itself, and for logins in progress."""
STALL_LOGINS = 200
BURST_LOGINS = 1_000
STALL_PERCENTILE = 0.999

LOGIN_SECONDS_AT_MOST = 120.0


class LoginTimes(NamedTuple):
    """How many logins, in how many seconds, and how long one took: half of them, and 99 of 100, at most."""

    done: int
    seconds: float
    median_ms: float
    late_ms: float


class Reading(NamedTuple):
    """One value of one figure; `peer` is whose, where the measurement is one of several at once."""

    figure: str
    value: float
    peer: str = ""


Take = Callable[[Bench, Peer], Iterator[Reading]]


def every_peer(_name: str) -> bool:
    return True


def every_proxy(name: str) -> bool:
    return name != "direct"


def our_gateway(name: str) -> bool:
    return name == "gateway"


def every_tls_peer(name: str) -> bool:
    """HAProxy cannot answer an SSLRequest, and other gateways need not know how to be told of a certificate."""
    return name in ("direct", "pgbouncer", "gateway")


def every_tls_proxy(name: str) -> bool:
    return every_proxy(name) and every_tls_peer(name)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something to measure, and of which peers."""

    name: str
    take: Take
    applies_to: Callable[[str], bool] = every_peer
    recipe: Recipe | None = None
    """How to start the peer, where the ordinary way does not serve."""
    over_tls: bool = False
    own_peers: Callable[[Callable[[str], bool]], dict[str, Recipe]] | None = None
    """Gives its peers where they are not those of the others, those of them only that are wanted."""
    once: bool = False
    """Whether it is taken in the first repeat alone: it takes long, and is compared with nothing."""


def prepare(bench: Bench) -> None:
    """Makes the tables and the file that the measurements use."""
    bench.client("pgbench", bench.postgres_port, "-i", "-q", "-s", str(PGBENCH_SCALE), timeout=300, discard_output=True)
    bench.query("create unlogged table copy_out (id int, filling text)")
    # Rows of a kilobyte, stored as they are: the server's own cost for each row is not what is measured.
    bench.query("alter table copy_out alter filling set storage plain")
    bench.query(
        f"insert into copy_out select n, repeat(md5(n::text), 32) from generate_series(1, {COPY_ROWS}) as n",
        timeout=300,
    )
    bench.query("create unlogged table copy_in (like copy_out including storage)")
    bench.query("vacuum analyze")
    bench.query(f"\\copy copy_out to '{copy_file(bench)}'", timeout=300)
    trivial_script(bench).write_text("select 1;\n")
    for method, role in LOGIN_ROLES.items():
        bench.query(f"set password_encryption = '{method}'; create role {role} login password '{PASSWORD}'")


def copy_file(bench: Bench) -> Path:
    return bench.folder / "rows.copy"


def trivial_script(bench: Bench) -> Path:
    return bench.folder / "trivial.sql"


# --- Transactions -------------------------------------------------------------------------------------------


def transactions(bench: Bench, peer: Peer, *, clients: int) -> Iterator[Reading]:
    """Small prepared queries, as fast as they go."""
    return pgbench(bench, peer, clients, ["-S", "-M", "prepared"], f"tps_{clients}", f"cpu_transaction_{clients}")


def simple_transactions(bench: Bench, peer: Peer, *, clients: int) -> Iterator[Reading]:
    """The same by the simple protocol: the SQL of each goes over the wire."""
    return pgbench(bench, peer, clients, ["-S"], f"simple_tps_{clients}", f"simple_cpu_{clients}")


def pgbench(
    bench: Bench, peer: Peer, clients: int, words: list[str], rate_figure: str, cpu_figure: str
) -> Iterator[Reading]:
    before = cpu_of(peer)
    output = bench.client(
        "pgbench",
        peer.port,
        *(*words, "-n", "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(bench.seconds)),
        timeout=bench.seconds + 90,
        settings=peer.client_settings,
    )
    used = cpu_of(peer) - before
    yield Reading(rate_figure, number_in(r"^tps = ([0-9.]+)", output))
    if peer.process is not None:
        processed = number_in(r"^number of transactions actually processed: ([0-9]+)", output)
        yield Reading(cpu_figure, used / processed * 1e6)


def number_in(pattern: str, output: str) -> float:
    found = re.search(pattern, output, re.MULTILINE)
    if found is None:
        raise MeasurementFailed(f"pgbench printed no {pattern!r}: {output[-300:]}")
    return float(found[1])


def cpu_of(peer: Peer) -> float:
    return sum(map(cpu_seconds, peer.pids))


# --- COPY ---------------------------------------------------------------------------------------------------


def copy_out(bench: Bench, peer: Peer) -> Iterator[Reading]:
    return _copy(bench, peer, "copy_out", ["-c", "copy copy_out to stdout"])


def copy_in(bench: Bench, peer: Peer) -> Iterator[Reading]:
    return _copy(bench, peer, "copy_in", ["-c", "truncate copy_in", "-c", f"\\copy copy_in from '{copy_file(bench)}'"])


def _copy(bench: Bench, peer: Peer, figure: str, round_: list[str]) -> Iterator[Reading]:
    before, begun = cpu_of(peer), time.monotonic()
    bench.client("psql", peer.port, "-Xq", *round_ * COPY_ROUNDS, timeout=300, discard_output=True)
    took, used = time.monotonic() - begun, cpu_of(peer) - before
    copied = copy_file(bench).stat().st_size * COPY_ROUNDS
    yield Reading(f"{figure}_rate", copied / took / 1e6)
    if peer.process is not None:
        yield Reading(f"{figure}_cpu", used / copied * 1e9)


# --- Logins -------------------------------------------------------------------------------------------------


def logins(bench: Bench, peer: Peer, *, clients: int) -> Iterator[Reading]:
    """Logging in and leaving, one login after the other."""
    warm_up(bench, peer)
    before = cpu_of(peer)
    seen = log_in(bench, peer, clients=clients, seconds=bench.seconds)
    used = cpu_of(peer) - before
    yield Reading(f"logins_{clients}", seen.done / seen.seconds)
    yield Reading(f"login_p50_{clients}", seen.median_ms)
    yield Reading(f"login_p99_{clients}", seen.late_ms)
    if peer.process is not None:
        yield Reading(f"cpu_login_{clients}", used / seen.done * 1e6)


def logins_of_kind(bench: Bench, peer: Peer, *, method: str) -> Iterator[Reading]:
    """The same with one client and with eight."""
    for clients in (1, 8):
        for one in logins(bench, peer, clients=clients):
            yield Reading(f"{method}_{one.figure}", one.value)


def logins_by_pgbench(bench: Bench, peer: Peer, *, clients: int) -> Iterator[Reading]:
    """Logging in, one trivial query and leaving, by libpq, one after the other."""
    warm_up(bench, peer)
    yield from pgbench(bench, peer, clients, _login_words(bench), f"logins_{clients}", f"cpu_login_{clients}")


def logins_to_tls_target(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """The same, where it is the gateway that speaks TLS, and the client none; direct logins are over TLS themselves."""
    for one in logins_by_pgbench(bench, peer, clients=1):
        yield Reading(f"target_{one.figure}", one.value)


def _login_words(bench: Bench) -> list[str]:
    """What makes each of pgbench's transactions a login."""
    return ["-C", "-f", str(trivial_script(bench))]


def warm_up(bench: Bench, peer: Peer) -> None:
    """A batch of logins, and the wait until PostgreSQL is rid of them."""
    if bench.tls is None:
        log_in(bench, peer, most=WARMING_LOGINS, clients=8)
    else:
        words = (*_login_words(bench), "-n", "-c", "8", "-t", str(WARMING_LOGINS // 8))
        bench.client("pgbench", peer.port, *words, timeout=60, settings=peer.client_settings)
    bench.wait_for_quiet()


def log_in(
    bench: Bench, peer: Peer, *, clients: int, seconds: float = LOGIN_SECONDS_AT_MOST, most: int = 10_000_000
) -> LoginTimes:
    try:
        output = subprocess.run(
            [*_login_load(bench, peer, "logins"), str(clients), str(seconds), str(most)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds + 90,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise MeasurementFailed("login_load did not end") from error
    except subprocess.CalledProcessError as error:
        raise MeasurementFailed(f"{error.stderr.strip()} after {error.stdout.strip()} (done, seconds)") from error
    done, *times = output.split()
    if int(done) == 0:
        raise MeasurementFailed("no login was done")
    return LoginTimes(int(done), *map(float, times))


def _login_load(bench: Bench, peer: Peer, mode: str) -> list[str]:
    return [bench.login_load, mode, *_login(peer)]


def _login(peer: Peer) -> list[str]:
    return [str(peer.port), peer.user, DATABASE, PASSWORD, "1" if peer.needs_touch else "0"]


# --- Idle sessions ------------------------------------------------------------------------------------------


def idle(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """What sessions cost that do nothing."""
    need_descriptors(2 * IDLE_CPU_SESSIONS + DESCRIPTORS_BESIDES)
    warm_up(bench, peer)
    with held_sessions(bench, peer) as hold:
        yield _memory_of_held(peer, hold)
        hold(IDLE_CPU_SESSIONS - IDLE_SESSIONS)
        time.sleep(1.0)  # what the last logins left to do is not the cost of being idle
        before, begun = cpu_seconds(peer.pid), time.monotonic()
        time.sleep(IDLE_CPU_SECONDS)
        used, took = cpu_seconds(peer.pid) - before, time.monotonic() - begun
        yield Reading("idle_cpu", used / took * 100)


def idle_memory(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """What sessions that do nothing keep."""
    warm_up(bench, peer)
    with held_sessions(bench, peer) as hold:
        yield _memory_of_held(peer, hold)


def _memory_of_held(peer: Peer, hold: Callable[[int], None]) -> Reading:
    empty = resident_bytes(peer.pid)
    hold(IDLE_SESSIONS)
    return Reading("idle_memory", (resident_bytes(peer.pid) - empty) / IDLE_SESSIONS / 1024)


@contextlib.contextmanager
def held_sessions(
    bench: Bench, peer: Peer, *, seconds: float = 3 * LOGIN_SECONDS_AT_MOST
) -> Iterator[Callable[[int], None]]:
    """A process that holds sessions as long as the block lasts; call what is yielded for more of them."""
    process = subprocess.Popen(
        _login_load(bench, peer, "hold") if bench.tls is None else _tls_sessions(peer, bench.tls),
        env=bench.client_environment(peer.port),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Reads from the process block; ending it when its time is over is what bounds them.
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    try:
        yield partial(_hold_more, process)
        _piped(process.stdin).close()  # at end of file it takes leave of each session
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MeasurementFailed("the held sessions were not closed") from error
    finally:
        limit.cancel()
        end(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):  # it ended with a request unread
                _piped(pipe).close()


def _tls_sessions(peer: Peer, tls: TlsFiles) -> list[str]:
    return [sys.executable, str(HERE / "tls_sessions.py"), *_login(peer), str(tls.authority)]


def _hold_more(process: subprocess.Popen[str], count: int) -> None:
    requests, answers = _piped(process.stdin), _piped(process.stdout)
    with contextlib.suppress(BrokenPipeError):  # it has ended; the missing answer tells
        requests.write(f"{count}\n")
        requests.flush()
    if not answers.readline():
        raise MeasurementFailed(f"sessions could not be held: {_piped(process.stderr).read().strip()}")


def _piped(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "the process was started with pipes"
    return stream


# --- One large row ------------------------------------------------------------------------------------------


def large_row(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """How much the peer grows while one large row passes."""
    warm_up(bench, peer)
    forget_peak(peer.pid)
    before = peak_bytes(peer.pid)
    bench.client("psql", peer.port, "-XAtqc", f"select repeat('x', {ROW_BYTES})", timeout=120, discard_output=True)
    yield Reading("row_memory", (peak_bytes(peer.pid) - before) / 1e6)


# --- Stalls of the event loop -------------------------------------------------------------------------------


def stall(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """How late a timer in a big gateway's loop fires while clients log in, and while nobody does.

    The second is what this machine does to any process; only what exceeds that is the gateway's own.
    """
    assert peer.process is not None, "the recipe starts a gateway"
    warm_up(bench, peer)
    begun = time.monotonic()
    log_in(bench, peer, most=STALL_LOGINS, clients=1)
    done = time.monotonic()
    bench.wait_for_quiet()
    quiet = time.monotonic()
    time.sleep(done - begun)
    ended = time.monotonic()
    end(peer.process)

    ticks = read_latenesses(latenesses_file(bench))
    busy = sorted(late for due, late in ticks if begun <= due < done)
    still = sorted(late for due, late in ticks if quiet <= due < ended)
    if not busy or not still:
        raise MeasurementFailed("the clock in the gateway's loop did not tick")
    yield Reading("stall_percentile", percentile(busy, STALL_PERCENTILE) * 1e3)
    yield Reading("stall_longest", busy[-1] * 1e3)
    yield Reading("stall_percentile_quiet", percentile(still, STALL_PERCENTILE) * 1e3)


def burst(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """A thousand clients who log in at once, and how late a timer in the gateway's loop fires meanwhile."""
    assert peer.process is not None, "the recipe starts a gateway"
    warm_up(bench, peer)
    begun = time.monotonic()
    seen = log_in(bench, peer, most=BURST_LOGINS, clients=BURST_LOGINS)
    done = time.monotonic()
    bench.wait_for_quiet()
    end(peer.process)
    if seen.done != BURST_LOGINS:
        raise MeasurementFailed(f"{seen.done} of {BURST_LOGINS} were let in")
    busy = sorted(late for due, late in read_latenesses(latenesses_file(bench)) if begun <= due < done)
    yield Reading("burst_seconds", seen.seconds)
    yield Reading("burst_stall_percentile", percentile(busy, STALL_PERCENTILE) * 1e3)
    yield Reading("burst_stall_longest", busy[-1] * 1e3)


def read_latenesses(file: Path) -> list[tuple[float, float]]:
    """When each tick was due and how late it came, in seconds; what stalled_gateway.py wrote."""
    if not file.exists():
        raise MeasurementFailed("the gateway ended without writing its latenesses")
    values = array.array("d", file.read_bytes())
    return list(zip(values[::2], values[1::2], strict=True))


def percentile(ordered: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


# --- Sessions that are watched ----------------------------------------------------------------------------


def watched(name: str, take: Take) -> Measurement:
    """The same measurement of our gateway, with figures of its own for each that it can be asked to see."""
    return Measurement(f"watched-{name}", _renamed(take, "watched"), own_peers=watching_gateways)


def _renamed(take: Take, what: str) -> Take:
    def taken(bench: Bench, peer: Peer) -> Iterator[Reading]:
        for one in take(bench, peer):
            yield Reading(f"{what}_{one.figure}", one.value)

    return taken


# --- Over TLS -----------------------------------------------------------------------------------------------


def tls_in_use(bench: Bench, peer: Peer) -> str:
    """The protocol and cipher that the peer and PostgreSQL's own clients agree on."""
    return negotiated(bench.client("psql", peer.port, "-Xc", r"\conninfo", timeout=60))


def over_tls(name: str, take: Take, applies_to: Callable[[str], bool] = every_tls_peer) -> Measurement:
    """The same measurement with figures of its own."""
    return Measurement(f"tls-{name}", _renamed(take, "tls"), applies_to, over_tls=True)


def of_kinds(method: str) -> Measurement:
    """Logins with each kind of authenticator."""
    return Measurement(f"kinds-{method}", partial(logins_of_kind, method=method), own_peers=partial(kind_peers, method))


MEASUREMENTS = (
    Measurement("pgbench-1", partial(transactions, clients=1)),
    Measurement("pgbench-16", partial(transactions, clients=16)),
    Measurement("copy-out", copy_out),
    Measurement("copy-in", copy_in),
    watched("pgbench-16", partial(transactions, clients=16)),
    watched("simple-16", partial(simple_transactions, clients=16)),
    watched("copy-out", copy_out),
    Measurement("logins-1", partial(logins, clients=1)),
    Measurement("logins-8", partial(logins, clients=8)),
    of_kinds("md5"),
    of_kinds("scram-sha-256"),
    Measurement("idle", idle, every_proxy),
    Measurement("row", large_row, every_proxy),
    Measurement("stall", stall, our_gateway, stalled_gateway),
    Measurement("burst", burst, our_gateway, four_workers),
    over_tls("pgbench-1", partial(transactions, clients=1)),
    over_tls("pgbench-16", partial(transactions, clients=16)),
    over_tls("copy-out", copy_out),
    over_tls("copy-in", copy_in),
    over_tls("logins-1", partial(logins_by_pgbench, clients=1)),
    over_tls("idle", idle_memory, every_tls_proxy),
    Measurement("kinds-tls-target", logins_to_tls_target, over_tls=True, own_peers=tls_target_peers),
)
