"""A secret never shows itself, whichever way one looks at it."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import structlog

from pgauthproxy.auth.model import Question
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.steps import DeriveKey
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Granted, Mapping, Password, ProvedKeys, Started, StoredMd5

HIDDEN = "hunter2"


@pytest.fixture
def secret() -> Secret:
    return Secret(HIDDEN.encode())


def test_only_reveal_gives_it(secret: Secret) -> None:
    assert secret.reveal() == HIDDEN.encode()


def test_no_text_made_of_it_holds_it(secret: Secret) -> None:
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r}", f"{secret!s}", "%s %r" % (secret, secret)]  # noqa: UP031
    texts += [f"{[secret]} { ({'password': secret}) }", format(secret), ascii(secret)]
    for text in texts:
        assert "Secret(***)" in text
        assert HIDDEN not in text


def test_it_takes_no_format_that_could_cut_pieces_off(secret: Secret) -> None:
    with pytest.raises(TypeError):
        format(secret, ".3")


def test_no_value_that_holds_it_shows_it(secret: Secret) -> None:
    started = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))
    parameters = ((b"user", b"reader"),)
    mapping = Mapping((Address("db", 5432),), parameters, Password(secret))
    proved = ProvedKeys(secret, Secret(HIDDEN.encode()), b"salt", 4096)
    holders = [
        Proof("cleartext", secret, bytes(4)),
        Question(started, "cleartext", secret, bytes(4)),
        mapping,
        Mapping((Address("db", 5432),), parameters, StoredMd5(secret)),
        Mapping((Address("db", 5432),), parameters, None, verifier=secret),
        Granted(started, mapping, Password(secret), 0.1),
        Granted(started, mapping, proved, 0.1),
        proved,
        DeriveKey(secret, b"salt", 4096),
    ]
    for holder in holders:
        assert "Secret(***)" in repr(holder)
        assert HIDDEN not in repr(holder)


def test_a_traceback_that_passes_it_does_not_show_it(secret: Secret) -> None:
    def log_in(password: Secret) -> None:
        raise AuthenticatorFault(f"no answer about {password}")

    with pytest.raises(AuthenticatorFault) as raised:
        log_in(secret)
    shown = "".join(traceback.TracebackException.from_exception(raised.value, capture_locals=True).format())
    assert "password = Secret(***)" in shown
    assert HIDDEN not in shown


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_not_pickled(secret: Secret, protocol: int) -> None:
    for value in (secret, [secret], Proof("md5", secret, b"salt")):
        with pytest.raises(TypeError, match=r"^a secret is not pickled$"):
            pickle.dumps(value, protocol)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_it_is_not_copied(secret: Secret, copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        copied(secret)


@pytest.mark.parametrize("encode", [msgspec.json.encode, msgspec.msgpack.encode, msgspec.to_builtins, json.dumps])
def test_it_is_not_encoded(secret: Secret, encode: Callable[[Any], Any]) -> None:
    for value in (secret, {"password": secret}):
        with pytest.raises(TypeError) as raised:
            encode(value)
        assert HIDDEN not in str(raised.value)


def test_it_gives_nothing_to_who_takes_bytes_or_text(secret: Secret) -> None:
    takers: list[Callable[[Any], Any]] = [bytes, bytearray, memoryview, list, len, vars, int]
    for taking in takers:
        with pytest.raises(TypeError):
            taking(secret)
    texts: list[Any] = [b"x", "x"]
    for text in texts:
        with pytest.raises(TypeError):
            text + secret


def test_loggers_do_not_show_it(secret: Secret, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(__name__).error("the password is %s", secret)
    assert "Secret(***)" in caplog.text
    assert HIDDEN not in caplog.text
    rendered = structlog.processors.KeyValueRenderer()(None, "info", {"event": "login", "password": secret})
    assert rendered == "event='login' password=Secret(***)"


def test_it_equals_the_same_secret_and_nothing_else(secret: Secret) -> None:
    assert secret == Secret(HIDDEN.encode())
    assert secret != Secret(b"hunter")
    assert secret != Secret(b"")
    assert secret != HIDDEN.encode()
    assert secret != HIDDEN
    assert secret is not None


def test_it_has_no_order_and_no_hash(secret: Secret) -> None:
    with pytest.raises(TypeError):
        hash(secret)
    with pytest.raises(TypeError):
        assert secret < Secret(b"z")  # type: ignore[operator]


def test_it_is_true_unless_it_is_empty(secret: Secret) -> None:
    assert secret
    assert not Secret(b"")


def test_it_cannot_be_changed_by_a_name_that_it_does_not_have(secret: Secret) -> None:
    with pytest.raises(AttributeError):
        secret.value = b"x"  # type: ignore[attr-defined]
