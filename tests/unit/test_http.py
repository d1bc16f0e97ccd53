"""Requests for operators' pages: what is no request, or too much of one, is told apart on its head alone."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import pytest

from pgauthproxy.ops.http import MAX_BODY, BadRequestError, Pace, Response, head_of, parse_head


def refused(head: bytes) -> HTTPStatus:
    with pytest.raises(BadRequestError) as caught:
        parse_head(head, local=True)
    return caught.value.status


def test_a_request_is_its_method_path_and_headers() -> None:
    request, length = parse_head(b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nACCEPT:  text/plain \r\n\r\n", local=True)
    assert (request.method, request.path, length) == ("GET", "/metrics", 0)
    assert request.headers == {"host": "a", "accept": "text/plain"}


def test_a_body_is_announced() -> None:
    assert parse_head(b"POST / HTTP/1.1\r\nContent-Length: 12\r\n\r\n", local=True)[1] == 12


def test_an_old_client_closes_after_its_answer() -> None:
    assert parse_head(b"GET / HTTP/1.0\r\n\r\n", local=True)[0].headers["connection"] == "close"


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n: no name\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(head: bytes) -> None:
    assert refused(head) == HTTPStatus.BAD_REQUEST


def test_a_body_that_is_too_long_or_comes_in_pieces_is_refused() -> None:
    assert refused(f"POST / HTTP/1.1\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n".encode()) == 413
    assert refused(b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n") == 413
    assert refused(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n") == 501


def test_another_version_is_refused() -> None:
    assert refused(b"GET / HTTP/2.0\r\n\r\n") == 505


def test_an_answer_says_how_long_it_is_and_that_nobody_is_to_keep_it() -> None:
    head = head_of(Response(HTTPStatus.OK, b"four"), close=False)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert b"\r\nContent-Length: 4\r\n" in head
    assert b"\r\nCache-Control: no-store\r\n" in head
    assert b"Connection: close" not in head
    assert b"\r\nConnection: close\r\n" in head_of(Response(HTTPStatus.OK), close=True)


def test_a_pace_lets_a_seconds_worth_through_at_once_and_no_more() -> None:
    async def turns(count: int) -> float:
        pace = Pace(100)
        began = asyncio.get_running_loop().time()
        for _ in range(count):
            await pace.turn()
        return asyncio.get_running_loop().time() - began

    assert asyncio.run(turns(130)) >= 0.25
