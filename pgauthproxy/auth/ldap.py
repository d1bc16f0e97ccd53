"""The authenticator that is a directory: it knows the passwords, and the groups that say who is sent where.

What a client says enters DNs and filters escaped, byte by byte (RFC 4514, RFC 4515), so that it stays a value. A
directory takes an empty password for an anonymous bind, which succeeds: none is ever sent. It compares names more
loosely than PostgreSQL, so the name in the user's own entry is held against the one that the client gave.
"""

import asyncio
import contextlib
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from collections.abc import Mapping as Named
from dataclasses import dataclass
from typing import Any, Final

import sansldap

from pgauthproxy.auth.directory import Connection, DirectoryError, Entry, Server
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Load, Question
from pgauthproxy.auth.targets import ReadTargets, Target
from pgauthproxy.auth.turns import Turns
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.net.tls import TlsConfigError, verifying_context
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Mapping, Started

USER: Final = "{user}"
DN: Final = "{dn}"
ATTRIBUTE_OF_USER: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]*)=\{user\}")
PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_@")
IDLE_SECONDS: Final = 60.0
"""How long a kept connection may have been idle to be used again."""
DOWN_SECONDS: Final = 30.0
"""How long a server that could not be reached is tried after the others."""
CODES: Final = sansldap.LDAPResultCode
REFUSALS: Final = frozenset(
    {
        CODES.INVALID_CREDENTIALS,
        CODES.NO_SUCH_OBJECT,
        CODES.INVALID_DN_SYNTAX,
        CODES.INAPPROPRIATE_AUTHENTICATION,
        CODES.CONSTRAINT_VIOLATION,
        CODES.INSUFFICIENT_ACCESS_RIGHTS,
        CODES.UNWILLING_TO_PERFORM,
    }
)
"""What a directory says to a bind that is not to be."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Sends a user to `target` who is in `group`, or whose entry matches `filter`; without either, anybody."""

    target: str
    group: str = ""
    filter: str = ""


@dataclass(frozen=True, slots=True)
class LdapPolicy:
    """How users are found, and what is asked of the directory; `timeout` is for each step, in seconds."""

    urls: tuple[str, ...]
    start_tls: bool
    allow_plain: bool
    ca: str
    user_dn: str
    base: str
    filter: str
    scope: str
    bind_dn: str
    bind_password: Secret
    name_attribute: str | None
    group_filter: str
    timeout: float
    max_parallel: int


ReadPolicy = Callable[[], LdapPolicy]
"""Reads what the policy refers to. Raises AuthenticatorConfigError."""


def escape(value: str) -> str:
    """A value as it may stand in a DN and in a filter: bytes that could mean anything there, as `\\` and hex digits."""
    return "".join(chr(byte) if byte in PLAIN else f"\\{byte:02x}" for byte in value.encode())


class LdapAuthenticator:
    """Lets in whom the directory lets bind. States, in order: made, started, closed."""

    def __init__(self, read_policy: ReadPolicy, rules: Sequence[Rule], read_targets: ReadTargets, sink: Sink) -> None:
        """Raises AuthenticatorConfigError, which names the key."""
        policy, targets = read_policy(), read_targets()
        self._read_policy = read_policy
        self._read_targets = read_targets
        self._policy = policy
        self._rules = tuple(rules)
        self._targets = targets
        self._sink = sink
        self._servers = _servers(policy)
        self._context = _context(policy)
        _check(policy, self._rules, targets)
        self._name_attribute = _name_attribute(policy)
        self._turns = Turns(policy.max_parallel)
        self._kept: list[tuple[Connection, float]] = []
        self._down_until: dict[Server, float] = {}
        self._closed = False

    async def start(self) -> None:
        exposed = [str(server) for server in self._servers if _is_exposed(server, self._policy)]
        if exposed:
            facts = (("servers", ", ".join(exposed)), ("remedy", "ldaps:// or authenticator.ldap.start_tls"))
            self._sink(Noticed("warning", "passwords go to the directory in clear", facts))

    async def ask(self, question: Question) -> Mapping:
        started = question.started
        try:
            name = started.user.decode()
            password = question.credential.reveal().decode() if question.credential is not None else ""
        except UnicodeDecodeError:
            raise Denied("name or password is not UTF-8") from None
        if not password:
            raise Denied("empty password")
        async with self._turns:
            try:
                return await self._decide(started, name, password)
            except DirectoryError as error:
                raise AuthenticatorFault(f"directory: {error}") from None

    async def reload(self) -> None:
        """Secrets and authorities: what refers to them stays as it is."""

        def read() -> tuple[LdapPolicy, dict[str, Target], ssl.SSLContext]:
            policy = self._read_policy()
            _check_password(policy)
            return policy, self._read_targets(), _context(policy)

        self._policy, self._targets, self._context = await asyncio.to_thread(read)
        while self._kept:
            self._kept.pop()[0].close()

    async def close(self) -> None:
        self._closed = True
        while self._kept:
            self._kept.pop()[0].close()

    def load(self) -> list[Load]:
        return [self._turns.load("ldap")]

    async def _decide(self, started: Started, name: str, password: str) -> Mapping:
        """Raises Denied and DirectoryError."""
        found, refusal = await self._find(name)
        connection = await self._connect()
        try:
            code, reason = await connection.bind(found.dn, password)
            if code not in REFUSALS and code is not CODES.SUCCESS:
                raise DirectoryError(f"bind failed: {reason}")
            if refusal or code is not CODES.SUCCESS:
                raise Denied(refusal or f"directory refuses: {reason}")
            async with self._searching(connection) as search:
                if not self._policy.base and self._name_attribute:
                    self._check_name(name, await search(_own(found.dn, self._name_attribute)))
                return (await self._choose(name, found.dn, search)).mapping(started)
        finally:
            connection.close()

    async def _find(self, name: str) -> tuple[Entry, str]:
        """The user's entry, and why it is refused all the same.

        Somebody whom nobody knows gets an entry that is nowhere, to bind to as everybody does.
        """
        policy = self._policy
        if policy.user_dn:
            return Entry(policy.user_dn.replace(USER, escape(name)), {}), ""
        condition = sansldap.LDAPFilter.from_string(policy.filter.replace(USER, escape(name)))
        async with self._searching(None) as search:
            entries = await search(_Search(policy.base, condition, policy.scope, self._name_attribute, 2))
        nowhere = Entry(f"cn={secrets.token_hex(16)},{policy.base}", {})
        if not entries:
            return nowhere, "unknown user"
        if len(entries) > 1:
            return nowhere, "authenticator.ldap.filter finds several users"
        try:
            if self._name_attribute:
                self._check_name(name, entries)
        except Denied as denied:
            return entries[0], denied.reason
        return entries[0], ""

    def _check_name(self, name: str, entries: list[Entry]) -> None:
        """Raises Denied unless the entry bears this very name."""
        values = entries[0].attributes.get(self._name_attribute.lower(), []) if entries else []
        if name.encode() not in values:
            raise Denied(f"the entry's {self._name_attribute} is not, to the letter, the name given, or cannot be read")

    async def _choose(self, name: str, dn: str, search: "_Searcher") -> Target:
        """The target of the first rule that fits. Raises Denied and DirectoryError."""
        in_group = self._policy.group_filter.replace(USER, escape(name)).replace(DN, escape(dn))
        for rule in self._rules:
            place, text = (rule.group, in_group) if rule.group else (dn, rule.filter)
            if text == "" or await search(_Search(place, sansldap.LDAPFilter.from_string(text), "base")):
                return self._targets[rule.target]
        raise Denied("no rule has a target for this user")

    @contextlib.asynccontextmanager
    async def _searching(self, connection: Connection | None) -> "AsyncIterator[_Searcher]":
        """Who searches: the service account, over a connection that is kept, or `connection`, or nobody in particular.

        A kept connection may have died unseen; then the search is done once more over a new one.
        """
        if not self._policy.bind_dn and connection is not None:
            yield lambda wanted: wanted.run(connection)
            return
        borrowed = self._take_kept()
        reused = borrowed is not None
        using = borrowed or await self._connect_to_search()

        async def search(wanted: _Search) -> list[Entry]:
            nonlocal using, reused
            try:
                return await wanted.run(using)
            except DirectoryError:
                if not reused or using.failure is None:
                    raise
                reused = False
                using = await self._connect_to_search()
                return await wanted.run(using)

        try:
            yield search
        finally:
            if using.failure is None and not self._closed:
                self._kept.append((using, time.monotonic()))
            else:
                using.abort()

    def _take_kept(self) -> Connection | None:
        while self._kept:
            connection, since = self._kept.pop()
            if connection.failure is None and time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect_to_search(self) -> Connection:
        connection = await self._connect()
        if self._policy.bind_dn:
            try:
                code, reason = await connection.bind(self._policy.bind_dn, self._policy.bind_password.reveal().decode())
                if code is not CODES.SUCCESS:
                    raise DirectoryError(f"authenticator.ldap.bind_dn cannot log in: {reason}")
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _connect(self) -> Connection:
        """A new connection to the first server that can be had. Raises DirectoryError."""
        policy = self._policy
        failures = []
        for server in sorted(self._servers, key=self._is_down):
            try:
                connection = await Connection.open(
                    server, self._context, start_tls=policy.start_tls, seconds=policy.timeout
                )
            except DirectoryError as error:
                self._down_until[server] = time.monotonic() + DOWN_SECONDS
                failures.append(str(error))
            else:
                self._down_until.pop(server, None)
                return connection
        raise DirectoryError("; ".join(failures))

    def _is_down(self, server: Server) -> bool:
        return self._down_until.get(server, 0.0) > time.monotonic()


@dataclass(frozen=True, slots=True)
class _Search:
    """What is looked for."""

    base: str
    condition: sansldap.LDAPFilter
    scope: str
    attribute: str = ""
    limit: int = 1

    async def run(self, connection: Connection) -> list[Entry]:
        return await connection.search(
            self.base, self.condition, scope=self.scope, attribute=self.attribute, limit=self.limit
        )


_Searcher = Callable[[_Search], Coroutine[Any, Any, list[Entry]]]


def _own(dn: str, attribute: str) -> _Search:
    """One attribute of one entry."""
    return _Search(dn, sansldap.FilterPresent("objectClass"), "base", attribute)


def _servers(policy: LdapPolicy) -> tuple[Server, ...]:
    """Raises AuthenticatorConfigError."""
    where = "authenticator.ldap.url"
    if not policy.urls:
        raise AuthenticatorConfigError(f"{where}: kind ldap needs it")
    try:
        servers = tuple(map(Server.parse, policy.urls))
    except AuthenticatorConfigError as error:
        raise AuthenticatorConfigError(f"{where}: {error}") from None
    for server in servers:
        if _is_exposed(server, policy) and not policy.allow_plain:
            raise AuthenticatorConfigError(
                f"{where}: {server} would get passwords in clear: use ldaps://, or authenticator.ldap.start_tls"
            )
    return servers


def _context(policy: LdapPolicy) -> ssl.SSLContext:
    """Raises AuthenticatorConfigError."""
    try:
        return verifying_context(policy.ca)
    except TlsConfigError as error:
        raise AuthenticatorConfigError(f"authenticator.ldap.ca: {error}") from None


def _is_exposed(server: Server, policy: LdapPolicy) -> bool:
    return not server.encrypted and not policy.start_tls and not server.is_loopback


def _name_attribute(policy: LdapPolicy) -> str:
    """The attribute that must be the user's name, empty for none."""
    if policy.name_attribute is not None:
        return policy.name_attribute
    found = ATTRIBUTE_OF_USER.search(policy.user_dn or policy.filter)
    return found[1] if found else ""


def _check_password(policy: LdapPolicy) -> None:
    """Raises AuthenticatorConfigError."""
    try:
        policy.bind_password.reveal().decode()
    except UnicodeDecodeError:
        raise AuthenticatorConfigError("authenticator.ldap.bind_password: is not UTF-8") from None


def _check(policy: LdapPolicy, rules: Sequence[Rule], targets: Named[str, Target]) -> None:
    """Raises AuthenticatorConfigError."""
    prefix = "authenticator.ldap"
    if bool(policy.user_dn) == bool(policy.base):
        raise AuthenticatorConfigError(f"{prefix}: needs either user_dn, or base and filter")
    key, template = ("user_dn", policy.user_dn) if policy.user_dn else ("filter", policy.filter)
    if USER not in template:
        raise AuthenticatorConfigError(f"{prefix}.{key}: needs {USER} in it")
    _check_password(policy)
    if bool(policy.bind_dn) != bool(policy.bind_password):
        raise AuthenticatorConfigError(f"{prefix}.bind_dn, {prefix}.bind_password: need each other")
    if not rules:
        raise AuthenticatorConfigError(f"{prefix}.rules: without a rule nobody has a target")
    for rule in rules:
        if rule.target not in targets:
            raise AuthenticatorConfigError(f"{prefix}.rules: {rule.target} is none of authenticator.targets")
        if rule.group and rule.filter:
            raise AuthenticatorConfigError(f"{prefix}.rules: a rule has a group or a filter, not both")
    filters = [("filter", policy.filter), ("group_filter", policy.group_filter)]
    for key, text in [*filters, *(("rules", rule.filter) for rule in rules if rule.filter)]:
        try:
            sansldap.LDAPFilter.from_string(text.replace(USER, "u").replace(DN, "d"))
        except ValueError:
            raise AuthenticatorConfigError(f"{prefix}.{key}: {text}: not a filter") from None
