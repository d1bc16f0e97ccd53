"""Settings that change while the gateway runs.

All of them are read and checked first; then they are put in force at once, for logins from then on. Sessions are not
touched. A fault anywhere leaves everything as it was. What a running gateway cannot change stays, and is named in the
log.
"""

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

import msgspec

from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.build import (
    authenticator_part,
    build_admission,
    build_authenticator,
    build_client_tls,
    check_target_tls,
    seed_part,
    target_policy,
    tcp_options,
)
from pgauthproxy.config import schema
from pgauthproxy.config.load import ConfigError
from pgauthproxy.config.schema import FIXED, Settings
from pgauthproxy.events import Event, Noticed, Sink
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.net import listen
from pgauthproxy.net.dial import tune
from pgauthproxy.net.listen import ListenError, parse_listen
from pgauthproxy.net.tls import ClientSide, TlsConfigError
from pgauthproxy.ops.log import LogSink

NOT_LOADED: Final = "configuration not loaded, the old one stays"
LOADED: Final = "configuration loaded anew"
Read = Callable[[], Settings]
"""Reads the settings. Raises ConfigError."""


def changed_keys(old: Settings, new: Settings) -> list[str]:
    """The settings that are not the same."""
    return [key.path for key in schema.all_keys() if schema.in_force(old, key) != schema.in_force(new, key)]


def keep_fixed(old: Settings, new: Settings, sink: Sink) -> Settings:
    """The new settings, but for what cannot change; the log is told."""
    fixed = [name for name in FIXED if getattr(old, name) != getattr(new, name)]
    if fixed:
        sink(Noticed("warning", "settings that need a restart stay as they were", (("keys", ", ".join(fixed)),)))
    return msgspec.structs.replace(new, **{name: getattr(old, name) for name in fixed})


def warn_of_cleartext(settings: Settings, listening: Sequence[socket.socket], sink: Sink) -> None:
    """Passwords that others could read on their way."""
    exposed = [listen.describe(each) for each in listening if not listen.is_local(each)]
    if exposed and settings.method == "cleartext" and settings.tls_mode != "require":
        facts = (("addresses", ", ".join(exposed)), ("remedy", "tls.mode: require"))
        sink(Noticed("warning", "passwords cross the network in clear", facts))


class OneAtATime:
    """Does something when it is asked for, one after the other; asked for twice meanwhile, it is done once more.

    `when_done` is called when nothing is left to be done.
    """

    def __init__(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        self._work = work
        self._working: asyncio.Task[None] | None = None
        self._again = False
        self.when_done: Callable[[], object] = lambda: None

    def ask(self) -> None:
        self._again = self._working is not None
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ends what is going on."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])

    async def _run(self) -> None:
        try:
            await self._work()
            while self._again:
                self._again = False
                await self._work()
        finally:
            self._working = None
            self.when_done()


class Reloads:
    """The settings in force in one gateway.

    `asked_for` are those that the operator wrote; `fit` lowers what the machine cannot give, and made `fitted` of them.
    """

    def __init__(
        self,
        gateway: Gateway,
        asked_for: Settings,
        fitted: Settings,
        listening: Sequence[socket.socket],
        read: Read,
        fit: Callable[[Settings, Sink], Settings],
        sink: LogSink,
    ) -> None:
        self.settings = fitted
        self._asked_for = asked_for
        self._gateway = gateway
        self._listening = listening
        self._read = read
        self._fit = fit
        self._sink = sink
        self.reloading = OneAtATime(self._reload)
        self._retiring: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what is going on. No login is in progress any more."""
        await self.reloading.close()
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def _reload(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._read)
        except ConfigError as error:
            self._complain(NOT_LOADED, *error.faults)
            return
        client_tls, is_sound = self._check(wanted)
        old = self._gateway.admission.authenticator
        try:
            if not is_sound:
                # It is not to be used: its faults are to be told together with the others.
                await self._build(wanted)
                return
            if authenticator_part(wanted) == authenticator_part(self._asked_for):
                await old.reload()
                authenticator = old
            else:
                authenticator = await self._build(wanted)
                await _start(authenticator)
        except AuthenticatorConfigError as error:
            self._complain("authenticator not loaded, the old one stays", *error.faults)
            return
        self._put_in_force(wanted, client_tls, authenticator)
        if authenticator is not old:
            self._retire(old)

    def _check(self, wanted: Settings) -> tuple[ClientSide | None, bool]:
        """TLS with clients, and whether nothing is wrong outside the authenticator; what is wrong is told."""
        try:
            for text in wanted.listen:
                parse_listen(text)
        except ListenError as error:
            self._complain(NOT_LOADED, str(error))
            return None, False
        try:
            client_tls = build_client_tls(wanted)
            check_target_tls(wanted)
        except TlsConfigError as error:
            self._complain("certificates not loaded, the old ones stay", str(error))
            return None, False
        return client_tls, True

    async def _build(self, wanted: Settings) -> Authenticator:
        """An authenticator, not started, made in a thread since it may be long to read."""
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            # It is called by that thread at first, and by this one for as long as the authenticator lives.
            if threading.get_ident() == here:
                self._sink(event)
            else:
                loop.call_soon_threadsafe(self._sink, event)

        here = threading.get_ident()
        return await asyncio.to_thread(build_authenticator, wanted, sink)

    def _put_in_force(self, wanted: Settings, client_tls: ClientSide | None, authenticator: Authenticator) -> None:
        gateway = self._gateway
        asked_for, self._asked_for = self._asked_for, keep_fixed(self._asked_for, wanted, self._sink)
        settings = self.settings = self._fit(self._asked_for, self._sink)
        gateway.client_tls = client_tls
        gateway.targets.policy = target_policy(settings)
        gateway.targets.forget_certificates()
        admission = build_admission(settings, authenticator)
        if seed_part(settings) == seed_part(asked_for):
            admission = dataclasses.replace(admission, seed=gateway.admission.seed)
        gateway.admission = admission
        gateway.limits.max_clients, gateway.limits.max_logins = settings.max_clients, settings.max_logins
        gateway.login_timeout = settings.login_timeout
        gateway.cancel_timeout = settings.cancel_timeout
        gateway.close_timeout = settings.close_timeout
        for each in self._listening:
            tune(each, tcp_options(settings), anew=True)
        self._sink.change(settings.log.format, settings.log.level)
        self._sink(Noticed("info", "certificates loaded anew"))
        changed = changed_keys(asked_for, self._asked_for)
        self._sink(Noticed("info", LOADED, (("changed", ", ".join(changed) or "nothing"),)))
        warn_of_cleartext(settings, self._listening, self._sink)

    def _retire(self, old: Authenticator) -> None:
        """Closes an authenticator once the logins that may be in its hands are done."""
        logins = [session.login for session in self._gateway.sessions if session.login is not None]
        task = asyncio.get_running_loop().create_task(_close_after(logins, old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _complain(self, what: str, *faults: str) -> None:
        complain(self._sink, what, *faults)


def complain(sink: Sink, what: str, *faults: str) -> None:
    """A line for each fault."""
    for fault in faults:
        sink(Noticed("error", what, (("reason", fault),)))


async def _start(authenticator: Authenticator) -> None:
    try:
        await authenticator.start()
    except BaseException:
        await authenticator.close()
        raise


async def _close_after(logins: "list[asyncio.Task[None]]", authenticator: Authenticator) -> None:
    if logins:
        await asyncio.wait(logins)
    await authenticator.close()
