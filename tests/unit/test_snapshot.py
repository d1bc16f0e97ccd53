"""What a gateway knows of itself: sums of several processes, quantiles, and what refusals are counted as."""

from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from pgauthproxy.auth.users import UsersAuthenticator
from pgauthproxy.build import build_gateway, build_ledger
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import AuthenticatorFault, ClientFault, Fault, GatewayFault, TargetFault, wrong_password
from pgauthproxy.events import Cancelled, Refused, TargetFailed
from pgauthproxy.ops.counts import Counts, counted_as
from pgauthproxy.ops.snapshot import (
    BOUNDS,
    MAX_REFUSALS,
    MAX_TARGETS,
    OTHERS,
    AuthenticatorRow,
    Histogram,
    RefusalRow,
    Snapshot,
    TargetRow,
)
from pgauthproxy.stages import Accepted, Address, Started

NOWHERE = Accepted("1", "127.0.0.1:1")
UNASKED = UsersAuthenticator.__new__(UsersAuthenticator)


def snapshot(**values: object) -> Snapshot:
    return Snapshot(**{"version": "1", "started": 100.0, "at": 200.0} | values)  # type: ignore[arg-type]


def test_a_histogram_has_quantiles_and_a_total() -> None:
    histogram = Histogram()
    for seconds in (0.002, 0.002, 0.002, 0.3):
        histogram.observe(seconds)
    assert histogram.count == 4
    assert histogram.total == pytest.approx(0.306)
    assert 0.001 < histogram.quantile(0.5) <= 0.0025
    assert 0.25 < histogram.quantile(0.99) <= 0.5
    histogram.observe(BOUNDS[-1] + 1)
    assert histogram.quantile(1) == BOUNDS[-1]


def test_nothing_counted_has_the_quantile_zero() -> None:
    assert Histogram().quantile(0.5) == 0


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram()
    histogram.observe(BOUNDS[3])
    assert histogram.counts[3] == 1


def test_snapshots_of_two_processes_are_summed() -> None:
    one = snapshot(accepted=3, refused={"28P01 wrong_credential": 1}, targets=[TargetRow("a:1", sessions=2, logins=3)])
    other = snapshot(
        started=50.0,
        accepted=4,
        refused={"28P01 wrong_credential": 2, "53300 full": 1},
        targets=[TargetRow("a:1", sessions=1, logins=4), TargetRow("b:1", sessions=5, logins=6)],
        draining=True,
    )
    one.histograms.login.observe(0.1)
    other.histograms.login.observe(0.1)
    both = one.merge(other)
    assert (both.accepted, both.started, both.draining) == (7, 50.0, True)
    assert both.refused == {"28P01 wrong_credential": 3, "53300 full": 1}
    assert {row.target: (row.sessions, row.logins) for row in both.targets} == {"a:1": (3, 7), "b:1": (5, 6)}
    assert both.histograms.login.count == 2
    assert one.histograms.login.count == 1


def test_what_is_known_of_a_target_is_what_was_seen_last() -> None:
    well = TargetRow("a:1", last_login=10.0)
    ill = TargetRow("a:1", is_up=False, failures=1, last_failure=20.0, last_error="refused")
    for merged in (well.merge(ill), ill.merge(well)):
        assert (merged.is_up, merged.last_login, merged.last_error) == (False, 10.0, "refused")
    well_again = TargetRow("a:1", last_login=30.0)
    assert ill.merge(well_again).is_up


def test_authenticators_are_summed_in_their_order() -> None:
    rows = [AuthenticatorRow("worker", 1, 2, 3), AuthenticatorRow("command", 1, 0, 1)]
    merged = snapshot(authenticators=rows).merge(snapshot(authenticators=rows))
    assert merged.authenticators == [AuthenticatorRow("worker", 2, 4, 6), AuthenticatorRow("command", 2, 0, 2)]


def test_an_authenticator_that_only_one_process_has_yet_stands_once() -> None:
    command, cache = AuthenticatorRow("command", 1, 0, 1), AuthenticatorRow("cache", 0, 2, 0)
    one, other = snapshot(authenticators=[command]), snapshot(authenticators=[command, cache])
    for merged in (one.merge(other), other.merge(one)):
        assert merged.authenticators == [AuthenticatorRow("command", 2, 0, 2), cache]


def test_an_audit_log_that_one_process_cannot_write_fails() -> None:
    well, ill = snapshot(audit_lost=1), snapshot(audit_lost=2, audit_failing=True)
    for merged in (well.merge(ill), ill.merge(well)):
        assert (merged.audit_lost, merged.audit_failing) == (3, True)


def test_what_is_bounded_stays_so_in_a_sum() -> None:
    def refusals(at: float) -> list[RefusalRow]:
        return [RefusalRow(at + number, "", "", "", "", "28P01", "") for number in range(MAX_REFUSALS)]

    targets = [TargetRow(f"a:{number}", logins=1) for number in range(MAX_TARGETS)]
    more = [TargetRow(f"b:{number}", logins=1) for number in range(5)]
    merged = snapshot(refusals=refusals(0), targets=targets).merge(snapshot(refusals=refusals(1000), targets=more))
    assert len(merged.refusals) == MAX_REFUSALS
    assert merged.refusals[0].at == 1000
    assert [(row.target, row.logins) for row in merged.targets[MAX_TARGETS:]] == [(OTHERS, 5)]


def test_a_snapshot_can_be_sent_to_another_process() -> None:
    sent = snapshot(targets=[TargetRow("a:1")], refused={"53300 full": 1})
    sent.histograms.lag.observe(0.1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Snapshot) == sent


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (wrong_password(b"alice", "no"), "28P01 wrong_credential"),
        (ClientFault("08P01", None, "client left during its login"), "08P01 left_or_garbage"),
        (ClientFault("08P01", "no"), "08P01 broken_protocol"),
        (AuthenticatorFault("no"), "58000 authenticator_failed"),
        (TargetFault("08001", "no"), "08001 target_unreachable"),
        (TargetFault("3D000", "no"), "3D000 target_refused"),
        (GatewayFault("53300", "no"), "53300 full"),
    ],
)
def test_a_refusal_is_counted_by_sqlstate_and_reason(fault: Fault, counted: str) -> None:
    assert counted_as(fault) == counted


def test_sqlstates_that_a_target_thinks_of_are_counted_as_one() -> None:
    assert {counted_as(TargetFault(f"ZZ{number:03}", "no")) for number in range(1000)} == {"other target_refused"}


def taken(counts: Counts) -> Snapshot:
    """What was counted, of a gateway without sessions."""
    gateway = build_gateway(Settings(), UNASKED, counts, build_ledger(Settings()))
    return asyncio.run(counts.snapshot(gateway))


def test_few_refusals_are_kept_and_little_of_each() -> None:
    counts = Counts()
    parameters = ((b"user", b"x" * 9000), (b"database", b"\x1b[31m"))
    for _ in range(10 * MAX_REFUSALS):
        counts(Refused(NOWHERE, Started(NOWHERE, parameters), wrong_password(b"x" * 9000, "y" * 9000)))
    found = taken(counts)
    assert found.refused == {"28P01 wrong_credential": 10 * MAX_REFUSALS}
    assert len(found.refusals) == MAX_REFUSALS
    row = found.refusals[0]
    assert max(len(row.user), len(row.reason)) < 300
    assert "\x1b" not in row.database


def test_targets_beyond_a_number_are_counted_as_one() -> None:
    counts = Counts()
    for number in range(2 * MAX_TARGETS):
        counts(TargetFailed(Address("10.0.0.1", number), False, "refused"))
    rows = taken(counts).targets
    assert len(rows) == MAX_TARGETS + 1
    assert (rows[-1].target, rows[-1].failures, rows[-1].is_up) == (OTHERS, MAX_TARGETS, False)


@pytest.mark.parametrize(
    ("outcome", "counted"),
    [
        ("passed on", "passed on"),
        ("passed on, not confirmed in 10 s", "passed on, not confirmed"),
        ("not passed on: 10.0.0.1:5432: refused", "not passed on"),
        ("nobody's key", "nobody's key"),
        ("the target issued no key", "refused"),
    ],
)
def test_a_cancel_request_is_counted_by_what_came_of_it(outcome: str, counted: str) -> None:
    counts = Counts()
    counts(Cancelled("127.0.0.1:1", "1", outcome))
    assert taken(counts).cancels == {counted: 1}


def test_the_process_knows_what_it_takes_of_the_machine() -> None:
    (process,) = taken(Counts()).processes
    assert process.pid == os.getpid()
    assert process.resident > 1 << 20
    assert 3 <= process.descriptors <= process.max_descriptors
    assert process.cpu_seconds > 0
