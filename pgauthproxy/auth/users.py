"""The authenticator that needs no code: a file of users, each mapped to a target by the database asked for.

It never judges a password: it gives the verifier, and the gateway compares. Whoever is refused is held to a verifier
all the same, their own or one made up after the pattern of somebody's in the file, so that an unknown name, a wrong
address and a database without a target look like a wrong password, in bytes and in time. The log has the true reason.
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from pgauthproxy.auth import users_file
from pgauthproxy.auth.model import Denied, Load, Question, UnknownUser
from pgauthproxy.auth.targets import TargetFault
from pgauthproxy.auth.users_file import NO_ITERATIONS, User, UsersFile
from pgauthproxy.proto import scram
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Mapping, Started

Notice = Callable[[str, str, tuple[tuple[str, object], ...]], None]
"""Tells the operator: level, what, facts."""

GIVE_WAY: Final = 1e-6
"""Seconds: the least that makes the kernel let another thread run."""
MAX_NAMES: Final = 10
"""Names in one warning."""


@dataclass(frozen=True, slots=True)
class UsersPolicy:
    """How clients prove themselves, and what of that is made up: the salts from `seed`, with so many iterations."""

    method: str
    seed: Secret
    scram_iterations: int


class UsersAuthenticator:
    """Knows the users of one file. All look-ups go to one value, which a reload replaces."""

    def __init__(self, path: Path, policy: UsersPolicy, target_fault: TargetFault, notice: Notice) -> None:
        """Reads the file. Raises AuthenticatorConfigError with all that is wrong in it."""
        self._path = path
        self._policy = policy
        self._target_fault = target_fault
        self._notice = notice
        self._file = users_file.read(path, policy.method, target_fault, give_way=lambda: None)
        # The MD5 hash that nobody's password has.
        self._no_md5 = Secret(b"md5" + secrets.token_hex(16).encode())
        self._warn(self._file)

    async def start(self) -> None:
        await self._put_in_force(self._file)

    async def ask(self, question: Question) -> Mapping:
        started = question.started
        file = self._file
        # For everybody, so that it does not take longer for those who do not exist.
        made_up = self._made_up(started.user, file)
        user = file.users.get(started.user)
        if user is None:
            raise UnknownUser("the users file does not have this user", verifier=made_up)
        if user.allow is not None and not user.allow.has(started.accepted.address):
            raise Denied("this user may not come from this address", verifier=user.verifier)
        if user.certificate is not None and (reason := _certificate_fault(user, started)):
            raise Denied(reason, verifier=user.verifier)
        target = user.target(started.database)
        if target is None:
            raise Denied("this user has no target for this database", verifier=user.verifier)
        return target.mapping(started, user.session_seconds, user.verifier)

    async def reload(self) -> None:
        old = self._file
        file = await asyncio.to_thread(users_file.read, self._path, self._policy.method, self._target_fault, _give_way)
        await self._put_in_force(file)
        self._warn(file)
        await asyncio.to_thread(users_file.let_go, old, _give_way)

    async def close(self) -> None:
        """Nothing is held."""

    def load(self) -> list[Load]:
        """It answers at once: nobody is ever found waiting."""
        return [Load("users")]

    async def _put_in_force(self, file: UsersFile) -> None:
        self._file = await asyncio.to_thread(_with_verifiers, file, self._policy)
        facts = (("file", str(self._path)), ("users", len(file.users)), ("targets", len(file.targets)))
        self._notice("info", "users loaded", facts)

    def _warn(self, file: UsersFile) -> None:
        if file.plain:
            names = ", ".join(file.plain[:MAX_NAMES]) + (", …" if len(file.plain) > MAX_NAMES else "")
            facts = (("file", str(self._path)), ("users", names), ("remedy", "pgauthproxy hash-password"))
            self._notice("warning", "passwords in plain text", facts)

    def _made_up(self, name: bytes, file: UsersFile) -> Secret | None:
        """What somebody with this name could have been given, by what users of this file have."""
        if self._policy.method == "cert":
            return None
        if self._policy.method == "md5":
            return self._no_md5
        seed = self._policy.seed.reveal()
        iterations = self._policy.scram_iterations
        if file.iterations:
            lot = int.from_bytes(hmac.digest(seed, b"iterations " + name, "sha256")[:8])
            iterations = file.iterations[lot % len(file.iterations)]
        if iterations == NO_ITERATIONS:
            return self._no_md5
        return Secret(scram.Verifier.made_up(name, seed, iterations).text())


def _give_way() -> None:
    """Lets the event loop's thread run."""
    time.sleep(GIVE_WAY)


def _certificate_fault(user: User, started: Started) -> str | None:
    """Why a client's certificate is not this user's."""
    certificate = started.encryption.certificate if started.encryption is not None else None
    if certificate is None:
        return "this user needs a client certificate"
    assert user.certificate is not None  # noqa: S101 (asked only then)
    return None if user.certificate.fits(certificate) else "the client's certificate is not this user's"


def _with_verifiers(file: UsersFile, policy: UsersPolicy) -> UsersFile:
    """The file with a verifier for everybody who has a password: a millisecond each, so not for the loop's thread."""
    if all(user.password is None for user in file.users.values()):
        return file
    users = {name: _with_verifier(name, user, policy) for name, user in file.users.items()}
    iterations = tuple(
        policy.scram_iterations if user.password is not None else each
        for user, each in zip(file.users.values(), file.iterations, strict=True)
    )
    return msgspec.structs.replace(file, users=users, iterations=iterations)


def _with_verifier(name: bytes, user: User, policy: UsersPolicy) -> User:
    if user.password is None:
        return user
    salt = scram.stable_salt(name, policy.seed.reveal())
    verifier = scram.Verifier.of(user.password.reveal(), salt, policy.scram_iterations)
    return msgspec.structs.replace(user, verifier=Secret(verifier.text()), password=None)
