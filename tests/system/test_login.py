"""Logging in through the gateway with psql's own messages."""

from __future__ import annotations

from tests.conftest import Gateway
from tests.wire import RawClient, password, query, startup


def test_a_client_is_let_in_as_the_mapped_role(gateway: Gateway) -> None:
    with RawClient(gateway.port) as client:
        greeting = client.log_in()
        assert greeting[0] == (b"R", b"\0\0\0\0")
        client.send(query("select current_user"))
        rows = [body for kind, body in client.read_until(b"Z") if kind == b"D"]
        assert rows == [b"\0\x01\0\0\0\x08postgres"]


def test_a_refused_client_is_told_so(gateway: Gateway) -> None:
    with RawClient(gateway.port) as client:
        client.send(startup(user="mallory"))
        client.read_message()
        client.send(password())
        error = client.read_error()
    assert error["S"] == error["V"] == "FATAL"
    assert error["C"] == "28P01"
    assert error["M"] == 'password authentication failed for user "mallory"'
