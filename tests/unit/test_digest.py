"""MD5 as the protocol uses it, against the examples of RFC 1321 and against the standard library."""

from __future__ import annotations

import pytest

from benchmarks import reference
from pgauthproxy._digest import md5_answer, md5_password

RFC_1321 = {
    b"": "d41d8cd98f00b204e9800998ecf8427e",
    b"a": "0cc175b9c0f1b6a831c399e269772661",
    b"abc": "900150983cd24fb0d6963f7d28e17f72",
    b"message digest": "f96b697d7cb7938d525a2f31aaf161d0",
    b"abcdefghijklmnopqrstuvwxyz": "c3fcd3d76192e4007dfb496cca67e13b",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789": "d174ab98d277d9f5a5611c2c9f419d9f",
    b"1234567890" * 8: "57edf4a22be3c955ac49da2e2107b67a",
}


@pytest.mark.parametrize("text", RFC_1321)
def test_the_examples_of_rfc_1321_hold_wherever_they_are_cut(text: bytes) -> None:
    for cut in range(len(text) + 1):
        assert md5_password(text[:cut], text[cut:]) == b"md5" + RFC_1321[text].encode()


def test_every_length_up_to_three_blocks_is_hashed_as_hashlib_does() -> None:
    for size in range(201):
        text = bytes((7 * at + size) & 0xFF for at in range(size))
        for cut in range(size + 1):
            assert md5_password(text[:cut], text[cut:]) == reference.md5_password(text[:cut], text[cut:]), (size, cut)


@pytest.mark.parametrize("size", [1 << 16, (1 << 20) + 1])
def test_a_long_password_is_hashed_as_hashlib_does(size: int) -> None:
    assert md5_password(b"x" * size, b"alice") == reference.md5_password(b"x" * size, b"alice")


@pytest.mark.parametrize("salt", [bytes(4), b"\xff" * 4, b"\x52\xfd\xfc\x07", b"salt"])
def test_an_answer_is_the_hash_of_the_hash_and_the_salt(salt: bytes) -> None:
    stored = md5_password("пароль".encode(), b"alice")
    assert md5_answer(stored, salt) == reference.md5_answer(stored, salt)


@pytest.mark.parametrize("stored", [b"", b"md5", b"md5" + b"0" * 31, b"md5" + b"0" * 33])
def test_a_stored_hash_of_another_size_is_an_error(stored: bytes) -> None:
    with pytest.raises(ValueError, match="35 bytes of stored hash"):
        md5_answer(stored, b"salt")


@pytest.mark.parametrize("salt", [b"", b"sal", b"salty"])
def test_a_salt_of_another_size_is_an_error(salt: bytes) -> None:
    with pytest.raises(ValueError, match="4 bytes of salt"):
        md5_answer(b"md5" + b"0" * 32, salt)


@pytest.mark.parametrize("wrong", [None, "text", bytearray(b"x")])
def test_only_bytes_are_hashed(wrong: bytes) -> None:
    with pytest.raises(TypeError):
        md5_password(wrong, b"alice")
    with pytest.raises(TypeError):
        md5_password(b"secret", wrong)
    with pytest.raises(TypeError):
        md5_answer(wrong, b"salt")
