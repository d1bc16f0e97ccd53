"""The keys of an issuer of tokens: a JSON Web Key Set (RFC 7517) that is read, kept, and read anew.

Strategy: a set that is too old is read anew behind the logins' backs; only a token that names a key which is not
known waits for that, and however many such tokens come, the issuer is asked once in a while. A set that cannot be read
leaves the old one in force: an issuer that is down for an hour must not lock everybody out.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import jwt
from jwt.algorithms import get_default_algorithms

from pgauthproxy.auth import https
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed, Sink

MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2048
# What may verify what: key type, and curve where there are several.
KEY_TYPES: Final = {
    **{name: ("RSA", None) for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")},
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "ES256K": ("EC", "secp256k1"),
    "EdDSA": ("OKP", None),
}


class KeySet:
    """Public keys by key id and algorithm. Keys for anything but verifying are not among them."""

    def __init__(self, body: bytes, algorithms: tuple[str, ...]) -> None:
        """Raises BadAnswerError if it is no key set, or holds no key for these algorithms."""
        listed = https.parse_object(body).get("keys")
        if not isinstance(listed, list) or len(listed) > MAX_KEYS:
            raise https.BadAnswerError(f"no JSON Web Key Set of at most {MAX_KEYS} keys")
        self._keys: list[tuple[str | None, str, Any]] = []
        known = get_default_algorithms()
        for fields in listed:
            for algorithm in algorithms:
                if isinstance(fields, dict) and _is_for(fields, algorithm):
                    try:
                        key = known[algorithm].from_jwk(fields)
                    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
                        continue
                    if getattr(key, "key_size", MIN_RSA_BITS) >= MIN_RSA_BITS or fields["kty"] != "RSA":
                        self._keys.append((fields.get("kid"), algorithm, key))
        if not self._keys:
            raise https.BadAnswerError("a JSON Web Key Set without a key for the algorithms that are allowed")

    def knows(self, key_id: str) -> bool:
        return any(known == key_id for known, _, _ in self._keys)

    def find(self, key_id: str | None, algorithm: str) -> list[Any]:
        """The keys that a token may be signed with, all of an algorithm if it names none."""
        return [key for known, its, key in self._keys if its == algorithm and key_id in (None, known)]


def _is_for(fields: dict[str, Any], algorithm: str) -> bool:
    """Whether a public key may verify signatures of this algorithm."""
    key_type, curve = KEY_TYPES[algorithm]
    operations = fields.get("key_ops", ["verify"])
    return (
        fields.get("kty") == key_type
        and curve in (None, fields.get("crv"))
        and fields.get("use", "sig") == "sig"
        and fields.get("alg", algorithm) == algorithm
        and isinstance(operations, list)
        and "verify" in operations
        # Whoever publishes a private key has lost it.
        and "d" not in fields
        and isinstance(fields.get("kid", ""), str)
    )


class KeptKeys:
    """The latest key set that could be read. Times in seconds."""

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        algorithms: tuple[str, ...],
        refresh: float,
        interval: float,
        sink: Sink,
    ) -> None:
        """`read` gives the set's text or raises one of https.FAILURES; it is called at most once each `interval`,
        and on a reload."""
        self._read = read
        self._algorithms = algorithms
        self._refresh = refresh
        self._interval = interval
        self._sink = sink
        self._keys: KeySet | None = None
        self._read_at = 0.0
        self._tried_at: float | None = None
        self._failure = ""
        self._reading: asyncio.Task[None] | None = None
        self.awaited_by = 0
        """How many tokens wait for keys to be read; all others are decided about at once."""

    async def find(self, key_id: str | None, algorithm: str) -> list[Any]:
        """The keys that a token may be signed with; none if it names one that nobody has published.

        Raises AuthenticatorFault while no key set could be read at all.
        """
        if self._keys is not None and time.monotonic() - self._read_at > self._refresh:
            self._begin_reading()
        if self._keys is None or (key_id is not None and not self._keys.knows(key_id)):
            self._begin_reading()
            if self._reading is not None:
                # Others wait for the same.
                self.awaited_by += 1
                try:
                    await asyncio.shield(self._reading)
                finally:
                    self.awaited_by -= 1
        if self._keys is None:
            raise AuthenticatorFault(f"no keys to verify tokens with: {self._failure}")
        return self._keys.find(key_id, algorithm)

    async def reload(self) -> None:
        """Reads them anew, however lately that was done."""
        self._tried_at = None
        self._begin_reading()
        if self._reading is not None:
            await asyncio.shield(self._reading)

    def _begin_reading(self) -> None:
        now = time.monotonic()
        if self._reading is None and (self._tried_at is None or now - self._tried_at >= self._interval):
            self._tried_at = now
            self._reading = asyncio.get_running_loop().create_task(self._read_anew())

    async def _read_anew(self) -> None:
        try:
            self._keys = KeySet(await self._read(), self._algorithms)
            self._read_at = time.monotonic()
        except https.FAILURES as error:
            self._failure = https.describe(error)
            kept = "none are known" if self._keys is None else "the old ones stay"
            self._sink(Noticed("warning", f"keys of tokens not read, {kept}", (("reason", self._failure),)))
        finally:
            self._reading = None

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
