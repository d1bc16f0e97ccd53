"""Passwords are prepared exactly as the server prepared them when they were set: PostgreSQL itself is asked."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stringprep
import unicodedata

import pytest

from pgauthproxy.proto import scram
from pgauthproxy.throwaway import ThrowawayPostgres

TABLES = [getattr(stringprep, name) for name in dir(stringprep) if name.startswith("in_table")]
# All but ideographs, Hangul and what is for private use: those are alike within themselves.
CODES = [*range(0x80, 0x3400), *range(0xD7A0, 0xD800), *range(0xF8F0, 0x10400), *range(0x2F800, 0x2FA20)]

# Gives what is stored for each password of the shape, one a line; nothing of it stays.
STORED = """
begin;
set local password_encryption = 'scram-sha-256';
set local scram_iterations = 1;
create role prepared login;
create function pg_temp.stored(shape text, codes int[]) returns setof text language plpgsql as $$
declare code int;
begin
  foreach code in array codes loop
    execute format('alter role prepared password %L', replace(shape, '?', chr(code)));
    return query select rolpassword from pg_authid where rolname = 'prepared';
  end loop;
end $$;
"""


def telling_codes() -> list[int]:
    """Where any of RFC 3454's tables begins or ends, and what normalization changes."""
    codes = []
    before: list[bool] = []
    for code in CODES:
        char = chr(code)
        now = [table(char) for table in TABLES]
        if now != before or unicodedata.normalize("NFKC", char) != char:
            codes.append(code)
        before = now
    return codes


def knows(verifier: str, password: str) -> bool:
    """Whether a verifier as pg_authid stores it was made from this password, as we prepare it."""
    _, parameters, keys = verifier.split("$")
    iterations, salt = parameters.split(":")
    salted = scram.salted_password(password.encode(), base64.b64decode(salt), int(iterations))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return base64.b64decode(keys.split(":")[0]) == hashlib.sha256(client_key).digest()


@pytest.fixture(scope="module")
def codes() -> list[int]:
    return telling_codes()


@pytest.mark.parametrize("shape", ["?", "a?b", "\u05d0?\u05d0", "\u05d0?", "a\u1100?\u1161"])
def test_the_server_finds_the_password_again(postgres: ThrowawayPostgres, codes: list[int], shape: str) -> None:
    numbers = ",".join(map(str, codes))
    verifiers = postgres.sql(f"{STORED} select pg_temp.stored('{shape}', '{{{numbers}}}'); rollback;").split("\n")
    assert len(verifiers) == len(codes)
    passwords = [shape.replace("?", chr(code)) for code in codes]
    made_of = zip(verifiers, passwords, strict=True)
    assert [ascii(password) for verifier, password in made_of if not knows(verifier, password)] == []
