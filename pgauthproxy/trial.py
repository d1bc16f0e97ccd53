"""`pgauthproxy auth`: one login, without a client, to see what the authenticator says to it."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import uvloop

from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.auth import fields
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError, Question
from pgauthproxy.build import build_admission, build_targets
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import ClientFault, Fault, wrong_password
from pgauthproxy.events import AuthenticatorSaid, Event
from pgauthproxy.gateway.admission import Watcher
from pgauthproxy.gateway.client_leg import SALT_BYTES, ClientPolicy
from pgauthproxy.kinds import build_authenticator
from pgauthproxy.ops.log import printable
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.client_login import NO_SALT, Proof
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Encryption, Granted, Leased, Password, Started, StoredMd5
from pgauthproxy.stages import Mapping as Answer

ADDRESS: Final = "127.0.0.1:0"
SESSION: Final = "trial"
HIDDEN: Final = "***"
# What a client that shows a token speaks; without TLS none is taken.
OVER_TLS: Final = Encryption("TLSv1.3", "", "", "", b"", None)
AGREED, REFUSED, BROKEN = 0, 1, 2

Say = Callable[[str], None]


class _Typist:
    """A client that has its password from the terminal. It proves itself as a real one would."""

    def __init__(self, password: bytes) -> None:
        self._password = password

    def watch(self, watcher: Watcher | None) -> None:
        """It never leaves."""

    async def receive_password(self, started: Started, policy: ClientPolicy) -> Proof:
        if policy.method == "cleartext":
            return Proof("cleartext", Secret(self._password), NO_SALT)
        salt = secrets.token_bytes(SALT_BYTES)
        return Proof("md5", Secret(md5_answer(md5_password(self._password, started.user), salt)), salt)

    async def receive_scram(self, started: Started, verifier: scram.Verifier, policy: ClientPolicy) -> scram.Keys:
        salted = scram.salted_password(self._password, verifier.salt, verifier.iterations)
        if not verifier.fits(salted):
            raise wrong_password(started.user, "the password is not the verifier's")
        return scram.Keys.of(salted)

    async def receive_token(self, started: Started, policy: ClientPolicy) -> Secret:
        return Secret(self._password)

    async def refuse_token(self, policy: ClientPolicy) -> None:
        """It needs no words."""


class _Telling:
    """An authenticator that tells what it is asked and what it answers, but for the secrets."""

    def __init__(self, inner: Authenticator, say: Say) -> None:
        self._inner = inner
        self._say = say

    async def start(self) -> None:
        await self._inner.start()

    async def ask(self, question: Question) -> Answer:
        self._say("sent:")
        for name, value in fields.question_pairs(question):
            self._say(f"  {printable(name)}={HIDDEN if name == b'_SOURCE_CRED' else printable(value)}")
        asked = time.monotonic()
        try:
            mapping = await self._inner.ask(question)
        finally:
            self._say(f"answered in {(time.monotonic() - asked) * 1000:.2f} ms:")
        for line in _describe(mapping):
            self._say(f"  {line}")
        return mapping

    async def reload(self) -> None:
        await self._inner.reload()

    async def close(self) -> None:
        await self._inner.close()


def _describe(mapping: Answer) -> Sequence[str]:
    lines = [f"host={','.join(map(str, mapping.hosts))}"]
    lines += [f"{printable(name)}={printable(value)}" for name, value in mapping.parameters]
    match mapping.credential:
        case Password():
            lines.append(f"credential: a password, {HIDDEN}")
        case StoredMd5():
            lines.append(f"credential: an MD5 hash, {HIDDEN}")
        case Leased(path):
            lines.append(f"credential: from Vault, {path}")
        case None:
            lines.append("credential: none")
        case _:
            lines.append("credential: what the client proves")
    if mapping.verifier is not None:
        lines.append(f"verifier: {HIDDEN}")
    lines += [f"tls.{name}={value}" for name, value in mapping.tls]
    for name in ("session_seconds", "idle_timeout", "idle_in_transaction_timeout", "cache_seconds", "warm"):
        if (value := getattr(mapping, name)) is not None:
            lines.append(f"{name}={value:g}")
    return lines


class Login(msgspec.Struct, frozen=True):
    """The login that is tried: `connect` for the target's part too."""

    user: bytes
    database: bytes
    parameters: tuple[tuple[bytes, bytes], ...]
    password: bytes
    connect: bool


def run(settings: Settings, login: Login, say: Say) -> int:
    """Asks, tells, and connects if wanted; the exit status."""
    return uvloop.run(_try(settings, login, say))


async def _try(settings: Settings, login: Login, say: Say) -> int:
    def hear(event: Event) -> None:
        if isinstance(event, AuthenticatorSaid):
            for line in event.lines:
                say(f"  (it says: {printable(line)})")

    parameters = ((b"user", login.user), (b"database", login.database), *login.parameters)
    started = Started(Accepted(SESSION, ADDRESS), parameters, OVER_TLS if settings.method == "oauth" else None)
    try:
        admission = build_admission(settings, _Telling(build_authenticator(settings, hear), say))
        await admission.authenticator.start()
    except AuthenticatorConfigError as error:
        say(f"broken: {error}")
        return BROKEN
    try:
        granted = await admission.admit(started, _Typist(login.password), lambda: None)
        try:
            say("let in")
            if login.connect:
                await _connect(settings, granted, say)
        finally:
            if granted.mapping.lease is not None:
                await granted.mapping.lease.release()
    except ClientFault as fault:
        say(f"refused: {fault.detail}")
        return REFUSED
    except Fault as fault:
        say(f"broken: {fault.detail}")
        return BROKEN
    finally:
        await admission.authenticator.close()
    return AGREED


async def _connect(settings: Settings, granted: Granted, say: Say) -> None:
    """Logs in at the target and tells where that was. Raises Fault."""
    attached, leg = await build_targets(settings).attach(granted)
    leg.send(messages.terminate())
    leg.close()
    encryption = attached.encryption
    over = f"{encryption.version} ({encryption.cipher})" if encryption is not None else "no TLS"
    version = messages.parameter_status(attached.greeting.before_key + attached.greeting.after_key, b"server_version")
    say(f"connected to {attached.reached}, PostgreSQL {printable(version)}, over {over}")
    say(f"  connecting {attached.connect_seconds * 1000:.2f} ms, logging in {attached.login_seconds * 1000:.2f} ms")
