"""What `top` makes of what a gateway shows: lines that fit, columns that stand, and nothing that acts on a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from pgauthproxy import top
from pgauthproxy.ops.history import History, Point
from pgauthproxy.ops.snapshot import RefusalRow, SessionRow, Snapshot, TargetRow
from pgauthproxy.ops.view import MAX_ROWS, View, view_of

POINT = Point(100.0, 1.5, 0.5, 1, 0.002, 0.02, 0.2)


def session(number: int, user: str = "alice") -> SessionRow:
    return SessionRow(
        session=f"{number:x}",
        state="relaying",
        client="127.0.0.1:1",
        user=user,
        database="db",
        application_name="psql",
        tls="",
        target="a:1",
        target_user="role",
        target_database="shop",
        since=float(number),
        bytes_from_client=1500,
        bytes_from_target=15,
    )


def view(count: int = 1, user: str = "alice", **values: Any) -> View:
    snapshot = Snapshot(
        version="1.2",
        started=0.0,
        at=3723.0,
        open=count,
        accepted=7,
        refused={"28P01 wrong_credential": 2},
        targets=[TargetRow("a:1", sessions=count, logins=7)],
        sessions=[session(number, user) for number in range(count)],
        refusals=[RefusalRow(100.0, "9", "127.0.0.1:2", "mallory", "db", "28P01", "wrong password")],
    )
    for name, value in values.items():
        setattr(snapshot, name, value)
    return view_of(snapshot, [POINT], whole=True, token_is_set=False)


def test_everything_is_shown() -> None:
    text = "\n".join(top.lines(view(), None))
    assert "pgauthproxy 1.2  serving  up 1:02:03  sessions 1" in text
    assert "logins 1.5/s  refused 0.5/s  login time p50 2.0 ms p95 20.0 ms p99 200.0 ms" in text
    assert "a:1     up     1         7       0" in text
    assert "alice  db        127.0.0.1:1  role @ shop  a:1     1:02:03  1.5 kB       15 B" in text
    assert "28P01     mallory  db        127.0.0.1:2  wrong password" in text


def test_what_passes_a_second_is_known_from_two_looks() -> None:
    before, after = view(bytes_from_client=0), view(at=3725.0, bytes_from_client=4000)
    assert "from clients 2.0 kB/s  from targets 0 B/s" in top.lines(after, before)[1]


@pytest.mark.parametrize(
    ("values", "says"),
    [({"draining": True}, "shutting down"), ({"paused": True}, "logins are paused"), ({}, "serving")],
)
def test_the_state_of_the_gateway_is_told(values: dict[str, bool], says: str) -> None:
    assert says in top.lines(view(**values), None)[0]


def test_a_screen_has_as_many_lines_as_the_terminal_and_none_is_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "20")
    found = top.screen_lines(view(300, "漢字の名前"), None, "")
    assert len(found) <= 20
    assert all(top.width_of(line) <= 60 for line in found[1:])
    assert any(line.startswith("and ") and line.endswith(" more") for line in found)


def test_a_failure_is_told_where_rates_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "20")
    assert top.screen_lines(view(), None, "gone\x1b[2J, trying again")[1] == "gone\\x1b[2J, trying again"


def test_nothing_that_an_answer_says_acts_on_the_terminal() -> None:
    evil = "\x1b[2J\x07\r\nforged"
    shown = view(user=evil, version=evil, targets=[TargetRow(evil, last_error=evil)])
    assert not any("\x1b" in line or "\n" in line or "\r" in line for line in top.lines(shown, None))


def test_widths_are_those_of_cells() -> None:
    assert top.width_of("abc") == 3
    assert top.width_of("漢字") == 4
    assert top.width_of("e\u0301") == 1
    assert top.cut_to("漢字", 3) == "漢"
    assert top.padded("漢", 4) == "漢  "


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e8, "250 MB"), (1e18, "1000 PB")]
)
def test_sizes_have_the_unit_that_fits(count: float, text: str) -> None:
    assert top.size(count) == text


def test_ages_have_days_where_there_are_any() -> None:
    assert top.age(59.6) == "0:01:00"
    assert top.age(90061) == "1 d 1:01:01"


# What is looked at


def test_so_many_of_the_newest_sessions_are_in_a_view() -> None:
    found = view(MAX_ROWS + 5)
    assert len(found.sessions) == MAX_ROWS
    assert found.sessions[0].since > found.sessions[-1].since
    assert found.sessions_left_out == 5


def test_history_has_what_happened_between_two_snapshots() -> None:
    history = History()
    first, second = Snapshot("1", 0.0, at=10.0), Snapshot("1", 0.0, at=12.0)
    second.accepted = 3
    second.refused = {"28P01 wrong_credential": 1}
    second.histograms.login.observe(0.002)
    history.note(first)
    history.note(second)
    (point,) = history.points
    assert (point.at, point.logins, point.refused) == (12.0, 1.5, 0.5)
    assert point.p50 is not None
    assert 0.001 < point.p50 <= 0.0025


def test_history_goes_on_when_a_process_and_its_counts_are_gone() -> None:
    history = History()
    first = Snapshot("1", 0.0, at=10.0, accepted=5, refused={"53300 full": 2})
    first.histograms.login.observe(0.1)
    history.note(first)
    history.note(Snapshot("1", 0.0, at=12.0))
    (point,) = history.points
    assert (point.logins, point.refused, point.p50) == (0, 0, None)
