"""The command line: commands and flags, nothing else."""

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from pgauthproxy import worker
from pgauthproxy._digest import md5_password
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.build import faults_of
from pgauthproxy.config import load, schema
from pgauthproxy.config.load import ConfigError, Loaded
from pgauthproxy.events import Noticed
from pgauthproxy.net import listen
from pgauthproxy.ops.log import LogSink
from pgauthproxy.proto import scram

BROKEN: Final = 2
"""Exit status: the settings, the authenticator or an address cannot be used."""


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


def _load(flags: dict[str, Any]) -> Loaded:
    """Reads the settings; ends with one line for each fault."""
    paths = {
        "listen": "listen",
        "clear_passwd": "authenticator.cleartext_password",
        "log_format": "log.format",
        "log_level": "log.level",
    }
    given = {path: flags[name] for name, path in paths.items() if flags[name] is not None}
    try:
        return load.load(flags["config"], given, os.environ)
    except ConfigError as error:
        _fail(*error.faults)


def _fail(*lines: str) -> NoReturn:
    for line in lines:
        click.echo(f"pgauthproxy: {line}", err=True)
    sys.exit(BROKEN)


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
        _serve(_load(flags))


def _serve(loaded: Loaded) -> None:
    settings = loaded.settings
    if faults := faults_of(settings):
        _fail(*faults)
    sink = LogSink(settings.log.format, settings.log.level)
    for warning in loaded.warnings:
        sink(Noticed("warning", warning))
    try:
        listening = worker.open_listeners(settings)
    except listen.ListenError as error:
        _fail(str(error))
    try:
        worker.serve(settings, listening, sink)
    except AuthenticatorConfigError as error:
        _fail(str(error))
    finally:
        sink.flush()


@_command.command()
@_settings_options
@click.pass_context
def check(context: click.Context, /, **flags: Any) -> None:
    """Reads the settings, prints them and where each came from, and looks for the authenticator.

    Exit status 0 if the gateway could start with them, 2 if not.
    """
    loaded = _load({name: value if value is not None else context.obj[name] for name, value in flags.items()})
    for key in schema.all_keys():
        value = schema.in_force(loaded.settings, key)
        click.echo(f"{key.path} = {_shown(key, value)}  ({loaded.origins[key.path]})")
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}")
    if faults := faults_of(loaded.settings):
        _fail(*faults)
    click.echo("ok")


def _shown(key: schema.Key, value: Any) -> str:
    if value is None:
        return "(not set)"
    if value and key.path in schema.SECRET_PATHS:
        return "***"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return ", ".join(value)
    if isinstance(value, list):
        return ", ".join(item if isinstance(item, str) else msgspec.json.encode(item).decode() for item in value)
    return f"{value}"


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


def read_password(*, confirm: bool) -> bytes:
    """A password from the terminal, without echo, or the first line of standard input."""
    if sys.stdin.isatty():
        typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=confirm)
        password = typed.encode(errors="surrogateescape")
    else:
        password = sys.stdin.buffer.readline().removesuffix(b"\n").removesuffix(b"\r")
    if not password:
        raise click.UsageError("an empty password opens nothing")
    return password


@_command.command()
@click.option("--port", type=int, default=0, help="Port of the gateway; by default a free one.")
def demo(port: int) -> None:
    """Shows it at work: an embedded PostgreSQL, the gateway before it, two identities, two roles."""
    from pgauthproxy import demo as demonstration

    try:
        demonstration.run(port)
    except demonstration.DemoError as error:
        _fail(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `pgauthproxy`. `--clear-passwd` alone means true, as it always did."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _command.main(
        ["--clear-passwd=true" if word == "--clear-passwd" else word for word in words], prog_name="pgauthproxy"
    )
