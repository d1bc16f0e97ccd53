"""Session rules: which hold for a session, and when they are broken."""

from __future__ import annotations

import pytest

from pgauthproxy._observe import Observer
from pgauthproxy.gateway import rules
from pgauthproxy.gateway.rules import SessionRules, Watch
from pgauthproxy.stages import Address, Mapping

BEGAN = 1000.0


def mapping(
    session_seconds: float | None = None,
    idle_timeout: float | None = None,
    idle_in_transaction_timeout: float | None = None,
) -> Mapping:
    return Mapping(
        hosts=(Address("db", 5432),),
        parameters=((b"user", b"app"),),
        credential=None,
        session_seconds=session_seconds,
        idle_timeout=idle_timeout,
        idle_in_transaction_timeout=idle_in_transaction_timeout,
    )


@pytest.mark.parametrize(
    ("configured", "mapped", "in_force"),
    [(0, None, 0), (60, None, 60), (0, 30, 30), (60, 30, 30), (60, 90, 60)],
)
def test_a_mapping_may_shorten_a_sessions_life_and_not_lengthen_it(
    configured: float, mapped: float | None, in_force: float
) -> None:
    found = SessionRules(max_session_seconds=configured).for_mapping(mapping(session_seconds=mapped))
    assert found == SessionRules(max_session_seconds=in_force)


@pytest.mark.parametrize(
    ("configured", "mapped", "in_force"),
    [(0, None, 0), (60, None, 60), (0, 30, 30), (60, 30, 30), (60, 90, 90), (60, 0, 0)],
)
def test_a_mappings_word_on_idling_goes_before_the_configuration(
    configured: float, mapped: float | None, in_force: float
) -> None:
    found = SessionRules(0, configured, configured).for_mapping(mapping(None, mapped, mapped))
    assert found == SessionRules(0, in_force, in_force)


@pytest.mark.parametrize(
    ("found", "idling", "anything"),
    [
        (SessionRules(), False, False),
        (SessionRules(max_session_seconds=1), False, True),
        (SessionRules(idle_timeout=1), True, True),
        (SessionRules(idle_in_transaction_timeout=1), True, True),
    ],
)
def test_what_a_session_has_to_be_watched_for_is_known(found: SessionRules, *, idling: bool, anything: bool) -> None:
    assert (found.limit_idling, found.limit_anything) == (idling, anything)


def test_a_life_is_over_when_its_time_is() -> None:
    watch = Watch(SessionRules(max_session_seconds=60), BEGAN, None)
    assert watch.look(BEGAN, held=False) == 60
    assert watch.look(BEGAN + 59, held=True) == 1
    assert watch.look(BEGAN + 60, held=False) is rules.LIVED_TOO_LONG


def test_an_idle_session_is_looked_at_again_when_its_time_would_be_over() -> None:
    observer = Observer()
    since = observer.idle_since
    assert since is not None
    watch = Watch(SessionRules(idle_timeout=10), since, observer)
    assert watch.look(since + 4, held=False) == pytest.approx(6)
    assert watch.look(since + 10, held=False) is rules.IDLE_TOO_LONG


def test_another_rule_is_not_forgotten_while_one_runs() -> None:
    # The transaction may begin just behind the look.
    observer = Observer()
    since = observer.idle_since
    assert since is not None
    watch = Watch(SessionRules(100, 50, 7), since, observer)
    assert watch.look(since + 1, held=False) == pytest.approx(7)
    assert watch.look(since + 45, held=False) == pytest.approx(5)


def test_a_session_that_is_not_in_a_transaction_does_not_idle_in_one() -> None:
    observer = Observer()
    since = observer.idle_since
    assert since is not None
    watch = Watch(SessionRules(idle_in_transaction_timeout=7), since, observer)
    assert watch.look(since + 1000, held=False) == 7


def test_a_client_that_has_not_taken_its_answer_does_not_idle() -> None:
    observer = Observer()
    since = observer.idle_since
    assert since is not None
    watch = Watch(SessionRules(idle_timeout=10), since, observer)
    assert watch.look(since + 15, held=True) == 10
    # And its time begins when it could have taken it.
    assert watch.look(since + 20, held=False) == pytest.approx(5)
    assert watch.look(since + 25, held=False) is rules.IDLE_TOO_LONG


def test_another_watch_goes_on_with_what_is_left() -> None:
    observer = Observer()
    since = observer.idle_since
    assert since is not None
    first = Watch(SessionRules(100, idle_timeout=10), since, observer)
    assert first.look(since + 4, held=True) == 10
    second = Watch.take_up(first.watched, observer)
    assert second.look(since + 6, held=False) == pytest.approx(8)
    assert second.look(since + 14, held=False) is rules.IDLE_TOO_LONG
    assert second.look(since + 100, held=False) is rules.LIVED_TOO_LONG


def test_nothing_is_looked_at_more_often_than_clocks_tick() -> None:
    watch = Watch(SessionRules(max_session_seconds=60), BEGAN, None)
    assert watch.look(BEGAN + 60 - 1e-9, held=False) == rules.LEAST_WAIT
