"""`pgauthproxy users`: who stands in the users file, put there and taken out.

The file is replaced as a whole or not at all, and only if nothing is wrong in the new one that was not wrong before.
Those who edit it with this command wait for each other; a change that was made otherwise meanwhile is not lost.
"""

import contextlib
import fcntl
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import click

from pgauthproxy._digest import md5_password
from pgauthproxy.auth import references, users_edit, users_file, yaml_lines
from pgauthproxy.auth.fields import MD5_CREDENTIAL
from pgauthproxy.auth.targets import TargetSpec
from pgauthproxy.auth.users_edit import EditError
from pgauthproxy.auth.users_file import ANY_DATABASE, SCRAM_PREFIX, UserSpec
from pgauthproxy.auth.yaml_lines import Fault, NotYamlError, printable
from pgauthproxy.config import load
from pgauthproxy.config.schema import AuthenticatorSettings, Settings
from pgauthproxy.proto import scram
from pgauthproxy.terminal import fail, read_password, read_password_line

LOCK_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 0.05
ANY_METHOD: Final = "cleartext"
"""The method of clients that takes every kind of verifier, where none is configured."""


class UsersCommand:
    """The file, and what the settings say about those in it, if there are settings."""

    def __init__(self, config: Path | None, file: Path | None) -> None:
        settings = Settings()
        if file is None:
            try:
                settings = load.load(config, {}, os.environ).settings
            except load.ConfigError as error:
                fail(*error.faults)
            file = _users_file_of(settings.authenticator)
        if file is None:
            fail("authenticator.users.file is not set; --file names a file")
        self.method = settings.method if _users_file_of(settings.authenticator) else ANY_METHOD
        self.scram_iterations = settings.authenticator.scram_iterations
        self.shown = file
        # What is replaced is the file, not a link to it.
        self._path = Path(os.path.realpath(file))

    def read(self) -> str:
        try:
            return self._path.read_bytes().decode()
        except OSError as error:
            hint = ": begin with examples/users.yaml" if isinstance(error, FileNotFoundError) else ""
            fail(f"{self.shown}: {error.strerror}{hint}")
        except UnicodeDecodeError:
            fail(f"{self.shown}: not UTF-8")

    def edit(self, change: Callable[[str], str]) -> None:
        """Replaces the file by what the change makes of it."""
        try:
            with self._locked():
                found = os.stat(self._path)
                before = self.read()
                try:
                    after = change(before)
                except EditError as error:
                    fail(f"{self.shown}: {error}")
                old = {(fault.key, fault.what) for fault in self._faults(before)}
                new = [fault for fault in self._faults(after) if (fault.key, fault.what) not in old]
                if new:
                    # Their lines are those of a file that there will never be.
                    fail(*(f"{self.shown}: {printable(fault.key)}: {printable(fault.what)}" for fault in sorted(new)))
                self._replace(found, after)
        except OSError as error:
            fail(f"{error.filename or self.shown}: {error.strerror}")

    def _faults(self, text: str) -> list[Fault]:
        return users_file.parse(text.encode(), self.method, lambda _: None, lambda: None)[1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the commands that edit this file. The lock is a file that stays: to remove it would race."""
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            give_up = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        fail(f"{self.shown}: somebody else edits it (or holds {self._path}.lock)")
                    time.sleep(RETRY_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, found: os.stat_result, text: str) -> None:
        """Puts the text in the file's place, with its mode, owner and attributes. Raises OSError."""
        descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with open(descriptor, "wb") as new:
                new.write(text.encode())
                new.flush()
                os.fchmod(descriptor, found.st_mode & 0o7777)
                if (found.st_uid, found.st_gid) != (os.fstat(descriptor).st_uid, os.fstat(descriptor).st_gid):
                    os.fchown(descriptor, found.st_uid, found.st_gid)
                _copy_attributes(self._path, descriptor)
                os.fsync(descriptor)
            now = os.stat(self._path)
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (found.st_ino, found.st_size, found.st_mtime_ns):
                fail(f"{self.shown}: it was changed meanwhile; nothing was done")
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _copy_attributes(source: Path, descriptor: int) -> None:
    """Access lists and labels, as far as the system has them and lets us."""
    if sys.platform != "linux":
        return
    for attribute in os.listxattr(source):
        with contextlib.suppress(OSError):
            os.setxattr(descriptor, attribute, os.getxattr(source, attribute))


def _users_file_of(settings: AuthenticatorSettings) -> Path | None:
    """The users file of the configuration; that of the first link in a chain that has one."""
    for each in (settings, *settings.chain):
        if each.users.file:
            return Path(each.users.file)
    return None


@click.group()
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with the settings, which name the file.")
@click.option("--file", type=click.Path(path_type=Path), help="The users file itself.")
@click.pass_context
def users(context: click.Context, config: Path | None, file: Path | None) -> None:
    """Edits and lists the users file (docs/users.md); comments and all that is not touched stay as they are."""
    # Read by the command itself, so that its help needs no settings.
    context.obj = config or (context.obj or {}).get("config"), file


@users.command()
@click.argument("name")
@click.option("--target", metavar="TARGET", help="Where to, for every database that is not named.")
@click.option("--database", "databases", multiple=True, metavar="DB=TARGET", help="Where to for one; several times.")
@click.option("--allow", multiple=True, metavar="CIDR", help="A network to come from, or local; several times.")
@click.option("--certificate", metavar="SUBJECT", help="The client certificate that the user must have.")
@click.option("--md5", is_flag=True, help="Store an MD5 hash instead of a SCRAM-SHA-256 verifier.")
@click.option("--password-stdin", is_flag=True, help="Take the password from the first line of standard input.")
@click.pass_obj
def add(
    where: tuple[Path | None, Path | None],
    name: str,
    target: str | None,
    databases: Sequence[str],
    allow: Sequence[str],
    certificate: str | None,
    md5: bool,
    password_stdin: bool,
) -> None:
    """Adds a user. The password is asked for without echo, and a verifier of it is stored."""
    if any(
        "\udc80" <= char <= "\udcff" for char in "".join((name, *databases, *allow, target or "", certificate or ""))
    ):
        raise click.UsageError("what is written into the file must be UTF-8")
    targets = {}
    for text in databases:
        database, separator, to = text.partition("=")
        if not (database and separator and to):
            raise click.UsageError("--database is written DB=TARGET")
        if database in targets:
            raise click.UsageError(f"--database {database} stands twice")
        targets[database] = to
    if target is not None:
        if ANY_DATABASE in targets:
            raise click.UsageError(f"--target and --database {ANY_DATABASE}=… say the same")
        targets[ANY_DATABASE] = target
    if not targets:
        raise click.UsageError("where to? --target or --database says it")
    command = UsersCommand(*where)
    keys: dict[str, str | list[str] | dict[str, str]] = {}
    if password_stdin or certificate is None or command.method not in ("cert", ANY_METHOD):
        password = _password(password_stdin)
        if md5:
            keys["verifier"] = md5_password(password, name.encode()).decode()
        else:
            salt = secrets.token_bytes(scram.SALT_BYTES)
            keys["verifier"] = scram.Verifier.of(password, salt, command.scram_iterations).text().decode()
    if certificate is not None:
        keys["certificate"] = certificate
    keys["databases"] = targets
    if allow:
        keys["allow"] = list(allow)
    command.edit(lambda text: users_edit.add(text, name, keys))
    click.echo(f"{printable(name)} is in {command.shown}; a running gateway reads it on SIGHUP")


def _password(from_line: bool) -> bytes:
    if from_line:
        return read_password_line()
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask for the password at; --password-stdin takes it from a line")
    return read_password(confirm=True)


@users.command()
@click.argument("name")
@click.pass_obj
def remove(where: tuple[Path | None, Path | None], name: str) -> None:
    """Removes a user."""
    command = UsersCommand(*where)
    command.edit(lambda text: users_edit.remove(text, name))
    click.echo(f"{printable(name)} is no more in {command.shown}; a running gateway reads it on SIGHUP")


@users.command("list")
@click.pass_obj
def list_(where: tuple[Path | None, Path | None]) -> None:
    """Shows users and targets, and never a verifier or a password."""
    command = UsersCommand(*where)
    try:
        document = yaml_lines.read(command.read().encode(), give_way=lambda: None)
    except NotYamlError as error:
        fail(f"{command.shown}:{error}")
    faults = list(document.faults)
    rows: dict[str, list[tuple[str, ...]]] = {"users": [], "targets": []}
    sections = document.value if isinstance(document.value, dict) else {}
    for section, wanted in (("users", UserSpec), ("targets", TargetSpec)):
        entries = sections.get(section)
        if not isinstance(entries, dict):
            continue
        for name, value in entries.items():
            line = document.line(entries, name)
            spec, wrong = yaml_lines.convert(document, value, wanted, f"{section}.{name}", line)
            faults += wrong
            if isinstance(spec, UserSpec):
                rows[section].append((name, _proof(spec), _databases(spec), _networks(spec)))
            elif isinstance(spec, TargetSpec):
                hosts = spec.host if isinstance(spec.host, str) else ", ".join(spec.host)
                rows[section].append((name, hosts, spec.user, spec.database or "{database}"))
    _print_table([("user", "proof", "databases", "from"), *rows["users"]])
    click.echo()
    _print_table([("target", "host", "user", "database"), *rows["targets"]])
    if faults:
        fail(*(f"{command.shown}:{fault}" for fault in sorted(faults)))


def _proof(spec: UserSpec) -> str:
    """By what a user logs in, and nothing of the secret."""
    kinds = []
    if references.is_reference(spec.verifier):
        kinds.append(spec.verifier)
    elif spec.verifier.encode().startswith(SCRAM_PREFIX):
        kinds.append("scram-sha-256")
    elif MD5_CREDENTIAL.fullmatch(spec.verifier.encode()):
        kinds.append("md5")
    elif spec.verifier:
        kinds.append("password in plain text")
    if spec.certificate is not None:
        kinds.append("certificate")
    return " + ".join(kinds)


def _databases(spec: UserSpec) -> str:
    return ", ".join(f"{database}={target}" for database, target in spec.databases.items())


def _networks(spec: UserSpec) -> str:
    return "anywhere" if spec.allow is None else ", ".join(spec.allow) or "nowhere"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    shown = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        click.echo("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
