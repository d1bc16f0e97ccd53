"""The users file: who may log in, from where, by what, and to which target for which database (docs/users.md).

A file is read whole or not at all: what is wrong in it is found all at once, each with its line and key, and never
shows a secret. Many users share a few targets, lists of networks and sets of databases, so these are made once.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from pgauthproxy import private_file
from pgauthproxy._digest import md5_password
from pgauthproxy.auth import references, yaml_lines
from pgauthproxy.auth.certificates import CertificateRule, CertificateSpec
from pgauthproxy.auth.fields import MD5_CREDENTIAL
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.auth.networks import Networks
from pgauthproxy.auth.targets import Seconds, Target, TargetFault, TargetSpec, build_target
from pgauthproxy.auth.yaml_lines import Document, Fault, GiveWay, NotYamlError, Value
from pgauthproxy.private_file import PrivateFileError
from pgauthproxy.proto import scram
from pgauthproxy.secret import Secret

ANY_DATABASE: Final = "*"
MAX_FAULTS: Final = 100
USERS_BETWEEN: Final = 64
"""Users that are read before others get their turn."""
SCRAM_PREFIX: Final = b"SCRAM-SHA-256$"
# What an MD5 hash costs to compare with, where a SCRAM verifier costs its iterations.
NO_ITERATIONS: Final = 0


class UserSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user as an operator writes it.

    `verifier`: a SCRAM verifier, an MD5 hash, a reference to one of these or to a password, or a password.
    `certificate`: what the client's certificate must be, by its subject or by more. `databases`: the target's name for
    each database asked for, `*` for any other. `allow`: networks that the user may come from, without it all.
    `session_seconds`: how long a session may live.
    """

    databases: dict[str, str]
    verifier: str = ""
    certificate: str | CertificateSpec | None = None
    allow: list[str] | None = None
    session_seconds: Seconds | None = None


class User(msgspec.Struct, frozen=True, gc=False):
    """A user as logins need it. `password` is there until a verifier was derived from it."""

    verifier: Secret | None
    password: Secret | None
    certificate: CertificateRule | None
    allow: Networks | None
    targets: dict[bytes, Target]
    session_seconds: float | None

    def target(self, database: bytes) -> Target | None:
        """The target for the database that was asked for."""
        return self.targets.get(database) or self.targets.get(ANY_DATABASE.encode())


class UsersFile(msgspec.Struct, frozen=True):
    """A file without a fault. `iterations` are those of each user's verifier; `plain` names who has a bare password."""

    targets: dict[str, Target]
    users: dict[bytes, User]
    iterations: tuple[int, ...]
    plain: tuple[str, ...]


def read(path: Path, method: str, target_fault: TargetFault, give_way: GiveWay) -> UsersFile:
    """Reads the file for a method of clients to prove themselves. Raises AuthenticatorConfigError with all faults."""
    try:
        with yaml_lines.uncollected():
            found, faults = parse(private_file.read(path), method, target_fault, give_way)
    except PrivateFileError as error:
        raise AuthenticatorConfigError(f"{path}: {error}") from None
    if found is None:
        lines = [f"{path}:{fault}" for fault in sorted(faults)]
        if len(lines) > MAX_FAULTS:
            lines[MAX_FAULTS:] = [f"{path}: {len(lines) - MAX_FAULTS} more faults"]
        raise AuthenticatorConfigError(*lines)
    return found


def let_go(file: UsersFile, give_way: GiveWay) -> None:
    """Empties a file that nobody uses any more; see `_Reader` for why not at once."""
    while file.users:
        file.users.popitem()
        if len(file.users) % USERS_BETWEEN == 0:
            give_way()


def parse(
    content: bytes, method: str, target_fault: TargetFault, give_way: GiveWay
) -> tuple[UsersFile | None, list[Fault]]:
    """What a content says, or all that is wrong with it."""
    try:
        document = yaml_lines.read(content, give_way)
    except NotYamlError as error:
        return None, [error.fault]
    return _Reader(document, method, target_fault, give_way).read()


class _Reader:
    """Makes sense of one document, in the order of the methods."""

    def __init__(self, document: Document, method: str, target_fault: TargetFault, give_way: GiveWay) -> None:
        self._document = document
        self._method = method
        self._target_fault = target_fault
        self._give_way = give_way
        self._faults: dict[str, Fault] = {}
        self._targets: dict[str, Target | None] = {}
        self._users: dict[bytes, User] = {}
        self._iterations: list[int] = []
        self._plain: list[str] = []
        self._networks: dict[tuple[str, ...], Networks] = {}
        self._maps: dict[tuple[tuple[str, str], ...], dict[bytes, Target]] = {}

    def read(self) -> tuple[UsersFile | None, list[Fault]]:
        top = self._document.value
        self._note(self._document.faults)
        if top is None:
            self._fault(1, "", "is empty; it needs targets and users")
        elif not isinstance(top, dict):
            self._fault(1, "", "must be a mapping with the keys targets, users")
        else:
            for key in top:
                if key not in ("targets", "users"):
                    self._fault(self._document.line(top, key), key, "unknown key; there are targets, users")
            self._read_targets(self._section(top, "targets"))
            self._read_users(self._section(top, "users"))
        if self._faults:
            return None, list(self._faults.values())
        targets = {name: target for name, target in self._targets.items() if target is not None}
        return UsersFile(targets, self._users, tuple(self._iterations), tuple(self._plain)), []

    def _note(self, faults: Iterable[Fault]) -> None:
        """Only the first fault of a key counts: what is looked at after that is not what stands there."""
        for fault in faults:
            self._faults.setdefault(fault.key, fault)

    def _fault(self, line: int, key: str, what: str) -> None:
        self._note([Fault(line, key, what)])

    def _section(self, top: dict[str, Value], name: str) -> dict[str, Value]:
        """A mapping of names, which may stand empty."""
        found = top.get(name)
        if isinstance(found, dict):
            return found
        if name not in top:
            self._fault(1, name, "is missing")
        elif found is not None:
            self._fault(self._document.line(top, name), name, "must be a mapping of names")
        return {}

    def _read_targets(self, section: dict[str, Value]) -> None:
        for name, value in section.items():
            line, key = self._document.line(section, name), f"targets.{name}"
            # Known by its name in any case, so that users who are mapped to it are not wrong too.
            self._targets[name] = None
            spec, faults = yaml_lines.convert(self._document, value, TargetSpec, key, line)
            self._note(faults)
            if spec is None or not isinstance(value, dict):
                continue
            try:
                self._targets[name] = build_target(spec, self._target_fault)
            except AuthenticatorConfigError as error:
                for fault in error.faults:
                    inner, _, what = fault.partition(": ")
                    place = self._document.line(value, inner.partition(".")[0], line)
                    self._fault(place, f"{key}.{inner}", what)

    def _read_users(self, section: dict[str, Value]) -> None:
        for number, name in enumerate(list(section)):
            if number % USERS_BETWEEN == 0:
                self._give_way()
            line = self._document.line(section, name)
            value = section.pop(name)
            spec, faults = yaml_lines.convert(self._document, value, UserSpec, f"users.{name}", line)
            self._note(faults)
            if spec is not None:
                self._read_user(name, line, spec, value)
            # One by one, since to free ten thousand at once stops everybody for milliseconds.
            self._document.let_go(value)

    def _read_user(self, name: str, line: int, spec: UserSpec, value: Value) -> None:
        faults = len(self._faults)

        def fault(key: str, what: str) -> None:
            place = self._document.line(value, key, line) if isinstance(value, dict) else line
            self._fault(place, f"users.{name}.{key}" if key else f"users.{name}", what)

        if not name or "\0" in name:
            fault("", "no name that a user can have")
        if not spec.databases:
            fault("databases", "is empty, so that there is nowhere to go")
        verifier = password = certificate = allow = None
        iterations = NO_ITERATIONS
        try:
            verifier, password, iterations = self._proof(name, spec.verifier)
        except (ValueError, AuthenticatorConfigError) as error:
            fault("verifier", str(error))
        if spec.certificate is not None:
            try:
                certificate = _certificate(spec.certificate)
            except ValueError as error:
                fault("certificate", str(error))
        elif self._method == "cert":
            fault("certificate", "is missing, and authenticator.method is cert")
        if spec.allow is not None:
            try:
                allow = self._allow(tuple(spec.allow))
            except ValueError as error:
                fault("allow", str(error))
        for database, target in spec.databases.items():
            if target not in self._targets:
                fault("databases", f"{database}: there is no target {target}")
        if len(self._faults) == faults:
            targets = self._map(tuple(spec.databases.items()))
            user = User(verifier, password, certificate, allow, targets, spec.session_seconds)
            self._users[name.encode()] = user
            self._iterations.append(iterations)

    def _proof(self, name: str, text: str) -> tuple[Secret | None, Secret | None, int]:
        """The verifier, or the password that it is to be derived from, and the iterations. Raises ValueError."""
        if not text:
            if self._method == "cert":
                return None, None, NO_ITERATIONS
            raise ValueError(f"is missing, and authenticator.method is {self._method}")
        secret = references.resolve(text)
        value = secret.reveal()
        if value.startswith(SCRAM_PREFIX):
            verifier = scram.Verifier.parse(value)
            if verifier is None:
                raise ValueError("is no SCRAM-SHA-256 verifier, though it begins as one")
            if self._method == "md5":
                raise ValueError("is a SCRAM verifier, and authenticator.method is md5")
            return secret, None, verifier.iterations
        if MD5_CREDENTIAL.fullmatch(value):
            if self._method == "scram-sha-256":
                raise ValueError("is an MD5 hash, and authenticator.method is scram-sha-256")
            return secret, None, NO_ITERATIONS
        if not references.is_reference(text):
            self._plain.append(yaml_lines.printable(name))
        if self._method == "scram-sha-256":
            return None, secret, NO_ITERATIONS
        return Secret(md5_password(value, name.encode())), None, NO_ITERATIONS

    def _allow(self, texts: tuple[str, ...]) -> Networks:
        networks = self._networks.get(texts)
        if networks is None:
            networks = self._networks[texts] = Networks(texts)
        return networks

    def _map(self, databases: tuple[tuple[str, str], ...]) -> dict[bytes, Target]:
        targets = self._maps.get(databases)
        if targets is None:
            targets = self._maps[databases] = {}
            for database, name in databases:
                # A target that is wrong itself is a fault of its own.
                if (target := self._targets[name]) is not None:
                    targets[database.encode()] = target
        return targets


def _certificate(given: str | CertificateSpec) -> CertificateRule:
    """Raises ValueError."""
    return CertificateRule(CertificateSpec(subject=given) if isinstance(given, str) else given)
