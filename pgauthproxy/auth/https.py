"""What authenticators that speak HTTP share: verified, bounded, without redirects, and past every proxy variable."""

import json
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from pgauthproxy.auth.model import AuthenticatorConfigError

MAX_BODY: Final = 1 << 20
"""Bytes of an answer; a longer one is an error."""
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
FAILURES: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What comes of a server that cannot be reached, does not answer in time, or answers nonsense."""


class BadAnswerError(ValueError):
    """An answer that means nothing. The text holds nothing of it."""


def checked_url(text: str) -> str:
    """An URL that may be trusted: https, or http to loopback. Raises AuthenticatorConfigError."""
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        raise AuthenticatorConfigError(f"{text}: not a URL") from None
    if not host or url.scheme not in ("https", "http") or port == 0:
        raise AuthenticatorConfigError(f"{text}: not a URL with https")
    if url.username is not None or url.fragment:
        raise AuthenticatorConfigError("a URL with a user name or a fragment in it")
    if url.scheme == "http" and host not in LOOPBACK:
        raise AuthenticatorConfigError(f"{text}: http is for loopback only, others need https")
    return text


def open_session(timeout: float, parallel: int) -> aiohttp.ClientSession:
    """Connections that are kept; `timeout` is for one request, all of it.

    Each request brings its TLS along, which may be another after a reload.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=parallel),
        timeout=aiohttp.ClientTimeout(total=timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole of an answer. Raises BadAnswerError if there is too much of it."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise BadAnswerError(f"an answer of more than {MAX_BODY} bytes")
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadAnswerError."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswerError("an answer that is not JSON") from None
    if not isinstance(found, dict):
        raise BadAnswerError("an answer that is no JSON object")
    return found


def describe(error: Exception) -> str:
    """Why a request failed, for the log; without what was sent or received."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error)
    return str(error) if isinstance(error, BadAnswerError) else type(error).__name__
