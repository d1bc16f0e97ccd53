"""The authenticator that is a function in Python, in this process."""

import asyncio
import contextlib
import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, Final

from pgauthproxy.auth.calls import CallLimits, Calls, Function, Notice, Tasks, Threads
from pgauthproxy.auth.model import AuthenticatorConfigError, Load, Question
from pgauthproxy.authenticator import Runnable
from pgauthproxy.authoring import what_failed
from pgauthproxy.events import Noticed
from pgauthproxy.stages import Mapping

ENTRY_POINTS: Final = "pgauthproxy.authenticators"


def load_callable(name: str, *, anew: bool = False) -> Function:
    """The function of `package.module:function`, or of an entry point of that name. Raises AuthenticatorConfigError.

    Modules are looked for in the working directory first, as for a script that is started there. `anew` runs the code
    of the function's module again; after a failure the old module is in its place.
    """
    module, colon, path = name.partition(":")
    load: Callable[[], Any] = functools.partial(importlib.import_module, module)
    if not colon:
        point = _entry_point(name)
        module, path, load = point.module, "", point.load
    elif not module or not path:
        raise _config_error(name, "neither package.module:function nor the name of an installed authenticator")
    elif os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _forgotten(module) if anew else contextlib.nullcontext():
        found = _load(name, load)
        for part in path.split(".") if path else ():
            if (found := getattr(found, part, None)) is None:
                raise _config_error(name, f"the module {module} has no {path}")
        if not callable(found):
            raise _config_error(name, f"{type(found).__name__} cannot be called")
    function: Function = found
    return function


@contextlib.contextmanager
def _forgotten(name: str) -> Iterator[None]:
    """As if this module had not been imported yet; if what is done then fails, it has been."""
    importlib.invalidate_caches()
    old = sys.modules.pop(name, None)
    try:
        yield
    except BaseException:
        if old is not None:
            sys.modules[name] = old
            package, _, child = name.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], child, old)
        raise


def _entry_point(name: str) -> metadata.EntryPoint:
    known = metadata.entry_points(group=ENTRY_POINTS)
    named = [point for point in known if point.name == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise _config_error(name, f"several packages have one: {', '.join(sorted(point.value for point in named))}")
    close = difflib.get_close_matches(name, known.names, 1, 0.5)
    meant = f", did you mean {close[0]}?" if close else "; package.module:function names a function"
    raise _config_error(name, f"no installed package has an authenticator of that name{meant}")


def _load(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # whatever the author's module does while it is imported
        what = type(error).__qualname__ if isinstance(error, ImportError) else what_failed(error, None)
        said = " ".join(str(error).split())
        raise _config_error(
            name, f"cannot be imported: {what}: {said}" if said else f"cannot be imported: {what}"
        ) from None


def _config_error(name: str, reason: str) -> AuthenticatorConfigError:
    return AuthenticatorConfigError(f"authenticator.callable: {name}: {reason}")


def is_async(function: Function) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class PythonAuthenticator:
    """Calls the operator's function: a plain one in threads, an async one in the gateway's loop."""

    def __init__(self, name: str, limits: CallLimits, notice: Notice) -> None:
        """Imports the function. Raises AuthenticatorConfigError."""
        self._name = name
        self._function = load_callable(name)
        self._limits = limits
        self._notice = notice
        self._calls: Calls | None = None
        self._replaced: set[Calls] = set()
        """Of functions as they were before a reload, with calls under way."""

    async def start(self) -> None:
        self._calls = self._calls_of(self._function)

    def _calls_of(self, function: Function) -> Calls:
        # What the decorator has made is called as it was written.
        written: Function = function.__wrapped__ if isinstance(function, Runnable) else function
        kind = Tasks if is_async(written) else Threads
        return kind(written, self._limits, self._notice)

    async def ask(self, question: Question) -> Mapping:
        assert self._calls is not None  # noqa: S101 (it was started)
        return await self._calls.call(question)

    async def reload(self) -> None:
        """Runs the module's code anew. Calls that are under way end with the old one."""
        function = await asyncio.to_thread(load_callable, self._name, anew=True)
        old, self._calls = self._calls, self._calls_of(function)
        self._notice(Noticed("info", "authenticator loaded anew", (("callable", self._name),)))
        if old is not None:
            self._replaced.add(old)
            try:
                await old.finish()
            finally:
                self._replaced.remove(old)

    async def close(self) -> None:
        if self._calls is not None:
            await self._calls.close()
            self._calls = None

    def load(self) -> list[Load]:
        loads = [calls.load() for calls in (self._calls, *self._replaced) if calls is not None]
        return [Load("python", sum(load.running for load in loads), sum(load.queued for load in loads))]
