"""The keys that clients are handed, and what finds a session."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest

from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.stages import Address

SOMEWHERE = Address("127.0.0.1", 5432)


@dataclass
class Running:
    """What cancelling needs of a session."""

    id: str = "1"
    target_key: bytes = b"the targets"
    reached: Address = SOMEWHERE
    cancel_key: bytes = b""
    cancelling: bool = False


@pytest.fixture
def keys() -> CancelKeys:
    return CancelKeys()


def test_a_key_is_four_bytes_of_process_id_and_four_of_secret(keys: CancelKeys) -> None:
    for _ in range(100):
        session = Running()
        key = keys.issue(session)
        assert session.cancel_key == key
        assert len(key) == 8
        # Clients read it as a signed number, and psql prints it.
        assert 0 < int.from_bytes(key[:4]) < 1 << 31


def test_the_whole_key_finds_its_session_and_no_other(keys: CancelKeys) -> None:
    sessions = [Running(id=str(number)) for number in range(100)]
    for session in sessions:
        keys.issue(session)
    assert len({session.cancel_key for session in sessions}) == 100
    for session in sessions:
        assert keys.find(session.cancel_key) is session


def test_nothing_but_the_whole_key_finds_anything(keys: CancelKeys) -> None:
    key = keys.issue(Running())
    wrong = [b"", key[:4], key[:7], key + b"\0", key[4:] + key[:4], bytes(8), b"\xff" * 8, key * 2]
    wrong += [(int.from_bytes(key) ^ (1 << bit)).to_bytes(8) for bit in range(64)]
    for other in wrong:
        assert keys.find(other) is None, other


def test_a_forgotten_key_finds_nothing(keys: CancelKeys) -> None:
    session, other = Running(), Running()
    key, other_key = keys.issue(session), keys.issue(other)
    keys.forget(key)
    keys.forget(key)
    assert keys.find(key) is None
    assert keys.find(other_key) is other


def test_a_session_that_got_no_key_has_none_to_forget(keys: CancelKeys) -> None:
    session = Running()
    key = keys.issue(session)
    keys.forget(b"")
    assert keys.find(key) is session


def test_a_process_id_in_use_or_zero_is_not_given_again(keys: CancelKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([0, 7, 7, 0, 8])
    monkeypatch.setattr(secrets, "randbits", lambda _bits: next(drawn))
    first, second = keys.issue(Running()), keys.issue(Running())
    assert [int.from_bytes(key[:4]) for key in (first, second)] == [7, 8]
