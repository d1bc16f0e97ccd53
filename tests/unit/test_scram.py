"""SCRAM-SHA-256 on both sides: RFC 7677's example, another implementation as peer, and every attribute wrong once."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable

import pytest
import scramp

from pgauthproxy.proto import scram
from pgauthproxy.proto.scram import (
    BindingError,
    Challenge,
    Keys,
    ScramClient,
    ScramError,
    ScramServer,
    Verifier,
    WrongProofError,
)

NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = NONCE + b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SALT = base64.b64decode(b"W22ZaJ0SNY7soEsUEjb6gQ==")
SERVER_FIRST = b"r=" + SERVER_NONCE + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
CLIENT_FIRST = b"n,,n=user,r=" + NONCE
PROOF = b"dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
CLIENT_FINAL = b"c=biws,r=" + SERVER_NONCE + b",p=" + PROOF
MAX_ITERATIONS = 10_000

# Code points of RFC 3454's tables, and what they are here for.
SOFT_HYPHEN = "\u00ad"
ZERO_WIDTH_SPACE = "\u200b"
NO_BREAK_SPACE = "\u00a0"
ALEF = "\u0627"


def exchange(user: bytes = b"") -> ScramClient:
    """An exchange; with a user it is as RFC 5802 has it. PostgreSQL has taken that from the startup packet."""
    client = ScramClient(NONCE, scram.CANNOT_BIND)
    client._bare = b"n=" + user + b",r=" + NONCE
    return client


def keys_of(password: str, challenge: Challenge) -> Keys:
    return Keys.of(scram.salted_password(password.encode(), challenge.salt, challenge.iterations))


def test_the_name_is_left_to_the_startup_packet() -> None:
    assert ScramClient(NONCE, scram.CANNOT_BIND).first() == exchange().first() == b"n,,n=,r=" + NONCE


@pytest.mark.parametrize(
    ("header", "binding", "bound"),
    [
        (scram.CANNOT_BIND, b"", b"biws"),
        (scram.SERVER_CANNOT_BIND, b"", b"eSws"),
        (scram.BINDS, b"\0\xff", base64.b64encode(b"p=tls-server-end-point,,\0\xff")),
    ],
)
def test_the_header_says_what_the_proof_is_bound_to(header: bytes, binding: bytes, bound: bytes) -> None:
    client = ScramClient(NONCE, header, binding)
    assert client.first() == header + b"n=,r=" + NONCE
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    assert client.final(challenge, keys_of("pencil", challenge)).startswith(b"c=" + bound + b",r=" + SERVER_NONCE)


def test_the_example_of_rfc_7677_holds() -> None:
    client = exchange(b"user")
    assert client.first() == CLIENT_FIRST == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    assert challenge == Challenge(SERVER_NONCE, SALT, 4096, SERVER_FIRST)
    assert client.final(challenge, keys_of("pencil", challenge)) == CLIENT_FINAL
    assert CLIENT_FINAL == (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    client.verify(SERVER_FINAL)


for_passwords = pytest.mark.parametrize("password", ["pencil", "pässwörd", "ⅸ¨Á x", "пароль", "密码", "a,=b", " "])
BINDING = hashlib.sha256(b"a certificate").digest()
bound_or_not = pytest.mark.parametrize("binding", [b"", BINDING], ids=["unbound", "bound"])


def scramp_names(binding: bytes) -> tuple[str, tuple[str, bytes] | None]:
    """The mechanism and the channel binding, as the other implementation has them."""
    return ("SCRAM-SHA-256-PLUS", ("tls-server-end-point", binding)) if binding else ("SCRAM-SHA-256", None)


@for_passwords
@bound_or_not
def test_a_server_of_another_make_agrees(password: str, binding: bytes) -> None:
    name, channel = scramp_names(binding)
    mechanism = scramp.ScramMechanism(name)
    known = mechanism.make_auth_info(password, salt=SALT)
    server = mechanism.make_server(lambda _user: known, channel)
    client = ScramClient(NONCE, scram.BINDS if binding else scram.CANNOT_BIND, binding)
    client._bare = b"n=alice,r=" + NONCE
    server.set_client_first(client.first().decode())
    challenge = client.challenge(server.get_server_first().encode(), MAX_ITERATIONS)
    server.set_client_final(client.final(challenge, keys_of(password, challenge)).decode())
    client.verify(server.get_server_final().encode())


def test_without_the_password_neither_side_can_prove_anything() -> None:
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    known = mechanism.make_auth_info("pencil", salt=SALT)
    server = mechanism.make_server(lambda _user: known)
    client = exchange(b"alice")
    server.set_client_first(client.first().decode())
    challenge = client.challenge(server.get_server_first().encode(), MAX_ITERATIONS)
    with pytest.raises(scramp.ScramException):
        server.set_client_final(client.final(challenge, keys_of("pen", challenge)).decode())
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
    client.final(challenge, Keys.of(scram.salted_password(b"pencil", SALT, 1)))
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


VERIFIER = Verifier.of(b"pencil", SALT, 4096)
OWN_NONCE = SERVER_NONCE.removeprefix(NONCE)
BOUND_HEADER = b"c=" + base64.b64encode(scram.BINDS + BINDING)


def serving(binding: bytes = b"", verifier: Verifier = VERIFIER) -> ScramServer:
    return ScramServer(verifier, OWN_NONCE, binding)


def challenged(first: bytes = CLIENT_FIRST) -> ScramServer:
    """A server that waits for a proof."""
    server = serving()
    server.first(scram.MECHANISM, first)
    return server


def test_the_example_of_rfc_7677_holds_for_the_server_too() -> None:
    server = serving()
    assert server.mechanisms() == (b"SCRAM-SHA-256",)
    assert server.first(scram.MECHANISM, CLIENT_FIRST) == SERVER_FIRST
    server_final, keys = server.final(CLIENT_FINAL)
    assert server_final == SERVER_FINAL
    assert keys == Keys.of(scram.salted_password(b"pencil", SALT, 4096))


@for_passwords
@bound_or_not
def test_a_client_of_another_make_agrees(password: str, binding: bytes) -> None:
    server = serving(binding, Verifier.of(password.encode(), SALT, 4096))
    _, channel = scramp_names(binding)
    offered = [name.decode() for name in server.mechanisms()]
    client = scramp.ScramClient(offered, "alice", password, channel_binding=channel)
    assert client.mechanism_name.encode() == server.mechanisms()[0]
    first = server.first(client.mechanism_name.encode(), client.get_client_first().encode())
    client.set_server_first(first.decode())
    server_final, keys = server.final(client.get_client_final().encode())
    client.set_server_final(server_final.decode())
    assert keys == Keys.of(scram.salted_password(password.encode(), SALT, 4096))


def test_binding_is_offered_first_where_it_can_be_had() -> None:
    assert serving(BINDING).mechanisms() == (b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256")


FLAG = "an unknown channel binding flag or type"
HAS_NONE = "a channel binding with a mechanism that has none"
NEEDS_ONE = "SCRAM-SHA-256-PLUS without a channel binding"
AUTHORIZATION = "an authorization identity, which is not supported"
EXTENSION = "a mandatory extension, which is not supported"
BAD_NONCE = "the client's nonce is empty or not printable"
MALFORMED = "malformed client-first-message"
BARE = b"n=,r=" + NONCE


@pytest.mark.parametrize(
    ("mechanism", "message", "says"),
    [
        # The flag.
        (scram.MECHANISM, b",," + BARE, FLAG),
        (scram.MECHANISM, b"N,," + BARE, FLAG),
        (scram.MECHANISM, b"Y,," + BARE, FLAG),
        (scram.MECHANISM, b"x,," + BARE, FLAG),
        (scram.MECHANISM, b" n,," + BARE, FLAG),
        (scram.MECHANISM, b"nn,," + BARE, FLAG),
        (scram.MECHANISM, b"p,," + BARE, FLAG),
        (scram.MECHANISM, b"p=,," + BARE, FLAG),
        (scram.MECHANISM_PLUS, b"p=tls-unique,," + BARE, FLAG),
        (scram.MECHANISM_PLUS, b"p=tls-exporter,," + BARE, FLAG),
        (scram.MECHANISM_PLUS, b"P=tls-server-end-point,," + BARE, FLAG),
        (scram.MECHANISM_PLUS, b"p=tls-server-end-points,," + BARE, FLAG),
        (scram.MECHANISM, scram.BINDS + BARE, HAS_NONE),
        (scram.MECHANISM_PLUS, scram.CANNOT_BIND + BARE, NEEDS_ONE),
        # Who to act as.
        (scram.MECHANISM, b"n,a=admin," + BARE, AUTHORIZATION),
        (scram.MECHANISM, b"n,a=," + BARE, AUTHORIZATION),
        (scram.MECHANISM, b"n,x," + BARE, AUTHORIZATION),
        # What must be understood, and is not.
        (scram.MECHANISM, b"n,,m=anything," + BARE, EXTENSION),
        (scram.MECHANISM, b"n,,m=," + BARE, EXTENSION),
        # The nonce.
        (scram.MECHANISM, b"n,,n=,r=", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=,x=y", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r= ", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=a b", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=\0", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=\x7f", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=\xc3\xa4", BAD_NONCE),
        (scram.MECHANISM, b"n,,n=,r=\n", BAD_NONCE),
        # The form.
        (scram.MECHANISM, b"", MALFORMED),
        (scram.MECHANISM, b"n", MALFORMED),
        (scram.MECHANISM, b"n,", MALFORMED),
        (scram.MECHANISM, b"n,,", MALFORMED),
        (scram.MECHANISM, b"n,,n=", MALFORMED),
        (scram.MECHANISM, b"n,,r=" + NONCE, MALFORMED),
        (scram.MECHANISM, b"n,,r=" + NONCE + b",n=", MALFORMED),
        (scram.MECHANISM, b"n,,N=,r=" + NONCE, MALFORMED),
        (scram.MECHANISM, b"n,,n=,R=" + NONCE, MALFORMED),
        (scram.MECHANISM, b"n,,n=,x=y,r=" + NONCE, MALFORMED),
        (scram.MECHANISM, b"n,,n=;r=" + NONCE, MALFORMED),
    ],
)
def test_a_first_message_with_anything_wrong_is_not_challenged(mechanism: bytes, message: bytes, says: str) -> None:
    with pytest.raises(ScramError, match=f"^{says}$") as raised:
        serving(BINDING).first(mechanism, message)
    assert not isinstance(raised.value, BindingError | WrongProofError)


@pytest.mark.parametrize("mechanism", [scram.MECHANISM, scram.MECHANISM_PLUS])
def test_a_client_that_was_hidden_the_offer_to_bind_is_found_out(mechanism: bytes) -> None:
    with pytest.raises(BindingError, match="cannot be bound, though that was offered"):
        serving(BINDING).first(mechanism, scram.SERVER_CANNOT_BIND + BARE)


def test_a_client_that_is_right_to_think_that_the_channel_cannot_be_bound_is_challenged() -> None:
    assert serving().first(scram.MECHANISM, scram.SERVER_CANNOT_BIND + b"n=user,r=" + NONCE) == SERVER_FIRST


@pytest.mark.parametrize("added", [b",x=y", b",x=y,z=", b","])
def test_optional_extensions_of_the_first_message_are_let_be_and_signed_with_the_rest(added: bytes) -> None:
    client = exchange(b"user")
    client._bare += added
    server = challenged(client.first())
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    server_final, _ = server.final(client.final(challenge, keys_of("pencil", challenge)))
    client.verify(server_final)
    with pytest.raises(WrongProofError):
        challenged().final(client.final(challenge, keys_of("pencil", challenge)))


def test_whatever_the_first_message_says_of_a_name_is_signed_and_not_believed() -> None:
    for name in (b"", b"mallory", b"=2C=3D", b"\xff"):
        client = exchange(name)
        server = challenged(client.first())
        challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
        server_final, _ = server.final(client.final(challenge, keys_of("pencil", challenge)))
        client.verify(server_final)


MALFORMED_FINAL = "malformed client-final-message"
WRONG_NONCE = "the nonce is not the one of this exchange"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        # The form.
        (b"", MALFORMED_FINAL),
        (b",p=" + PROOF, MALFORMED_FINAL),
        (CLIENT_FINAL.rpartition(b",p=")[0], MALFORMED_FINAL),
        (CLIENT_FINAL.replace(b",p=", b",P="), MALFORMED_FINAL),
        (CLIENT_FINAL.replace(b"c=", b"C="), MALFORMED_FINAL),
        (CLIENT_FINAL.replace(b",r=", b",R="), MALFORMED_FINAL),
        (b"p=" + PROOF + b",c=biws,r=" + SERVER_NONCE, MALFORMED_FINAL),
        (b"r=" + SERVER_NONCE + b",c=biws,p=" + PROOF, MALFORMED_FINAL),
        (b"c=biws,p=" + PROOF, MALFORMED_FINAL),
        (b"x=y," + CLIENT_FINAL, MALFORMED_FINAL),
        (b"c=biws,x=y,r=" + SERVER_NONCE + b",p=" + PROOF, MALFORMED_FINAL),
        # The nonce.
        (CLIENT_FINAL.replace(SERVER_NONCE, b""), WRONG_NONCE),
        (CLIENT_FINAL.replace(SERVER_NONCE, NONCE), WRONG_NONCE),
        (CLIENT_FINAL.replace(SERVER_NONCE, OWN_NONCE), WRONG_NONCE),
        (CLIENT_FINAL.replace(SERVER_NONCE, SERVER_NONCE[:-1]), WRONG_NONCE),
        (CLIENT_FINAL.replace(SERVER_NONCE, SERVER_NONCE + b"x"), WRONG_NONCE),
        (CLIENT_FINAL.replace(SERVER_NONCE, SERVER_NONCE.lower()), WRONG_NONCE),
        # The proof.
        (CLIENT_FINAL.replace(PROOF, b""), "a proof of the wrong length"),
        (CLIENT_FINAL.replace(PROOF, PROOF[:40]), "a proof of the wrong length"),
        (CLIENT_FINAL.replace(PROOF, b"AAAA" + PROOF), "a proof of the wrong length"),
        (CLIENT_FINAL.replace(PROOF, PROOF[:-1]), "the proof is not base64"),
        (CLIENT_FINAL.replace(PROOF, PROOF + b"\n"), "the proof is not base64"),
        (CLIENT_FINAL.replace(PROOF, PROOF + b",x=y"), "the proof is not base64"),
        (CLIENT_FINAL.replace(PROOF, PROOF.replace(b"/", b"_").replace(b"+", b"-")), "the proof is not base64"),
        (CLIENT_FINAL.replace(PROOF, b"\xff" * 44), "the proof is not base64"),
        # The binding, as far as it can be read.
        (CLIENT_FINAL.replace(b"biws", b"biw"), "the channel binding is not base64"),
        (CLIENT_FINAL.replace(b"biws", b"bi ws"), "the channel binding is not base64"),
        (CLIENT_FINAL.replace(b"biws", b"\xff"), "the channel binding is not base64"),
    ],
)
def test_a_final_message_with_anything_wrong_is_refused(message: bytes, says: str) -> None:
    with pytest.raises(ScramError, match=f"^{says}$") as raised:
        challenged().final(message)
    assert not isinstance(raised.value, BindingError | WrongProofError)


OTHER_BINDING = "the channel binding is not that of this connection"


@pytest.mark.parametrize("bound", [b"", b"eSws", b"biwsbiws", b"biwsAA==", BOUND_HEADER[2:]])
def test_a_channel_that_cannot_be_bound_has_no_binding_but_the_header(bound: bytes) -> None:
    with pytest.raises(BindingError, match=OTHER_BINDING):
        challenged().final(CLIENT_FINAL.replace(b"biws", bound))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        scram.BINDS,
        BINDING,
        scram.CANNOT_BIND,
        scram.CANNOT_BIND + BINDING,
        scram.BINDS + BINDING[:-1],
        scram.BINDS + BINDING + b"\0",
        scram.BINDS + bytes(32),
        b"p=tls-unique,," + BINDING,
        *(scram.BINDS + (int.from_bytes(BINDING) ^ (1 << bit)).to_bytes(32) for bit in (0, 100, 255)),
    ],
)
def test_a_proof_that_is_bound_to_another_channel_is_refused(data: bytes) -> None:
    server = serving(BINDING)
    server.first(scram.MECHANISM_PLUS, scram.BINDS + b"n=user,r=" + NONCE)
    with pytest.raises(BindingError, match=OTHER_BINDING):
        server.final(b"c=" + base64.b64encode(data) + b",r=" + SERVER_NONCE + b",p=" + PROOF)


def test_a_proof_with_any_bit_wrong_is_a_wrong_password() -> None:
    right = int.from_bytes(base64.b64decode(PROOF))
    wrong = [bytes(32), b"\xff" * 32, *((right ^ (1 << bit)).to_bytes(32) for bit in range(256))]
    for proof in wrong:
        with pytest.raises(WrongProofError, match=r"^wrong password$"):
            challenged().final(CLIENT_FINAL.replace(PROOF, base64.b64encode(proof)))


@pytest.mark.parametrize("part", ["a bare first message", "a challenge", "a header"])
def test_a_proof_of_other_messages_is_a_wrong_password(part: str) -> None:
    first, verifier = CLIENT_FIRST, VERIFIER
    if part == "a bare first message":
        first = b"n,,n=another,r=" + NONCE
    elif part == "a challenge":
        verifier = Verifier(VERIFIER.iterations + 1, VERIFIER.salt, VERIFIER.stored_key, VERIFIER.server_key)
    else:
        first = b"y,,n=user,r=" + NONCE
    server = ScramServer(verifier, OWN_NONCE, b"")
    server.first(scram.MECHANISM, first)
    final = CLIENT_FINAL.replace(b"biws", b"eSws") if part == "a header" else CLIENT_FINAL
    with pytest.raises(WrongProofError, match=r"^wrong password$"):
        server.final(final)


def test_optional_extensions_of_the_final_message_are_let_be_and_signed_with_the_rest() -> None:
    extended = CLIENT_FINAL.replace(b",p=", b",x=y,p=")
    with pytest.raises(WrongProofError):
        challenged().final(extended)
    keys = Keys.of(scram.salted_password(b"pencil", SALT, 4096))
    without_proof = extended.rpartition(b",p=")[0]
    signed = b",".join((CLIENT_FIRST.removeprefix(b"n,,"), SERVER_FIRST, without_proof))
    signature = hmac.digest(VERIFIER.stored_key, signed, "sha256")
    proof = (int.from_bytes(keys.client) ^ int.from_bytes(signature)).to_bytes(32)
    _, shown = challenged().final(without_proof + b",p=" + base64.b64encode(proof))
    assert shown == keys


@pytest.mark.parametrize("password", [b"pen", b"Pencil", b"pencil ", b""])
def test_a_wrong_password_proves_nothing(password: bytes) -> None:
    client = exchange(b"user")
    challenge = client.challenge(SERVER_FIRST, MAX_ITERATIONS)
    final = client.final(challenge, Keys.of(scram.salted_password(password, SALT, 4096)))
    with pytest.raises(WrongProofError, match=r"^wrong password$"):
        challenged().final(final)


STORED = b"SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$" + b":".join(
    base64.b64encode(key) for key in (VERIFIER.stored_key, VERIFIER.server_key)
)


def test_a_verifier_is_written_as_postgresql_stores_it_and_read_back() -> None:
    assert VERIFIER.text() == STORED
    assert STORED == (
        b"SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
        b"WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert Verifier.parse(STORED) == VERIFIER
    keys = Keys.of(scram.salted_password(b"pencil", SALT, 4096))
    assert hashlib.sha256(keys.client).digest() == VERIFIER.stored_key
    assert keys.server == VERIFIER.server_key


@pytest.mark.parametrize("salt", [b"x", bytes(16), b"a salt that is longer than usual"])
@pytest.mark.parametrize("iterations", [1, 4096, 999_999_999])
def test_a_verifier_of_any_salt_and_iterations_is_read_back(salt: bytes, iterations: int) -> None:
    verifier = Verifier(iterations, salt, bytes(range(32)), bytes(range(32, 64)))
    assert Verifier.parse(verifier.text()) == verifier


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: b"",
        lambda stored: stored[:-1],
        lambda stored: stored + b"\n",
        lambda stored: stored + b"x",
        lambda stored: b" " + stored,
        lambda stored: stored.lower(),
        lambda stored: stored.replace(b"SHA-256", b"SHA-1"),
        lambda stored: stored.replace(b"SHA-256", b"SHA-256-PLUS"),
        lambda stored: stored.replace(b"4096", b""),
        lambda stored: stored.replace(b"4096", b"0"),
        lambda stored: stored.replace(b"4096", b"000000000"),
        lambda stored: stored.replace(b"4096", b"-1"),
        lambda stored: stored.replace(b"4096", b"+1"),
        lambda stored: stored.replace(b"4096", b"4_096"),
        lambda stored: stored.replace(b"4096", b"4096.0"),
        lambda stored: stored.replace(b"4096", "\u0664".encode()),
        lambda stored: stored.replace(b"4096", b"1" * 10),
        lambda stored: stored.replace(b"W22ZaJ0SNY7soEsUEjb6gQ==", b""),
        lambda stored: stored.replace(b"W22ZaJ0SNY7soEsUEjb6gQ==", b"===="),
        lambda stored: stored.replace(b"W22ZaJ0SNY7soEsUEjb6gQ==", b"W22ZaJ0SNY7soEsUEjb6gQ"),
        lambda stored: stored.replace(b"W22ZaJ0SNY7soEsUEjb6gQ==", b"W22Z-J0SNY7soEsUEjb6gQ=="),
        lambda stored: stored.replace(b"wfPL", b"====", 1),
        lambda stored: stored.replace(b"WG5d", b""),
        lambda stored: stored.replace(b"qY=:", b"qYA:"),
        lambda stored: stored.replace(b"dU=", b"dUA"),
        lambda stored: stored.replace(b"W22ZaJ0SNY7soEsUEjb6gQ==$", b"W22ZaJ0SNY7soEsUEjb6gQ=="),
        lambda stored: stored.replace(b":wf", b"$wf"),
        lambda stored: b"md5" + b"0" * 32,
        lambda stored: b"pencil",
    ],
)
def test_what_is_no_verifier_is_none(change: Callable[[bytes], bytes]) -> None:
    changed = change(STORED)
    assert changed != STORED
    assert Verifier.parse(changed) is None


@pytest.mark.parametrize(
    ("password", "fits"), [(b"pencil", True), (b"pencils", False), (b"", False), (b"PENCIL", False)]
)
def test_a_verifier_fits_its_password_and_no_other(password: bytes, *, fits: bool) -> None:
    assert VERIFIER.fits(scram.salted_password(password, SALT, 4096)) is fits


def test_a_verifier_that_differs_in_any_bit_of_its_stored_key_does_not_fit() -> None:
    salted = scram.salted_password(b"pencil", SALT, 4096)
    for bit in range(256):
        stored_key = (int.from_bytes(VERIFIER.stored_key) ^ (1 << bit)).to_bytes(32)
        assert not Verifier(4096, SALT, stored_key, VERIFIER.server_key).fits(salted)


def test_a_made_up_verifier_shows_each_user_a_salt_that_stays() -> None:
    made_up = [Verifier.made_up(user, seed, 4096) for user in (b"a", b"b") for seed in (b"x", b"y") for _ in range(2)]
    salts = [verifier.salt for verifier in made_up]
    assert salts[::2] == salts[1::2]
    assert len(set(salts)) == 4
    # As one that was made of a password would be.
    assert {len(salt) for salt in salts} == {scram.SALT_BYTES}
    assert len({verifier.stored_key for verifier in made_up}) == len(made_up)
    for verifier in made_up:
        assert verifier.iterations == 4096
        assert Verifier.parse(verifier.text()) == verifier


@pytest.mark.parametrize("password", [b"", b"pencil", b"a"])
def test_no_password_fits_a_made_up_verifier(password: bytes) -> None:
    verifier = Verifier.made_up(b"alice", b"seed", 1)
    assert not verifier.fits(scram.salted_password(password, verifier.salt, 1))
    server = ScramServer(verifier, OWN_NONCE, b"")
    client = exchange()
    challenge = client.challenge(server.first(scram.MECHANISM, client.first()), MAX_ITERATIONS)
    with pytest.raises(WrongProofError, match=r"^wrong password$"):
        server.final(client.final(challenge, Keys.of(scram.salted_password(password, challenge.salt, 1))))


def test_a_verifier_may_look_the_same_and_fit_nobody() -> None:
    shown = VERIFIER.unfitting()
    assert (shown.salt, shown.iterations) == (VERIFIER.salt, VERIFIER.iterations)
    salted = scram.salted_password(b"pencil", VERIFIER.salt, VERIFIER.iterations)
    assert VERIFIER.fits(salted)
    assert not shown.fits(salted)
    assert shown.unfitting().stored_key != shown.stored_key
    assert shown.server_key != VERIFIER.server_key


def test_a_salt_that_stays_is_the_one_of_a_made_up_verifier() -> None:
    assert scram.stable_salt(b"alice", b"seed") == Verifier.made_up(b"alice", b"seed", 1).salt


def test_keys_and_verifiers_do_not_show_themselves() -> None:
    keys = Keys.of(scram.salted_password(b"pencil", SALT, 4096))
    for shown in (repr(keys), f"{keys}", repr(VERIFIER), f"{VERIFIER}"):
        assert "key" not in shown
        assert "salt" not in shown
        assert repr(keys.client)[2:-1] not in shown
        assert repr(VERIFIER.stored_key)[2:-1] not in shown


def test_no_error_shows_what_was_sent() -> None:
    for message in (b"n,,n=hunter2", b"hunter2,,n=,r=x", b"n,a=hunter2,n=,r=x", b"n,,m=hunter2,n=,r=x"):
        with pytest.raises(ScramError) as raised:
            serving().first(scram.MECHANISM, message)
        assert "hunter2" not in str(raised.value)
    for message in (
        b"hunter2",
        b"c=hunter2,r=x,p=x",
        b"c=biws,r=hunter2,p=x",
        b"c=biws,r=" + SERVER_NONCE + b",p=hunter2",
    ):
        with pytest.raises(ScramError) as raised:
            challenged().final(message)
        assert "hunter2" not in str(raised.value)


def test_a_fresh_nonce_is_one_that_both_sides_take() -> None:
    nonces = {scram.fresh_nonce() for _ in range(100)}
    assert len(nonces) == 100
    for nonce in nonces:
        assert len(nonce) == 24
        assert challenged(b"n,,n=,r=" + nonce)


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
