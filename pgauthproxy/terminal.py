"""What commands say and ask where somebody sits before them."""

import sys
from typing import Final, NoReturn

import click

BROKEN: Final = 2
"""Exit status: the settings, the authenticator or an address cannot be used."""


def fail(*lines: str) -> NoReturn:
    """Ends the command, with a line for each fault."""
    for line in lines:
        click.echo(f"pgauthproxy: {line}", err=True)
    sys.exit(BROKEN)


def read_password(*, confirm: bool) -> bytes:
    """A password from the terminal, without echo, or the first line of standard input."""
    if not sys.stdin.isatty():
        return read_password_line()
    # What is said of two that differ must not get into what is printed.
    typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=confirm, err=True)
    return _not_empty(typed.encode(errors="surrogateescape"))


def read_password_line() -> bytes:
    """A password that is the first line of standard input."""
    return _not_empty(sys.stdin.buffer.readline().removesuffix(b"\n").removesuffix(b"\r"))


def _not_empty(password: bytes) -> bytes:
    if not password:
        raise click.UsageError("an empty password opens nothing")
    return password
