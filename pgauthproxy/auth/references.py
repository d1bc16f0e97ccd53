"""Secrets by reference, so that they need not stand in a configuration file: `env:NAME` or `file:/path`."""

import os
from pathlib import Path
from typing import Final

from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.secret import Secret

ENVIRONMENT: Final = "env:"
FILE: Final = "file:"


def is_reference(text: str) -> bool:
    """Whether this names a secret, and is none itself."""
    return text.startswith((ENVIRONMENT, FILE))


def resolve(text: str) -> Secret:
    """The secret that is referred to, or the text itself. A file's last line break is not part of it.

    Raises AuthenticatorConfigError, which names the reference and never the secret.
    """
    if text.startswith(ENVIRONMENT):
        name = text.removeprefix(ENVIRONMENT)
        if not (value := os.environb.get(os.fsencode(name), b"")):
            raise AuthenticatorConfigError(f"{text}: there is no such environment variable, or it is empty")
        return Secret(value)
    if text.startswith(FILE):
        try:
            value = Path(text.removeprefix(FILE)).read_bytes()
        except OSError as error:
            raise AuthenticatorConfigError(f"{text}: {error.strerror}") from None
        value = value.removesuffix(b"\n").removesuffix(b"\r")
        if not value:
            raise AuthenticatorConfigError(f"{text}: the file is empty")
        return Secret(value)
    return Secret(text.encode(errors="surrogateescape"))
