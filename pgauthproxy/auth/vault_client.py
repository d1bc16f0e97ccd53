"""HashiCorp Vault's HTTP API, as far as credentials are borrowed there: requests, and the gateway's own token.

Leases hang from the token that they were made with: when it ends, so do they. So a token is renewed as long as that
goes, and only then is another one asked for.

Every request is told how long it may take. No asyncio.timeout stands around one: aiohttp, if its own time-out ends in
the same moment, takes both for its own, and nobody stops what goes on.
"""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from pgauthproxy.auth import https
from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.net.tls import TlsConfigError, verifying_context
from pgauthproxy.secret import Secret

PARALLEL: Final = 32
FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 2.0
RENEW_AFTER: Final = 2 / 3
"""How much of a lease may be over before it is renewed."""
PASSING: Final = frozenset({408, 412, 425, 429})
"""Statuses below 500 that another try may do away with."""
MEANINGS: Final = {
    400: "says that the request is no good, or that the lease has ended",
    404: "knows no such path",
    429: "has too much to do",
    503: "is sealed or down for maintenance",
}


class VaultError(Exception):
    """Vault cannot be reached, or says no. `final`: it will not do any better when asked again."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.final = final


class NotAllowedError(VaultError):
    """The token is not good, or may not do what was asked."""

    def __init__(self) -> None:
        super().__init__("refuses: the token is not good, or may not do this (status 403)", final=True)


@dataclass(frozen=True, slots=True)
class VaultPolicy:
    """Where Vault is, and who the gateway is there: either `token` or `role_id`. Times in seconds."""

    address: str
    ca: str
    namespace: str
    token: Secret
    role_id: str
    secret_id: Secret
    approle_mount: str
    timeout: float


class VaultClient:
    """States, in order: made, started, closed."""

    def __init__(self, policy: VaultPolicy, sink: Sink) -> None:
        """Raises AuthenticatorConfigError, which names the key."""
        try:
            https.checked_url(policy.address)
        except AuthenticatorConfigError as error:
            raise AuthenticatorConfigError(f"authenticator.vault.address: {error}") from None
        if bool(policy.token) == bool(policy.role_id):
            raise AuthenticatorConfigError("authenticator.vault: needs either token or role_id")
        self._context = read_context(policy)
        self._policy = policy
        self._sink = sink
        self._session: aiohttp.ClientSession | None = None
        self._token: str | None = None
        self._getting_token = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._session = https.open_session(self._policy.timeout, PARALLEL)

    async def replace(self, policy: VaultPolicy, context: ssl.SSLContext) -> None:
        """From here on, the secrets of this policy. What was lent with an old token may be renewed with the new one."""
        # Not while somebody gets to know the old token.
        async with self._getting_token:
            if policy.token.reveal() != self._policy.token.reveal():
                self._forget_token()
            self._policy = policy
            self._context = context

    async def close(self) -> None:
        self._forget_token()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float
    ) -> dict[str, Any]:
        """One request with the gateway's token, once more with another one if that is no good. Raises VaultError.

        `seconds` bounds each step: getting a token, and the request.
        """
        token = await self._get_token(seconds)
        try:
            return await self._send(method, path, body, token, seconds)
        except NotAllowedError:
            if not self._policy.role_id:
                raise
        if self._token == token:
            self._forget_token()
        return await self._send(method, path, body, await self._get_token(seconds), seconds)

    async def request_patiently(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The same, again and again for as long as the time-out allows and there is hope. Raises VaultError."""
        loop = asyncio.get_running_loop()
        wait = FIRST_WAIT
        until = loop.time() + self._policy.timeout
        while True:
            try:
                return await self.request(method, path, body, seconds=max(until - loop.time(), FIRST_WAIT))
            except VaultError as error:
                if error.final:
                    raise
                if loop.time() + wait >= until:
                    raise VaultError(f"{error}, for {self._policy.timeout:g} s", final=True) from None
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _get_token(self, limit: float) -> str:
        async with self._getting_token:
            if self._token is None:
                self._token, seconds, renewable = await (
                    self._log_in(limit) if self._policy.role_id else self._look_up(limit)
                )
                if seconds > 0:
                    self._keeping = asyncio.get_running_loop().create_task(self._keep(self._token, seconds, renewable))
            return self._token

    async def _log_in(self, limit: float) -> tuple[str, float, bool]:
        policy = self._policy
        body = {"role_id": policy.role_id}
        if policy.secret_id:
            body["secret_id"] = policy.secret_id.reveal().decode(errors="surrogateescape")
        answer = await self._send("POST", f"auth/{policy.approle_mount}/login", body, None, limit)
        token = answer.get("auth", {}).get("client_token") if isinstance(answer.get("auth"), dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise VaultError("gives no token to a role", final=True)
        return token, *read_term(answer["auth"], "lease_duration")

    async def _look_up(self, limit: float) -> tuple[str, float, bool]:
        """The token from the settings. One that may not ask about itself is used as it is."""
        token = self._policy.token.reveal().decode(errors="replace")
        try:
            answer = await self._send("GET", "auth/token/lookup-self", None, token, limit)
        except VaultError as error:
            if error.final:
                return token, 0.0, False
            raise
        data = answer.get("data")
        return token, *read_term(data if isinstance(data, dict) else {}, "ttl")

    async def _keep(self, token: str, seconds: float, renewable: bool) -> None:
        """Renews a token as long as that goes; forgets it just before it ends."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        wait = seconds * RENEW_AFTER
        while True:
            await asyncio.sleep(wait)
            if renewable:
                try:
                    answer = await self._send("POST", "auth/token/renew-self", {}, token, self._policy.timeout)
                    seconds, renewable = read_term(answer.get("auth") or {}, "lease_duration")
                    until = loop.time() + seconds
                    wait = seconds * RENEW_AFTER
                except VaultError as error:
                    renewable = not error.final
                    wait = (until - loop.time()) / 3
            else:
                wait = until - loop.time()
            if wait < FIRST_WAIT:
                break
        if self._token == token:
            self._token = self._keeping = None
            if not self._policy.role_id:
                self._sink(Noticed("error", "the token for Vault has ended, and cannot be renewed"))

    def _forget_token(self) -> None:
        self._token = None
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, token: str | None, seconds: float
    ) -> dict[str, Any]:
        """One request, its answer as an object. Raises VaultError, which holds nothing of either."""
        assert self._session is not None  # noqa: S101 (it was started)
        headers = {"X-Vault-Request": "true"}
        if token is not None:
            headers["X-Vault-Token"] = token
        if self._policy.namespace:
            headers["X-Vault-Namespace"] = self._policy.namespace
        url = f"{self._policy.address.rstrip('/')}/v1/{quote(path)}"
        try:
            async with self._session.request(
                method,
                url,
                json=body,
                ssl=self._context,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                text = await https.read_body(response)
                status = response.status
            if 200 <= status < 300:
                return https.parse_object(text) if text.strip() else {}
        except https.FAILURES as error:
            raise VaultError(f"cannot be asked: {https.describe(error)}", final=False) from None
        if status == 403:
            raise NotAllowedError
        final = 300 <= status < 500 and status not in PASSING
        raise VaultError(f"{MEANINGS.get(status, 'cannot serve')} (status {status})", final=final)


def read_context(policy: VaultPolicy) -> ssl.SSLContext:
    """Raises AuthenticatorConfigError."""
    try:
        return verifying_context(policy.ca)
    except TlsConfigError as error:
        raise AuthenticatorConfigError(f"authenticator.vault.ca: {error}") from None


def read_term(fields: dict[str, Any], name: str) -> tuple[float, bool]:
    """For how long something is good, and whether that can be renewed."""
    seconds = fields.get(name)
    good = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e9
    return float(seconds) if good and seconds is not None else 0.0, fields.get("renewable") is True
