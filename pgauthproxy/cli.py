"""The command line: commands and flags, nothing else."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from pgauthproxy import worker
from pgauthproxy.auth.command import missing_command
from pgauthproxy.config import load, schema
from pgauthproxy.config.load import ConfigError, Loaded
from pgauthproxy.events import Noticed
from pgauthproxy.net import listen
from pgauthproxy.ops.log import LogSink

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


def _faults(loaded: Loaded) -> list[str]:
    """What the settings ask for and the machine does not have."""
    faults = []
    for text in loaded.settings.listen:
        try:
            listen.parse_listen(text)
        except listen.ListenError as error:
            faults.append(str(error))
    argv = loaded.settings.authenticator.cmd
    if not argv:
        faults.append("authenticator.cmd: no authenticator is configured")
    elif (missing := missing_command(argv)) is not None:
        faults.append(f"authenticator.cmd: {missing}")
    return faults


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
    if faults := _faults(loaded):
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
        value: Any = loaded.settings
        for name in key.path.split("."):
            value = getattr(value, name)
        click.echo(f"{key.path} = {_shown(value)}  ({loaded.origins[key.path]})")
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}")
    if faults := _faults(loaded):
        _fail(*faults)
    click.echo("ok")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "(all)"}[value]
    return ", ".join(value) if isinstance(value, list) else f"{value}"


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
