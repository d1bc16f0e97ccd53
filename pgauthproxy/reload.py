"""Settings that change while the gateway runs.

All of them are read and checked first; then they are put in force at once, for logins from then on. Sessions are not
touched. A fault anywhere leaves everything as it was. What a running gateway cannot change stays, and is named in the
log.
"""

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec

from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.build import (
    address_faults,
    authenticator_part,
    build_access,
    build_admission,
    build_client_tls,
    build_limits,
    build_rules,
    build_statements,
    build_throttle,
    check_target_tls,
    seed_part,
    target_policy,
    tcp_options,
)
from pgauthproxy.config import schema
from pgauthproxy.config.load import ConfigError
from pgauthproxy.config.schema import FIXED, Settings
from pgauthproxy.events import Event, Noticed, Reloaded, Reloading, Sink
from pgauthproxy.gateway.session import Gateway, Session
from pgauthproxy.kinds import build_authenticator
from pgauthproxy.net import listen
from pgauthproxy.net.dial import tune
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.net.tls import ClientSide, TlsConfigError
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink

NOT_LOADED: Final = "configuration not loaded, the old one stays"
LOADED: Final = "configuration loaded anew"
CONFIGURATION: Final = "configuration"
AUTHENTICATOR: Final = "authenticator"
LOOK_SECONDS: Final = 1.0
"""How often is looked whether an authenticator that was replaced has anything on lease."""
Read = Callable[[], Settings]
"""Reads the settings. Raises ConfigError."""


def changed_keys(old: Settings, new: Settings) -> list[str]:
    """The settings that are not the same."""
    return [key.path for key in schema.all_keys() if schema.in_force(old, key) != schema.in_force(new, key)]


def keep_fixed(old: Settings, new: Settings, sink: Sink) -> Settings:
    """The new settings, but for what cannot change; the log is told."""
    fixed = [path for path in FIXED if _at(old, path) != _at(new, path)]
    if fixed:
        sink(Noticed("warning", "settings that need a restart stay as they were", (("keys", ", ".join(fixed)),)))
    for path in fixed:
        section, _, name = path.rpartition(".")
        value = _at(old, path)
        if section:
            name, value = section, msgspec.structs.replace(_at(new, section), **{name: value})
        new = msgspec.structs.replace(new, **{name: value})
    return new


def _at(settings: Settings, path: str) -> Any:
    """A setting, or a section of them."""
    return functools.reduce(getattr, path.split("."), settings)


def warn_of_cleartext(settings: Settings, listening: Sequence[StreamSocket], sink: Sink) -> None:
    """Passwords that others could read on their way."""
    exposed = [listen.describe(each) for each in listening if not listen.is_local(each)]
    if exposed and settings.method == "cleartext" and settings.tls_mode != "require":
        facts = (("addresses", ", ".join(exposed)), ("remedy", "tls.mode: require"))
        sink(Noticed("warning", "passwords cross the network in clear", facts))


class OneAtATime:
    """Does something when it is asked for, one after the other; asked for twice meanwhile, it is done once more.

    `when_asked` is called whenever it is asked for, `when_done` when nothing is left to be done.
    """

    def __init__(
        self, work: Callable[[], Coroutine[None, None, None]], when_asked: Callable[[], object] = lambda: None
    ) -> None:
        self._work = work
        self._when_asked = when_asked
        self._working: asyncio.Task[None] | None = None
        self._again = False
        self.when_done: Callable[[], object] = lambda: None

    def ask(self) -> None:
        self._when_asked()
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
        listening: Sequence[StreamSocket],
        read: Read,
        fit: Callable[[Settings, Sink], Settings],
        sink: Sink,
        log: LogSink,
        audit: AuditSink | None,
    ) -> None:
        self.settings = fitted
        self._asked_for = asked_for
        self._gateway = gateway
        self._listening = listening
        self._read = read
        self._fit = fit
        self._sink = sink
        self._log = log
        self._audit = audit
        self.reloading = OneAtATime(self._reload, lambda: sink(Reloading()))
        self._retiring: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def close(self) -> None:
        """Ends what is going on. No login is in progress any more."""
        await self.reloading.close()
        self._closing.set()
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def _reload(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._read)
        except ConfigError as error:
            self._complain(NOT_LOADED, *error.faults)
            self._sink(Reloaded(CONFIGURATION, error.faults))
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
            self._sink(Reloaded(AUTHENTICATOR, error.faults))
            if is_sound:
                self._sink(Reloaded(CONFIGURATION, ("the authenticator has faults",)))
            return
        self._put_in_force(wanted, client_tls, authenticator)
        if authenticator is not old:
            self._retire(old)

    def _check(self, wanted: Settings) -> tuple[ClientSide | None, bool]:
        """TLS with clients, and whether nothing is wrong outside the authenticator; what is wrong is told."""
        if faults := address_faults(wanted):
            self._complain(NOT_LOADED, *faults)
            self._sink(Reloaded(CONFIGURATION, tuple(faults)))
            return None, False
        try:
            client_tls = build_client_tls(wanted)
            check_target_tls(wanted)
        except TlsConfigError as error:
            self._complain("certificates not loaded, the old ones stay", str(error))
            self._sink(Reloaded(CONFIGURATION, (str(error),)))
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
        throttle = build_throttle(settings, gateway.limits.ledger, self._sink)
        admission = build_admission(settings, authenticator, throttle)
        if seed_part(settings) == seed_part(asked_for):
            admission = dataclasses.replace(admission, seed=gateway.admission.seed)
        gateway.admission = admission
        gateway.limits.bind(build_limits(settings, gateway.limits.ledger))
        gateway.access = build_access(settings)
        gateway.rules = build_rules(settings)
        gateway.statements = build_statements(settings, self._audit)
        gateway.login_timeout = settings.login_timeout
        gateway.cancel_timeout = settings.cancel_timeout
        gateway.close_timeout = settings.close_timeout
        for each in self._listening:
            tune(each, tcp_options(settings), anew=True)
        self._log.change(settings.log.format, settings.log.level)
        self._sink(Noticed("info", "certificates loaded anew"))
        self._sink(Noticed("info", "authenticator loaded anew"))
        self._sink(Reloaded(AUTHENTICATOR))
        self._sink(Reloaded(CONFIGURATION))
        changed = changed_keys(asked_for, self._asked_for)
        self._sink(Noticed("info", LOADED, (("changed", ", ".join(changed) or "nothing"),)))
        warn_of_cleartext(settings, self._listening, self._sink)

    def _retire(self, old: Authenticator) -> None:
        """Closes an authenticator once the logins that may be in its hands are done, and what it has lent is back."""
        task = asyncio.get_running_loop().create_task(self._close_after(list(self._gateway.sessions), old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _close_after(self, sessions: list[Session], authenticator: Authenticator) -> None:
        logins = [session.login for session in sessions if session.login is not None]
        if logins:
            await asyncio.wait(logins)
        lent = [session for session in sessions if session.has_lease]
        del sessions, logins
        while not self._closing.is_set() and (lent or self._gateway.releasing):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._closing.wait()
            lent = [session for session in lent if session.has_lease]
        await authenticator.close()

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
