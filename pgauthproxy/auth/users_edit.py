"""Puts users into the text of a users file, and takes them out.

Strategy: what is not touched stays as it is, byte by byte, comments and all, so lines are put in and taken out by the
places that the parser names, and nothing is written anew. What comes of it is read again, and must say what was meant;
a file in which that cannot be done so (all in braces, say) is left to its author.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import yaml

from pgauthproxy.auth import yaml_lines
from pgauthproxy.auth.yaml_lines import NotYamlError

Keys = Mapping[str, str | list[str] | dict[str, str]]
"""What is said of a user, by the keys of UserSpec."""

INDENT: Final = 2
PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]*|SCRAM-SHA-256\$[A-Za-z0-9+/=:$]+|[0-9]+(\.[0-9]+){3}(/[0-9]+)?")
COMMENTS: Final = re.compile(r"([ \t]*(#[^\n]*)?\r?\n)*[ \t]*(#[^\n]*)?")
# What some reader of YAML takes for something else than a word.
NO_WORDS: Final = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


class EditError(Exception):
    """A file that is not written so that it can be edited, or not as is asked; the text is for the operator."""


class _User(msgspec.Struct, frozen=True):
    """Where a user stands in the text: from the key to the last word that belongs to it."""

    name: str
    start: int
    end: int
    column: int


class _Layout(msgspec.Struct, frozen=True):
    """Where everything stands: the last word of the section of users, or of the file if there is none.

    `column` is that of the section's key; `braces` is what stands for nothing in it.
    """

    end: int
    column: int | None = None
    braces: tuple[int, int] | None = None
    users: tuple[_User, ...] = ()


def add(text: str, name: str, keys: Keys) -> str:
    """The text with this user at the end of the section. Raises EditError."""
    found = _lay_out(text)
    if any(user.name == name for user in found.users):
        raise EditError(f"there is a user {name} already")
    line_break = "\r\n" if "\r\n" in text else "\n"
    # What follows on a line is a comment on what stands before it.
    if found.column is None:
        end = _next_line(text, found.end)
        before, after = text[:end].rstrip("\r\n"), text[end:]
        before += f"{line_break * 2}users:" if before else "users:"
        column = INDENT
    else:
        place, rest = (found.end, found.end) if found.braces is None else found.braces
        end = _next_line(text, rest)
        before, after = text[:place].rstrip() + text[rest:end].rstrip(), text[end:]
        column = found.users[0].column if found.users else found.column + INDENT
    lines = _lines(name, keys, column, column - (found.column or 0) or INDENT)
    edited = line_break.join((before, *lines)) + line_break + after
    said: dict[str, Any] = _read(text) or {}
    return _checked(edited, said | {"users": (said.get("users") or {}) | {name: dict(keys)}})


def remove(text: str, name: str) -> str:
    """The text without this user. Raises EditError."""
    user = next((user for user in _lay_out(text).users if user.name == name), None)
    if user is None:
        raise EditError(f"there is no user {name}")
    start = text.rfind("\n", 0, user.start) + 1
    edited = text[:start] + text[_next_line(text, user.end) :]
    said: dict[str, Any] = _read(text)
    return _checked(edited, said | {"users": {each: said["users"][each] for each in said["users"] if each != name}})


def _checked(edited: str, wanted: dict[str, Any]) -> str:
    """The text, if it says just that. Raises EditError."""
    try:
        said = _read(edited)
    except NotYamlError:
        said = None
    # A section without users is written as one with nothing in it.
    if not isinstance(said, dict) or said | {"users": said.get("users") or {}} != wanted:
        raise EditError("the file is written in a way that is not edited here: edit it by hand")
    return edited


def _read(text: str) -> Any:
    return yaml_lines.read(text.encode(), give_way=lambda: None).value


def _lay_out(text: str) -> _Layout:
    """Raises EditError."""
    try:
        if yaml_lines.read(text.encode(), give_way=lambda: None).faults:
            raise EditError("the file has faults, which pgauthproxy check names")
    except NotYamlError as error:
        raise EditError(f"line {error}") from None
    with yaml_lines.uncollected():
        root = yaml.compose(text, Loader=yaml_lines.PARSER)
        if root is None:
            return _Layout(end=len(text))
        if not isinstance(root, yaml.MappingNode) or root.flow_style:
            raise EditError("the file is no mapping, or one in braces: edit it by hand")
        section = next(((key, value) for key, value in root.value if key.value == "users"), None)
        if section is None:
            return _Layout(end=_end(text, root))
        key, value = section
        column: int = key.start_mark.column
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            users = tuple(
                _User(
                    name.value,
                    name.start_mark.index,
                    _with_comments(text, _end(text, inner), name.start_mark.column),
                    name.start_mark.column,
                )
                for name, inner in value.value
            )
            return _Layout(users[-1].end, column, None, users)
        if not _is_nothing(value):
            raise EditError("the users stand in braces: edit the file by hand")
        braces = (value.start_mark.index, value.end_mark.index)
        return _Layout(braces[1], column, braces)


def _is_nothing(node: Any) -> bool:
    if isinstance(node, yaml.ScalarNode):
        return not node.style and node.value in yaml_lines.NOTHING
    return isinstance(node, yaml.MappingNode) and not node.value


def _end(text: str, node: Any) -> int:
    """Where the last word of a node ends; a block has no end of its own, it ends where the next thing begins."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    end: int = node.end_mark.index
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    return len(text[:end].rstrip()) if is_block else end


def _with_comments(text: str, end: int, column: int) -> int:
    """The end of what belongs to a key in this column: comments that stand further in do."""
    line = _next_line(text, end)
    for comment in COMMENTS.match(text, line)[0].split("\n"):  # type: ignore[index]  # it always matches
        line += len(comment) + 1
        if len(comment) - len(comment.lstrip()) > column:
            end = line - 1
    return end


def _next_line(text: str, place: int) -> int:
    """Where the line after this place begins."""
    found = text.find("\n", place)
    return len(text) if found < 0 else found + 1


def _lines(name: str, keys: Keys, column: int, step: int) -> list[str]:
    outer, inner = " " * column, " " * (column + step)
    lines = [f"{outer}{_word(name)}:"]
    for key, value in keys.items():
        if isinstance(value, str):
            lines.append(f"{inner}{key}: {_word(value)}")
        elif isinstance(value, list):
            lines.append(f"{inner}{key}: [{', '.join(map(_word, value))}]")
        else:
            lines.append(f"{inner}{key}:")
            lines += [f"{inner}{' ' * step}{_word(each)}: {_word(value[each])}" for each in value]
    return lines


def _word(text: str) -> str:
    """A scalar, quoted where it could be taken for something else."""
    if PLAIN.fullmatch(text) and text.lower() not in NO_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)
