"""Reads the settings: flag beats environment beats file beats default. All faults are reported at once."""

import difflib
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from pgauthproxy.config import schema
from pgauthproxy.config.schema import AuthenticatorSettings, Key, ListenSettings, Settings

FILE_NAMES: Final = ("pgAuthProxy.yaml", "pgauthproxy.yaml")
ENVIRONMENT_PREFIX: Final = "PGPROXY_"
# The one variable of pgAuthProxy whose name is not made from its key's path.
ENVIRONMENT_ALIASES: Final = {"PGPROXY_CLEAR_PASSWD": "authenticator.cleartext_password"}
SECTIONS: Final = {"authenticator.chain": AuthenticatorSettings}
"""Settings that are lists of whole sections."""
TEXT_OR_SECTION: Final = {"listen": ListenSettings}
"""Settings that are lists of text, or of sections where that says too little."""
TRUE_WORDS: Final = ("1", "t", "T", "TRUE", "true", "True")
FOREVER_WORDS: Final = ("forever", "infinite")
FALSE_WORDS: Final = ("0", "f", "F", "FALSE", "false", "False")


class ConfigError(Exception):
    """The settings cannot be used; `faults` says why, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force, where each came from (by dotted path), and what an operator should be told."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


def find_file() -> Path | None:
    """The file that is read without --config."""
    for folder in (Path(), Path("/etc")):
        for name in FILE_NAMES:
            if (folder / name).is_file():
                return folder / name
    return None


def load(config: Path | None, flags: Mapping[str, object], environment: Mapping[str, str]) -> Loaded:
    """Reads everything. `flags` holds values by dotted path. Raises ConfigError."""
    known = {key.path: key for key in schema.all_keys()}
    faults: list[str] = []
    warnings: list[str] = []
    given: dict[str, tuple[object, str]] = {}
    file = config or find_file()
    if file is None:
        warnings.append(f"no configuration file: looked for {' and '.join(FILE_NAMES)} in . and /etc")
    else:
        for path, value in _read_file(file, known):
            if path in known:
                given[path] = value, f"file {file}"
            else:
                faults.append(f"{file}: unknown key {path}{_nearest(path, known)}")
    by_name = {key.environment_name: key.path for key in known.values()} | ENVIRONMENT_ALIASES
    for name, text in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or not text:
            continue
        if name in by_name:
            given[by_name[name]] = text, f"environment {name}"
        elif difflib.get_close_matches(name, by_name, 1, 0.85):
            # Not an error: container platforms make variables of service names.
            warnings.append(f"environment variable {name} is not used{_nearest(name, by_name)}")
    given |= {path: (value, "flag") for path, value in flags.items()}
    tree: dict[str, Any] = {}
    for path, (value, origin) in given.items():
        try:
            _put(tree, path, _convert(known[path], value))
        except (msgspec.ValidationError, ValueError) as error:
            faults.append(f"{origin}: {path}: {str(error).replace(' - at `$`', '')}")
    if faults:
        raise ConfigError(faults)
    origins = {path: given[path][1] if path in given else "default" for path in known}
    settings = msgspec.convert(tree, Settings)
    if faults := list(schema.conflicts(settings)):
        raise ConfigError(faults)
    return Loaded(settings, origins, tuple(warnings))


def _read_file(file: Path, known: Mapping[str, Key]) -> Iterator[tuple[str, object]]:
    """The pairs of a YAML file, whatever its name; paths in lower case."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not YAML: {' '.join(str(error).split())}"]) from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise ConfigError([f"{file}: not a mapping of keys to values"])
    yield from _flatten(content, "", known)


def _flatten(content: dict[Any, Any], prefix: str, known: Mapping[str, Key]) -> Iterator[tuple[str, object]]:
    for name, value in content.items():
        path = f"{prefix}{name}".lower()
        if isinstance(value, dict) and not (path in known and isinstance(known[path].default, dict)):
            yield from _flatten(value, path + ".", known)
        elif value is not None:
            yield path, value


def _convert(key: Key, value: object) -> object:
    """A value as its type; text (from the environment, a flag, or quoted in the file) is read as the type demands."""
    if isinstance(value, str):
        if key.path == "drain_timeout" and value.lower() in FOREVER_WORDS:
            value = math.inf
        elif (key.owner, key.name) == (AuthenticatorSettings, "cmd"):
            value = shlex.split(value)
        elif key.holds_structs or isinstance(key.default, dict):
            value = _parse_yaml(value)
        elif isinstance(key.default, list) or (key.owner, key.name) == (AuthenticatorSettings, "env"):
            value = [part.strip() for part in value.split(",")]
        elif isinstance(key.default, bool):
            value = _parse_bool(value)
    elif isinstance(value, float) and isinstance(key.default, str):
        # A version: YAML takes 1.3 for a number.
        value = str(value)
    if key.path in SECTIONS and isinstance(value, list):
        value = [_convert_section(content, SECTIONS[key.path]) for content in value]
    elif key.path in TEXT_OR_SECTION and isinstance(value, list):
        section = TEXT_OR_SECTION[key.path]
        value = [_convert_section(each, section) if isinstance(each, dict) else each for each in value]
    return msgspec.convert(value, key.type, strict=False)


def _convert_section(content: object, struct: type[msgspec.Struct]) -> msgspec.Struct:
    """A section that stands in a list. Raises ValueError."""
    if not isinstance(content, dict):
        raise ValueError("not a list of mappings of keys to values")
    known = {key.path: key for key in schema.all_keys(struct)}
    tree: dict[str, Any] = {}
    for path, value in _flatten(content, "", known):
        if path not in known:
            raise ValueError(f"unknown key {path}{_nearest(path, known)}")
        _put(tree, path, _convert(known[path], value))
    return msgspec.convert(tree, struct)


def _parse_bool(text: str) -> bool:
    if text in TRUE_WORDS:
        return True
    if text in FALSE_WORDS:
        return False
    raise ValueError("neither true nor false")


def _parse_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("not YAML") from None


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f", did you mean {close[0]}?" if close else ""


def authenticator_environment(settings: Settings) -> dict[bytes, bytes]:
    """What the authenticator command gets of the gateway's environment."""
    names = settings.authenticator.env
    if names is None:
        return dict(os.environb)
    return {name: os.environb[name] for name in map(os.fsencode, names) if name in os.environb}
