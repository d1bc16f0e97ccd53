"""A TLS connection without I/O: two channels back to back in memory, in any chunking, and peers that break off."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgauthproxy._tls import Channel, describe
from pgauthproxy.errors import TlsError
from tests.channels import (
    NAME,
    VERSIONS,
    Cut,
    Renegotiating,
    authority,
    channels,
    client_context,
    in_pieces_of,
    server_context,
    shake_hands,
    shaken,
)
from tests.conftest import resident_bytes

RECORD = 16384
MEGABYTE = 1 << 20
for_versions = pytest.mark.parametrize("version", VERSIONS)
either_way = pytest.mark.parametrize("speaker", ["client", "server"])
SIZES = [0, 1, 2, 100, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD + 5, MEGABYTE]


def in_order(pair: tuple[Channel, Channel], speaker: str) -> tuple[Channel, Channel]:
    """Who speaks and who listens."""
    client, server = pair
    return (client, server) if speaker == "client" else (server, client)


def cut_at(point: int) -> Cut:
    return lambda data: [part for part in (data[:point], data[point:]) if part]


def flights(version: str) -> int:
    """The longest that either side says at once in a handshake."""
    longest = 0

    def measure(data: bytes) -> list[bytes]:
        nonlocal longest
        longest = max(longest, len(data))
        return [data]

    client, server = channels(version)
    shake_hands(client, server, measure)
    return longest


@for_versions
def test_a_handshake_ends_the_same_wherever_it_is_cut(version: str) -> None:
    for point in range(1, flights(version)):
        client, server = channels(version)
        shake_hands(client, server, cut_at(point))
        assert (client.tls.version(), server.tls.version()) == (f"TLSv{version}",) * 2
        assert server.decrypt(client.encrypt(b"question")) == b"question"
        assert client.decrypt(server.encrypt(b"answer")) == b"answer"


@for_versions
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_handshake_ends_the_same_in_small_pieces(version: str, size: int) -> None:
    client, server = channels(version)
    assert not client.established
    assert not server.established
    shake_hands(client, server, in_pieces_of(size))
    assert client.established
    assert server.established
    assert client.tls.selected_alpn_protocol() == server.tls.selected_alpn_protocol() == "postgresql"


@for_versions
def test_what_a_client_says_at_the_end_of_its_handshake_is_read_behind_it(version: str) -> None:
    client, server = channels(version)
    answer = client.handshake(b"")
    said = b""
    while not client.established:
        answer = server.handshake(answer)
        answer = client.handshake(answer)
    if server.established:
        said = server.decrypt(answer + client.encrypt(b"question"))
    else:
        server.handshake(answer + client.encrypt(b"question"))
        said = server.decrypt(b"")
    assert server.established
    assert said == b"question"


@for_versions
@either_way
@pytest.mark.parametrize("size", SIZES)
def test_data_of_any_size_comes_through(version: str, speaker: str, size: int) -> None:
    said, heard = in_order(shaken(version), speaker)
    data = bytes(range(251)) * (size // 251) + b"\xff" * (size % 251)
    records = said.encrypt(data)
    assert heard.decrypt(records) == data
    # No record is longer than TLS allows, and nothing is added but their frames.
    assert len(records) <= len(data) + (size // RECORD + 1) * 64
    assert heard.decrypt(b"") == b""
    assert heard.take_output() == said.take_output() == b""


@for_versions
@pytest.mark.parametrize("size", [1, 4, 5, 6, 1000, RECORD, RECORD + 21, RECORD + 22, 65_536])
def test_records_come_through_in_pieces_of_any_size(version: str, size: int) -> None:
    client, server = shaken(version)
    data = bytes(range(256)) * (20 if size < 100 else 800)
    records = client.encrypt(data[:1]) + client.encrypt(data[1:])
    assert b"".join(map(server.decrypt, in_pieces_of(size)(records))) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_records_may_lie_in_any_memory(kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    client, server = shaken()
    assert server.decrypt(kind(client.encrypt(b"question"))) == b"question"


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.booleans(), st.binary(max_size=40) | st.sampled_from([b"x" * RECORD, b"y" * 40_000]))),
    st.integers(1, 2000),
    st.sampled_from(list(VERSIONS)),
)
def test_whoever_speaks_when_both_hear_what_was_said(
    sayings: list[tuple[bool, bytes]], size: int, version: str
) -> None:
    client, server = shaken(version)
    for by_client, data in sayings:
        said, heard = (client, server) if by_client else (server, client)
        assert b"".join(map(heard.decrypt, in_pieces_of(size)(said.encrypt(data)))) == data


@for_versions
def test_a_channel_that_has_moved_much_is_no_bigger_than_one_that_has_not(version: str) -> None:
    client, server = shaken(version)
    data = bytes(4 * MEGABYTE)
    assert server.decrypt(client.encrypt(data)) == data
    before = resident_bytes()
    for _ in range(20):
        assert server.decrypt(client.encrypt(data)) == data
    assert resident_bytes() - before < 2 * len(data)


@for_versions
@either_way
def test_a_goodbye_is_the_end_of_what_is_said_and_of_nothing_else(version: str, speaker: str) -> None:
    said, heard = in_order(shaken(version), speaker)
    records = said.encrypt(b"last words") + said.say_goodbye()
    assert not heard.finished
    assert heard.decrypt(records) == b"last words"
    assert heard.finished
    assert not said.finished
    answer = heard.encrypt(b"answer")
    assert said.decrypt(answer) == b"answer"
    assert said.decrypt(heard.say_goodbye()) == b""
    assert said.finished


@for_versions
def test_an_answer_comes_through_wherever_a_goodbye_cuts_it(version: str) -> None:
    size = len(shaken(version)[0].encrypt(b"answer"))
    for point in range(size + 1):
        client, server = shaken(version)
        answer = server.encrypt(b"answer")
        heard = client.decrypt(answer[:point])
        server.decrypt(client.say_goodbye())
        heard += client.decrypt(answer[point:])
        heard += client.decrypt(server.encrypt(b", and more") + server.say_goodbye())
        assert heard == b"answer, and more"
        assert client.finished


@for_versions
def test_a_goodbye_is_said_once_and_only_behind_a_handshake(version: str) -> None:
    client, server = channels(version)
    assert client.say_goodbye() == b""
    shake_hands(client, server)
    assert client.say_goodbye()
    assert client.say_goodbye() == b""


@for_versions
def test_behind_its_own_goodbye_a_channel_says_nothing_more(version: str) -> None:
    client, _ = shaken(version)
    client.say_goodbye()
    with pytest.raises(TlsError):
        client.encrypt(b"one thing more")


@for_versions
@pytest.mark.parametrize("behind", [b"x", b"x" * 70_000, b"\x17\x03\x03\x00\x01x", b"\x15\x03\x03\x00\x02\x02\x28"])
def test_what_comes_behind_a_goodbye_is_dropped(version: str, behind: bytes) -> None:
    client, server = shaken(version)
    goodbye = client.say_goodbye()
    assert server.decrypt(goodbye + behind) == b""
    assert server.decrypt(behind) == b""
    assert client.decrypt(server.encrypt(b"answer")) == b"answer"


def test_what_comes_behind_a_goodbye_takes_no_memory() -> None:
    client, server = shaken()
    server.decrypt(client.say_goodbye())
    flood = bytes(65_536)
    before = resident_bytes()
    for _ in range(1000):
        assert server.decrypt(flood) == b""
    assert resident_bytes() - before < 16 * MEGABYTE


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"\x16\x03\x01\x00\x05garba",
    b"\x16\x03\x01\xff\xff" + b"\0" * 20,
    b"\x17\x03\x03\x00\x10" + b"\0" * 16,
    b"\x80\x2e\x01\x00\x02" + b"\0" * 50,
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"\0" * 200,
    b"\xff" * 200,
]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("size", [1, 1000])
def test_garbage_instead_of_a_handshake_ends_it_on_both_sides(garbage: bytes, size: int) -> None:
    for number in range(2):
        channel = channels()[number]
        channel.handshake(b"")
        with pytest.raises(TlsError) as raised:
            deque(map(channel.handshake, in_pieces_of(size)(garbage)))
        assert str(raised.value)
        assert not channel.established


@for_versions
@either_way
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_behind_a_handshake_ends_the_connection(version: str, speaker: str, garbage: bytes) -> None:
    said, heard = in_order(shaken(version), speaker)
    with pytest.raises(TlsError) as raised:
        assert heard.decrypt(garbage) == b""
    assert str(raised.value)
    if raised.value.alert:
        with pytest.raises(TlsError, match="ALERT"):
            said.decrypt(raised.value.alert)


@for_versions
def test_a_record_with_any_bit_wrong_ends_the_connection_and_the_peer_is_told(version: str) -> None:
    size = len(shaken(version)[0].encrypt(b"question"))
    for at in range(5, size):
        client, server = shaken(version)
        record = bytearray(client.encrypt(b"question"))
        record[at] ^= 1
        with pytest.raises(TlsError, match=r"^DECRYPTION_FAILED_OR_BAD_RECORD_MAC$") as raised:
            server.decrypt(record)
        with pytest.raises(TlsError, match="ALERT_BAD_RECORD_MAC"):
            client.decrypt(raised.value.alert)


@for_versions
def test_a_record_that_is_said_twice_ends_the_connection(version: str) -> None:
    client, server = shaken(version)
    record = client.encrypt(b"transfer 1 euro")
    with pytest.raises(TlsError, match="BAD_RECORD_MAC"):
        server.decrypt(record + record)


@for_versions
def test_behind_a_broken_record_nothing_is_said_or_heard(version: str) -> None:
    client, server = shaken(version)
    record = client.encrypt(b"question")
    with pytest.raises(TlsError):
        server.decrypt(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(TlsError):
        server.encrypt(b"answer")
    with pytest.raises(TlsError):
        server.decrypt(record)
    assert server.say_goodbye() == b""


@for_versions
def test_a_record_that_is_cut_off_is_no_goodbye(version: str) -> None:
    client, server = shaken(version)
    records = client.encrypt(b"first") + client.encrypt(b"second")
    assert server.decrypt(records[:-1]) == b"first"
    assert not server.finished


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_client_that_trusts_nobody_says_so(version: str) -> None:
    _, server = channels(version)
    client = Channel(client_context(trusts=False), server_side=False, server_hostname=NAME)
    with pytest.raises(TlsError, match=r"^CERTIFICATE_VERIFY_FAILED: unable to get local issuer") as raised:
        shake_hands(client, server)
    with pytest.raises(TlsError, match=r"^TLSV1_ALERT_UNKNOWN_CA$"):
        server.handshake(raised.value.alert)


def test_a_client_that_meets_another_than_it_looks_for_says_so() -> None:
    _, server = channels()
    client = Channel(client_context(), server_side=False, server_hostname="other.example.com")
    with pytest.raises(TlsError, match=r"^CERTIFICATE_VERIFY_FAILED: Hostname mismatch.*other\.example\.com") as raised:
        shake_hands(client, server)
    with pytest.raises(TlsError, match=r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_UNKNOWN)"):
        server.handshake(raised.value.alert)


@for_versions
def test_a_client_without_the_certificate_that_is_asked_for_is_told(version: str) -> None:
    client = channels()[0]
    server = Channel(server_context(version, asks=True), server_side=True)
    with pytest.raises(TlsError, match=r"^PEER_DID_NOT_RETURN_A_CERTIFICATE$") as raised:
        shake_hands(client, server)
    with pytest.raises(TlsError, match="ALERT"):
        # With TLS 1.3 a client is through before the server has looked at its certificate.
        (client.decrypt if client.established else client.handshake)(raised.value.alert)


def test_a_client_with_the_certificate_that_is_asked_for_is_let_in() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    authority().issue_cert("alice@example.com").configure_cert(context)
    client = Channel(context, server_side=False, server_hostname=NAME)
    server = Channel(server_context(asks=True), server_side=True)
    shake_hands(client, server)
    presented = server.tls.getpeercert()
    assert presented is not None
    assert presented["subjectAltName"] == (("email", "alice@example.com"),)


def test_two_that_speak_no_version_in_common_part() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    client = Channel(context, server_side=False, server_hostname=NAME)
    server = Channel(server_context("1.2"), server_side=True)
    with pytest.raises(TlsError, match=r"^UNSUPPORTED_PROTOCOL$") as raised:
        server.handshake(client.handshake(b""))
    with pytest.raises(TlsError, match="ALERT_PROTOCOL_VERSION"):
        client.handshake(raised.value.alert)


def test_renegotiation_is_answered_with_no_and_nothing_else(tmp_path: Path) -> None:
    asking = Renegotiating(tmp_path)
    for _ in range(3):
        assert asking.server.decrypt(asking.asks()) == b""
        refusal = asking.server.take_output()
        assert refusal[0] == 0x15
        assert len(refusal) < 40
    assert asking.server.established
    assert asking.server.take_output() == b""


def test_a_session_can_be_resumed() -> None:
    context = client_context()
    first, server = Channel(context, server_side=False, server_hostname=NAME), channels()[1]
    shake_hands(first, server)
    assert first.tls.session is not None
    assert first.tls.session.has_ticket
    again = Channel(context, server_side=False, server_hostname=NAME, session=first.tls.session)
    shake_hands(again, channels()[1])
    assert again.tls.session_reused
    assert not first.tls.session_reused


@pytest.mark.parametrize("name", ["", ".example.com", "a" * 64 + ".example.com", "a..b", "\ud800"])
def test_a_name_that_nobody_can_have_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"server_hostname|codec"):
        Channel(client_context(), server_side=False, server_hostname=name)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ssl.SSLEOFError(8, "EOF occurred"), "SSLEOFError"),
        (ValueError("of its own"), "ValueError"),
        (ssl.SSLError(1, "[SSL] unknown"), "SSLError"),
    ],
)
def test_an_error_without_a_reason_is_called_by_its_name(error: Exception, says: str) -> None:
    assert describe(error) == says
