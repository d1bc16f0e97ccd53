"""Credentials that HashiCorp Vault makes for one session: lent, renewed while it lives, given back when it ends.

Vault does not say who may come in; the authenticator inside does, and names the path of a secret (`vault:PATH`) in its
mapping. The credential is borrowed only once the client has proved who it is, so that a stranger cannot make Vault
create roles. Whatever happens to the gateway, a lease that nobody renews ends by itself.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeGuard

import msgspec

from pgauthproxy.auth.model import Authenticator, Load, Question, load_of
from pgauthproxy.auth.vault_client import (
    FIRST_WAIT,
    PARALLEL,
    RENEW_AFTER,
    VaultClient,
    VaultError,
    VaultPolicy,
    read_context,
    read_term,
)
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Leased, Mapping, Parameters, Password

LONGEST_TIMER: Final = 1e7
SHORTEST_LEASE: Final = 0.5
"""Seconds below which it is not worth asking for more."""


class VaultLease:
    """A credential on loan. States, in order: running, ended or given back."""

    __slots__ = ("_id", "_lost", "_over", "_renewing", "_timer", "_until", "_vault")

    def __init__(self, vault: "VaultAuthenticator", lease_id: str, seconds: float, renewable: bool) -> None:
        self._vault = vault
        self._id = lease_id
        self._lost: Callable[[], object] | None = None
        self._over = False
        self._renewing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._run(seconds, renewable)

    def watch(self, lost: Callable[[], object]) -> None:
        if self._over:
            lost()
        else:
            self._lost = lost

    async def release(self) -> None:
        ended = self._over
        self._stop()
        if not ended:
            await self._vault.revoke(self._id)

    def _run(self, seconds: float, renewable: bool) -> None:
        """Waits until it is time to renew, or until there is nothing left to renew."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        if renewable and seconds >= SHORTEST_LEASE:
            self._timer = loop.call_later(min(seconds * RENEW_AFTER, LONGEST_TIMER), self._begin_renewal)
        else:
            self._timer = loop.call_later(min(seconds, LONGEST_TIMER), self._end)

    def _begin_renewal(self) -> None:
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        """Asks until Vault gives more time, says that there is none, or the time is over."""
        loop = asyncio.get_running_loop()
        wait = FIRST_WAIT
        while True:
            try:
                seconds, renewable = await self._vault.renew(self._id, max(self._until - loop.time(), FIRST_WAIT))
            except VaultError as error:
                left = self._until - loop.time()
                if left <= 0 or error.final:
                    self._end()
                    return
                await asyncio.sleep(min(wait, left))
                wait *= 2
            else:
                self._renewing = None
                self._run(seconds, renewable)
                return

    def _end(self) -> None:
        lost = self._lost
        self._stop()
        if lost is not None:
            lost()

    def _stop(self) -> None:
        self._over = True
        self._lost = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        renewing, self._renewing = self._renewing, None
        if renewing is not None and renewing is not asyncio.current_task():
            renewing.cancel()


class VaultAuthenticator:
    """An authenticator whose mappings may name credentials of Vault. States, in order: made, started, closed."""

    def __init__(self, read_policy: Callable[[], VaultPolicy], inner: Authenticator, sink: Sink) -> None:
        """`read_policy` reads what the policy refers to. Raises AuthenticatorConfigError, as that does."""
        policy = read_policy()
        self._read_policy = read_policy
        self._client = VaultClient(policy, sink)
        self._timeout = policy.timeout
        self._inner = inner
        self._sink = sink
        self._borrowing: set[asyncio.Task[tuple[str, Secret, VaultLease | None]]] = set()
        self._returning: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._inner.start()
        self._client.start()

    async def ask(self, question: Question) -> Mapping:
        """As the authenticator inside; what it wants from Vault is lent later, by `lend`."""
        mapping = await self._inner.ask(question)
        if isinstance(mapping.credential, Leased):
            return msgspec.structs.replace(mapping, credential=Leased(mapping.credential.path, self))
        return mapping

    async def reload(self) -> None:
        def read() -> tuple[VaultPolicy, ssl.SSLContext]:
            policy = self._read_policy()
            return policy, read_context(policy)

        policy, context = await asyncio.to_thread(read)
        await self._inner.reload()
        await self._client.replace(policy, context)

    def load(self) -> list[Load]:
        """That of the authenticator inside, and the credentials that are being borrowed."""
        running = min(len(self._borrowing), PARALLEL)
        return [*load_of(self._inner), Load("vault", running, len(self._borrowing) - running)]

    async def close(self) -> None:
        await self._inner.close()
        pending = [*self._borrowing, *self._returning]
        if pending:
            await asyncio.wait(pending, timeout=self._timeout)
        await self._client.close()

    async def lend(self, mapping: Mapping, path: str) -> Mapping:
        task = asyncio.get_running_loop().create_task(self._borrow(path))
        self._borrowing.add(task)
        task.add_done_callback(self._borrowing.discard)
        try:
            # Not given up in the middle: what Vault has made by then must be given back.
            user, password, lease = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._return_unused)
            raise
        except VaultError as error:
            raise AuthenticatorFault(f"Vault {error}") from None
        parameters = _with_user(mapping, user.encode())
        return msgspec.structs.replace(mapping, parameters=parameters, credential=Password(password), lease=lease)

    async def _borrow(self, path: str) -> tuple[str, Secret, VaultLease | None]:
        """User, password, and the lease if there is one (a static role has none)."""
        answer = await self._client.request_patiently("GET", path)
        data = answer.get("data")
        user, password = (data.get("username"), data.get("password")) if isinstance(data, dict) else (None, None)
        lease_id = answer.get("lease_id")
        lease = None
        if isinstance(lease_id, str) and lease_id:
            lease = VaultLease(self, lease_id, *read_term(answer, "lease_duration"))
        if _is_word(user) and _is_word(password):
            return user, Secret(password.encode()), lease
        if lease is not None:
            await lease.release()
        raise VaultError("gives no user name and password at this path", final=True)

    def _return_unused(self, task: "asyncio.Task[tuple[str, Secret, VaultLease | None]]") -> None:
        if task.cancelled() or task.exception() is not None:
            return
        lease = task.result()[2]
        if lease is not None:
            returning = asyncio.get_running_loop().create_task(lease.release())
            self._returning.add(returning)
            returning.add_done_callback(self._returning.discard)

    async def renew(self, lease_id: str, limit: float) -> tuple[float, bool]:
        """How long the lease is good from now on, and whether it can be renewed again. Raises VaultError."""
        body = {"lease_id": lease_id}
        answer = await self._client.request("POST", "sys/leases/renew", body, seconds=min(limit, self._timeout))
        return read_term(answer, "lease_duration")

    async def revoke(self, lease_id: str) -> None:
        """Never fails: a lease that cannot be given back ends by itself."""
        try:
            await self._client.request_patiently("POST", "sys/leases/revoke", {"lease_id": lease_id})
        except VaultError as error:
            facts = (("lease", lease_id), ("reason", f"Vault {error}"))
            self._sink(Noticed("warning", "lease not given back, it ends by itself", facts))


def _with_user(mapping: Mapping, user: bytes) -> Parameters:
    """The mapping's parameters with another user; without a database it stays that of the first one."""
    named = tuple((name, user if name == b"user" else value) for name, value in mapping.parameters)
    if any(name == b"database" for name, _ in named):
        return named
    return (*named, (b"database", mapping.database))


def _is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != "" and "\0" not in value
