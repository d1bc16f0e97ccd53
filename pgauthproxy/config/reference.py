"""The reference of all settings, docs/config.md: `python -m pgauthproxy.config.reference > docs/config.md`."""

import ast
import functools
import inspect
import itertools
import textwrap
from typing import Final

from pgauthproxy.config import schema

INTRODUCTION: Final = """\
# Settings

<!-- Made from pgauthproxy/config/schema.py; a test holds the two together. -->

A flag beats an environment variable, that beats the YAML file, that beats the default. The file is the one of
`--config`, else `pgAuthProxy.yaml` or `pgauthproxy.yaml` in the working directory, else the same in `/etc`. Keys are
case-insensitive. A key that does not exist is an error that names the nearest one. Every key has a variable:
`PGPROXY_` and its path in capitals with `_` between; an empty one counts as not set. `PGPROXY_CLEAR_PASSWD` is another
name for `PGPROXY_AUTHENTICATOR_CLEARTEXT_PASSWORD`. Lists are written with commas in variables and flags.

`pgauthproxy check` prints the settings in force and where each came from.

Times are seconds, sizes are bytes.

| key | default | meaning |
|---|---|---|
"""


def markdown() -> str:
    """docs/config.md, whole."""
    rows = [
        f"| `{key.path}` | {key.default_text} | {documentation(key.owner)[key.name]} |\n" for key in schema.all_keys()
    ]
    return INTRODUCTION + "".join(rows)


@functools.cache
def documentation(owner: type) -> dict[str, str]:
    """The text that stands under each setting of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 (a class was given)
    texts: dict[str, str] = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                texts[name] = " ".join(said.split())
    return texts


if __name__ == "__main__":
    print(markdown(), end="")
