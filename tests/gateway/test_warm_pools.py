"""The pools of open connections, with legs that are made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pgauthproxy.gateway import warm
from pgauthproxy.gateway.warm import WarmTargets
from pgauthproxy.net.dial import DialError
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address

PLACE = Address("db", 5432)
MOMENT = 0.01
SOON = 5.0


class Framer:
    pending = 0


class HandLeg:
    """As much of a leg as a pool looks at."""

    def __init__(self) -> None:
        self.framer = Framer()
        self.gone = False
        self.heard = True
        self.aborted = False
        self.watcher: Callable[[], object] | None = None

    def watch(self, watcher: Callable[[], object] | None) -> None:
        self.watcher = watcher

    def abort(self) -> None:
        self.aborted = True


class Opening:
    """Opens legs, or fails to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.legs: list[HandLeg] = []
        self.tried = 0
        self._fails = fails

    async def __call__(self, address: Address, plan: TlsPlan | None) -> HandLeg:
        self.tried += 1
        await asyncio.sleep(0)
        if self._fails:
            raise DialError("nobody there")
        self.legs.append(HandLeg())
        return self.legs[-1]


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 (a condition of several parts)
            await asyncio.sleep(0.001)


def pools(opening: Opening) -> WarmTargets[HandLeg]:  # type: ignore[type-var]
    return WarmTargets(opening)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await work()

    asyncio.run(whole())


def test_what_was_asked_for_is_opened_and_topped_up() -> None:
    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        assert warm_targets.take(PLACE, None, 2) is None
        await settled(lambda: warm_targets.standing == 2)
        taken = [warm_targets.take(PLACE, None, 2), warm_targets.take(PLACE, None, 2)]
        assert taken == opening.legs[:2]
        assert not any(leg.heard for leg in opening.legs[:2])
        await settled(lambda: warm_targets.standing == 2)
        assert opening.tried == 4
        warm_targets.close()

    run(work)


def test_places_and_ways_of_tls_are_kept_apart() -> None:
    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        plan = TlsPlan(side=None, required=True, verified=False, direct=False)  # type: ignore[arg-type]
        warm_targets.take(PLACE, None, 1)
        await settled(lambda: warm_targets.standing == 1)
        assert warm_targets.take(PLACE, plan, 1) is None
        assert warm_targets.take(Address("other", 5432), None, 1) is None
        assert warm_targets.take(PLACE, None, 1) is opening.legs[0]
        warm_targets.close()

    run(work)


@pytest.mark.parametrize("of_no_use", ["gone", "has spoken"])
def test_one_that_is_of_no_use_is_dropped(of_no_use: str) -> None:
    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        warm_targets.take(PLACE, None, 2)
        await settled(lambda: warm_targets.standing == 2)
        first, second = opening.legs
        if of_no_use == "gone":
            first.gone = True
        else:
            first.framer.pending = 1
        assert warm_targets.take(PLACE, None, 2) is second
        assert first.aborted
        warm_targets.close()

    run(work)


def test_one_whose_target_closes_it_is_forgotten_at_once() -> None:
    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        warm_targets.take(PLACE, None, 1)
        await settled(lambda: warm_targets.standing == 1)
        watcher = opening.legs[0].watcher
        assert watcher is not None
        watcher()
        assert warm_targets.standing == 0
        warm_targets.close()

    run(work)


def test_where_none_can_be_opened_nobody_is_told_and_nothing_is_tried_in_vain() -> None:
    async def work() -> None:
        opening = Opening(fails=True)
        warm_targets = pools(opening)
        for tried in (2, 4):
            assert warm_targets.take(PLACE, None, 2) is None
            await settled(lambda tried=tried: opening.tried == tried)
            await asyncio.sleep(0)
        assert (opening.tried, warm_targets.standing) == (4, 0)
        warm_targets.close()

    run(work)


def test_one_that_has_stood_for_long_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "RENEW_SECONDS", MOMENT)

    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        warm_targets.take(PLACE, None, 1)
        await settled(lambda: opening.tried >= 3)
        assert opening.legs[0].aborted
        warm_targets.close()

    run(work)


def test_a_target_that_nobody_is_sent_to_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "UNUSED_SECONDS", MOMENT)

    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        warm_targets.take(PLACE, None, 2)
        await settled(lambda: len(opening.legs) == 2 and all(leg.aborted for leg in opening.legs))
        assert warm_targets.standing == 0

    run(work)


def test_closing_drops_those_that_stand_and_those_that_are_on_their_way() -> None:
    async def work() -> None:
        opening = Opening()
        warm_targets = pools(opening)
        warm_targets.take(PLACE, None, 2)
        await settled(lambda: warm_targets.standing == 2)
        warm_targets.take(PLACE, None, 2)
        warm_targets.close()
        await asyncio.sleep(MOMENT)
        assert warm_targets.standing == 0
        assert [leg.aborted for leg in opening.legs] == [False, True, *[True] * (len(opening.legs) - 2)]

    run(work)
