"""The authenticator that takes JSON Web Tokens (RFC 7519) in the place of passwords: OpenID Connect's, or others'.

A token is judged here before a library sees it: its size, its form, its header. What says which key and algorithm
is in the header, which nobody has signed yet; so the algorithm must be one that the operator allows, all of which have
public keys, and a header that could be read in two ways, or that demands what nobody here knows, is no header.
"""

import asyncio
import base64
import binascii
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Mapping as Named
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import jwt

from pgauthproxy.auth import https
from pgauthproxy.auth.keysets import KeptKeys
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Load, Question
from pgauthproxy.auth.targets import ReadTargets, Target
from pgauthproxy.events import Sink
from pgauthproxy.net.tls import TlsConfigError, verifying_context
from pgauthproxy.stages import Mapping

TOKEN: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
USER: Final = "{user}"
MAX_SESSION_SECONDS: Final = 1e8
LATEST: Final = 1 << 40
MIN_SESSION_SECONDS: Final = 0.1
"""A token that is within the leeway behind its expiry is good for a moment."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Sends a user to `target` if a claim is, or holds, a value; without a claim, anybody."""

    target: str
    claim: str = ""
    equals: str | None = None
    contains: str | None = None

    def fits(self, claims: Named[str, Any]) -> bool:
        if not self.claim:
            return True
        value = find_claim(claims, self.claim)
        if self.equals is not None:
            return _text(value) == self.equals
        if isinstance(value, list):
            return self.contains in map(_text, value)
        return isinstance(value, str) and self.contains in value.split(" ")


@dataclass(frozen=True, slots=True)
class JwtPolicy:
    """What a token must be. Times in seconds, sizes in bytes."""

    algorithms: tuple[str, ...]
    issuer: str
    audience: tuple[str, ...]
    leeway: float
    required_claims: tuple[str, ...]
    max_token: int
    user_claim: str
    user_is: str
    end_with_token: bool


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where an issuer's keys are: a file or a URL. Times in seconds."""

    file: str
    url: str
    ca: str
    refresh: float
    interval: float
    timeout: float


class JwtAuthenticator:
    """Lets in who has a good token, as its claims say. States, in order: made, started, closed."""

    def __init__(
        self, source: KeySource, policy: JwtPolicy, rules: Sequence[Rule], read_targets: ReadTargets, sink: Sink
    ) -> None:
        """Raises AuthenticatorConfigError."""
        targets = read_targets()
        if bool(source.file) == bool(source.url):
            raise AuthenticatorConfigError("authenticator.jwt: needs either jwks_file or jwks_url")
        if not policy.issuer or not policy.audience or not policy.user_claim:
            raise AuthenticatorConfigError("authenticator.jwt: needs issuer, audience and user_claim")
        if USER not in policy.user_is:
            raise AuthenticatorConfigError(f"authenticator.jwt.user_is: needs {USER} in it")
        check_rules(rules, targets)
        self._policy = policy
        self._rules = tuple(rules)
        self._read_targets = read_targets
        self._targets = targets
        self._source = source
        if source.url:
            try:
                https.checked_url(source.url)
            except AuthenticatorConfigError as error:
                raise AuthenticatorConfigError(f"authenticator.jwt.jwks_url: {error}") from None
        elif not Path(source.file).is_file():
            raise AuthenticatorConfigError(f"authenticator.jwt.jwks_file: {source.file}: no such file")
        self._context = _context(source)
        self._session: aiohttp.ClientSession | None = None
        read: Callable[[], Awaitable[bytes]] = self._read_url if source.url else self._read_file
        self._keys = KeptKeys(read, policy.algorithms, source.refresh, source.interval, sink)

    async def start(self) -> None:
        if self._source.url:
            self._session = https.open_session(self._source.timeout, 1)

    async def ask(self, question: Question) -> Mapping:
        token = question.credential.reveal() if question.credential is not None else b""
        key_id, algorithm = self._read_header(token)
        keys = await self._keys.find(key_id, algorithm)
        if not keys:
            raise Denied(f"token is signed with a key that is not known: {key_id!r}, {algorithm}")
        claims = self._verify(token.decode(), keys, algorithm)
        name = find_claim(claims, self._policy.user_claim)
        wanted = self._policy.user_is.replace(USER, question.started.user.decode(errors="surrogateescape"))
        if not isinstance(name, str) or name != wanted:
            raise Denied(f"token is for another user: its claim {self._policy.user_claim} is {name!r}")
        for rule in self._rules:
            if rule.fits(claims):
                return self._targets[rule.target].mapping(question.started, self._seconds_left(claims))
        raise Denied("token is good, and no rule has a target for it")

    async def reload(self) -> None:
        self._targets, self._context = await asyncio.to_thread(lambda: (self._read_targets(), _context(self._source)))
        await self._keys.reload()

    def load(self) -> list[Load]:
        return [Load("jwt", self._keys.awaited_by)]

    async def close(self) -> None:
        await self._keys.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _read_header(self, token: bytes) -> tuple[str | None, str]:
        """The key id and the algorithm. Raises Denied."""
        if len(token) > self._policy.max_token:
            raise Denied(f"token of more than {self._policy.max_token} bytes")
        parts = TOKEN.fullmatch(token)
        if parts is None:
            raise Denied("not a token")
        header = _parse_part(parts[1], "header")
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._policy.algorithms:
            raise Denied(f"token is signed by an algorithm that is not allowed: {algorithm!r}")
        if "crit" in header or "b64" in header:
            raise Denied("token's header demands an extension that is not known")
        key_id = header.get("kid")
        if key_id is not None and not isinstance(key_id, str):
            raise Denied("token with a key id that is no text")
        _parse_part(parts[2], "body")
        return key_id, algorithm

    def _verify(self, token: str, keys: Sequence[Any], algorithm: str) -> dict[str, Any]:
        """The claims of a token that one of these keys has signed. Raises Denied."""
        policy = self._policy
        failure = "no key"
        for key in keys:
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    issuer=policy.issuer,
                    audience=policy.audience,
                    leeway=policy.leeway,
                    options={"require": ["exp", "iss", "aud", *policy.required_claims]},
                )
            except jwt.InvalidSignatureError:
                failure = "token with a wrong signature"
            except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
                raise Denied(f"token is not good: {type(error).__name__}: {error}") from None
        raise Denied(failure)

    def _seconds_left(self, claims: Named[str, Any]) -> float | None:
        if not self._policy.end_with_token:
            return None
        # The library has seen to it that this is a number, though it may be one too large for a float.
        left = min(int(claims["exp"]), LATEST) - time.time()
        return min(max(left, MIN_SESSION_SECONDS), MAX_SESSION_SECONDS)

    async def _read_file(self) -> bytes:
        # A small local file, once in minutes.
        return Path(self._source.file).read_bytes()  # noqa: ASYNC240

    async def _read_url(self) -> bytes:
        assert self._session is not None  # noqa: S101 (it was started)
        assert self._context is not None  # noqa: S101 (there is a URL)
        async with self._session.get(self._source.url, ssl=self._context, allow_redirects=False) as response:
            if response.status != 200:
                raise https.BadAnswerError(f"status {response.status}")
            return await https.read_body(response)


def _context(source: KeySource) -> ssl.SSLContext | None:
    """None where nothing is asked over TLS. Raises AuthenticatorConfigError."""
    if not source.url:
        return None
    try:
        return verifying_context(source.ca)
    except TlsConfigError as error:
        raise AuthenticatorConfigError(f"authenticator.jwt.jwks_ca: {error}") from None


def check_rules(rules: Sequence[Rule], targets: Named[str, Target]) -> None:
    """Raises AuthenticatorConfigError."""
    where = "authenticator.jwt.rules"
    if not rules:
        raise AuthenticatorConfigError(f"{where}: without a rule nobody has a target")
    for rule in rules:
        if rule.target not in targets:
            raise AuthenticatorConfigError(f"{where}: {rule.target} is none of authenticator.targets")
        if bool(rule.claim) != ((rule.equals is None) != (rule.contains is None)):
            raise AuthenticatorConfigError(
                f"{where}: a rule has a claim and either equals or contains, or none of them"
            )


def find_claim(claims: Named[str, Any], path: str) -> Any:
    """A claim by its name, which may hold dots itself, or by its path; None if there is none."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: object) -> str | None:
    """A plain value as a rule writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int) else None


def _parse_part(part: bytes, what: str) -> dict[str, Any]:
    """A part of a token: a JSON object in base64url, in which no name stands twice. Raises Denied."""
    try:
        text = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
        found = json.loads(text, object_pairs_hook=_no_duplicates)
    except (binascii.Error, ValueError, RecursionError):
        raise Denied(f"not a token: its {what} cannot be read, or has a name twice") from None
    if not isinstance(found, dict):
        raise Denied(f"not a token: its {what} is no object")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
