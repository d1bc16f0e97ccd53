"""SCRAM-SHA-256 as a client: RFC 7677's example, another implementation's server, and every attribute wrong once."""

from __future__ import annotations

import base64
import hashlib

import pytest
import scramp

from pgauthproxy.proto import scram
from pgauthproxy.proto.scram import Challenge, ScramClient, ScramError

NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = NONCE + b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SALT = base64.b64decode(b"W22ZaJ0SNY7soEsUEjb6gQ==")
SERVER_FIRST = b"r=" + SERVER_NONCE + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
MAX_ITERATIONS = 10_000

# Code points of RFC 3454's tables, and what they are here for.
SOFT_HYPHEN = "\u00ad"
ZERO_WIDTH_SPACE = "\u200b"
NO_BREAK_SPACE = "\u00a0"
ALEF = "\u0627"


def exchange(user: bytes = b"") -> ScramClient:
    """An exchange; with a user it is as RFC 5802 has it. PostgreSQL has taken that from the startup packet."""
    client = ScramClient(NONCE)
    client._bare = b"n=" + user + b",r=" + NONCE
    return client


def test_the_name_is_left_to_the_startup_packet() -> None:
    assert ScramClient(NONCE).first() == exchange().first() == b"n,,n=,r=" + NONCE


def test_the_example_of_rfc_7677_holds() -> None:
    client = exchange(b"user")
    assert client.first() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    assert challenge == Challenge(SERVER_NONCE, SALT, 4096, SERVER_FIRST)
    salted = scram.salted_password(b"pencil", challenge.salt, challenge.iterations)
    assert client.final(challenge, salted) == (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    client.verify(SERVER_FINAL)


@pytest.mark.parametrize("password", ["pencil", "pässwörd", "ⅸ¨Á x", "пароль", "密码", "a,=b", " "])
def test_a_server_of_another_make_agrees(password: str) -> None:
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    known = mechanism.make_auth_info(password, salt=SALT)
    server = mechanism.make_server(lambda _user: known)
    client = exchange(b"alice")
    server.set_client_first(client.first().decode())
    challenge = client.challenge(server.get_server_first().encode(), MAX_ITERATIONS)
    salted = scram.salted_password(password.encode(), challenge.salt, challenge.iterations)
    server.set_client_final(client.final(challenge, salted).decode())
    client.verify(server.get_server_final().encode())


def test_without_the_password_neither_side_can_prove_anything() -> None:
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    known = mechanism.make_auth_info("pencil", salt=SALT)
    server = mechanism.make_server(lambda _user: known)
    client = exchange(b"alice")
    server.set_client_first(client.first().decode())
    challenge = client.challenge(server.get_server_first().encode(), MAX_ITERATIONS)
    with pytest.raises(scramp.ScramException):
        server.set_client_final(client.final(challenge, scram.salted_password(b"pen", SALT, 4096)).decode())
    with pytest.raises(ScramError, match="wrong server signature"):
        client.verify(b"v=" + base64.b64encode(bytes(32)))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b",,",
        b"r=" + SERVER_NONCE,
        b"r=" + SERVER_NONCE + b",s=QUJD",
        b"r=" + SERVER_NONCE + b",i=4096,s=QUJD",
        b"s=QUJD,r=" + SERVER_NONCE + b",i=4096",
        b"m=ext,r=" + SERVER_NONCE + b",s=QUJD,i=4096",
        b"R=" + SERVER_NONCE + b",s=QUJD,i=4096",
        b" r=" + SERVER_NONCE + b",s=QUJD,i=4096",
        b"e=other-error",
        b"\0",
    ],
)
def test_a_first_message_of_another_form_is_malformed(message: bytes) -> None:
    with pytest.raises(ScramError, match=r"^malformed server-first-message$"):
        exchange().challenge(message, MAX_ITERATIONS)


def test_extensions_behind_the_iterations_are_let_be_and_signed_with_the_rest() -> None:
    message = SERVER_FIRST + b",x=new,y=newer"
    assert exchange().challenge(message, MAX_ITERATIONS).message == message


@pytest.mark.parametrize(
    "nonce",
    [b"", NONCE, NONCE[:-1], b"x" + NONCE, NONCE.lower() + b"x", NONCE + b"x" * 1025, NONCE[:-1] + b"P" + b"x"],
)
def test_a_nonce_that_does_not_extend_ours_or_is_too_long_is_refused(nonce: bytes) -> None:
    with pytest.raises(ScramError, match="does not extend ours, or is too long"):
        exchange().challenge(b"r=" + nonce + b",s=QUJD,i=4096", MAX_ITERATIONS)


def test_a_nonce_may_be_as_long_as_allowed() -> None:
    nonce = NONCE.ljust(scram.MAX_NONCE, b"x")
    assert exchange().challenge(b"r=" + nonce + b",s=QUJD,i=1", MAX_ITERATIONS).nonce == nonce
    with pytest.raises(ScramError, match="too long"):
        exchange().challenge(b"r=" + nonce + b"x,s=QUJD,i=1", MAX_ITERATIONS)


@pytest.mark.parametrize("added", [b" ", b"\0", b"\x7f", b"\x80", b"\n"])
def test_a_nonce_that_is_not_printable_is_refused(added: bytes) -> None:
    with pytest.raises(ScramError, match="nonce is not printable"):
        exchange().challenge(b"r=" + NONCE + added + b",s=QUJD,i=4096", MAX_ITERATIONS)


@pytest.mark.parametrize("salt", [b"A", b"QUJ", b"QU JD", b"QUJD\n", b"Q-_D", b"QUJ\xff", b"=QUJ"])
def test_a_salt_that_is_not_base64_is_refused(salt: bytes) -> None:
    with pytest.raises(ScramError, match=r"^the server's salt is not base64$"):
        exchange().challenge(b"r=" + SERVER_NONCE + b",s=" + salt + b",i=4096", MAX_ITERATIONS)


def test_an_empty_salt_is_refused() -> None:
    with pytest.raises(ScramError, match=r"^the server's salt is empty$"):
        exchange().challenge(b"r=" + SERVER_NONCE + b",s=,i=4096", MAX_ITERATIONS)


@pytest.mark.parametrize("iterations", [1, 4096, MAX_ITERATIONS])
def test_iterations_within_the_bounds_are_taken(iterations: int) -> None:
    message = b"r=" + SERVER_NONCE + b",s=QUJD,i=%d" % iterations
    assert exchange().challenge(message, MAX_ITERATIONS).iterations == iterations


@pytest.mark.parametrize(
    "iterations",
    [b"", b"0", b"-1", b"+1", b" 1", b"1_0", b"1.0", b"x", b"\xb2", b"10001", b"9" * 9, b"9" * 10, b"1" * 5000],
)
def test_iterations_out_of_bounds_are_refused_before_any_is_computed(iterations: bytes) -> None:
    with pytest.raises(ScramError, match=r"^the server asks for an iteration count outside 1 to 10000$"):
        exchange().challenge(b"r=" + SERVER_NONCE + b",s=QUJD,i=" + iterations, MAX_ITERATIONS)


@pytest.fixture
def answered() -> ScramClient:
    """An exchange that has sent its proof."""
    client = exchange()
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    client.final(challenge, scram.salted_password(b"pencil", SALT, 1))
    return client


@pytest.mark.parametrize("message", [b"", b"v", b"V=AAAA", b" v=AAAA", b"e=invalid-proof", b"x=1,v=AAAA"])
def test_a_final_message_of_another_form_is_malformed(answered: ScramClient, message: bytes) -> None:
    with pytest.raises(ScramError, match=r"^malformed server-final-message$"):
        answered.verify(message)


@pytest.mark.parametrize("signature", [b"A", b"AAA", b"A===", b"AA AA", b"\xff", b"AAAA\n"])
def test_a_signature_that_is_not_base64_is_refused(answered: ScramClient, signature: bytes) -> None:
    with pytest.raises(ScramError, match=r"^the server's signature is not base64$"):
        answered.verify(b"v=" + signature)


def test_a_signature_with_any_bit_wrong_or_any_byte_missing_is_refused(answered: ScramClient) -> None:
    right = answered._server_signature
    answered.verify(b"v=" + base64.b64encode(right))
    answered.verify(b"v=" + base64.b64encode(right) + b",x=extension")
    wrong = [bytes(32), b"", right[:-1], right + b"\0", right[::-1]]
    wrong += [(int.from_bytes(right) ^ (1 << bit)).to_bytes(32) for bit in range(256)]
    for signature in wrong:
        with pytest.raises(ScramError, match=r"^wrong server signature$"):
            answered.verify(b"v=" + base64.b64encode(signature))


@pytest.mark.parametrize("signature", [b"", b"AAAA", base64.b64encode(bytes(32))])
def test_nothing_is_verified_before_the_proof_was_sent(signature: bytes) -> None:
    with pytest.raises(ScramError, match=r"^wrong server signature$"):
        exchange().verify(b"v=" + signature)


def test_the_salted_password_is_pbkdf2_of_the_prepared_one() -> None:
    assert scram.salted_password("I\u00adX".encode(), b"salt", 2) == hashlib.pbkdf2_hmac("sha256", b"IX", b"salt", 2)


@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        # RFC 4013, section 3.
        ("I" + SOFT_HYPHEN + "X", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        # Spaces, and what is mapped to nothing; a zero-width space is both.
        ("a" + NO_BREAK_SPACE + "b", "a b"),
        ("a\u3000b", "a b"),
        ("a" + ZERO_WIDTH_SPACE + "b", "a b"),
        ("a\u200db\ufeff", "ab"),
        # Composed and compatible forms.
        ("\u0041\u030a", "\u00c5"),
        ("\u212b", "\u00c5"),
        ("\ufb01", "fi"),
        ("\u1e9b\u0323", "\u1e69"),
        ("\uff21", "A"),
        # Right to left: alone, and round what has no direction.
        (ALEF + "1" + ALEF, ALEF + "1" + ALEF),
        ("\u05d0\u05b0\u05d1", "\u05d0\u05b0\u05d1"),
        # A letter in form, though not in direction, that becomes right-to-left: judged before it does.
        ("a\u2135b", "a\u05d0b"),
        ("\ufb1d", "\u05d9\u05b4"),
    ],
)
def test_a_password_is_prepared_as_postgresql_prepares_it(password: str, prepared: str) -> None:
    assert scram.saslprep(password.encode()) == prepared.encode()


@pytest.mark.parametrize(
    "password",
    [
        b"",
        b"plain ascii",
        b"foo\x07bar",
        b"\x7f",
        # RFC 4013, section 3: prohibited characters; PostgreSQL uses such a password as it is.
        "\u00e4\x07".encode(),
        f"foo{ALEF}1bar".encode(),
        f"{ALEF}1".encode(),
        f"1{ALEF}".encode(),
        "\u00e4\u0080".encode(),
        "\u00e4\ue000".encode(),
        "\u00e4\ufdd0".encode(),
        "\u00e4\ufffd".encode(),
        "\u00e4\u2ff0".encode(),
        "\u00e4\u0340".encode(),
        "\u00e4\u200e".encode(),
        "\u00e4\U000e0001".encode(),
        # Unassigned in Unicode 3.2.
        "\u00e4\u0221".encode(),
        "\u00e4\U0001f600".encode(),
        # Nothing is left of it.
        SOFT_HYPHEN.encode(),
        # No UTF-8.
        b"\xff",
        b"caf\xe9",
        b"\xed\xa0\x80",
        b"\xc0\x80",
    ],
)
def test_a_password_that_cannot_be_prepared_is_used_as_it_is(password: bytes) -> None:
    assert scram.saslprep(password) == password
