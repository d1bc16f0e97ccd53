"""What was measured: figures, their medians, the aims they are held to, and how all that is shown."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tls import TLS_MATERIAL

SUBJECT = "gateway"
QUICK_KINDS = ("worker", "python", "users")
WARM_KINDS = ("users-warm",)
YARDSTICK = "haproxy"
TLS_YARDSTICK = "pgbouncer"


ONE_WORKER, TWO_WORKERS = "1 worker", "2 workers"
WORKERS = (TWO_WORKERS,)

GROUPS = {
    "watched_": "What a session pays for what the gateway is asked to see of it:",
    "workers_": 'Several workers. "All cores" is what load, gateway and server together have taken of them:',
    "metrics_": "Metrics, beside 16 clients:",
    "upgrade_": "The same 16 sessions before an upgrade in place, and after it, in the new process:",
    "many_": "10,000 sessions that idle and 500 that work, for as long as `--many-seconds` says; once:",
}
"""What has a table of its own, by how the figures' keys begin."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: a bound in its unit, in times another peer's value, or on top of it.

    `of` names whose figure it is, each of which has to be so.
    """

    bound: float
    at_most: bool
    times: str | None = None
    over: str | None = None
    of: tuple[str, ...] = (SUBJECT,)

    def __str__(self) -> str:
        words = f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        if self.times is not None:
            words += f" times {self.times}"
        if self.over is not None:
            words += f" over {self.over}"
        return words if self.of == (SUBJECT,) else f"{', '.join(self.of)}: {words}"


UNWATCHED = Aim(1.05, at_most=True, times="nothing", of=("time limit, audit",))
"""What is seen of a session's ends alone costs nothing on the way of its bytes."""


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    title: str
    unit: str
    digits: int
    aim: Aim | None = None
    also: Aim | None = None
    """A second aim, for others."""

    @property
    def over_tls(self) -> bool:
        return self.key.startswith("tls_")

    @property
    def of_kinds(self) -> bool:
        """Whether its columns are kinds of authenticators."""
        return self.key.startswith(("md5_", "scram-", "target_"))

    @property
    def group(self) -> str:
        """What its key begins with, if that is one of GROUPS."""
        return next(filter(self.key.startswith, GROUPS), "")

    @property
    def aims(self) -> list[Aim]:
        return [aim for aim in (self.aim, self.also) if aim is not None]

    @property
    def yardstick(self) -> str:
        """Whom our gateway is compared with."""
        return TLS_YARDSTICK if self.over_tls else YARDSTICK


def _of_kinds(method: str, name: str, added: float) -> tuple[Figure, ...]:
    quick, warm = QUICK_KINDS, WARM_KINDS
    return (
        Figure(
            f"{method}_logins_1",
            f"{name}: logins, 1 client",
            "logins/s",
            0,
            Aim(1.0, at_most=False, times="haproxy", of=quick),
            Aim(1.0, at_most=False, times="direct", of=warm),
        ),
        Figure(
            f"{method}_login_p50_1",
            f"{name}: a login's time, half of them",
            "ms",
            2,
            Aim(added, at_most=True, over="direct", of=quick),
        ),
        Figure(f"{method}_login_p99_1", f"{name}: a login's time, 99 of 100", "ms", 2),
        Figure(f"{method}_cpu_login_1", f"{name}: proxy CPU, 1 client", "µs/login", 0),
        Figure(
            f"{method}_logins_8",
            f"{name}: logins, 8 clients",
            "logins/s",
            0,
            Aim(1.0, at_most=False, times="haproxy", of=quick),
            Aim(1.0, at_most=False, times="direct", of=warm),
        ),
        Figure(f"{method}_cpu_login_8", f"{name}: proxy CPU, 8 clients", "µs/login", 0),
    )


FIGURES = (
    Figure("tps_1", "pgbench -S, 1 client", "tps", 0, Aim(1.0, at_most=False, times=YARDSTICK)),
    Figure("cpu_transaction_1", "proxy CPU, 1 client", "µs/transaction", 1),
    Figure("tps_16", "pgbench -S, 16 clients", "tps", 0),
    Figure("cpu_transaction_16", "proxy CPU, 16 clients", "µs/transaction", 1, Aim(1.05, True, YARDSTICK)),
    Figure("copy_out_rate", "COPY out", "MB/s", 0, Aim(0.97, at_most=False, times=YARDSTICK)),
    Figure("copy_out_cpu", "proxy CPU, COPY out", "s/GB", 2, Aim(1.1, True, YARDSTICK)),
    Figure("copy_in_rate", "COPY in", "MB/s", 0, Aim(0.97, at_most=False, times=YARDSTICK)),
    Figure("copy_in_cpu", "proxy CPU, COPY in", "s/GB", 2, Aim(1.1, True, YARDSTICK)),
    Figure("logins_1", "logins, 1 client", "logins/s", 0, Aim(0.70, at_most=False, times="direct")),
    Figure("cpu_login_1", "proxy CPU, 1 client", "µs/login", 0, Aim(600, at_most=True)),
    Figure("logins_8", "logins, 8 clients", "logins/s", 0),
    Figure("cpu_login_8", "proxy CPU, 8 clients", "µs/login", 0),
    Figure("idle_memory", "idle session, of 1,000", "KiB", 1, Aim(4, at_most=True)),
    # A tenth of a percent of one core is what "no CPU" means here: a timer a second costs less.
    Figure("idle_cpu", "CPU of 2,000 idle sessions", "% of a core", 2, Aim(0.1, at_most=True)),
    Figure("row_memory", "growth for one 200 MB row", "MB", 1, Aim(16, at_most=True)),
    Figure("stall_percentile", "loop stall at 300 MB, 99.9th percentile", "ms", 2, Aim(1, at_most=True)),
    Figure("stall_longest", "longest loop stall at 300 MB", "ms", 2),
    Figure("stall_percentile_quiet", "the same percentile without logins", "ms", 2),
    Figure("burst_seconds", "1,000 logins at once, 4 workers", "s", 2),
    Figure("burst_stall_percentile", "loop stall meanwhile, 99.9th percentile", "ms", 2, Aim(2, at_most=True)),
    Figure("burst_stall_longest", "longest loop stall meanwhile", "ms", 2),
    Figure("tls_tps_1", "TLS: pgbench -S, 1 client", "tps", 0),
    Figure("tls_cpu_transaction_1", "TLS: proxy CPU, 1 client", "µs/transaction", 1),
    Figure("tls_tps_16", "TLS: pgbench -S, 16 clients", "tps", 0),
    Figure("tls_cpu_transaction_16", "TLS: proxy CPU, 16 clients", "µs/transaction", 1, Aim(1.1, True, TLS_YARDSTICK)),
    Figure("tls_copy_out_rate", "TLS: COPY out", "MB/s", 0, Aim(1.5, at_most=False, times=TLS_YARDSTICK)),
    Figure("tls_copy_out_cpu", "TLS: proxy CPU, COPY out", "s/GB", 2),
    Figure("tls_copy_in_rate", "TLS: COPY in", "MB/s", 0),
    Figure("tls_copy_in_cpu", "TLS: proxy CPU, COPY in", "s/GB", 2),
    Figure("tls_logins_1", "TLS: logins of pgbench -C, 1 client", "logins/s", 0, Aim(0.8, False, "direct")),
    Figure("tls_cpu_login_1", "TLS: proxy CPU, 1 client", "µs/login", 0),
    Figure("tls_idle_memory", "TLS: idle session, of 1,000", "KiB", 1, Aim(60, at_most=True)),
    *_of_kinds("md5", "md5", 0.3),
    *_of_kinds("scram-sha-256", "scram", 0.5),
    Figure(
        "target_logins_1",
        "target over TLS: logins, 1 client",
        "logins/s",
        0,
        Aim(1.5, at_most=False, times="direct", of=WARM_KINDS),
    ),
    Figure("target_cpu_login_1", "target over TLS: proxy CPU", "µs/login", 0),
    Figure("watched_tps_16", "pgbench -S, 16 clients", "tps", 0),
    Figure("watched_cpu_transaction_16", "proxy CPU, 16 clients", "µs/transaction", 1, UNWATCHED),
    Figure("watched_simple_tps_16", "pgbench -S by the simple protocol, 16 clients", "tps", 0),
    Figure("watched_simple_cpu_16", "the same: proxy CPU", "µs/transaction", 1, UNWATCHED),
    Figure("watched_copy_out_rate", "COPY out", "MB/s", 0),
    Figure("watched_copy_out_cpu", "proxy CPU, COPY out", "s/GB", 2, UNWATCHED),
    Figure("workers_tps", "pgbench -S by the simple protocol, 64 clients", "tps", 0),
    Figure(
        "workers_cpu_transaction",
        "the same: CPU of all processes",
        "µs/transaction",
        1,
        Aim(1.1, at_most=True, times=ONE_WORKER, of=WORKERS),
    ),
    Figure("workers_share", "sessions of the worker that has the fewest", "%", 0, Aim(40, at_most=False, of=WORKERS)),
    Figure("workers_busy", "all cores meanwhile", "%", 0),
    Figure(
        "workers_logins",
        "logins, 16 clients, kind worker",
        "logins/s",
        0,
        Aim(1.2, at_most=False, times=ONE_WORKER, of=WORKERS),
    ),
    Figure("workers_cpu_login", "the same: CPU of all processes", "µs/login", 0),
    Figure("workers_logins_busy", "all cores meanwhile", "%", 0),
    Figure(
        "workers_bare_logins",
        "the same, to a server that costs nothing",
        "logins/s",
        0,
        Aim(1.2, at_most=False, times=ONE_WORKER, of=WORKERS),
    ),
    Figure("workers_bare_cpu_login", "the same: CPU of all processes", "µs/login", 0),
    Figure("workers_bare_logins_busy", "all cores meanwhile", "%", 0),
    Figure("metrics_tps_16", "pgbench -S, 16 clients", "tps", 0),
    Figure("metrics_cpu_transaction_16", "proxy CPU, 16 clients", "µs/transaction", 1),
    Figure("metrics_scrape_time", "a scrape's time meanwhile, half of them", "ms", 2),
    Figure("metrics_scrape_cpu", "proxy CPU of one scrape, answered anew", "ms", 2),
    Figure(
        "metrics_share",
        "one scrape each 15 s, of the relay's CPU",
        "%",
        3,
        Aim(1, at_most=True, of=("scraped 1 Hz",)),
    ),
    Figure("upgrade_tps", "pgbench -S, 16 clients", "tps", 0),
    Figure(
        "upgrade_cpu_transaction",
        "proxy CPU, 16 clients",
        "µs/transaction",
        1,
        Aim(1.05, at_most=True, times="before", of=("after",)),
    ),
    Figure("upgrade_seconds", "from the signal until all have moved", "s", 2),
    Figure("many_workers", "workers, for there to be descriptors enough", "", 0),
    Figure("many_memory", "resident memory after 10 s, all processes", "MiB", 1),
    Figure("many_memory_session", "the same for each session", "KiB", 1),
    Figure("many_growth", "growth from there to the end", "KiB", 0, Aim(1024, at_most=True)),
    Figure("many_peak", "the most meanwhile, above there", "KiB", 0),
    Figure("many_descriptors", "descriptors after 10 s", "", 0),
    Figure("many_descriptors_growth", "growth from there to the end", "", 0, Aim(0, at_most=True)),
    Figure("many_tps", "pgbench -S -R 1000 by the simple protocol", "tps", 0),
    Figure("many_cpu", "CPU of all processes", "% of a core", 1),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value that was measured."""

    figure: str
    peer: str
    repeat: int
    value: float


@dataclass(frozen=True, slots=True)
class Failure:
    """One measurement that did not come about."""

    measurement: str
    peer: str
    repeat: int
    reason: str


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Without which no figure means anything."""

    date: str
    command: str
    repeats: int
    seconds: int
    machine: dict[str, str]
    versions: dict[str, str]


@dataclass(slots=True)
class Report:
    circumstances: Circumstances
    peers: Sequence[str]
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    impossible: list[Failure] = field(default_factory=list)
    """What this machine cannot measure."""
    tls: dict[str, str] = field(default_factory=dict)
    """What each peer's clients agreed on with it, where that was TLS."""

    def values(self, figure: str, peer: str) -> list[float]:
        return [sample.value for sample in self.samples if sample.figure == figure and sample.peer == peer]

    def median(self, figure: str, peer: str) -> float | None:
        values = self.values(figure, peer)
        return statistics.median(values) if values else None

    def ratio(self, figure: str, numerator: str, denominator: str) -> float | None:
        above, below = self.median(figure, numerator), self.median(figure, denominator)
        return above / below if above is not None and below else None

    def measured_figures(self) -> list[Figure]:
        return [figure for figure in FIGURES if any(sample.figure == figure.key for sample in self.samples)]

    def holds(self, figure: Figure) -> bool | None:
        """Whether all aims are met; None where there is none, or not all that it takes was measured."""
        seen = [self._meets(figure, aim, subject) for aim in figure.aims for subject in aim.of]
        return None if not seen or None in seen else all(seen)

    def _meets(self, figure: Figure, aim: Aim, subject: str) -> bool | None:
        value = self.median(figure.key, subject)
        if aim.times is not None:
            value = self.ratio(figure.key, subject, aim.times)
        elif aim.over is not None:
            below = self.median(figure.key, aim.over)
            value = None if value is None or below is None else value - below
        if value is None:
            return None
        return value <= aim.bound if aim.at_most else value >= aim.bound

    def tables(self) -> str:
        """In Markdown: what was measured in plain, what over TLS, of each kind of authenticator, and of each group."""
        measured = self.measured_figures()
        plain = [figure for figure in measured if not (figure.over_tls or figure.of_kinds or figure.group)]
        over_tls = [figure for figure in measured if figure.over_tls]
        of_kinds = [figure for figure in measured if figure.of_kinds]
        parts = []
        if plain:
            parts.append(self._table(plain, self.peers, YARDSTICK))
        if over_tls:
            agreed = ", ".join(dict.fromkeys(self.tls.values()))
            peers = [peer for peer in self.peers if peer in self.tls]
            parts.append(f"Over TLS: {agreed}, with {', '.join(peers)}; {TLS_MATERIAL}.")
            parts.append(self._table(over_tls, peers, TLS_YARDSTICK))
        if of_kinds:
            parts.append("Logins, for each kind of authenticator:")
            parts.append(self._table(of_kinds, self.peers_of(of_kinds)))
        for key, heading in GROUPS.items():
            if grouped := [figure for figure in measured if figure.group == key]:
                parts.extend([heading, self._table(grouped, self.peers_of(grouped))])
        return "\n\n".join(parts)

    def peers_of(self, figures: Sequence[Figure]) -> list[str]:
        """Whose figures these are, in the order of the first repeat, PostgreSQL itself before all."""
        keys = {figure.key for figure in figures}
        peers = dict.fromkeys(sample.peer for sample in self.samples if sample.figure in keys)
        return sorted(peers, key=lambda peer: peer != "direct")

    def _table(self, figures: Sequence[Figure], peers: Sequence[str], yardstick: str | None = None) -> str:
        """Aligned for the eye: a row a figure, a column a peer, and how our gateway compares with the yardstick."""
        ratio = [] if yardstick is None else [f"{SUBJECT}/{yardstick}"]
        head = ["", "unit", *peers, *ratio, "aim", "holds"]
        rows = [self._row(figure, peers, yardstick) for figure in figures]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        numeric = range(2, len(head) - 2)
        rule = ["-" * (width - 1) + ":" if at in numeric else "-" * width for at, width in enumerate(widths)]
        return "\n".join(
            "| "
            + " | ".join(
                cell.rjust(width) if at in numeric else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
            for row in [head, rule, *rows]
        )

    def _row(self, figure: Figure, peers: Sequence[str], yardstick: str | None) -> list[str]:
        medians = [self.median(figure.key, peer) for peer in peers]
        ratio = None if yardstick is None else self.ratio(figure.key, SUBJECT, yardstick)
        ratio_cell = [] if yardstick is None else ["" if ratio is None else f"{ratio:.2f}"]
        return [
            figure.title,
            figure.unit,
            *("" if median is None else f"{median:,.{figure.digits}f}" for median in medians),
            *ratio_cell,
            "; ".join(map(str, figure.aims)),
            {True: "yes", False: "NO", None: ""}[self.holds(figure)],
        ]

    def write_json(self, file: Path) -> None:
        seen = self.circumstances
        document = {
            "date": seen.date,
            "command": seen.command,
            "repeats": seen.repeats,
            "seconds": seen.seconds,
            "machine": seen.machine,
            "versions": seen.versions,
            "tls": self.tls,
            "figures": [self._figure_document(figure) for figure in self.measured_figures()],
            "failures": [
                {"measurement": one.measurement, "peer": one.peer, "repeat": one.repeat, "reason": one.reason}
                for one in self.failures
            ],
            "impossible": [
                {"measurement": one.measurement, "peer": one.peer, "reason": one.reason} for one in self.impossible
            ],
        }
        file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _figure_document(self, figure: Figure) -> dict[str, object]:
        return {
            "key": figure.key,
            "title": figure.title,
            "unit": figure.unit,
            "peers": {
                peer: {"median": self.median(figure.key, peer), "values": self.values(figure.key, peer)}
                for peer in self.peers_of([figure])
            },
            "yardstick": figure.yardstick,
            "ratio": self.ratio(figure.key, SUBJECT, figure.yardstick),
            "aim": "; ".join(map(str, figure.aims)) or None,
            "holds": self.holds(figure),
        }


def machine() -> dict[str, str]:
    """What the measurements ran on."""
    return {
        "cpu": _value_in(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": _value_in(Path("/proc/meminfo"), "MemTotal"),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def _value_in(file: Path, label: str) -> str:
    if not file.exists():
        return ""
    values = [line.partition(":")[2] for line in file.read_text().splitlines() if line.startswith(label)]
    return values[0].strip() if values else ""
