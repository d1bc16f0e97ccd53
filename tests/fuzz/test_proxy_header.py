"""Any bytes before a client's first: an address or an error, the same in any chunking, and nothing else is taken."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy import _wire
from pgauthproxy.auth.networks import Networks
from pgauthproxy.proto.proxy_header import receive_proxy_header
from tests.sans_io import Outcome, Raised, Waiting, run
from tests.wire import proxy_v1, proxy_v2, raw_proxy_v2

PIECES = st.sampled_from(
    [
        b"PROXY ",
        b"TCP4 ",
        b"TCP6 ",
        b"UNKNOWN",
        b"1.2.3.4 ",
        b"::1 ",
        b"65535",
        b"0",
        b" ",
        b"\r\n",
        b"\r",
        b"\n",
        b"\0",
    ]
)
BODIES = st.binary(max_size=60) | st.builds(bytes, st.sampled_from([12, 36, 216]))
HEADERS = (
    st.lists(PIECES | st.binary(max_size=3), max_size=12).map(b"".join)
    | st.builds(raw_proxy_v2, st.sampled_from([0x20, 0x21, 0x22, 0x11]), st.integers(0, 255), BODIES)
    | st.binary(max_size=40)
)
PORTS = st.integers(0, 65535)


def receive(data: bytes, cuts: list[int]) -> Outcome:
    points = sorted(cut % (len(data) + 1) for cut in cuts)
    chunks = [data[start:end] for start, end in zip([0, *points], [*points, len(data)], strict=True)]
    framer = _wire.Framer({})
    return run(receive_proxy_header(framer), framer, [data], lambda turn: [chunk for chunk in chunks if chunk])


@given(HEADERS, st.binary(max_size=30), st.lists(st.integers(0, 500), max_size=6))
def test_any_bytes_give_the_same_in_any_chunking(header: bytes, rest: bytes, cuts: list[int]) -> None:
    data = header + rest
    outcome = receive(data, cuts)
    whole = receive(data, [])
    assert outcome.ending == whole.ending
    match outcome.ending:
        case Raised(told=told):
            assert told is None
        case Waiting():
            assert len(data) < 16 + 4096
        case address:
            # What the rest of the gateway makes of an address must not fail with one that came this way.
            assert not address or Networks(("0.0.0.0/0", "::/0")).has(address)
            assert outcome.rest == whole.rest
            assert data.endswith(outcome.rest)


@given(st.ip_addresses(), st.ip_addresses(v=4), st.ip_addresses(v=6), PORTS, st.binary(max_size=30))
def test_what_a_balancer_says_is_what_is_heard(
    source: ipaddress.IPv4Address | ipaddress.IPv6Address,
    v4: ipaddress.IPv4Address,
    v6: ipaddress.IPv6Address,
    port: int,
    rest: bytes,
) -> None:
    mapped = source.ipv4_mapped if isinstance(source, ipaddress.IPv6Address) else None
    plain = mapped or source
    written = f"[{plain}]:{port}" if plain.version == 6 else f"{plain}:{port}"
    destination = str(v4 if source.version == 4 else v6)
    for header in (proxy_v1(str(source), port, destination), proxy_v2(str(source), port, destination)):
        outcome = receive(header + rest, [5])
        assert (outcome.ending, outcome.rest) == (written, rest)
