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
YARDSTICK = "haproxy"
TLS_YARDSTICK = "pgbouncer"


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure of our gateway should be: a bound in its unit, or in times another peer's value."""

    bound: float
    at_most: bool
    times: str | None = None

    def __str__(self) -> str:
        words = f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        return words if self.times is None else f"{words} times {self.times}"


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    title: str
    unit: str
    digits: int
    aim: Aim | None = None

    @property
    def over_tls(self) -> bool:
        return self.key.startswith("tls_")

    @property
    def yardstick(self) -> str:
        """Whom our gateway is compared with."""
        return TLS_YARDSTICK if self.over_tls else YARDSTICK


FIGURES = (
    Figure("tps_1", "pgbench -S, 1 client", "tps", 0, Aim(1.0, at_most=False, times=YARDSTICK)),
    Figure("cpu_transaction_1", "proxy CPU, 1 client", "µs/transaction", 1),
    Figure("tps_16", "pgbench -S, 16 clients", "tps", 0),
    Figure("cpu_transaction_16", "proxy CPU, 16 clients", "µs/transaction", 1, Aim(1.05, True, YARDSTICK)),
    Figure("rules_tps_16", "with idle rules: pgbench -S, 16 clients", "tps", 0),
    Figure("rules_cpu_transaction_16", "with idle rules: proxy CPU, 16 clients", "µs/transaction", 1),
    Figure("statements_tps_16", "with audited statements: pgbench -S, 16 clients", "tps", 0),
    Figure("statements_cpu_transaction_16", "with audited statements: proxy CPU, 16 clients", "µs/transaction", 1),
    Figure("simple_tps_16", "pgbench -S by the simple protocol, 16 clients", "tps", 0),
    Figure("simple_cpu_16", "the same: proxy CPU", "µs/transaction", 1),
    Figure("statements_simple_tps_16", "the same with audited statements", "tps", 0),
    Figure("statements_simple_cpu_16", "the same: proxy CPU", "µs/transaction", 1),
    Figure("rules_copy_out_rate", "with idle rules: COPY out", "MB/s", 0),
    Figure("rules_copy_out_cpu", "with idle rules: proxy CPU, COPY out", "s/GB", 2),
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
        """Whether the aim is met; None where there is none, or not all that it takes was measured."""
        if figure.aim is None:
            return None
        if figure.aim.times is None:
            value = self.median(figure.key, SUBJECT)
        else:
            value = self.ratio(figure.key, SUBJECT, figure.aim.times)
        if value is None:
            return None
        return value <= figure.aim.bound if figure.aim.at_most else value >= figure.aim.bound

    def tables(self) -> str:
        """In Markdown: what was measured in plain, and what over TLS, which has peers and a yardstick of its own."""
        plain = [figure for figure in self.measured_figures() if not figure.over_tls]
        over_tls = [figure for figure in self.measured_figures() if figure.over_tls]
        parts = []
        if plain:
            parts.append(self._table(plain, YARDSTICK, self.peers))
        if over_tls:
            agreed = ", ".join(dict.fromkeys(self.tls.values()))
            peers = [peer for peer in self.peers if peer in self.tls]
            parts.append(f"Over TLS: {agreed}, with {', '.join(peers)}; {TLS_MATERIAL}.")
            parts.append(self._table(over_tls, TLS_YARDSTICK, peers))
        return "\n\n".join(parts)

    def _table(self, figures: Sequence[Figure], yardstick: str, peers: Sequence[str]) -> str:
        """Aligned for the eye: a row a figure, a column a peer."""
        head = ["", "unit", *peers, f"{SUBJECT}/{yardstick}", "aim", "holds"]
        rows = [self._row(figure, peers) for figure in figures]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        numeric = range(2, len(peers) + 3)
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

    def _row(self, figure: Figure, peers: Sequence[str]) -> list[str]:
        medians = [self.median(figure.key, peer) for peer in peers]
        ratio = self.ratio(figure.key, SUBJECT, figure.yardstick)
        return [
            figure.title,
            figure.unit,
            *("" if median is None else f"{median:,.{figure.digits}f}" for median in medians),
            "" if ratio is None else f"{ratio:.2f}",
            "" if figure.aim is None else str(figure.aim),
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
        }
        file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _figure_document(self, figure: Figure) -> dict[str, object]:
        return {
            "key": figure.key,
            "title": figure.title,
            "unit": figure.unit,
            "peers": {
                peer: {"median": self.median(figure.key, peer), "values": self.values(figure.key, peer)}
                for peer in self.peers
                if self.values(figure.key, peer)
            },
            "yardstick": figure.yardstick,
            "ratio": self.ratio(figure.key, SUBJECT, figure.yardstick),
            "aim": None if figure.aim is None else str(figure.aim),
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
