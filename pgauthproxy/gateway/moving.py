"""What a session is, apart from its connections: all that another process must know to go on with it."""

from collections.abc import Awaitable, Callable

import msgspec

from pgauthproxy.gateway.rules import Watched
from pgauthproxy.stages import Address


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Who a session is, at both its ends: what is kept of its login for as long as it lives, in one piece of memory."""

    user: bytes
    address: str
    database: bytes
    application_name: bytes
    tls: str
    target_user: bytes
    target_database: bytes


class HandedOver(msgspec.Struct, frozen=True):
    """A session on its way to another process.

    Of each side: how many bytes were received, the last of them, and what is still to be sent to it.
    """

    number: int
    identity: bytes
    began: float
    cancel_key: bytes
    target_key: bytes
    reached: Address
    client: tuple[int, bytes, bytes]
    target: tuple[int, bytes, bytes]
    watched: Watched | None = None
    observed: bytes | None = None
    """What its observer knows, if it has one."""
    is_leased: bool = False
    """Whether its credential is on loan, which the process that it comes from keeps."""
    is_audited: bool = False
    """Whether what the client says is recorded."""


SendHandedOver = Callable[[HandedOver, tuple[int, int]], Awaitable[bool]]
"""Sends it to the other process with the descriptors of the client's connection and the target's; False if that one is
gone."""
