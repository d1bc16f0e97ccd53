"""Answers that hold for a while: the same identity with the same proof is not asked about again.

An authenticator says for how long (`_META_CACHE_SECONDS`); the configuration bounds that. An answer is kept under a
MAC, by a key that is made at start, of all that the authenticator was told: no password is kept. In the methods where
the authenticator sees no proof, or sees it salted, only an answer with a verifier is kept: the gateway then compares
each time. Refusals are never kept.
"""

import asyncio
import hmac
import secrets
import time
from collections import OrderedDict
from typing import Final

from pgauthproxy.auth.model import Authenticator, Load, Question, load_of
from pgauthproxy.stages import Mapping

COMPARED_METHODS: Final = ("md5", "scram-sha-256")
"""Where the proof is not part of the question, or differs each time."""


class CachedAuthenticator:
    """An authenticator round another."""

    def __init__(self, inner: Authenticator, max_seconds: float, max_entries: int) -> None:
        self._inner = inner
        self._max_seconds = max_seconds
        self._max_entries = max_entries
        self._mac_key = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, tuple[float, Mapping]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Event] = {}
        self._waiting = 0
        """How many wait for what another is told."""
        self._is_used = False
        """Whether any answer was ever to be kept: without that, nobody waits for another's."""

    async def start(self) -> None:
        await self._inner.start()

    async def ask(self, question: Question) -> Mapping:
        if not self._is_used:
            mapping = await self._inner.ask(question)
            return mapping if mapping.cache_seconds is None else self._keep(self._name(question), question, mapping)
        name = self._name(question)
        if (kept := self._find(name)) is not None:
            return kept
        if (asking := self._asking.get(name)) is not None:
            # The same login at the same time: if its answer is kept, it is ours too.
            self._waiting += 1
            try:
                await asking.wait()
            finally:
                self._waiting -= 1
            if (kept := self._find(name)) is not None:
                return kept
            return self._keep(name, question, await self._inner.ask(question))
        self._asking[name] = asyncio.Event()
        try:
            return self._keep(name, question, await self._inner.ask(question))
        finally:
            self._asking.pop(name).set()

    async def reload(self) -> None:
        self._kept.clear()
        await self._inner.reload()

    def load(self) -> list[Load]:
        inner = load_of(self._inner)
        return [*inner, Load("cache", queued=self._waiting)] if self._is_used else inner

    async def close(self) -> None:
        self._kept.clear()
        await self._inner.close()

    def _name(self, question: Question) -> bytes:
        """The MAC of everything that an answer may depend on."""
        started = question.started
        encryption = started.encryption
        certificate = encryption.certificate if encryption is not None else None
        parts = [
            question.method.encode(),
            started.accepted.address.rpartition(":")[0].encode(),
            encryption.server_name.encode() if encryption is not None else b"",
            certificate.fingerprint.encode() if certificate is not None else b"",
        ]
        for name, value in started.parameters:
            parts += (name, value)
        if question.credential is not None and question.method not in COMPARED_METHODS:
            parts.append(question.credential.reveal())
        mac = hmac.new(self._mac_key, digestmod="sha256")
        for part in parts:
            mac.update(len(part).to_bytes(8))
            mac.update(part)
        return mac.digest()

    def _find(self, name: bytes) -> Mapping | None:
        found = self._kept.get(name)
        if found is None:
            return None
        expires, mapping = found
        if expires <= time.monotonic():
            del self._kept[name]
            return None
        self._kept.move_to_end(name)
        return mapping

    def _keep(self, name: bytes, question: Question, mapping: Mapping) -> Mapping:
        seconds = mapping.cache_seconds
        if seconds == 0:
            self._kept.clear()
        elif seconds and (mapping.verifier is not None or question.method not in COMPARED_METHODS):
            self._is_used = True
            self._kept[name] = time.monotonic() + min(seconds, self._max_seconds), mapping
            if len(self._kept) > self._max_entries:
                self._kept.popitem(last=False)
        return mapping
