"""The command line: commands and flags, nothing else."""

import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pgauthproxy import alone, operators, process, supervised, supervisor, trial
from pgauthproxy._digest import md5_password
from pgauthproxy._ledger import SLOTS
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.build import admin_token, build_audit, examine
from pgauthproxy.config import load, schema
from pgauthproxy.config.load import ConfigError, Loaded
from pgauthproxy.cores import available_cores
from pgauthproxy.events import Event, Noticed
from pgauthproxy.link import Link
from pgauthproxy.net import listen
from pgauthproxy.ops import privileges
from pgauthproxy.ops.log import LogSink
from pgauthproxy.ops.privileges import Identity, PrivilegesError
from pgauthproxy.pid_file import PidFileError, running
from pgauthproxy.proto import scram
from pgauthproxy.release import version
from pgauthproxy.service import Service
from pgauthproxy.slots import open_slots
from pgauthproxy.supervisor import WorkersFailedError
from pgauthproxy.terminal import fail, read_password
from pgauthproxy.upgrade import TAKE_OVER, UpgradeError
from pgauthproxy.users_command import users


class _Bool(click.ParamType[bool]):
    name = "bool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if value in load.TRUE_WORDS:
            return True
        if value in load.FALSE_WORDS:
            return False
        self.fail(f"{value!r} is neither true nor false", param, ctx)


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that choose settings, for the gateway itself and for every command that reads them."""
    for option in reversed(
        (
            click.option("--config", type=click.Path(path_type=Path), help="YAML file with the settings."),
            click.option(
                "--listen", metavar="ADDR", help="Where clients connect, [host]:port for example; several with commas."
            ),
            click.option(
                "--clear-passwd", type=_Bool(), metavar="[=BOOL]", help="Ask clients for the password as it is."
            ),
            click.option("--log-format", type=click.Choice(["text", "json"]), help="Lines to read, or JSON."),
            click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"])),
        )
    ):
        command = option(command)
    return command


def _read(flags: dict[str, Any]) -> Loaded:
    """Reads the settings. Raises ConfigError."""
    paths = {
        "listen": "listen",
        "clear_passwd": "authenticator.cleartext_password",
        "log_format": "log.format",
        "log_level": "log.level",
    }
    given = {path: flags[name] for name, path in paths.items() if flags[name] is not None}
    return load.load(flags["config"], given, os.environ)


def _load(flags: dict[str, Any]) -> Loaded:
    """Reads the settings; ends with one line for each fault."""
    try:
        return _read(flags)
    except ConfigError as error:
        fail(*error.faults)


def _with_flags_before(context: click.Context, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a command, those included that stand before its name."""
    return {name: value if value is not None else context.obj[name] for name, value in flags.items()}


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@_settings_options
@click.version_option(package_name="pgauthproxy")
@click.pass_context
def _command(context: click.Context, /, **flags: Any) -> None:
    """A PostgreSQL gateway with customizable authentication.

    Without a command it serves.
    """
    context.obj = flags
    if context.invoked_subcommand is None:
        _serve(flags)


def _serve(flags: dict[str, Any], link: Link | None = None, ledger: int = -1, taken_workers: int = 0) -> None:
    """`link` leads to a process that is to be succeeded, which counts in `ledger`, and is a supervisor if it has
    `taken_workers`."""
    service = Service(os.environ)
    loaded = _load(flags)
    settings = loaded.settings
    log = LogSink(settings.log.format, settings.log.level)
    identity = _identity(settings)
    with privileges.acting_as(identity):
        authenticator, faults = examine(settings, log)
    if authenticator is None or faults:
        fail(*faults)
    for warning in loaded.warnings:
        log(Noticed("warning", warning))
    count = min(available_cores(), SLOTS) if settings.workers == "auto" else settings.workers
    try:
        listening = process.open_listeners(settings, service.descriptors) if link is None else []
        # The first process of a container must collect orphans, which may be anybody's but a worker's own.
        is_alone = taken_workers == 0 if link is not None else count == 1 and os.getpid() != 1
        slots = [] if is_alone or link is not None else open_slots(settings, count, listening, service)
        admin_listening = operators.open_listeners(settings) if link is None else []
        version()
        privileges.become(identity)
        if settings.no_new_privs:
            privileges.forbid_new()
    except (listen.ListenError, PrivilegesError) as error:
        fail(str(error))
    audit = build_audit(settings, log)
    if audit is not None:
        try:
            audit.open()
        except OSError as error:
            fail(f"audit.file: {settings.audit.file}: {error.strerror}")

    def read() -> schema.Settings:
        return _read(flags).settings

    words = _own_words()
    try:
        if is_alone:
            alone.serve(
                settings, authenticator, listening, admin_listening, read, log, audit, service, words, link, ledger
            )
        else:
            supervisor.supervise(settings, slots, admin_listening, read, log, audit, service, words, link, ledger)
    except (AuthenticatorConfigError, WorkersFailedError) as error:
        fail(*error.faults)
    except (PidFileError, UpgradeError, listen.ListenError) as error:
        fail(str(error))
    finally:
        # Whoever asks for an end now is getting it: the status is to be that of the end in order.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if audit is not None:
            audit.close()
        log.flush()


def _identity(settings: schema.Settings) -> Identity | None:
    """Whom the gateway is to become; ends with one line if it cannot."""
    try:
        return privileges.find(settings.user, settings.group)
    except PrivilegesError as error:
        fail(str(error))


@_command.command()
@_settings_options
@click.pass_context
def check(context: click.Context, /, **flags: Any) -> None:
    """Reads the settings, prints them and where each came from, and looks for the authenticator.

    Exit status 0 if the gateway could start with them, 2 if not.
    """
    loaded = _load(_with_flags_before(context, flags))
    for key in schema.all_keys():
        value = schema.in_force(loaded.settings, key)
        click.echo(f"{key.path} = {schema.shown(key, value)}  ({loaded.origins[key.path]})")
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}")
    with privileges.acting_as(_identity(loaded.settings)):
        _, faults = examine(loaded.settings, _echo_warning)
    if faults:
        fail(*faults)
    click.echo("ok")


def _echo_warning(event: Event) -> None:
    if isinstance(event, Noticed) and event.level == "warning":
        click.echo(f"warning: {event.what}: {', '.join(f'{name} {value}' for name, value in event.facts)}")


@_command.command()
@_settings_options
@click.option("--user", required=True, help="Whom to log in as.")
@click.option("--database", default="", help="The database to ask for; by default the user's name.")
@click.option(
    "--param", "parameters", multiple=True, metavar="K=V", help="A startup parameter; may stand more than once."
)
@click.option("--connect", is_flag=True, help="Log in at the target too.")
@click.pass_context
def auth(
    context: click.Context, /, user: str, database: str, parameters: tuple[str, ...], connect: bool, **flags: Any
) -> None:
    """Asks the configured authenticator about one login, and shows what it was sent and what it answered.

    The password is asked for without echo; secrets are shown as ***. Exit status 0 if it agrees, 1 if it refuses, 2 if
    something is broken.
    """
    settings = _load(
        {name: value if value is not None else context.obj[name] for name, value in flags.items()}
    ).settings
    pairs = [parameter.partition("=") for parameter in parameters]
    if any(not (name and separator) for name, separator, _ in pairs):
        raise click.UsageError("--param is written name=value")
    login = trial.Login(
        user=os.fsencode(user),
        database=os.fsencode(database or user),
        parameters=tuple((os.fsencode(name), os.fsencode(value)) for name, _, value in pairs),
        password=b"" if settings.method == "cert" else read_password(confirm=False),
        connect=connect,
    )
    sys.exit(trial.run(settings, login, click.echo))


def _own_words() -> list[str]:
    """The flags that this process was started with."""
    words = sys.argv[1:]
    return words[:-4] if words[-4:-3] == [TAKE_OVER] else words


@_command.command(TAKE_OVER, hidden=True)
@click.argument("descriptor", type=int)
@click.argument("ledger", type=int)
@click.argument("workers", type=int)
@click.pass_context
def take_over(context: click.Context, descriptor: int, ledger: int, workers: int) -> None:
    """The successor of a gateway that is upgraded, as that one starts it."""
    _serve(context.obj, Link(socket.socket(fileno=descriptor)), ledger, workers)


@_command.command("worker", hidden=True)
@click.argument("descriptor", type=int)
def be_worker(descriptor: int) -> None:
    """One of several workers, as a supervisor starts them."""
    supervised.run(descriptor)


@_command.command()
@_settings_options
@click.pass_context
def reload(context: click.Context, /, **flags: Any) -> None:
    """Has the running gateway read its settings anew; it is found by `pid_file`.

    What comes of it stands in the gateway's log. Settings with a fault are told here, and the gateway is left alone.
    """
    _signal_gateway(_with_flags_before(context, flags), signal.SIGHUP)


@_command.command()
@_settings_options
@click.pass_context
def upgrade(context: click.Context, /, **flags: Any) -> None:
    """Has a new process of the installed program take over from the running gateway, which is found by `pid_file`.

    Sessions without TLS move there; others stay with the old process until they end. What comes of it stands in the
    gateway's log.
    """
    _signal_gateway(_with_flags_before(context, flags), signal.SIGUSR2)


def _signal_gateway(flags: dict[str, Any], number: signal.Signals) -> None:
    path = _load(flags).settings.pid_file
    if not path:
        fail("pid_file: is not set, so that the gateway cannot be found")
    try:
        os.kill(running(path), number)
    except PidFileError as error:
        fail(str(error))
    except OSError as error:
        fail(f"pid_file: {path}: {error.strerror}")


@_command.command("hash-password")
@click.option("--user", default="", help="The user's name, which an MD5 hash is salted with.")
@click.option("--md5", is_flag=True, help="An MD5 hash instead of a SCRAM-SHA-256 verifier.")
@click.option("--iterations", type=click.IntRange(1, 1_000_000), default=scram.DEFAULT_ITERATIONS, show_default=True)
def hash_password(user: str, md5: bool, iterations: int) -> None:
    """Reads a password and prints what an authenticator or PostgreSQL can keep of it.

    The password is asked for without echo; if the input is no terminal, it is its first line.
    """
    if md5 and not user:
        raise click.UsageError("--md5 needs --user")
    password = read_password(confirm=True)
    if md5:
        click.echo(md5_password(password, user.encode(errors="surrogateescape")))
    else:
        click.echo(scram.Verifier.of(password, secrets.token_bytes(scram.SALT_BYTES), iterations).text())


@_command.command("top")
@_settings_options
@click.option(
    "--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look once and print it plainly, as without a terminal.")
@click.pass_context
def top_command(context: click.Context, /, interval: float, once: bool, **flags: Any) -> None:
    """Shows a running gateway: sessions, refusals, login times and targets, as its live page does.

    It looks where the settings say that the gateway serves operators (admin.listen, admin.token). q leaves.
    """
    from pgauthproxy import top

    settings = _load(_with_flags_before(context, flags)).settings
    if not settings.admin.listen:
        fail("admin.listen: is not set, so that the gateway shows itself to nobody")
    try:
        address = listen.parse_admin_listen(settings.admin.listen)
        token = admin_token(settings)
        top.run(lambda: top.fetch(address, token), interval, once=once)
    except listen.ListenError as error:
        fail(f"admin.{error}")
    except AuthenticatorConfigError as error:
        fail(*error.faults)
    except top.TopError as error:
        fail(str(error))


@_command.command()
@click.option("--port", type=int, default=0, help="Port of the gateway; by default a free one.")
def demo(port: int) -> None:
    """Shows it at work: an embedded PostgreSQL, the gateway before it, two identities, two roles."""
    from pgauthproxy import demo as demonstration

    try:
        demonstration.run(port)
    except demonstration.DemoError as error:
        fail(str(error))


_command.add_command(users)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `pgauthproxy`. `--clear-passwd` alone means true, as it always did."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _command.main(
        ["--clear-passwd=true" if word == "--clear-passwd" else word for word in words], prog_name="pgauthproxy"
    )
