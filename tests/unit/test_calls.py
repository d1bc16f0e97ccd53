"""Calls of an author's function: who may run, in which order, and that no place is ever lost or given twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pgauthproxy.auth.calls import Call, CallLimits, Calls, Places, Tasks, Threads
from pgauthproxy.auth.model import Denied as Refused
from pgauthproxy.auth.model import Question
from pgauthproxy.authenticator import Denied, Mapping, Request
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed
from pgauthproxy.stages import Accepted, Started
from pgauthproxy.stages import Mapping as TargetMapping

SECONDS = 20
LIMITS = CallLimits(timeout=SECONDS, grace=0.01, max_parallel=2)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await test()

    asyncio.run(bounded())


def question(user: bytes = b"alice") -> Question:
    return Question(Started(Accepted("2a", "192.0.2.1:50000"), ((b"user", user),)), "cert")


def ignore(_notice: Noticed) -> None:
    """Nobody is to be told."""


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


# Places


def test_places_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    async def test() -> None:
        places, served = Places(1), []

        async def visit(number: int) -> None:
            await places.take()
            served.append(number)
            await asyncio.sleep(0)
            places.give_back()

        await asyncio.gather(*(visit(number) for number in range(8)))
        assert served == list(range(8))
        assert places.taken == 0

    run(test)


def test_one_who_gives_up_waiting_as_a_place_comes_free_leaves_it_to_others() -> None:
    async def test() -> None:
        places = Places(1)
        await places.take()
        waiting = asyncio.create_task(places.take())
        await settle()
        waiting.cancel()
        places.give_back()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert places.taken == 0

    run(test)


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    async def test() -> None:
        places = Places(1)
        await places.take()
        waiting = asyncio.create_task(places.take())
        await settle()
        places.give_back()
        # The place is the waiter's, though it has not run since.
        newcomer = asyncio.create_task(places.take())
        await waiting
        await settle()
        assert not newcomer.done()
        places.give_back()
        await newcomer

    run(test)


def test_who_leaves_while_waiting_takes_no_place() -> None:
    async def test() -> None:
        places = Places(1)
        await places.take()
        tasks = [asyncio.create_task(places.take()) for _ in range(3)]
        await settle()
        tasks[0].cancel()
        tasks[1].cancel()
        await settle()
        places.give_back()
        await tasks[2]
        places.give_back()
        assert places.taken == 0

    run(test)


def test_a_place_that_was_given_to_somebody_on_the_way_out_goes_to_the_next() -> None:
    async def test() -> None:
        places = Places(1)
        await places.take()
        leaving, next_one = asyncio.create_task(places.take()), asyncio.create_task(places.take())
        await settle()
        places.give_back()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await next_one
        assert places.taken == 1
        places.give_back()
        assert places.taken == 0

    run(test)


def test_when_all_places_are_held_nobody_waits_for_one() -> None:
    async def test() -> None:
        places = Places(2)
        await places.take()
        await places.take()
        waiting = asyncio.create_task(places.take())
        await settle()
        places.hold()
        await settle()
        assert not waiting.done()
        places.hold()
        with pytest.raises(AuthenticatorFault, match="2 calls run on"):
            await waiting
        with pytest.raises(AuthenticatorFault, match="2 calls run on"):
            await places.take()
        places.held -= 1
        places.give_back()
        await places.take()

    run(test)


# Calls


def plain(request: Request) -> Mapping:
    if request.user == "mallory":
        raise Denied("no mallory")
    if request.user == "broken":
        raise KeyError("secret")
    if request.user == "slow":
        time.sleep(0.05)
    return Mapping("db7", request.user)


async def later(request: Request) -> Mapping:
    await asyncio.sleep(SECONDS if request.user == "slow" else 0)
    return plain(request)


KINDS = pytest.mark.parametrize(("kind", "function"), [(Threads, plain), (Tasks, later)])


@KINDS
def test_a_call_gives_a_mapping_a_refusal_or_a_failure(kind: type[Calls], function: Any) -> None:
    async def test() -> None:
        calls = kind(function, LIMITS, ignore)
        for _ in range(5):
            assert (await calls.call(question())).user == b"alice"
            with pytest.raises(Refused, match="no mallory"):
                await calls.call(question(b"mallory"))
            with pytest.raises(AuthenticatorFault, match=r"KeyError at test_calls\.py"):
                await calls.call(question(b"broken"))
        assert calls._places.taken == 0
        await calls.close()

    run(test)


@KINDS
def test_many_calls_at_once_are_all_answered_each_with_its_own(kind: type[Calls], function: Any) -> None:
    async def test() -> None:
        calls = kind(function, LIMITS, ignore)
        users = [b"user%d" % number for number in range(100)]
        mappings = await asyncio.gather(*(calls.call(question(user)) for user in users))
        assert [mapping.user for mapping in mappings] == users
        await calls.close()

    run(test)


@KINDS
def test_calls_that_are_cancelled_at_any_moment_lose_no_place(kind: type[Calls], function: Any) -> None:
    async def test() -> None:
        calls = kind(function, LIMITS, ignore)
        for steps in range(8):
            for _ in range(3):
                tasks = [asyncio.create_task(calls.call(question())) for _ in range(4)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                for ended in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(ended, asyncio.CancelledError | TargetMapping)
        while calls._places.taken:  # noqa: ASYNC110 (threads end without telling anybody)
            await asyncio.sleep(0.001)
        assert calls._places.held == 0
        mappings = await asyncio.gather(*(calls.call(question()) for _ in range(4)))
        assert len(mappings) == 4
        await calls.close()

    run(test)


@KINDS
@pytest.mark.parametrize("user", [b"alice", b"mallory", b"broken", b"slow"])
def test_nothing_of_a_call_is_left_for_the_collector(kind: type[Calls], function: Any, user: bytes) -> None:
    async def test() -> None:
        calls = kind(function, CallLimits(0.01, 0.01, 1), ignore)
        for _ in range(5):
            with contextlib.suppress(Refused, AuthenticatorFault):
                await calls.call(question(user))
        # Threads end without telling anybody; what other tests have left is not ours.
        while any(isinstance(each, kinds) and id(each) not in before for each in gc.get_objects()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert calls._places.taken == 0
        await calls.close()

    kinds = (Call, Question, Request)
    gc.collect()
    before = {id(each): each for each in gc.get_objects() if isinstance(each, kinds)}
    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()


def test_where_no_thread_can_be_started_the_call_fails_and_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def test() -> None:
        calls = Threads(plain, LIMITS, ignore)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                with pytest.raises(AuthenticatorFault, match="no thread"):
                    await calls.call(question())
        assert calls._places.taken == 0
        assert (await calls.call(question())).user == b"alice"
        await calls.close()

    run(test)


def test_a_call_that_ends_as_its_client_leaves_holds_no_place() -> None:
    begun: list[Call] = []

    class ByHand(Threads):
        def _begin(self, call: Call) -> None:
            begun.append(call)

    async def test() -> None:
        calls = ByHand(plain, LIMITS, ignore)
        waiting = asyncio.create_task(calls.call(question()))
        await settle()
        calls._end(begun[0], AuthenticatorFault("late"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (calls._places.held, calls._places.taken) == (0, 0)
        waiting = asyncio.create_task(calls.call(question()))
        await settle()
        calls._run_over(begun[1])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (calls._places.held, calls._places.taken) == (1, 1)
        calls._end(begun[1], AuthenticatorFault("late"))
        assert (calls._places.held, calls._places.taken) == (0, 0)

    run(test)


def test_a_call_whose_client_leaves_as_it_ends_holds_no_place() -> None:
    begun: list[Call] = []

    class ByHand(Threads):
        def _begin(self, call: Call) -> None:
            begun.append(call)

    async def test() -> None:
        calls = ByHand(plain, LIMITS, ignore)
        waiting = asyncio.create_task(calls.call(question()))
        await settle()
        waiting.cancel()
        calls._end(begun[0], AuthenticatorFault("late"))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (calls._places.held, calls._places.taken) == (0, 0)

    run(test)


def test_a_task_that_is_cancelled_before_its_first_step_gives_its_place_back() -> None:
    async def test() -> None:
        calls = Tasks(later, LIMITS, ignore)
        waiting = asyncio.create_task(calls.call(question()))
        await asyncio.sleep(0)
        (task,) = asyncio.all_tasks() - {waiting, asyncio.current_task()}
        task.cancel()
        with pytest.raises(AuthenticatorFault, match="cancelled"):
            await waiting
        assert calls._places.taken == 0

    run(test)


def test_an_async_function_cleans_up_when_it_is_cancelled() -> None:
    async def test() -> None:
        cleaned = asyncio.Event()

        async def waits(_request: Request) -> Mapping:
            try:
                await asyncio.sleep(SECONDS)
            finally:
                await asyncio.sleep(0)
                cleaned.set()
            raise AssertionError

        calls = Tasks(waits, CallLimits(0.01, SECONDS, 1), ignore)
        with pytest.raises(AuthenticatorFault, match=r"longer than 0\.01 s"):
            await calls.call(question())
        await cleaned.wait()
        await settle()
        assert calls._places.taken == 0

    run(test)


def test_what_does_not_end_is_left_when_calls_are_closed() -> None:
    async def test() -> None:
        async def stubborn(_request: Request) -> Mapping:
            while True:
                try:
                    await asyncio.sleep(SECONDS)
                except asyncio.CancelledError:
                    continue

        told: list[Noticed] = []
        calls = Tasks(stubborn, LIMITS, told.append)
        waiting = asyncio.create_task(calls.call(question()))
        await settle()
        await calls.close()
        with pytest.raises(AuthenticatorFault):
            await waiting
        assert calls._places.taken == 0
        assert [notice.what for notice in told] == ["authenticator did not heed being cancelled, and was left"]

    run(test)
