"""The authenticator's lines: what goes out comes back, and whatever comes back is a mapping or nonsense."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy.auth import fields
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Question
from pgauthproxy.net import listen
from pgauthproxy.net.listen import ListenError
from pgauthproxy.ops.log import MAX_VALUE, printable
from pgauthproxy.proto import startup
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Mapping, Started, TargetTls

MAX_LINES = 20
BYTES = [bytes([byte]) for byte in range(256)]
VALUES = st.lists(st.sampled_from([byte for byte in BYTES if byte not in (b"\0", b"\r", b"\n")]), max_size=12).map(
    b"".join
)
NAMES = VALUES.filter(lambda name: name and b"=" not in name and not name.upper().startswith(startup.RESERVED_PREFIXES))
META = st.sampled_from(
    [
        b"_META_TARGET_HOST",
        b"_META_TARGET_CRED",
        b"_META_SESSION_SECONDS",
        b"_META_IDLE_TIMEOUT",
        b"_META_IDLE_IN_TRANSACTION_TIMEOUT",
        b"_META_SOURCE_VERIFIER",
        b"_SOURCE_X",
        *fields.TARGET_TLS,
    ]
)
HOSTS = st.sampled_from([b"db:5432", b"db", b"[::1]:1", b"/run:5432", b"a,b", b"a:x", b"[", b""])
LINES = st.lists(
    st.builds(lambda name, value: name + b"=" + value, META | NAMES | st.just(b"user"), HOSTS | VALUES)
    | st.binary(max_size=20),
    max_size=10,
)
OUTPUTS = st.builds(lambda lines, end: b"\n".join(lines) + end, LINES, st.sampled_from([b"", b"\n", b"\r\n"]))


@given(st.dictionaries(NAMES, VALUES, max_size=6), VALUES, st.binary(min_size=4, max_size=4))
def test_an_authenticator_reads_exactly_what_the_client_sent(
    parameters: dict[bytes, bytes], credential: bytes, salt: bytes
) -> None:
    started = Started(Accepted("7f", "192.0.2.1:1"), tuple(parameters.items()))
    lines = fields.encode_question(Question(started, "md5", Secret(credential), salt))
    assert lines.endswith(b"\n")
    pairs = fields.split_lines(lines, MAX_LINES)
    assert list(pairs.items()) == [
        *parameters.items(),
        (b"_SOURCE_ADDR", b"192.0.2.1:1"),
        (b"_SOURCE_METHOD", b"md5"),
        (b"_SOURCE_SESSION", b"7f"),
        (b"_SOURCE_CRED", credential),
        (b"_SOURCE_SALT", salt.hex().encode()),
    ]


@given(st.dictionaries(NAMES, VALUES, max_size=6), VALUES.filter(bool))
def test_an_echoed_question_maps_to_the_same_parameters(parameters: dict[bytes, bytes], user: bytes) -> None:
    parameters[b"user"] = user
    started = Started(Accepted("7f", "192.0.2.1:1"), tuple(parameters.items()))
    echoed = fields.encode_question(Question(started, "md5", Secret(b"x"), bytes(4)))
    mapping = fields.decode_mapping(echoed + b"_META_TARGET_HOST=db\n", MAX_LINES)
    assert mapping.parameters == tuple(parameters.items())
    assert mapping.hosts == (Address("db", 5432),)


@given(OUTPUTS | st.binary(max_size=100))
def test_any_output_is_a_mapping_or_nonsense(output: bytes) -> None:
    told = fields.decode_error(output, MAX_LINES)
    assert told is None or told
    try:
        mapping = fields.decode_mapping(output, MAX_LINES)
    except NonsenseError:
        return
    assert isinstance(mapping, Mapping)
    assert mapping.hosts
    assert mapping.user
    assert all(0 < host.port < 65536 and host.host for host in mapping.hosts)
    assert mapping.verifier is None or mapping.verifier
    assert all(field in TargetTls.__struct_fields__ and value for field, value in mapping.tls)
    for name, value in mapping.parameters:
        assert not name.startswith((b"_SOURCE_", b"_META_"))
        assert b"\0" not in name + value
        assert b"\n" not in name + value


@given(st.text("abc:[]%.-_/,1234567890 \u0661\u00b2", max_size=20) | st.text(max_size=12))
def test_any_text_is_hosts_or_nonsense_and_hosts_are_written_as_they_are_read(text: str) -> None:
    try:
        hosts = fields.parse_hosts(text.encode(errors="surrogatepass"))
    except NonsenseError:
        return
    again = ",".join(str(host) for host in hosts if not host.is_socket_folder)
    if again:
        assert fields.parse_hosts(again.encode()) == tuple(host for host in hosts if not host.is_socket_folder)


@given(st.text("abc:[]%./1234567890", max_size=20) | st.text(max_size=12))
def test_any_text_is_an_address_to_listen_on_or_is_named(text: str) -> None:
    for given_text in (text, "unix:" + text):
        try:
            said = listen.parse_listen(given_text).port
        except ListenError as error:
            said = str(error)
        assert said in given_text or given_text in said


@given(st.binary(max_size=400) | st.text(max_size=400))
def test_any_value_is_printable_in_the_log(value: bytes | str) -> None:
    shown = printable(value)
    assert shown.isprintable()
    assert len(shown) <= MAX_VALUE + 1
