"""The lines of the authenticator contract: what is written, what is read, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pgauthproxy.auth import fields
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Question
from pgauthproxy.secret import Secret
from pgauthproxy.stages import (
    Accepted,
    Address,
    Certificate,
    Encryption,
    FromClient,
    Mapping,
    Parameters,
    Password,
    Started,
    StoredMd5,
    TargetTls,
)

MAX_LINES = 8
MD5 = b"md5" + b"0123456789abcdef" * 2
HOST_LINE = b"_META_TARGET_HOST=db:5432\n"
ANSWER = HOST_LINE + b"user=reader\n"


def question(parameters: Parameters = ((b"user", b"alice"),), **changes: Any) -> Question:
    values: dict[str, Any] = {"method": "md5", "credential": Secret(MD5), "salt": b"\x01\xab\x00\xff"} | changes
    return Question(Started(Accepted("2a", "192.0.2.1:50000"), parameters), **values)


def test_a_question_is_the_parameters_in_order_and_then_our_own_fields() -> None:
    parameters = ((b"user", b"alice"), (b"database", b"shop"), (b"application_name", b"psql = the best"))
    assert fields.encode_question(question(parameters)) == (
        b"user=alice\n"
        b"database=shop\n"
        b"application_name=psql = the best\n"
        b"_SOURCE_ADDR=192.0.2.1:50000\n"
        b"_SOURCE_METHOD=md5\n"
        b"_SOURCE_SESSION=2a\n"
        b"_SOURCE_CRED=" + MD5 + b"\n"
        b"_SOURCE_SALT=01ab00ff\n"
    )


def test_the_salt_of_cleartext_mode_is_eight_zeros() -> None:
    asked = question(method="cleartext", credential=Secret(b"p=q"), salt=bytes(4))
    assert b"_SOURCE_METHOD=cleartext\n" in fields.encode_question(asked)
    assert fields.encode_question(asked).endswith(b"_SOURCE_CRED=p=q\n_SOURCE_SALT=00000000\n")


CERTIFICATE = Certificate(
    subject="CN=alice,O=Example\\, Inc.",
    issuer="CN=Example CA",
    serial="7f",
    alternative_names="DNS:alice.example.com,email:alice@example.com",
    fingerprint="ab" * 32,
)


def over_tls(certificate: Certificate | None = None, server_name: str = "") -> Encryption:
    return Encryption("TLSv1.3", "TLS_AES_256_GCM_SHA384", server_name, "postgresql", b"binding", certificate)


def tls_lines(encryption: Encryption) -> list[bytes]:
    started = Started(Accepted("2a", "192.0.2.1:50000"), ((b"user", b"alice"),), encryption)
    lines = fields.encode_question(Question(started, "md5", Secret(MD5), b"salt")).split(b"\n")
    return [line for line in lines if line.startswith(b"_SOURCE_TLS")]


def test_what_is_known_by_tls_stands_in_lines_of_its_own() -> None:
    assert tls_lines(over_tls()) == [b"_SOURCE_TLS=TLSv1.3"]
    assert tls_lines(over_tls(server_name="db.example.com")) == [
        b"_SOURCE_TLS=TLSv1.3",
        b"_SOURCE_TLS_SNI=db.example.com",
    ]
    assert tls_lines(over_tls(CERTIFICATE)) == [
        b"_SOURCE_TLS=TLSv1.3",
        b"_SOURCE_TLS_SUBJECT=CN=alice,O=Example\\, Inc.",
        b"_SOURCE_TLS_ISSUER=CN=Example CA",
        b"_SOURCE_TLS_SERIAL=7f",
        b"_SOURCE_TLS_SAN=DNS:alice.example.com,email:alice@example.com",
        b"_SOURCE_TLS_FINGERPRINT=" + b"ab" * 32,
    ]


def test_without_tls_there_is_no_line_of_it() -> None:
    assert b"_SOURCE_TLS" not in fields.encode_question(question())


@pytest.mark.parametrize("method", ["scram-sha-256", "cert"])
def test_a_client_that_has_not_answered_has_no_credential_and_no_salt(method: str) -> None:
    asked = fields.encode_question(question(method=method, credential=None, salt=b""))
    assert asked == (
        b"user=alice\n_SOURCE_ADDR=192.0.2.1:50000\n_SOURCE_METHOD=" + method.encode() + b"\n_SOURCE_SESSION=2a\n"
    )


@pytest.mark.parametrize("field", ["subject", "issuer", "serial", "alternative_names", "fingerprint"])
def test_no_line_of_a_certificate_can_forge_another(field: str) -> None:
    values = dict.fromkeys(Certificate.__struct_fields__, "x") | {field: "x\nuser=mallory"}
    with pytest.raises(ValueError, match=r"^a line break in a field of the authenticator's input$"):
        tls_lines(over_tls(Certificate(**values)))


def test_values_pass_unchanged_whatever_their_encoding() -> None:
    value = bytes(byte for byte in range(1, 256) if byte not in b"\r\n")
    assert fields.encode_question(question(((b"user", value),))).startswith(b"user=" + value + b"\n")


@pytest.mark.parametrize(
    "asked",
    [
        question(((b"user", b"alice\nuser=mallory"),)),
        question(((b"user\n", b"alice"),)),
        question(credential=Secret(b"pass\nword")),
    ],
)
def test_a_line_break_that_got_so_far_is_an_error_that_does_not_show_it(asked: Question) -> None:
    with pytest.raises(ValueError, match=r"^a line break in a field of the authenticator's input$"):
        fields.encode_question(asked)


@pytest.mark.parametrize(
    ("output", "pairs"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"a=b", [(b"a", b"b")]),
        (b"a=b\n", [(b"a", b"b")]),
        (b"a=b\r\n", [(b"a", b"b")]),
        (b"a=b\r\r\n", [(b"a", b"b\r")]),
        (b"a=b\rc=d\n", [(b"a", b"b\rc=d")]),
        (b"a=\n", [(b"a", b"")]),
        (b"a=b=c=\n", [(b"a", b"b=c=")]),
        (b" a = b \n", [(b" a ", b" b ")]),
        (b"=b\n", [(b"", b"b")]),
        (b"nothing to see here\na=b\n", [(b"a", b"b")]),
        (b"a=1\nb=2\na=3\n", [(b"b", b"2"), (b"a", b"3")]),
        (b"a=\xff\xfe\x0b\x0c\x1c\x85\xe2\x80\xa8b\n", [(b"a", b"\xff\xfe\x0b\x0c\x1c\x85\xe2\x80\xa8b")]),
    ],
)
def test_lines_end_at_lf_and_split_at_their_first_equals_sign(output: bytes, pairs: list[tuple[bytes, bytes]]) -> None:
    assert list(fields.split_lines(output, MAX_LINES).items()) == pairs


def test_as_many_lines_as_allowed_and_not_one_more() -> None:
    lines = [b"%d=x" % number for number in range(MAX_LINES)]
    assert len(fields.split_lines(b"\n".join(lines), MAX_LINES)) == MAX_LINES
    assert len(fields.split_lines(b"\n".join(lines) + b"\n", MAX_LINES)) == MAX_LINES
    for output in (b"\n".join(lines) + b"\n\n", b"\n".join(lines) + b"\nx", b"\n" * (MAX_LINES + 1)):
        with pytest.raises(NonsenseError, match=f"^over {MAX_LINES} lines of output$"):
            fields.split_lines(output, MAX_LINES)


def test_a_nul_anywhere_is_nonsense() -> None:
    for output in (b"\0", b"a=\0", b"no pair\0\na=b\n"):
        with pytest.raises(NonsenseError, match=r"^a NUL in the output$"):
            fields.split_lines(output, MAX_LINES)


def test_all_that_is_not_the_gateways_goes_to_the_target_in_order() -> None:
    output = ANSWER + b"database=shop\noptions=-c a=b\nX_META_=1\n_meta_x=2\n_source_y=3\n"
    assert fields.decode_mapping(output, MAX_LINES) == Mapping(
        hosts=(Address("db", 5432),),
        parameters=(
            (b"user", b"reader"),
            (b"database", b"shop"),
            (b"options", b"-c a=b"),
            (b"X_META_", b"1"),
            (b"_meta_x", b"2"),
            (b"_source_y", b"3"),
        ),
        credential=None,
    )


def test_what_was_echoed_and_what_is_not_known_is_dropped() -> None:
    output = ANSWER + b"_SOURCE_CRED=x\n_SOURCE_=x\n_META_UNHEARD_OF=x\n_META_=x\n_META_ERROR=x\n"
    assert fields.decode_mapping(output, MAX_LINES).parameters == ((b"user", b"reader"),)


def plain(value: bytes) -> Password:
    return Password(Secret(value))


@pytest.mark.parametrize(
    ("lines", "credential"),
    [
        (b"", None),
        (b"_META_TARGET_CRED=\n", None),
        (b"_META_TARGET_CRED=" + MD5, StoredMd5(Secret(MD5))),
        (b"_META_TARGET_CRED=" + MD5 + b"\r\n", StoredMd5(Secret(MD5))),
        (b"_META_TARGET_CRED=secret", plain(b"secret")),
        (b"_META_TARGET_CRED=" + MD5.upper(), plain(MD5.upper())),
        (b"_META_TARGET_CRED=" + MD5[:-1], plain(MD5[:-1])),
        (b"_META_TARGET_CRED=" + MD5 + b"0", plain(MD5 + b"0")),
        (b"_META_TARGET_CRED= " + MD5, plain(b" " + MD5)),
        (b"_META_TARGET_PASSWORD=" + MD5, plain(MD5)),
        (b"_META_TARGET_PASSWORD=", plain(b"")),
        (b"_META_TARGET_CRED=" + MD5 + b"\n_META_TARGET_PASSWORD=secret", plain(b"secret")),
        (b"_META_TARGET_CRED=\xff\xfe", plain(b"\xff\xfe")),
        (b"_META_TARGET_CRED=client", FromClient()),
        (b"_META_TARGET_CRED=Client", plain(b"Client")),
        (b"_META_TARGET_CRED=client ", plain(b"client ")),
        (b"_META_TARGET_PASSWORD=client", plain(b"client")),
        (b"_META_TARGET_CRED=client\n_META_TARGET_PASSWORD=secret", plain(b"secret")),
    ],
)
def test_a_credential_is_what_it_looks_like_unless_it_is_called_a_password(
    lines: bytes, credential: Password | StoredMd5 | FromClient | None
) -> None:
    assert fields.decode_mapping(ANSWER + lines, MAX_LINES).credential == credential


SCRAM = b"SCRAM-SHA-256$4096:c2FsdA==$" + b"A" * 43 + b"=:" + b"A" * 43 + b"="


@pytest.mark.parametrize(
    ("lines", "verifier"),
    [
        (b"", None),
        (b"_META_SOURCE_VERIFIER=", None),
        (b"_META_SOURCE_VERIFIER=" + SCRAM, Secret(SCRAM)),
        (b"_META_SOURCE_VERIFIER=" + MD5 + b"\r\n", Secret(MD5)),
    ],
)
def test_a_verifier_is_handed_on_as_it_is(lines: bytes, verifier: Secret | None) -> None:
    assert fields.decode_mapping(ANSWER + lines, MAX_LINES).verifier == verifier


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (b"", "no user for the target"),
        (HOST_LINE, "no user for the target"),
        (HOST_LINE + b"user=\n", "no user for the target"),
        (HOST_LINE + b"User=x\n", "no user for the target"),
        (b"user=x\n", "no _META_TARGET_HOST"),
        (b"user=x\n_META_TARGET_HOST=\n", "no _META_TARGET_HOST"),
        (b"user=x\n_meta_target_host=db\n", "no _META_TARGET_HOST"),
        (ANSWER + b"=x\n", "a line without a name before its ="),
        (ANSWER + b"database=\0\n", "a NUL in the output"),
        (ANSWER + b"x\n" * MAX_LINES, f"over {MAX_LINES} lines of output"),
    ],
)
def test_an_answer_of_which_no_session_can_be_made_is_nonsense(output: bytes, says: str) -> None:
    with pytest.raises(NonsenseError, match=f"^{re.escape(says)}$"):
        fields.decode_mapping(output, MAX_LINES)


TLS_FIELDS = [
    ("_META_TARGET_TLS", "mode", "verify-full"),
    ("_META_TARGET_CA", "ca", "/etc/ca.pem"),
    ("_META_TARGET_CERT", "cert", "/etc/client.crt"),
    ("_META_TARGET_KEY", "key", "/etc/client.key"),
    ("_META_TARGET_TLS_NEGOTIATION", "negotiation", "direct"),
    ("_META_TARGET_TLS_NAME", "name", "db.example.com"),
]


@pytest.mark.parametrize(("name", "field", "value"), TLS_FIELDS)
def test_a_wish_for_tls_names_what_it_is_about(name: str, field: str, value: str) -> None:
    assert field in TargetTls.__struct_fields__
    output = ANSWER + f"{name}={value}\n".encode()
    assert fields.decode_mapping(output, MAX_LINES).tls == ((field, value),)


def test_wishes_for_tls_come_in_one_order_and_empty_ones_are_none() -> None:
    lines = [f"{name}={value}\n" for name, _, value in TLS_FIELDS]
    wished = tuple((field, value) for _, field, value in TLS_FIELDS)
    assert {field for field, _ in wished} == set(TargetTls.__struct_fields__)
    for ordered in (lines, lines[::-1]):
        assert fields.decode_mapping(ANSWER + "".join(ordered).encode(), 20).tls == wished
    emptied = "".join(f"{name}=\n" for name, _, _ in TLS_FIELDS).encode()
    assert fields.decode_mapping(ANSWER + emptied, 20).tls == ()


@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "Disable", "off", " ", "allow"])
def test_a_mode_is_handed_on_as_it_is(mode: str) -> None:
    output = ANSWER + f"_META_TARGET_TLS={mode}".encode()
    assert fields.decode_mapping(output, MAX_LINES).tls == (("mode", mode),)


@pytest.mark.parametrize("name", [name.encode() for name, _, _ in TLS_FIELDS])
def test_a_wish_that_is_not_utf8_is_nonsense(name: bytes) -> None:
    with pytest.raises(NonsenseError, match=r"^a _META_TARGET_ field for TLS that is not UTF-8$"):
        fields.decode_mapping(ANSWER + name + b"=\xff", MAX_LINES)


@pytest.mark.parametrize(("text", "seconds"), [(b"", None), (b"1", 1.0), (b"0.5", 0.5), (b"1e3", 1000.0)])
def test_the_life_of_a_session_is_a_number_of_seconds(text: bytes, seconds: float | None) -> None:
    output = ANSWER + b"_META_SESSION_SECONDS=" + text
    assert fields.decode_mapping(output, MAX_LINES).session_seconds == seconds


IDLE_FIELDS = [
    (b"_META_IDLE_TIMEOUT", "idle_timeout"),
    (b"_META_IDLE_IN_TRANSACTION_TIMEOUT", "idle_in_transaction_timeout"),
]


@pytest.mark.parametrize(("text", "seconds"), [(b"", None), (b"0", 0.0), (b"0.5", 0.5), (b"1e3", 1000.0)])
@pytest.mark.parametrize(("name", "field"), IDLE_FIELDS)
def test_how_long_a_session_may_idle_is_a_number_of_seconds_or_zero(
    name: bytes, field: str, text: bytes, seconds: float | None
) -> None:
    assert getattr(fields.decode_mapping(ANSWER + name + b"=" + text, MAX_LINES), field) == seconds


@pytest.mark.parametrize("text", [b"-1", b"nan", b"inf", b"1e9", b"5min"])
@pytest.mark.parametrize(("name", "field"), IDLE_FIELDS)
def test_idling_for_what_is_no_time_is_nonsense_that_is_not_quoted(name: bytes, field: str, text: bytes) -> None:
    with pytest.raises(NonsenseError, match=rf"^{name.decode()} is no number of seconds$"):
        fields.decode_mapping(ANSWER + name + b"=" + text, MAX_LINES)


@pytest.mark.parametrize("text", [b"0", b"-1", b"nan", b"inf", b"-inf", b"1e9", b"1h", b"\xff", b"1,5", b"9" * 5000])
def test_a_life_that_is_no_positive_number_is_nonsense_that_is_not_quoted(text: bytes) -> None:
    with pytest.raises(NonsenseError, match=r"^_META_SESSION_SECONDS is no number of seconds$"):
        fields.decode_mapping(ANSWER + b"_META_SESSION_SECONDS=" + text, MAX_LINES)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (b"", None),
        (b"_META_ERROR=\n", None),
        (b"_META_ERROR=come back on Monday\n", b"come back on Monday"),
        (b"user=x\n_META_ERROR=a=b\r\n", b"a=b"),
        (b"_META_ERROR=\xff\n", b"\xff"),
        (b"_META_ERROR=x\n\0", None),
        (b"\n" * MAX_LINES + b"_META_ERROR=x\n", None),
    ],
)
def test_a_refusal_says_what_it_wants_if_it_can_be_read(output: bytes, told: bytes | None) -> None:
    assert fields.decode_error(output, MAX_LINES) == told


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (b"", None),
        (b"_META_ERROR=x\n", None),
        (b"_META_FAILED=\n", b""),
        (ANSWER + b"_META_FAILED=no directory\n", b"no directory"),
        (b"_META_FAILED=x\n\0", None),
        (b"\n" * MAX_LINES + b"_META_FAILED=x\n", None),
    ],
)
def test_a_failure_is_told_apart_from_a_refusal_if_it_can_be_read(output: bytes, said: bytes | None) -> None:
    assert fields.decode_failure(output, MAX_LINES) == said


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        (b"db", [("db", 5432)]),
        (b"db:", [("db", 5432)]),
        (b"db:1", [("db", 1)]),
        (b"db.example.com:65535", [("db.example.com", 65535)]),
        (b"my_db-1:05433", [("my_db-1", 5433)]),
        (b"192.0.2.1", [("192.0.2.1", 5432)]),
        (b"192.0.2.1:6000", [("192.0.2.1", 6000)]),
        (b"[::1]", [("::1", 5432)]),
        (b"[::1]:", [("::1", 5432)]),
        (b"[::1]:6000", [("::1", 6000)]),
        (b"[fe80::1%eth0]:6000", [("fe80::1%eth0", 6000)]),
        (b"::1", [("::1", 5432)]),
        (b"2001:db8::5432", [("2001:db8::5432", 5432)]),
        (b"/run/postgresql", [("/run/postgresql", 5432)]),
        (b"/run/postgresql:6000", [("/run/postgresql", 6000)]),
        (b"/tmp/with:colon:6000", [("/tmp/with:colon", 6000)]),
        ("/tmp/mit Umläuten".encode(), [("/tmp/mit Umläuten", 5432)]),
        (b"a:1,b:2", [("a", 1), ("b", 2)]),
        (b"a , [::1]:2,\t/run:3", [("a", 5432), ("::1", 2), ("/run", 3)]),
        (b"a,a", [("a", 5432), ("a", 5432)]),
    ],
)
def test_a_host_takes_all_its_forms(text: bytes, hosts: list[tuple[str, int]]) -> None:
    assert fields.parse_hosts(text) == tuple(Address(*host) for host in hosts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no _META_TARGET_HOST"),
        (b":5432", "_META_TARGET_HOST names no host"),
        (b"[]:5432", "_META_TARGET_HOST names no host"),
        (b"a,", "_META_TARGET_HOST names no host"),
        (b",a", "_META_TARGET_HOST names no host"),
        (b"a,,b", "_META_TARGET_HOST names no host"),
        (b" ", "_META_TARGET_HOST names no host"),
        (b"a b", "_META_TARGET_HOST names no host"),
        (b"user@db", "_META_TARGET_HOST names no host"),
        (b"postgres://db", "_META_TARGET_HOST with a port that is no port"),
        ("dä".encode(), "_META_TARGET_HOST names no host"),
        (b"relative/folder", "_META_TARGET_HOST names no host"),
        (b"[::1", "_META_TARGET_HOST with an unclosed bracket"),
        (b"[::1]6000", "_META_TARGET_HOST with an unclosed bracket"),
        (b"db:0", "_META_TARGET_HOST with a port that is no port"),
        (b"db:65536", "_META_TARGET_HOST with a port that is no port"),
        (b"db:-1", "_META_TARGET_HOST with a port that is no port"),
        (b"db:+1", "_META_TARGET_HOST with a port that is no port"),
        (b"db: 1", "_META_TARGET_HOST with a port that is no port"),
        (b"db:1_0", "_META_TARGET_HOST with a port that is no port"),
        (b"db:postgresql", "_META_TARGET_HOST with a port that is no port"),
        ("db:\u0661".encode(), "_META_TARGET_HOST with a port that is no port"),
        ("db:\u00b2".encode(), "_META_TARGET_HOST with a port that is no port"),
        (b"db:" + b"1" * 5000, "_META_TARGET_HOST with a port that is no port"),
        (b"[::1]:x", "_META_TARGET_HOST with a port that is no port"),
        (b"/run:x", "_META_TARGET_HOST with a port that is no port"),
        (b"/run:5432/x", "_META_TARGET_HOST with a port that is no port"),
        (b"db\xff", "_META_TARGET_HOST is not UTF-8"),
    ],
)
def test_a_host_that_is_none_is_nonsense_that_is_not_quoted(text: bytes, says: str) -> None:
    with pytest.raises(NonsenseError, match=f"^{re.escape(says)}$"):
        fields.parse_hosts(text)


def test_sessions_to_one_target_share_its_address() -> None:
    assert fields.parse_hosts(b"shared.example.com:1") is fields.parse_hosts(b"shared.example.com:1")
