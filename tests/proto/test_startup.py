"""The startup phase with bytes alone: what clients may ask for, and what a stranger's packet must not do."""

from __future__ import annotations

import functools

import pytest

from pgauthproxy import _wire
from pgauthproxy.errors import ClientFault
from pgauthproxy.proto import messages, startup
from pgauthproxy.proto.startup import CancelRequest, StartupMessage, parse_parameters
from pgauthproxy.proto.steps import Login, StartTls, TlsSide
from pgauthproxy.stages import Encryption, Parameters
from tests.sans_io import TLS, Outcome, Raised, Turn, Waiting, encrypted, run, run_in_every_chunking

MAX_PACKET = 200
ALICE: Parameters = ((b"user", b"alice"), (b"database", b"shop"))
SSL, GSSENC = (_wire.startup_packet(code, b"") for code in (messages.SSL_REQUEST, messages.GSSENC_REQUEST))
REFUSED, ACCEPTED = b"N", b"S"
SILENT_CLOSE = None
CLIENT_HELLO = b"\x16\x03\x01\x00\x05\x01\0\0\x01\x03"
SECURE = encrypted()


def packet(*pairs: tuple[bytes, bytes], code: int = messages.PROTOCOL_3_0) -> bytes:
    return _wire.startup_packet(code, body(*pairs))


def body(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"".join(name + b"\0" + value + b"\0" for name, value in pairs) + b"\0"


def receive(
    framer: _wire.Framer, tls: TlsSide | None = None, *, required: bool = False
) -> Login[StartupMessage | CancelRequest]:
    return startup.receive_startup(framer, MAX_PACKET, tls, tls_required=required)


def received(*turns: Turn) -> Outcome:
    """How the startup phase goes, in every chunking, where no TLS is to be had."""
    return run_in_every_chunking(receive, turns)


def received_with_tls(*turns: Turn, required: bool = False, encryption: Encryption = SECURE) -> Outcome:
    """The same where it is."""
    login = functools.partial(receive, tls=TLS, required=required)
    return run_in_every_chunking(login, turns, encryption=encryption)


def wanted(parameters: Parameters, minor: int = 0, encryption: Encryption | None = None) -> StartupMessage:
    return StartupMessage(parameters, minor, encryption)


def client_fault(sqlstate: str, told: str | None, detail: str | None = None) -> Raised:
    return Raised("client", sqlstate, told.encode() if told is not None else None, detail or told or "")


@pytest.mark.parametrize(
    ("requests", "answers"),
    [
        ([], ()),
        ([SSL], (REFUSED,)),
        ([GSSENC], (REFUSED,)),
        ([SSL, GSSENC], (REFUSED, REFUSED)),
        ([GSSENC, SSL], (REFUSED, REFUSED)),
    ],
)
def test_a_client_may_ask_for_each_encryption_once_before_it_says_who_it_is(
    requests: list[bytes], answers: tuple[bytes, ...]
) -> None:
    assert received(*requests, packet(*ALICE)) == Outcome(answers, wanted(ALICE))
    key = bytes(range(8))
    cancel = _wire.startup_packet(messages.CANCEL_REQUEST, key)
    assert received(*requests, cancel) == Outcome(answers, CancelRequest(key))


@pytest.mark.parametrize("again", [SSL, GSSENC])
@pytest.mark.parametrize("between", [[], [SSL], [GSSENC]])
def test_asking_again_is_an_unknown_protocol(again: bytes, between: list[bytes]) -> None:
    asked = [again, *(request for request in between if request != again), again]
    outcome = received(*asked)
    minor = int.from_bytes(again[4:]) & 0xFFFF
    told = f"unsupported frontend protocol 1234.{minor}: server supports 3.0 to 3.2"
    assert outcome == Outcome((REFUSED,) * (len(asked) - 1), client_fault("0A000", told))


@pytest.mark.parametrize(("request_", "name"), [(SSL, "SSL request"), (GSSENC, "GSSAPI encryption request")])
@pytest.mark.parametrize("behind", [b"\0", packet(*ALICE), SSL, b"\x16\x03\x01"])
def test_bytes_in_plain_behind_an_encryption_request_end_it_before_any_answer(
    request_: bytes, name: str, behind: bytes
) -> None:
    framer = _wire.Framer({})
    outcome = run(receive(framer), framer, [request_ + behind])
    assert outcome == Outcome((), client_fault("08P01", f"received unencrypted data after {name}"))


def test_what_is_sent_behind_the_startup_packet_is_left_in_order() -> None:
    rest = _wire.message(messages.PASSWORD_MESSAGE, b"secret\0") + b"Q\0\0\0\x0dselect 1\0"
    assert received(packet(*ALICE) + rest) == Outcome((), wanted(ALICE), rest)


@pytest.mark.parametrize("size", [0, 1, 4, 8, 32, MAX_PACKET - 8])
def test_a_cancel_request_has_a_key_of_any_length(size: int) -> None:
    key = bytes(range(size))
    assert received(_wire.startup_packet(messages.CANCEL_REQUEST, key)) == Outcome((), CancelRequest(key))


@pytest.mark.parametrize(
    ("code", "version"),
    [
        (0, "0.0"),
        (2 << 16, "2.0"),
        ((2 << 16) + 0xFFFF, "2.65535"),
        (4 << 16, "4.0"),
        ((1234 << 16) + 5677, "1234.5677"),
        ((1234 << 16) + 5681, "1234.5681"),
        ((1 << 32) - 1, "65535.65535"),
    ],
)
def test_a_protocol_that_is_none_of_ours_is_refused(code: int, version: str) -> None:
    told = f"unsupported frontend protocol {version}: server supports 3.0 to 3.2"
    assert received(packet(*ALICE, code=code)) == Outcome((), client_fault("0A000", told))


@pytest.mark.parametrize("minor", [0, 1, 2])
def test_a_minor_version_up_to_ours_is_spoken_without_a_word(minor: int) -> None:
    outcome = received(packet(*ALICE, code=messages.PROTOCOL_3_0 + minor))
    assert outcome == Outcome((), wanted(ALICE, minor))


@pytest.mark.parametrize("minor", [3, 4, 9999, 0xFFFF])
def test_a_higher_minor_version_is_negotiated_down(minor: int) -> None:
    answer = _wire.message(ord("v"), b"\0\x03\0\x02" + bytes(4))
    outcome = received(packet(*ALICE, code=messages.PROTOCOL_3_0 + minor))
    assert outcome == Outcome((answer,), wanted(ALICE, 2))


@pytest.mark.parametrize(("minor", "spoken"), [(0, 0), (2, 2), (9999, 2)])
def test_protocol_options_are_named_as_unknown_and_are_no_parameters(minor: int, spoken: int) -> None:
    pairs = (ALICE[0], (b"_pq_.compression", b"on"), ALICE[1], (b"_pq_.", b""))
    version = b"\0\x03" + spoken.to_bytes(2)
    answer = _wire.message(ord("v"), version + b"\0\0\0\x02" + b"_pq_.compression\0_pq_.\0")
    outcome = received(packet(*pairs, code=messages.PROTOCOL_3_0 + minor))
    assert outcome == Outcome((answer,), wanted(ALICE, spoken))


@pytest.mark.parametrize("length", [0, 1, 4, 7, MAX_PACKET + 1, 10_001, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_closes_without_a_word(length: int) -> None:
    detail = f"startup packet of length {length}, allowed are 8 to {MAX_PACKET}"
    assert received(length.to_bytes(4)) == Outcome((), client_fault("08P01", SILENT_CLOSE, detail))


@pytest.mark.parametrize(
    "stranger", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"SSH-2.0-OpenSSH_9.2\r\n"]
)
def test_whoever_speaks_another_language_is_closed_without_a_word(stranger: bytes) -> None:
    outcome = received(stranger)
    assert isinstance(outcome.ending, Raised)
    assert (outcome.ending.sqlstate, outcome.ending.told) == ("08P01", SILENT_CLOSE)


def test_a_packet_of_the_longest_length_is_read() -> None:
    longest = packet((b"user", b"x" * (MAX_PACKET - len(packet((b"user", b""))))))
    assert len(longest) == MAX_PACKET
    assert isinstance(received(longest).ending, StartupMessage)


def test_nothing_less_than_a_packet_is_acted_upon() -> None:
    whole = packet(*ALICE)
    for size in range(len(whole)):
        framer = _wire.Framer({})
        assert run(receive(framer), framer, [whole[:size]]) == Outcome((), Waiting())


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", SSL[:5]])
def test_a_client_that_stops_in_between_is_waited_for(sent: bytes) -> None:
    assert received(SSL, sent) == Outcome((REFUSED,), Waiting())


NO_USER = ("28000", "no PostgreSQL user name specified in startup packet")
NO_TERMINATOR = ("08P01", "invalid startup packet layout: expected terminator as last byte")
NO_VALUE = ("08P01", "invalid startup packet layout: a name without a value")
BAD_CHARACTER = ("08P01", "invalid character in startup parameter")
RESERVED = ("08P01", "reserved name of startup parameter")
TWICE = ("08P01", "startup parameter given twice")


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        (b"", NO_TERMINATOR),
        (b"\0", NO_USER),
        (b"\0\0", NO_VALUE),
        (b"\0\0\0", NO_TERMINATOR),
        (b"user\0alice", NO_TERMINATOR),
        (b"user\0alice\0", NO_TERMINATOR),
        (b"user\0alice\0x", NO_TERMINATOR),
        (b"user\0alice\0\0x", NO_TERMINATOR),
        (b"user\0alice\0\0x\0", NO_TERMINATOR),
        (b"user\0alice\0\0\0", NO_VALUE),
        (b"user\0alice\0\0x\0\0", NO_TERMINATOR),
        (b"user\0", NO_TERMINATOR),
        (b"user\0\0", NO_VALUE),
        (b"user\0\0\0", NO_USER),
        (b"\0alice\0\0", NO_TERMINATOR),
        (b"user\0alice\0database\0\0", NO_VALUE),
        (b"database\0shop\0\0", NO_USER),
        (b"USER\0alice\0\0", NO_USER),
        (b"user\0\0database\0shop\0\0", NO_USER),
        (b"user\0alice\0user\0mallory\0\0", TWICE),
        (b"user\0alice\0user\0alice\0\0", TWICE),
        (b"user\0alice\0x\0\0x\0\0\0", TWICE),
        (b"user\0alice\0_pq_.a\0b\0_pq_.a\0b\0\0", TWICE),
        (b"user\0ali\nce\0\0", BAD_CHARACTER),
        (b"user\0alice\r\0\0", BAD_CHARACTER),
        (b"user\0alice\0a\nb\0c\0\0", BAD_CHARACTER),
        (b"user\0alice\0a\rb\0c\0\0", BAD_CHARACTER),
        (b"user\0alice\0a=b\0c\0\0", BAD_CHARACTER),
        (b"user\0alice\0=\0c\0\0", BAD_CHARACTER),
        (b"user\0alice\0_SOURCE_CRED\0x\0\0", RESERVED),
        (b"user\0alice\0_source_cred\0x\0\0", RESERVED),
        (b"user\0alice\0_SoUrCe_\0\0\0", RESERVED),
        (b"user\0alice\0_META_TARGET_HOST\0evil:1\0\0", RESERVED),
        (b"user\0alice\0_meta_x\0\0\0", RESERVED),
    ],
)
def test_a_packet_that_could_mislead_is_refused(layout: bytes, fault: tuple[str, str]) -> None:
    sqlstate, told = fault
    assert received(_wire.startup_packet(messages.PROTOCOL_3_0, layout)).ending == client_fault(sqlstate, told)


@pytest.mark.parametrize(
    ("pairs"),
    [
        ALICE,
        ((b"user", b"a"), (b"x", b"")),
        ((b"options", b"-c a=b"), (b"user", b"alice")),
        ((b"user", b"alice"), (b"User", b"bob")),
        ((b"user", b"\xff\xfe\x0b\x0c\x1c\x85"),),
        ((b"user", b"_SOURCE_CRED"), (b"x_META_", b"_META_"), (b"_META", b"x"), (b" _META_", b"x")),
        ((b"user", "Ὀδυσσεύς".encode()), ("né".encode(), b"x")),
    ],
)
def test_parameters_are_taken_as_they_are_and_in_their_order(pairs: Parameters) -> None:
    assert parse_parameters(body(*pairs)) == pairs


def test_no_fault_quotes_what_was_sent() -> None:
    for layout in (
        b"user\0hunter2\n\0\0",
        b"hunter2=\0\0user\0x\0\0",
        b"hunter2\0x\0hunter2\0x\0user\0x\0\0",
        b"hunter2",
    ):
        with pytest.raises(ClientFault) as raised:
            parse_parameters(layout)
        assert "hunter2" not in str(raised.value)
        assert b"hunter2" not in (raised.value.told or b"")


@pytest.mark.parametrize("turns", [[packet(*ALICE)], [SSL, packet(*ALICE)]])
def test_a_login_that_is_over_asks_for_nothing_more(turns: list[bytes]) -> None:
    framer = _wire.Framer({})
    login = receive(framer)
    assert isinstance(run(login, framer, turns).ending, StartupMessage)
    with pytest.raises(StopIteration):
        next(login)


def test_a_smaller_bound_is_kept_too() -> None:
    whole = packet(*ALICE)
    for bound, ending in ((len(whole), StartupMessage), (len(whole) - 1, Raised)):
        bounded = functools.partial(startup.receive_startup, max_packet=bound, tls=None, tls_required=False)
        assert isinstance(run_in_every_chunking(bounded, [whole]).ending, ending)


UPGRADED = (ACCEPTED, StartTls(TLS))


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(("before", "refused"), [([], ()), ([GSSENC], (REFUSED,))])
def test_an_ssl_request_is_accepted_and_the_startup_packet_comes_in_tls(
    before: list[bytes], refused: tuple[bytes, ...], *, required: bool
) -> None:
    outcome = received_with_tls(*before, SSL, packet(*ALICE) + b"behind", required=required)
    assert outcome == Outcome((*refused, *UPGRADED), wanted(ALICE, 0, SECURE), b"behind")


@pytest.mark.parametrize("alpn", ["", "postgresql"])
def test_behind_an_ssl_request_no_application_protocol_is_needed(alpn: str) -> None:
    agreed = encrypted(alpn=alpn)
    assert received_with_tls(SSL, packet(*ALICE), encryption=agreed).ending == wanted(ALICE, 0, agreed)


@pytest.mark.parametrize("required", [False, True])
def test_tls_from_the_first_byte_on_is_known_by_it(*, required: bool) -> None:
    outcome = received_with_tls(CLIENT_HELLO, packet(*ALICE, code=messages.PROTOCOL_3_2) + b"x", required=required)
    assert outcome == Outcome((StartTls(TLS),), wanted(ALICE, 2, SECURE), b"x")


@pytest.mark.parametrize("alpn", ["", "http/1.1", "POSTGRESQL", "postgresql2"])
def test_direct_tls_without_our_application_protocol_is_refused(alpn: str) -> None:
    outcome = received_with_tls(CLIENT_HELLO, packet(*ALICE), encryption=encrypted(alpn=alpn))
    detail = "direct TLS without the application protocol postgresql"
    assert outcome == Outcome((StartTls(TLS),), client_fault("08P01", detail))


@pytest.mark.parametrize("first", [SSL, CLIENT_HELLO], ids=["behind a request", "direct"])
@pytest.mark.parametrize("again", [SSL, GSSENC], ids=["TLS", "GSSAPI"])
def test_inside_tls_no_encryption_is_to_be_had(first: bytes, again: bytes) -> None:
    outcome = received_with_tls(first, again, packet(*ALICE))
    minor = int.from_bytes(again[4:]) & 0xFFFF
    told = f"unsupported frontend protocol 1234.{minor}: server supports 3.0 to 3.2"
    assert outcome == Outcome(UPGRADED if first == SSL else UPGRADED[1:], client_fault("0A000", told))


def test_direct_tls_comes_first_or_not_at_all() -> None:
    hello_length = int.from_bytes(CLIENT_HELLO[:4])
    detail = f"startup packet of length {hello_length}, allowed are 8 to {MAX_PACKET}"
    outcome = received_with_tls(GSSENC, CLIENT_HELLO)
    assert outcome == Outcome((REFUSED,), client_fault("08P01", SILENT_CLOSE, detail))


@pytest.mark.parametrize("behind", [b"\0", packet(*ALICE), CLIENT_HELLO])
@pytest.mark.parametrize("required", [False, True])
def test_bytes_in_plain_behind_an_ssl_request_are_not_taken_for_tls(behind: bytes, *, required: bool) -> None:
    framer = _wire.Framer({})
    outcome = run(receive(framer, TLS, required=required), framer, [SSL + behind], encryption=SECURE)
    assert outcome == Outcome((), client_fault("08P01", "received unencrypted data after SSL request"))


NO_TLS = client_fault("28000", "connection requires TLS (sslmode=require or better)")


@pytest.mark.parametrize("turns", [[packet(*ALICE)], [GSSENC, packet(*ALICE)], [packet(*ALICE, code=0x3270F)]])
def test_where_tls_is_required_a_plain_client_is_refused_before_anything_is_read_of_it(turns: list[bytes]) -> None:
    outcome = received_with_tls(*turns, required=True)
    assert outcome == Outcome((REFUSED,) * (len(turns) - 1), NO_TLS)
    assert received_with_tls(_wire.startup_packet(messages.PROTOCOL_3_0, b"garbage"), required=True).ending == NO_TLS


def test_where_tls_is_to_be_had_a_plain_client_is_let_in_too() -> None:
    assert received_with_tls(packet(*ALICE)) == Outcome((), wanted(ALICE))


@pytest.mark.parametrize("required", [False, True])
def test_a_cancel_request_may_come_in_plain_or_in_tls(*, required: bool) -> None:
    key = bytes(range(8))
    cancel = _wire.startup_packet(messages.CANCEL_REQUEST, key)
    assert received_with_tls(cancel, required=required) == Outcome((), CancelRequest(key))
    assert received_with_tls(SSL, cancel, required=required) == Outcome(UPGRADED, CancelRequest(key))
    assert received_with_tls(CLIENT_HELLO, cancel, required=required) == Outcome(UPGRADED[1:], CancelRequest(key))


@pytest.mark.parametrize("tls", [None, TLS])
def test_before_the_first_byte_nothing_is_said_or_begun(tls: TlsSide | None) -> None:
    framer = _wire.Framer({})
    assert run(receive(framer, tls), framer, []) == Outcome((), Waiting())
