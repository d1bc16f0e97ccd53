"""The MD5 answers of the protocol, compiled and in plain Python (hashlib): the same digits, and how long they take.

pytest benchmarks/test_md5.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from types import ModuleType

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from pgauthproxy import _digest

USER, PASSWORD, SALT = b"alice", b"correct horse battery staple", b"\x01\xab\x00\xff"
LONG_PASSWORD = b"x" * 1000
STORED = reference.md5_password(PASSWORD, USER)

both = pytest.mark.parametrize("digest", [_digest, reference], ids=["compiled", "python"])


def log_in(digest: ModuleType) -> bytes:
    """What the gateway computes to answer a target's request from a password."""
    answer: bytes = digest.md5_answer(digest.md5_password(PASSWORD, USER), SALT)
    return answer


def test_both_compute_the_same() -> None:
    for size in range(300):
        password = bytes(at & 0xFF for at in range(size))
        stored = reference.md5_password(password, USER)
        assert _digest.md5_password(password, USER) == stored
        assert _digest.md5_answer(stored, SALT) == reference.md5_answer(stored, SALT)
    assert log_in(_digest) == log_in(reference)


@pytest.mark.parametrize(("stored", "salt"), [(b"", SALT), (STORED[:-1], SALT), (STORED, b""), (STORED, SALT * 2)])
def test_both_refuse_the_same(stored: bytes, salt: bytes) -> None:
    for digest in (_digest, reference):
        with pytest.raises(ValueError, match="35 bytes of stored hash and 4 bytes of salt"):
            digest.md5_answer(stored, salt)


@both
@pytest.mark.benchmark(group="md5: salting a stored hash")
def test_salting_a_stored_hash(benchmark: BenchmarkFixture, digest: ModuleType) -> None:
    assert benchmark(digest.md5_answer, STORED, SALT) == reference.md5_answer(STORED, SALT)


@both
@pytest.mark.benchmark(group="md5: answering from a password")
def test_answering_from_a_password(benchmark: BenchmarkFixture, digest: ModuleType) -> None:
    assert benchmark(log_in, digest) == reference.md5_answer(STORED, SALT)


@both
@pytest.mark.benchmark(group="md5: a password of 1,000 bytes")
def test_hashing_a_long_password(benchmark: BenchmarkFixture, digest: ModuleType) -> None:
    assert benchmark(digest.md5_password, LONG_PASSWORD, USER) == reference.md5_password(LONG_PASSWORD, USER)
