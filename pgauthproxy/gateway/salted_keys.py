"""Salted passwords of targets, so that a login does not pay for thousands of hash rounds each time.

What is kept opens a target as the password does, so it stays in this process; the password itself is not kept: entries
are found by a MAC of it under a key that is made at start.
"""

import asyncio
import hmac
import secrets
from collections import OrderedDict
from typing import Final

from pgauthproxy.proto import scram
from pgauthproxy.proto.steps import DeriveKey

MAX_KEPT: Final = 1024


class SaltedKeys:
    """Derives keys in a thread, and remembers the latest ones."""

    def __init__(self) -> None:
        self._mac_key = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    async def derive(self, step: DeriveKey) -> bytes:
        """The salted password of a SCRAM challenge."""
        asked = b"%d|%d|" % (step.iterations, len(step.salt)) + step.salt + step.password.reveal()
        name = hmac.digest(self._mac_key, asked, "sha256")
        salted = self._kept.pop(name, None)
        if salted is None:
            salted = await asyncio.to_thread(scram.salted_password, step.password.reveal(), step.salt, step.iterations)
        self._kept[name] = salted
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return salted
