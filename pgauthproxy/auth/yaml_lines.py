"""YAML whose every key knows its line: what a file says as text, lists and mappings, and where it says so.

Whether `no`, `0123` or `1e3` is a word or a number is for whoever knows what stands there: a scalar is the text that
it is, but for nothing at all, `~` and `null`, which are None. A user may be called `no`.

Strategy: the parser's events are read one by one, and nothing is made of them but what is needed: a tenth of what
PyYAML's own values cost with a file of ten thousand users. Aliases are refused: no file grows in memory. A thread that
reads beside an event loop lets it wait 5 ms for the interpreter, again and again, unless it gives way by itself.
"""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec
import yaml

Value = str | list[Any] | dict[str, Any] | None
S = TypeVar("S", bound=msgspec.Struct)

GiveWay = Callable[[], object]
"""Called every fraction of a millisecond, so that others get their turn."""

EVENTS_BETWEEN: Final = 512
MAX_DEPTH: Final = 16
NOTHING: Final = frozenset(("", "~", "null", "Null", "NULL"))
TYPES_IN_WORDS: Final = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "array": "list",
    "object": "mapping",
    "null": "nothing",
}
# libyaml where PyYAML was built with it, as its wheels are.
PARSER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Fault(msgspec.Struct, frozen=True, order=True):
    """What is wrong in a file; `key` is dotted, empty where no key can be named. Lines count from 1."""

    line: int
    key: str
    what: str

    def __str__(self) -> str:
        parts = (str(self.line), self.key, self.what) if self.key else (str(self.line), self.what)
        return ": ".join(map(printable, parts))


def printable(text: str) -> str:
    """What stands in a file, with nothing in it that a terminal would act on."""
    return text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode()


class NotYamlError(Exception):
    """A file that cannot be read to its end."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Document:
    """A file that was read: its value, and what stands wrong in it whatever it means."""

    def __init__(self, value: Value, lines: dict[int, dict[str, int]], faults: list[Fault]) -> None:
        self.value = value
        self.faults = faults
        self._lines = lines

    def line(self, mapping: dict[str, Any], key: str, otherwise: int = 1) -> int:
        """The line of a key of one of the document's mappings."""
        return self._lines.get(id(mapping), {}).get(key, otherwise)

    def let_go(self, value: Value) -> None:
        """Forgets the lines of a value that is done with."""
        if isinstance(value, dict):
            self._lines.pop(id(value), None)
            for inner in value.values():
                self.let_go(inner)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for meanwhile: there is none, and each look would stop everybody for milliseconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read(data: bytes, give_way: GiveWay) -> Document:
    """Reads a whole file, which must be one document in UTF-8. Raises NotYamlError."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise NotYamlError(Fault(data.count(b"\n", 0, error.start) + 1, "", "not UTF-8")) from None
    try:
        parser = PARSER(data)
    except yaml.YAMLError as error:
        raise NotYamlError(_syntax_fault(error, data)) from None
    try:
        return _compose(parser, give_way)
    except yaml.YAMLError as error:
        raise NotYamlError(_syntax_fault(error, data)) from None
    finally:
        parser.dispose()


def _syntax_fault(error: yaml.YAMLError, data: bytes) -> Fault:
    """Where and why it is no YAML; never what stands there, which may be a secret."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return Fault(mark.line + 1, "", f"not YAML: {getattr(error, 'problem', '')}")
    position = getattr(error, "position", 0)
    return Fault(data.count(b"\n", 0, position) + 1, "", f"not YAML: {getattr(error, 'reason', 'cannot be read')}")


def _compose(parser: Any, give_way: GiveWay) -> Document:
    faults: list[Fault] = []
    lines: dict[int, dict[str, int]] = {}
    # What is open, from the outermost on, each with the key under which the next stands in it.
    outer: list[tuple[Any, str | None]] = []
    top: list[Any] = []
    # The innermost; `key` is the one that was read in it and waits for its value.
    container: Any = top
    key: str | None = None
    next_event = parser.get_event

    def fault(event: Any, what: str) -> Fault:
        path = [*(above for _, above in outer), key]
        return Fault(event.start_mark.line + 1, ".".join(filter(None, path)), what)

    for number in itertools.count():
        if number % EVENTS_BETWEEN == 0:
            give_way()
        event = next_event()
        kind = type(event)
        is_key = type(container) is dict and key is None
        value: Value
        if kind is yaml.ScalarEvent:
            if is_key:
                key = event.value
                first = lines[id(container)].setdefault(key, event.start_mark.line + 1)
                if key in container:
                    faults.append(fault(event, f"stands twice, first in line {first}"))
                continue
            value = None if not event.style and event.value in NOTHING else event.value
            if event.tag is not None:
                faults.append(fault(event, "tags are not used here"))
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            value = container
            container, key = outer.pop()
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            if is_key:
                raise NotYamlError(fault(event, "a key that is no word"))
            if len(outer) >= MAX_DEPTH:
                raise NotYamlError(fault(event, f"more than {MAX_DEPTH} levels"))
            if event.tag is not None:
                faults.append(fault(event, "tags are not used here"))
            outer.append((container, key))
            container, key = [], None
            if kind is yaml.MappingStartEvent:
                container = {}
                lines[id(container)] = {}
            continue
        elif kind is yaml.AliasEvent:
            if is_key:
                raise NotYamlError(fault(event, "aliases are not used here"))
            faults.append(fault(event, "aliases are not used here"))
            value = None
        elif kind is yaml.StreamEndEvent:
            break
        elif kind is yaml.DocumentStartEvent and top:
            raise NotYamlError(fault(event, "a second document"))
        else:
            continue
        if type(container) is dict:
            # The first of a name stays.
            container.setdefault(key, value)
            key = None
        else:
            container.append(value)
    return Document(top[0] if top else None, lines, faults)


def convert(
    document: Document, value: Value, wanted: type[S], key: str, line: int
) -> tuple[S | None, tuple[Fault, ...]]:
    """The value of a key, in this line, as a struct, and what is wrong in it.

    With faults the struct is made of what is right, so that the rest can be looked at too; None if that is not enough.
    """
    try:
        return msgspec.convert(value, wanted, strict=False), ()
    except msgspec.ValidationError:
        faults = tuple(_faults_of(document, value, wanted, key, line))
    if isinstance(value, dict):
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(wanted)}
        right = {name: inner for name, inner in value.items() if name in fields and _is(inner, fields[name])}
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(right, wanted, strict=False), faults
    return None, faults


def _is(value: Value, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted, strict=False)
    except msgspec.ValidationError:
        return False
    return True


def _faults_of(document: Document, value: Value, wanted: type[msgspec.Struct], key: str, line: int) -> Iterator[Fault]:
    """Looks at each key by itself, since msgspec stops at the first that does not fit."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(wanted)}
    known = ", ".join(fields)
    if not isinstance(value, dict):
        yield Fault(line, key, f"must be a mapping with the keys {known}")
        return
    for name, inner in value.items():
        place, path = document.line(value, name, line), f"{key}.{name}"
        if name not in fields:
            yield Fault(place, path, f"unknown key; there are {known}")
            continue
        type_ = fields[name].type
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
            yield from _faults_of(document, inner, type_, path, place)
            continue
        try:
            msgspec.convert(inner, type_, strict=False)
        except msgspec.ValidationError as error:
            yield Fault(place, path, _in_words(error))
    if missing := [name for name, field in fields.items() if field.required and name not in value]:
        yield Fault(line, key, f"has no {', no '.join(missing)}")


def _in_words(error: msgspec.ValidationError) -> str:
    """msgspec's text for people who know YAML and not Python, without its path, which is JSON's."""
    text = str(error).partition(" - at `")[0].replace(" | null`", "`")
    for theirs, ours in TYPES_IN_WORDS.items():
        text = (
            text.replace(f"`{theirs}`", ours)
            .replace(f"`{theirs} |", f"`{ours} |")
            .replace(f"| {theirs}`", f"| {ours}`")
        )
    return text[0].lower() + text[1:].replace("`", "")
