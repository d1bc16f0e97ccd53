"""The PROXY protocol, versions 1 and 2, seen from the receiver (haproxy.org, "The PROXY protocol").

A load balancer says in a header, before the first byte of its client, where that client connected from. The header is
only believed from balancers that the operator has listed; who that is, is not this module's to know. What can be no
header is judged on its first bytes, and none is waited for that is longer than it may be.
"""

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from pgauthproxy import _wire
from pgauthproxy.errors import PROTOCOL_VIOLATION, ClientFault, FrameError
from pgauthproxy.proto.steps import MORE, Login

V1_START: Final = b"PROXY "
V1_END: Final = b"\r\n"
V1_LONGEST: Final = 107
"""Bytes, CR LF included, as the specification has it."""
V1_PORT: Final = rb"(0|[1-9][0-9]{0,4})"
V1_LINE: Final = re.compile(rb"PROXY TCP([46]) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) %b %b" % (V1_PORT, V1_PORT))
V1_UNKNOWN: Final = re.compile(rb"PROXY UNKNOWN( [ -~]*)?")
MAX_PORT: Final = 65_535

V2_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
V2_PREFIX_BYTES: Final = 16
V2_LONGEST: Final = 4096
"""Bytes behind the first 16: addresses take 216 at most, the rest is for what balancers add."""
V2_VERSION: Final = 2
V2_LOCAL: Final = 0
V2_PROXY: Final = 1
V2_UNSPECIFIED: Final = 0x00
V2_TCP4: Final = 0x11
V2_TCP6: Final = 0x21
V2_UNIX: Final = 0x31
V2_ADDRESS_BYTES: Final = {V2_TCP4: 12, V2_TCP6: 36, V2_UNIX: 216}
TLV_HEADER_BYTES: Final = 3
TLV_CRC32C: Final = 0x03
CRC32C_BYTES: Final = 4
CRC32C_POLYNOMIAL: Final = 0x82F63B78


def _crc32c_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (CRC32C_POLYNOMIAL if byte & 1 else 0)
    return byte


CRC32C_OF_BYTE: Final = tuple(_crc32c_of(byte) for byte in range(256))

Found = tuple[str, int]
"""A client's address, as `Accepted` has it, empty if the socket's own is to be kept; and the header's length."""


def receive_proxy_header(framer: _wire.Framer) -> Login[str]:
    """The address that the header says, empty if the socket's own is to be kept. What follows stays in the framer."""
    received = b""
    try:
        while True:
            while not framer.pending:
                yield MORE
            received += framer.take_rest()
            if (found := parse(received)) is not None:
                address, length = found
                framer.feed(received[length:])
                return address
    except FrameError as error:
        # There is nobody to tell: it is the balancer that speaks, or a client that should have come through it.
        raise ClientFault(PROTOCOL_VIOLATION, None, f"PROXY protocol: {error}") from error


def parse(received: bytes) -> Found | None:
    """What a header says; None if it is not all here yet. Raises FrameError if it is none."""
    if V1_START.startswith(received[: len(V1_START)]):
        return _parse_v1(received) if len(received) >= len(V1_START) else None
    if V2_SIGNATURE.startswith(received[: len(V2_SIGNATURE)]):
        return _parse_v2(received) if len(received) >= V2_PREFIX_BYTES else None
    raise FrameError("no header")


def _parse_v1(received: bytes) -> Found | None:
    line, end, _ = received[:V1_LONGEST].partition(V1_END)
    if not end:
        if len(received) >= V1_LONGEST:
            raise FrameError(f"no end of the line in {V1_LONGEST} bytes")
        return None
    length = len(line) + len(V1_END)
    if V1_UNKNOWN.fullmatch(line):
        return "", length
    matched = V1_LINE.fullmatch(line)
    if matched is None:
        raise FrameError("a line that is none of version 1")
    family, source, destination, *ports = (part.decode("ascii") for part in matched.groups())
    if any(int(port) > MAX_PORT for port in ports):
        raise FrameError("a port above 65535")
    parse_address = IPv4Address if family == "4" else IPv6Address
    try:
        parse_address(destination)
        return _written(parse_address(source), int(ports[0])), length
    except ValueError:
        raise FrameError(f"an address that is none of TCP{family}") from None


def _parse_v2(received: bytes) -> Found | None:
    version, command = divmod(received[12], 16)
    family = received[13]
    length = int.from_bytes(received[14:16])
    if version != V2_VERSION or command not in (V2_LOCAL, V2_PROXY):
        raise FrameError(f"version and command 0x{received[12]:02x}")
    if length > V2_LONGEST:
        raise FrameError(f"a header of length {length}, allowed are {V2_LONGEST}")
    # Of LOCAL, which a balancer's own checks send, nothing else counts.
    if command == V2_PROXY:
        if family != V2_UNSPECIFIED and family not in V2_ADDRESS_BYTES:
            raise FrameError(f"family and protocol 0x{family:02x}")
        if length < V2_ADDRESS_BYTES.get(family, 0):
            raise FrameError(f"a header of length {length}, too short for family 0x{family:02x}")
    whole = V2_PREFIX_BYTES + length
    if len(received) < whole:
        return None
    if command == V2_LOCAL or family == V2_UNSPECIFIED:
        return "", whole
    _check_additions(received[:whole], V2_PREFIX_BYTES + V2_ADDRESS_BYTES[family])
    body = received[V2_PREFIX_BYTES:whole]
    if family == V2_TCP4:
        return _written(IPv4Address(body[:4]), int.from_bytes(body[8:10])), whole
    if family == V2_TCP6:
        return _written(IPv6Address(body[:16]), int.from_bytes(body[32:34])), whole
    # A Unix socket of the balancer's machine says nothing about who may use one of ours.
    return "", whole


def _check_additions(header: bytes, at: int) -> None:
    """Walks what stands behind the addresses, and holds the header to its checksum if it has one."""
    while at < len(header):
        start = at + TLV_HEADER_BYTES
        size = int.from_bytes(header[at + 1 : start])
        if start + size > len(header):
            raise FrameError("an addition that goes beyond the header")
        if header[at] == TLV_CRC32C:
            zeroed = header[:start] + bytes(size) + header[start + size :]
            if size != CRC32C_BYTES or int.from_bytes(header[start : start + size]) != crc32c(zeroed):
                raise FrameError("a checksum that is wrong")
        at = start + size


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ CRC32C_OF_BYTE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _written(address: IPv4Address | IPv6Address, port: int) -> str:
    """As `Accepted` has it; IPv4 is IPv4, however it arrives."""
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return f"[{address}]:{port}" if mapped is None else f"{mapped}:{port}"
    return f"{address}:{port}"
