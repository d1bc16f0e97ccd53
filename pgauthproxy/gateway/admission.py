"""Steps 3 and 4: how a client proves who it is, and what the authenticator says to that.

Two orders, by the method. With `md5` and `cleartext` the client answers first, and the authenticator judges the answer;
if it gives a verifier instead of a judgement, the gateway compares. With `scram-sha-256` the authenticator is asked
first, since the exchange begins with the user's own salt; with `cert` there is nothing left to prove. Whoever the
authenticator refuses goes through the same exchange, and fails at its end. With `oauth` the client shows a token, over
TLS alone. A credential that is made for one session is made last of all, for whom has proved everything.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.auth.model import Authenticator, Denied, Question
from pgauthproxy.errors import (
    INVALID_AUTHORIZATION,
    INVALID_PASSWORD,
    AuthenticatorFault,
    ClientFault,
    refused_token,
    wrong_password,
)
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.throttle import Attempt, Blocked, Throttle
from pgauthproxy.proto import scram
from pgauthproxy.proto.client_login import MD5_ANSWER, NO_SALT, Proof
from pgauthproxy.secret import Secret
from pgauthproxy.stages import FromClient, Granted, Leased, Mapping, Password, ProvedKeys, Started

Watcher = Callable[[], object]


class Client(Protocol):
    """A client, as far as it proves who it is."""

    def watch(self, watcher: Watcher | None) -> None:
        """Calls `watcher` once the client is gone."""

    def receive_password(self, started: Started, policy: ClientPolicy) -> Awaitable[Proof]:
        """Its answer to a request for a password, or for the MD5 of it."""

    async def receive_scram(self, started: Started, verifier: scram.Verifier, policy: ClientPolicy) -> scram.Keys:
        """Its keys, once it has proved that it knows the password of this verifier."""

    async def receive_token(self, started: Started, policy: ClientPolicy) -> Secret:
        """Its bearer token."""

    async def refuse_token(self, policy: ClientPolicy) -> None:
        """Ends the exchange of a token that will not do."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Lets clients in, or not. `seed` is what made-up verifiers are made from, `scram_iterations` what they claim."""

    authenticator: Authenticator
    policy: ClientPolicy
    seed: Secret
    scram_iterations: int
    throttle: Throttle | None = None

    async def admit(self, started: Started, client: Client, client_left: Watcher) -> Granted:
        """The grant, once the client has proved what it must. `client_left` is called if it goes meanwhile.

        Raises ClientFault, AuthenticatorFault and GatewayFault.
        """
        attempt = self.throttle.attempt(started) if self.throttle is not None else None
        if attempt is None:
            return await self._judge(started, client, client_left, None)
        attempt.check()
        try:
            return await self._judge(started, client, client_left, attempt)
        except Blocked:
            raise
        except ClientFault as fault:
            if fault.sqlstate in (INVALID_PASSWORD, INVALID_AUTHORIZATION):
                attempt.failed()
            raise

    async def _judge(self, started: Started, client: Client, client_left: Watcher, attempt: Attempt | None) -> Granted:
        try:
            if self.policy.method == "scram-sha-256":
                return await self._by_scram(started, client, client_left, attempt)
            if self.policy.method == "cert":
                return await self._by_certificate(started, client, client_left, attempt)
            if self.policy.method == "oauth":
                return await self._by_token(started, client, client_left, attempt)
            return await self._by_password(started, client, client_left, attempt)
        except Denied as denied:
            raise wrong_password(started.user, denied.reason, denied.told) from None

    async def _by_password(
        self, started: Started, client: Client, client_left: Watcher, attempt: Attempt | None
    ) -> Granted:
        proof = await client.receive_password(started, self.policy)
        client.watch(client_left)
        try:
            mapping, seconds = await self._ask(Question(started, proof.method, proof.answer, proof.salt), attempt)
        except Denied as denied:
            if denied.verifier is not None:
                with contextlib.suppress(ClientFault):
                    await _compare(started, denied.verifier.reveal(), proof)
            raise
        if mapping.verifier is not None:
            await _compare(started, mapping.verifier.reveal(), proof)
        proved = Password(proof.answer) if proof.method == "cleartext" else None
        return await _grant(started, mapping, proved, seconds, attempt)

    async def _by_certificate(
        self, started: Started, client: Client, client_left: Watcher, attempt: Attempt | None
    ) -> Granted:
        if started.encryption is None or started.encryption.certificate is None:
            raise ClientFault(INVALID_AUTHORIZATION, "connection requires a valid client certificate")
        client.watch(client_left)
        mapping, seconds = await self._ask(Question(started, self.policy.method), attempt)
        return await _grant(started, mapping, None, seconds, attempt)

    async def _by_token(
        self, started: Started, client: Client, client_left: Watcher, attempt: Attempt | None
    ) -> Granted:
        if started.encryption is None:
            raise ClientFault(INVALID_AUTHORIZATION, "OAuth bearer authentication requires TLS")
        token = await client.receive_token(started, self.policy)
        client.watch(client_left)
        try:
            mapping, seconds = await self._ask(Question(started, self.policy.method, token, NO_SALT), attempt)
        except Denied as denied:
            await client.refuse_token(self.policy)
            raise refused_token(started.user, denied.reason, denied.told) from None
        if mapping.verifier is not None:
            # Nothing holds a token to it, so to go on would let anybody in.
            raise AuthenticatorFault("authenticator gave a _META_SOURCE_VERIFIER that method oauth cannot use")
        return await _grant(started, mapping, None, seconds, attempt)

    async def _by_scram(
        self, started: Started, client: Client, client_left: Watcher, attempt: Attempt | None
    ) -> Granted:
        client.watch(client_left)
        try:
            mapping, seconds = await self._ask(Question(started, self.policy.method), attempt)
        except Denied as denied:
            await self._fail_by_scram(started, client, denied.verifier)
            raise
        verifier = scram.Verifier.parse(mapping.verifier.reveal()) if mapping.verifier is not None else None
        if verifier is None:
            raise AuthenticatorFault("authenticator gave no _META_SOURCE_VERIFIER that is a SCRAM verifier")
        keys = await client.receive_scram(started, verifier, self.policy)
        proved = ProvedKeys(Secret(keys.client), Secret(keys.server), verifier.salt, verifier.iterations)
        return await _grant(started, mapping, proved, seconds, attempt)

    async def _fail_by_scram(self, started: Started, client: Client, like: Secret | None) -> None:
        """The same exchange as for anybody, so that nobody learns who exists, with a verifier that nothing fits."""
        given = scram.Verifier.parse(like.reveal()) if like is not None else None
        if given is not None:
            verifier = given.unfitting()
        else:
            verifier = scram.Verifier.made_up(started.user, self.seed.reveal(), self.scram_iterations)
        try:
            await client.receive_scram(started, verifier, self.policy)
        except ClientFault as fault:
            if fault.sqlstate != INVALID_PASSWORD:
                raise

    async def _ask(self, question: Question, attempt: Attempt | None) -> tuple[Mapping, float]:
        """What the authenticator answers, and how many seconds it took. Raises Denied and AuthenticatorFault.

        Who is to wait waits before that.
        """
        if attempt is not None:
            await attempt.hold()
        asked = time.monotonic()
        mapping = await self.authenticator.ask(question)
        return mapping, time.monotonic() - asked


async def _compare(started: Started, verifier: bytes, proof: Proof) -> None:
    """Holds a password, or its salted MD5, to a verifier. Raises ClientFault if it is not the right one."""
    answer = proof.answer.reveal()
    if MD5_ANSWER.fullmatch(verifier):
        given = md5_password(answer, started.user) if proof.method == "cleartext" else answer
        expected = verifier if proof.method == "cleartext" else md5_answer(verifier, proof.salt)
        fits = hmac.compare_digest(given, expected)
    elif proof.method == "cleartext" and (parsed := scram.Verifier.parse(verifier)) is not None:
        fits = parsed.fits(await asyncio.to_thread(scram.salted_password, answer, parsed.salt, parsed.iterations))
    else:
        raise AuthenticatorFault(f"authenticator gave a _META_SOURCE_VERIFIER that method {proof.method} cannot use")
    if not fits:
        raise wrong_password(started.user, "wrong password")


async def _grant(
    started: Started,
    mapping: Mapping,
    proved: Password | ProvedKeys | None,
    seconds: float,
    attempt: Attempt | None,
) -> Granted:
    """The grant, with the credential for the target: the mapping's, or what the client proved if that is asked for.

    Nothing is waited for once a credential was lent: a grant that is cancelled then would keep it.
    """
    if attempt is not None:
        attempt.succeeded()
    if isinstance(mapping.credential, Leased):
        mapping, seconds = await _borrow(mapping, mapping.credential, seconds)
    credential = mapping.credential
    if isinstance(credential, Leased):
        raise AuthenticatorFault("a lender gave what is to be borrowed")
    if not isinstance(credential, FromClient):
        return Granted(started, mapping, credential, seconds)
    if proved is None:
        raise AuthenticatorFault("_META_TARGET_CRED=client needs a client that answers in cleartext or by SCRAM")
    return Granted(started, mapping, proved, seconds)


async def _borrow(mapping: Mapping, wanted: Leased, seconds: float) -> tuple[Mapping, float]:
    """The mapping with a credential that was made for it, and how many seconds all answers took together."""
    if wanted.lender is None:
        raise AuthenticatorFault("a credential of vault: is asked for, and authenticator.vault.address is not set")
    asked = time.monotonic()
    mapping = await wanted.lender.lend(mapping, wanted.path)
    return mapping, seconds + time.monotonic() - asked
