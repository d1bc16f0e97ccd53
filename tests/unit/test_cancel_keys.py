"""The keys that clients are handed, and what finds a session."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest

from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address

SOMEWHERE = Address("127.0.0.1", 5432)


@dataclass
class Running:
    """What cancelling needs of a session."""

    id: str = "1"
    target_key: bytes = b"the targets"
    reached: Address = SOMEWHERE
    reached_tls: TlsPlan | None = None
    cancel_key: bytes = b""
    cancelling: bool = False


@pytest.fixture
def keys() -> CancelKeys:
    return CancelKeys()


@pytest.mark.parametrize(("minor", "size"), [(0, 8), (1, 8), (2, 36)])
def test_a_key_is_four_bytes_of_process_id_and_a_secret_as_long_as_the_client_understands(
    keys: CancelKeys, minor: int, size: int
) -> None:
    for _ in range(100):
        session = Running()
        key = keys.issue(session, minor)
        assert session.cancel_key == key
        assert len(key) == size
        # Clients read it as a signed number, and psql prints it.
        assert 0 < int.from_bytes(key[:4]) < 1 << 31


def test_the_whole_key_finds_its_session_and_no_other(keys: CancelKeys) -> None:
    sessions = [Running(id=str(number)) for number in range(100)]
    for number, session in enumerate(sessions):
        keys.issue(session, 2 * (number % 2))
    assert len({session.cancel_key for session in sessions}) == 100
    assert len({session.cancel_key[4:] for session in sessions}) == 100
    for session in sessions:
        assert keys.find(session.cancel_key) is session


@pytest.mark.parametrize("minor", [0, 2])
def test_nothing_but_the_whole_key_finds_anything(keys: CancelKeys, minor: int) -> None:
    key = keys.issue(Running(), minor)
    size = len(key)
    wrong = [b"", key[:4], key[:7], key[:8], key[:-1], key + b"\0", key[4:] + key[:4], bytes(size), b"\xff" * size]
    wrong += [key * 2, *((int.from_bytes(key) ^ (1 << bit)).to_bytes(size) for bit in range(8 * size))]
    for other in wrong:
        if other != key:
            assert keys.find(other) is None, other


def test_a_forgotten_key_finds_nothing(keys: CancelKeys) -> None:
    session, other = Running(), Running()
    key, other_key = keys.issue(session, 0), keys.issue(other, 2)
    keys.forget(key)
    keys.forget(key)
    assert keys.find(key) is None
    assert keys.find(other_key) is other


def test_a_session_that_got_no_key_has_none_to_forget(keys: CancelKeys) -> None:
    session = Running()
    key = keys.issue(session, 0)
    keys.forget(b"")
    assert keys.find(key) is session


def test_a_process_id_in_use_or_zero_is_not_given_again(keys: CancelKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([0, 7, 7, 0, 8])
    monkeypatch.setattr(secrets, "token_bytes", lambda size: next(drawn).to_bytes(4) + bytes(size - 4))
    first, second = keys.issue(Running(), 0), keys.issue(Running(), 2)
    assert [int.from_bytes(key[:4]) for key in (first, second)] == [7, 8]
