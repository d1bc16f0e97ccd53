"""Lists of networks that a client may come from."""

import functools
import ipaddress
import socket
from typing import Final

LOCAL: Final = "local"
"""The word for Unix sockets, and what stands for a client's address there, in brackets."""

IPV4_BYTES: Final = 4
IPV6_NETWORK_BYTES: Final = 8

_Block = tuple[int, int, int]
"""Version of IP, mask and network."""


class Networks:
    """Networks in CIDR form or single addresses, and `local` for Unix sockets. IPv4 is IPv4, however it arrives."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        """Raises ValueError, which names the text."""
        self._local = LOCAL in texts
        self._blocks = tuple(_parse(text) for text in texts if text != LOCAL)

    def has(self, address: str) -> bool:
        """Whether a client's address, as `Accepted` has it, is in one of them."""
        if is_local(address):
            return self._local
        if not self._blocks:
            return False
        packed = _pack(address)
        version, number = (4 if len(packed) == IPV4_BYTES else 6), int.from_bytes(packed)
        for of, mask, network in self._blocks:  # noqa: SIM110 (a generator would cost more than the look-up)
            if of == version and number & mask == network:
                return True
        return False


def is_local(address: str) -> bool:
    """Whether a client's address, as `Accepted` has it, is a Unix socket."""
    return ":" not in address


def network_key(address: str) -> bytes:
    """What stands for the network that one client has to itself: an IPv4 address, or the /64 of one of IPv6.

    Empty for a Unix socket, which says nothing about who is behind it.
    """
    return b"" if is_local(address) else _pack(address)[:IPV6_NETWORK_BYTES]


def _pack(address: str) -> bytes:
    """An IP address as the network has it, without its port."""
    host, _, _ = address.rpartition(":")
    if host.startswith("["):
        return socket.inet_pton(socket.AF_INET6, host[1:-1].partition("%")[0])
    return socket.inet_pton(socket.AF_INET, host)


# Users have the same few networks, and making one costs as much as reading a whole user.
@functools.lru_cache(4096)
def _parse(text: str) -> _Block:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        what = str(error) if "host bits" in str(error) else f"{text!r} is no network, as 10.0.0.0/8 or fd00::/8 are"
        raise ValueError(what) from None
    return network.version, int(network.netmask), int(network.network_address)
