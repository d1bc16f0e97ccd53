"""The header of a load balancer, as bytes alone: the address that it says, and what is no header."""

from __future__ import annotations

import struct
import time

import pytest

from pgauthproxy.errors import FrameError
from pgauthproxy.proto import proxy_header
from pgauthproxy.proto.proxy_header import V2_LONGEST, crc32c, parse, receive_proxy_header
from tests.sans_io import Raised, Waiting, run_in_every_chunking
from tests.wire import SSL_REQUEST, proxy_v1, proxy_v2, raw_proxy_v2, startup

IPV6 = "2001:db8::7"
UNIX_ADDRESSES = b"/client".ljust(108, b"\0") + b"/server".ljust(108, b"\0")
LONGEST_V1 = b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535".ljust(105, b" ") + b"\r\n"


def addition(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def with_checksum(*, off_by: int = 0, **addresses: str) -> bytes:
    additions = addition(0x02, b"db.example") + addition(0x03, bytes(4))
    header = proxy_v2(**addresses, additions=additions)
    return header[:-4] + struct.pack("!I", crc32c(header) ^ off_by)


ACCEPTED = {
    "version 1, IPv4": (proxy_v1(), "192.0.2.7:56324"),
    "version 1, IPv6": (proxy_v1(IPV6, destination="::1"), "[2001:db8::7]:56324"),
    "version 1, upper case": (proxy_v1("2001:DB8:0:0:0:0:0:7", destination="::1"), "[2001:db8::7]:56324"),
    "version 1, IPv4 in IPv6": (proxy_v1("::ffff:192.0.2.7", destination="::1"), "192.0.2.7:56324"),
    "version 1, ports at their ends": (b"PROXY TCP4 1.2.3.4 5.6.7.8 65535 0\r\n", "1.2.3.4:65535"),
    "version 1, unknown": (b"PROXY UNKNOWN\r\n", ""),
    "version 1, unknown with more": (LONGEST_V1, ""),
    "version 2, IPv4": (proxy_v2(), "192.0.2.7:56324"),
    "version 2, IPv6": (proxy_v2(IPV6, destination="::1"), "[2001:db8::7]:56324"),
    "version 2, IPv4 in IPv6": (proxy_v2("::ffff:192.0.2.7", destination="::1"), "192.0.2.7:56324"),
    "version 2, additions": (proxy_v2(additions=addition(0x01, b"h2") + addition(0x04, bytes(50))), "192.0.2.7:56324"),
    "version 2, a right checksum": (with_checksum(), "192.0.2.7:56324"),
    "version 2, a right checksum over IPv6": (with_checksum(source=IPV6, destination="::1"), "[2001:db8::7]:56324"),
    "version 2, local": (raw_proxy_v2(0x20, 0x00, b""), ""),
    "version 2, local with anything": (raw_proxy_v2(0x20, 0xFF, b"ignored"), ""),
    "version 2, unspecified": (raw_proxy_v2(0x21, 0x00, b"ignored"), ""),
    "version 2, a Unix socket": (raw_proxy_v2(0x21, 0x31, UNIX_ADDRESSES), ""),
}

NONE = {
    "a startup packet": (startup(), "no header"),
    "an SSLRequest": (SSL_REQUEST, "no header"),
    "a ClientHello": (b"\x16\x03\x01\x02\x00\x01", "no header"),
    "HTTP": (b"GET / HTTP/1.1\r\n", "no header"),
    "almost the first word": (b"PROXIES ", "no header"),
    "the first word in lower case": (b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n", "no header"),
    "almost the signature": (b"\r\n\r\n\0\r\nQUIT\r", "no header"),
    "UTF-8": ("PROXY TCP4 1.2.3.4 5.6.7.8 1 ²\r\n".encode(), "a line that is none of version 1"),
    "no addresses": (b"PROXY TCP4\r\n", "a line that is none of version 1"),
    "two spaces": (b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n", "a line that is none of version 1"),
    "more behind the ports": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n", "a line that is none of version 1"),
    "a port with a zero before it": (b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n", "a line that is none of version 1"),
    "a negative port": (b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n", "a line that is none of version 1"),
    "a port too large": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n", "a port above 65535"),
    "another family": (b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n", "a line that is none of version 1"),
    "unknown, with a tail": (b"PROXY UNKNOWNS\r\n", "a line that is none of version 1"),
    "an octet too large": (b"PROXY TCP4 1.2.3.256 5.6.7.8 1 2\r\n", "an address that is none of TCP4"),
    "an octet with a zero before it": (b"PROXY TCP4 1.2.3.04 5.6.7.8 1 2\r\n", "an address that is none of TCP4"),
    "no address of its family": (b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n", "an address that is none of TCP6"),
    "a wrong destination": (b"PROXY TCP4 1.2.3.4 5.6.7 1 2\r\n", "an address that is none of TCP4"),
    "a zone": (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "a line that is none of version 1"),
    "a line without end": (b"PROXY TCP4 ".ljust(107, b"1"), "no end of the line in 107 bytes"),
    "a line one byte too long": (LONGEST_V1[:-2] + b" \r\n", "no end of the line in 107 bytes"),
    "version 3": (raw_proxy_v2(0x31, 0x11, bytes(12)), "version and command 0x31"),
    "version 1 in the new form": (raw_proxy_v2(0x11, 0x11, bytes(12)), "version and command 0x11"),
    "an unknown command": (raw_proxy_v2(0x22, 0x11, bytes(12)), "version and command 0x22"),
    "an unknown family": (raw_proxy_v2(0x21, 0x41, bytes(12)), "family and protocol 0x41"),
    "datagrams": (raw_proxy_v2(0x21, 0x12, bytes(12)), "family and protocol 0x12"),
    "too short for IPv4": (raw_proxy_v2(0x21, 0x11, bytes(11)), "a header of length 11, too short for family 0x11"),
    "too short for IPv6": (raw_proxy_v2(0x21, 0x21, bytes(35)), "a header of length 35, too short for family 0x21"),
    "too short for Unix": (raw_proxy_v2(0x21, 0x31, bytes(215)), "a header of length 215, too short for family 0x31"),
    "an addition too long": (proxy_v2(additions=b"\x01\0\x02x"), "an addition that goes beyond the header"),
    "half an addition": (proxy_v2(additions=b"\x01\0"), "an addition that goes beyond the header"),
    "a wrong checksum": (with_checksum(off_by=1), "a checksum that is wrong"),
    "a checksum of the wrong size": (proxy_v2(additions=addition(0x03, b"\0")), "a checksum that is wrong"),
}


@pytest.mark.parametrize("rest", [b"", startup(), SSL_REQUEST, b"\x16\x03\x01", b"PROXY "], ids=repr)
@pytest.mark.parametrize("header", ACCEPTED)
def test_a_header_says_an_address_and_takes_nothing_of_what_follows(header: str, rest: bytes) -> None:
    sent, address = ACCEPTED[header]
    outcome = run_in_every_chunking(receive_proxy_header, [sent + rest], longest=len(sent) + 2)
    assert (outcome.ending, outcome.rest, outcome.sent) == (address, rest, ())


@pytest.mark.parametrize("sent", NONE)
def test_what_is_no_header_is_refused_and_nobody_is_answered(sent: str) -> None:
    data, reason = NONE[sent]
    outcome = run_in_every_chunking(receive_proxy_header, [data], longest=len(data))
    assert outcome.ending == Raised("client", "08P01", None, f"PROXY protocol: {reason}")
    assert outcome.sent == ()


@pytest.mark.parametrize("header", ACCEPTED)
def test_nothing_is_said_before_a_header_is_whole(header: str) -> None:
    sent, _ = ACCEPTED[header]
    for end in range(len(sent)):
        assert parse(sent[:end]) is None
    assert run_in_every_chunking(receive_proxy_header, [sent[:-1]]).ending == Waiting()


def test_a_length_that_is_too_large_is_refused_before_anything_of_it_is_here() -> None:
    allowed = raw_proxy_v2(0x21, 0x11, bytes(V2_LONGEST))
    too_long = raw_proxy_v2(0x21, 0x11, bytes(V2_LONGEST + 1))
    assert parse(allowed[:16]) is None
    with pytest.raises(FrameError, match="a header of length 4097, allowed are 4096"):
        parse(too_long[:16])
    with pytest.raises(FrameError, match="a header of length 65535"):
        parse(raw_proxy_v2(0x20, 0x00, bytes(65535))[:16])


def test_the_longest_header_costs_no_more_than_a_moment() -> None:
    header = proxy_v2(additions=addition(0x04, bytes(V2_LONGEST - 12 - 3 - 7)) + addition(0x03, bytes(4)))
    assert len(header) == 16 + V2_LONGEST
    header = header[:-4] + struct.pack("!I", crc32c(header))
    began = time.process_time()
    assert parse(header) == ("192.0.2.7:56324", len(header))
    assert time.process_time() - began < 1


def test_the_checksum_is_castagnolis() -> None:
    assert proxy_header.crc32c(b"123456789") == 0xE3069283
