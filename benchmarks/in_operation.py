"""What operators ask: what a second worker brings, whether memory stays flat under many sessions, what metrics cost,
and whether a session that has moved to a new process runs as before.

Strategy: each question has a table of its own, since its columns are ways to run our gateway. CPU is that of all its
processes. Where a server's own cost would hide the gateway's, bare_target stands in for it; what needs more of this
machine than there is says so (NotPossibleHere) instead of measuring something else.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from kinds import WORKER
from measure import (
    DESCRIPTORS_BESIDES,
    Measurement,
    Reading,
    cpu_of,
    held_sessions,
    log_in,
    number_in,
    pgbench,
    warm_up,
)
from peers import (
    OUR_GATEWAY,
    PASSWORD,
    USER,
    Bench,
    Peer,
    Recipe,
    bare_target,
    configured_gateway,
    gateway,
    log_of,
)
from processes import (
    LOOPBACK,
    MeasurementFailed,
    cpu_seconds,
    descriptors_of,
    end,
    free_port,
    machine_times,
    need_descriptors,
    resident_bytes,
    running,
    wait_until,
)
from report import ONE_WORKER, TWO_WORKERS

# --- Several workers --------------------------------------------------------------------------------------

WORKERS = {ONE_WORKER: 1, TWO_WORKERS: 2}
WORKERS_CLIENTS = 64
WORKERS_LOGIN_CLIENTS = 16

WORKERS_CONFIGURATION = """\
listen: {{host}}:{{port}}
workers: {count}
max_clients: {{most}}
max_logins: {{most}}
log: {{{{format: json}}}}
authenticator:
"""


@contextlib.contextmanager
def gateway_with_workers(
    bench: Bench, *, name: str, authenticator: str = WORKER, target_port: int | None = None
) -> Iterator[Peer]:
    """Our gateway with so many workers, whose authenticator sends everybody to one target: PostgreSQL, or a port."""
    template = WORKERS_CONFIGURATION.format(count=WORKERS[name]) + authenticator
    environment = {"BENCHMARK_TARGET": f"{LOOPBACK}:{target_port or bench.postgres_port}"}
    with configured_gateway(bench, name, OUR_GATEWAY, template, environment) as peer:
        yield replace(peer, has_workers=True)


@contextlib.contextmanager
def before_bare_target(bench: Bench, *, name: str) -> Iterator[Peer]:
    with bare_target(bench) as target:
        if name == target.name:
            yield target
            return
        with gateway_with_workers(bench, name=name, target_port=target.port) as peer:
            yield peer


def with_workers(wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    return {name: partial(gateway_with_workers, name=name) for name in WORKERS if wanted("gateway")}


def with_workers_and_bare_target(wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    names = [*(["direct"] if wanted("direct") else []), *(WORKERS if wanted("gateway") else [])]
    return {name: partial(before_bare_target, name=name) for name in names}


def transactions_of_workers(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """Small queries by the simple protocol, and how the sessions are spread."""
    warm_up(bench, peer)
    log = log_of(bench, peer.name)
    said_before = log.stat().st_size
    with machine_busy() as busy:
        words = ["-S"]
        yield from pgbench(bench, peer, WORKERS_CLIENTS, words, "workers_tps", "workers_cpu_transaction")
    yield Reading("workers_busy", busy[0])
    yield Reading("workers_share", least_share(log, said_before, WORKERS[peer.name]))


def least_share(log: Path, begin: int, workers: int) -> float:
    """How many in a hundred of the sessions the worker has that has the fewest."""
    seen: Counter[int] = Counter()

    def all_said() -> bool:
        with log.open("rb") as lines:
            lines.seek(begin)
            said = [json.loads(line) for line in lines if line.endswith(b"\n")]
        seen.clear()
        seen.update(line.get("worker", 0) for line in said if line["event"] == "login")
        return seen.total() >= WORKERS_CLIENTS

    wait_until(all_said, f"the log says of {WORKERS_CLIENTS} logins which worker has them", timeout=10)
    return (min(seen.values()) if len(seen) == workers else 0) / seen.total() * 100


def logins_of_workers(bench: Bench, peer: Peer, *, figures: str) -> Iterator[Reading]:
    """Logins with authenticators that live on."""
    warm_up(bench, peer)
    before = cpu_of(peer)
    with machine_busy() as busy:
        seen = log_in(bench, peer, clients=WORKERS_LOGIN_CLIENTS, seconds=bench.seconds)
    used = cpu_of(peer) - before
    yield Reading(f"{figures}_logins", seen.done / seen.seconds)
    if peer.process is not None and peer.name in WORKERS:
        yield Reading(f"{figures}_cpu_login", used / seen.done * 1e6)
    yield Reading(f"{figures}_logins_busy", busy[0])


@contextlib.contextmanager
def machine_busy() -> Iterator[list[float]]:
    """Fills in how many in a hundred of all cores' time the block has used, whoever used it."""
    share: list[float] = []
    busy, there = machine_times()
    yield share
    busy_after, there_after = machine_times()
    share.append((busy_after - busy) / max(1, there_after - there) * 100)


# --- Many sessions ----------------------------------------------------------------------------------------

MANY_IDLE = 10_000
MANY_ACTIVE = 500
MANY_RATE = 1_000
"""Transactions a second of all that are active: two of each."""
MANY_WARM_SECONDS = 10
MANY_LOOK_SECONDS = 5
MANY_LOGIN_SECONDS = 180
"""How long all of them may take to log in."""

MANY_CONFIGURATION = """\
listen: {{host}}:{{port}}
workers: {workers}
max_clients: {most}
authenticator:
  method: md5
  max_parallel: 8
  users: {{{{file: {{folder}}/many.yaml}}}}
"""
IDLER = "idler"


@contextlib.contextmanager
def gateway_for_many(bench: Bench) -> Iterator[Peer]:
    """Our gateway, where the idle have bare_target as their server and the active PostgreSQL."""
    need_descriptors(MANY_IDLE + DESCRIPTORS_BESIDES)
    most = MANY_IDLE + MANY_ACTIVE
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A hash spreads them over the workers: one may get somewhat more than its part.
    needed = 1.1 * 2 * most
    workers = 1 if limit == resource.RLIM_INFINITY else math.ceil(needed / (limit - DESCRIPTORS_BESIDES))
    with bare_target(bench) as target:
        file = bench.folder / "many.yaml"
        lines = [
            "targets:",
            f'  idle: {{host: "{LOOPBACK}:{target.port}", user: {USER}, password: {PASSWORD}}}',
            f'  active: {{host: "{LOOPBACK}:{bench.postgres_port}", user: {USER}, password: {PASSWORD}}}',
            "users:",
        ]
        for user, where in ((IDLER, "idle"), (USER, "active")):
            verifier = "md5" + hashlib.md5((PASSWORD + user).encode()).hexdigest()  # noqa: S324 (PostgreSQL's own)
            lines.append(f'  {user}: {{verifier: "{verifier}", databases: {{"*": {where}}}}}')
        file.write_text("\n".join(lines) + "\n")
        file.chmod(0o600)
        template = MANY_CONFIGURATION.format(workers=workers, most=most + 100)
        with configured_gateway(bench, "gateway", OUR_GATEWAY, template) as peer:
            yield replace(peer, has_workers=workers > 1)


@dataclass(frozen=True, slots=True)
class Look:
    """What all processes of a gateway have at one moment."""

    at: float
    resident: int
    descriptors: int
    cpu: float


def look_at(peer: Peer) -> Look:
    pids = peer.pids
    resident, descriptors = sum(map(resident_bytes, pids)), sum(map(descriptors_of, pids))
    return Look(time.monotonic(), resident, descriptors, cpu_of(peer))


def many(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """Thousands that idle and hundreds that work at a pace that leaves the machine time."""
    warm_up(bench, peer)
    empty = look_at(peer)
    bound = MANY_LOGIN_SECONDS + bench.many_seconds
    words = ["-S", "-n", "-c", str(MANY_ACTIVE), "-j", "2", "-R", str(MANY_RATE)]
    command = [str(bench.postgres_bin / "pgbench"), *words, "-T", str(bench.many_seconds + 2 * MANY_LOOK_SECONDS)]
    environment = bench.client_environment(peer.port)
    with held_sessions(bench, replace(peer, user=IDLER), seconds=bound) as hold:
        hold(MANY_IDLE)
        with running(command, log_of(bench, "many"), env=environment) as load:
            wait_until(lambda: _active(bench) >= MANY_ACTIVE, f"{MANY_ACTIVE} sessions are there", timeout=120)
            looks = list(_look_for(bench, peer, load))
            try:
                load.wait(60)
            except subprocess.TimeoutExpired as error:
                raise MeasurementFailed("pgbench did not end") from error
    said = log_of(bench, "many").read_text()
    if load.returncode != 0:
        raise MeasurementFailed(f"pgbench ended with status {load.returncode}: {said[-500:]}")
    print(f"  resident MiB: {' '.join(f'{one.resident / 2**20:.1f}' for one in looks)}", file=sys.stderr)
    print(f"  descriptors: {' '.join(str(one.descriptors) for one in looks)}", file=sys.stderr)
    warm, last = looks[0], looks[-1]
    yield Reading("many_workers", max(1, len(peer.pids) - 1))
    yield Reading("many_memory", warm.resident / 2**20)
    yield Reading("many_memory_session", (warm.resident - empty.resident) / 1024 / (MANY_IDLE + MANY_ACTIVE))
    yield Reading("many_growth", (last.resident - warm.resident) / 1024)
    yield Reading("many_peak", (max(one.resident for one in looks) - warm.resident) / 1024)
    yield Reading("many_descriptors", warm.descriptors)
    yield Reading("many_descriptors_growth", last.descriptors - warm.descriptors)
    yield Reading("many_tps", number_in(r"^tps = ([0-9.]+)", said))
    yield Reading("many_cpu", (last.cpu - warm.cpu) / (last.at - warm.at) * 100)


def _active(bench: Bench) -> int:
    return int(bench.query("select count(*) from pg_stat_activity where application_name = 'pgbench'"))


def _look_for(bench: Bench, peer: Peer, load: subprocess.Popen[bytes]) -> Iterator[Look]:
    """From when it is warm until its time is over, every few seconds."""
    begun = time.monotonic()
    warm = min(MANY_WARM_SECONDS, bench.many_seconds / 2)
    count = max(1, round((bench.many_seconds - warm) / MANY_LOOK_SECONDS))
    for number in range(count + 1):
        due = begun + warm + number * (bench.many_seconds - warm) / count
        time.sleep(max(0.0, due - time.monotonic()))
        if load.poll() is not None:
            raise MeasurementFailed(f"pgbench ended with status {load.returncode} before its time")
        yield look_at(peer)


# --- Metrics ----------------------------------------------------------------------------------------------

SCRAPES_A_SECOND: Mapping[str, int] = {"admin off": 0, "admin on": 0, "scraped 1 Hz": 1, "scraped 100 Hz": 100}
SCRAPE_SECONDS = 15
"""How often Prometheus usually asks."""
COSTED_SCRAPES_A_SECOND = 4
"""Seldom enough for each to be answered anew."""


@contextlib.contextmanager
def gateway_with_metrics(bench: Bench, *, name: str) -> Iterator[Peer]:
    port = 0 if name == "admin off" else free_port()
    more = f"admin: {{{{listen: '{LOOPBACK}:{port}'}}}}\n" if port else ""
    with gateway(bench, name=name, command=OUR_GATEWAY, more=more) as peer:
        yield replace(peer, admin_port=port)


def with_metrics(wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    return {name: partial(gateway_with_metrics, name=name) for name in SCRAPES_A_SECOND if wanted("gateway")}


@dataclass(slots=True)
class Scrapes:
    """How long each took, in seconds, and what went wrong with the last."""

    seconds: list[float] = field(default_factory=list)
    fault: str = ""


@contextlib.contextmanager
def scraping(peer: Peer, a_second: int) -> Iterator[Scrapes]:
    """Asks for the metrics so often, for as long as the block lasts."""
    seen = Scrapes()
    over = threading.Event()
    thread = threading.Thread(target=_scrape, args=(peer.admin_port, a_second, seen, over), daemon=True)
    if a_second:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        if a_second:
            thread.join()
    if a_second and (seen.fault or not seen.seconds):
        raise MeasurementFailed(f"metrics could not be had: {seen.fault or 'no scrape was done'}")


def _scrape(port: int, a_second: int, seen: Scrapes, over: threading.Event) -> None:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    due = time.monotonic()
    try:
        while not over.is_set():
            begun = time.monotonic()
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            answer.read()
            if answer.status != http.client.OK:
                seen.fault = f"status {answer.status}"
                return
            seen.seconds.append(time.monotonic() - begun)
            due = max(due + 1 / a_second, time.monotonic())
            over.wait(due - time.monotonic())
    except (OSError, http.client.HTTPException) as error:
        seen.fault = str(error) or type(error).__name__
    finally:
        connection.close()


def metrics(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """What the relay costs while somebody asks for metrics, and what one answer costs."""
    warm_up(bench, peer)
    before, begun = cpu_of(peer), time.monotonic()
    with scraping(peer, SCRAPES_A_SECOND[peer.name]) as scrapes:
        yield from pgbench(bench, peer, 16, ["-S", "-M", "prepared"], "metrics_tps_16", "metrics_cpu_transaction_16")
    relay = (cpu_of(peer) - before) / (time.monotonic() - begun)
    if scrapes.seconds:
        yield Reading("metrics_scrape_time", statistics.median(scrapes.seconds) * 1e3)
    if SCRAPES_A_SECOND[peer.name] == 1:
        cost = _cost_of_scrape(bench, peer)
        yield Reading("metrics_scrape_cpu", cost * 1e3)
        yield Reading("metrics_share", cost / SCRAPE_SECONDS / relay * 100)


def _cost_of_scrape(bench: Bench, peer: Peer) -> float:
    """Seconds of CPU, beside those that the gateway takes when nobody asks."""
    bench.wait_for_quiet()
    before = cpu_of(peer)
    time.sleep(bench.seconds)
    quiet = cpu_of(peer) - before
    before = cpu_of(peer)
    with scraping(peer, COSTED_SCRAPES_A_SECOND) as scrapes:
        time.sleep(bench.seconds)
    return max(0.0, cpu_of(peer) - before - quiet) / len(scrapes.seconds)


# --- A session that has moved -----------------------------------------------------------------------------

UPGRADE_CLIENTS = 16
UPGRADE_SECONDS = 60
"""How long an upgrade may take, until the last session has moved."""
FRESH_SECONDS = 0.02
"""A line that was waited for so long was written just now."""


def pid_file(bench: Bench) -> Path:
    return bench.folder / "upgraded.pid"


@contextlib.contextmanager
def upgradable_gateway(bench: Bench) -> Iterator[Peer]:
    """Our gateway; whoever has taken over from it by the end is ended too."""
    with gateway(bench, name="gateway", command=OUR_GATEWAY, more=f"pid_file: {pid_file(bench)}\n") as peer:
        try:
            yield peer
        finally:
            _end_successor(bench, peer.pid)


def _end_successor(bench: Bench, first: int) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        successor = int(pid_file(bench).read_text())
        if successor != first:
            os.kill(successor, signal.SIGTERM)
            wait_until(lambda: not pid_file(bench).exists(), "the new process ends", timeout=40)


def upgrade(bench: Bench, peer: Peer) -> Iterator[Reading]:
    """The same sessions in the process that they began in, and in the one that has taken over from it."""
    warm_up(bench, peer)
    assert peer.process is not None, "the recipe starts a gateway"
    with progress_of_pgbench(bench, peer) as lines:
        yield from _over(bench.seconds, lines, peer.pid, "before")
        peer.process.send_signal(signal.SIGUSR2)
        begun = time.monotonic()
        wait_until(lambda: end_of(peer) is not None, "all sessions have moved", timeout=UPGRADE_SECONDS)
        if end_of(peer) != 0:
            raise MeasurementFailed(f"the old process ended with status {end_of(peer)}")
        yield Reading("upgrade_seconds", time.monotonic() - begun, "after")
        yield from _over(bench.seconds, lines, int(pid_file(bench).read_text()), "after")


def end_of(peer: Peer) -> int | None:
    return None if peer.process is None else peer.process.poll()


@contextlib.contextmanager
def progress_of_pgbench(bench: Bench, peer: Peer) -> Iterator[Iterator[tuple[float, float]]]:
    """Gives, each second, what a pgbench says when it has just said it: its time, and transactions a second."""
    longest = 2 * bench.seconds + UPGRADE_SECONDS + 30
    words = ["-S", "-M", "prepared", "-n", "-c", str(UPGRADE_CLIENTS), "-j", "2", "-P", "1", "-T", str(longest)]
    process = subprocess.Popen(
        [str(bench.postgres_bin / "pgbench"), *words],
        env=bench.client_environment(peer.port),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None, "it was started with a pipe"
    try:
        yield _progress(process)
    finally:
        end(process)
        process.stderr.close()


def _progress(process: subprocess.Popen[str]) -> Iterator[tuple[float, float]]:
    assert process.stderr is not None, "it was started with a pipe"
    said = ""
    while True:
        begun = time.monotonic()
        line = process.stderr.readline()
        if not line:
            raise MeasurementFailed(f"pgbench ended: {said.strip()[-500:]}")
        said += line
        if line.startswith("progress:"):
            fresh = time.monotonic() - begun > FRESH_SECONDS
            at, rate = number_in(r"^progress: ([0-9.]+) s", line), number_in(r"s, ([0-9.]+) tps", line)
            yield (at, rate) if fresh else (at, math.nan)


def _over(seconds: int, lines: Iterator[tuple[float, float]], pid: int, peer: str) -> Iterator[Reading]:
    """From one fresh line to another, so many seconds later."""
    begun = next(at for at, rate in lines if not math.isnan(rate))
    before, done, last = cpu_seconds(pid), 0.0, begun
    while last - begun < seconds - 0.5:
        at, rate = next(lines)
        if math.isnan(rate):
            raise MeasurementFailed("what pgbench said was read too late")
        done, last = done + rate * (at - last), at
    used = cpu_seconds(pid) - before
    yield Reading("upgrade_tps", done / (last - begun), peer)
    yield Reading("upgrade_cpu_transaction", used / done * 1e6, peer)


def our_gateway_alone(recipe: Recipe, wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    return {"gateway": recipe} if wanted("gateway") else {}


MEASUREMENTS = (
    Measurement("workers", transactions_of_workers, own_peers=with_workers),
    Measurement("workers-logins", partial(logins_of_workers, figures="workers"), own_peers=with_workers),
    Measurement(
        "workers-logins-bare",
        partial(logins_of_workers, figures="workers_bare"),
        own_peers=with_workers_and_bare_target,
    ),
    Measurement("metrics", metrics, own_peers=with_metrics),
    Measurement("upgrade", upgrade, own_peers=partial(our_gateway_alone, upgradable_gateway)),
    Measurement("many", many, own_peers=partial(our_gateway_alone, gateway_for_many), once=True),
)
