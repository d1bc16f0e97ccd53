"""A snapshot as Prometheus and OpenMetrics have it.

No label's value is one that a client chooses: targets are the authenticator's words, and bounded in number; SQLSTATEs
and reasons are those of `ops.counts`. docs/admin.md and deploy/ name what stands here; a test holds them together.
"""

import platform
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector

from pgauthproxy.ops.snapshot import BOUNDS, AuthenticatorRow, Histogram, Snapshot


def render(snapshot: Snapshot, *, openmetrics: bool) -> tuple[bytes, str]:
    """The metrics in one of two forms, and the type of that form."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(snapshot))
    if openmetrics:
        return openmetrics_text(registry), OPENMETRICS_TYPE  # type: ignore[no-untyped-call]  # it has no types
    return plain_text(registry), CONTENT_TYPE_PLAIN_0_0_4


class _Collected(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: registering is not to collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        return families(self._snapshot)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All metrics that there are."""
    build = InfoMetricFamily("pgauthproxy_build", "What runs")
    build.add_metric([], {"version": snapshot.version, "python": platform.python_version()})
    yield build
    yield _gauge("start_time_seconds", "When counting began, in seconds since the epoch", snapshot.started)
    yield _gauge("draining", "1 once nobody new is accepted and sessions are to end", snapshot.draining)
    yield _gauge("logins_paused", "1 while new logins are held (PAUSE)", snapshot.paused)
    yield _gauge("audit_failing", "1 while the audit log cannot be written", snapshot.audit_failing)
    lost = CounterMetricFamily("pgauthproxy_audit_lost_lines", "Lines that are missing in the audit log")
    lost.add_metric([], snapshot.audit_lost)
    yield lost
    yield from _logins(snapshot)
    yield from _traffic(snapshot)
    yield from _targets(snapshot)
    yield from _authenticators(snapshot)
    yield from _processes(snapshot)


def _logins(snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge("logins_in_progress", "Connections that are not in yet", snapshot.logging_in)
    logins = CounterMetricFamily(
        "pgauthproxy_logins", "Logins by what came of them", labels=["outcome", "sqlstate", "reason"]
    )
    logins.add_metric(["accepted", "00000", "accepted"], snapshot.accepted)
    for counted, count in sorted(snapshot.refused.items()):
        sqlstate, _, reason = counted.partition(" ")
        logins.add_metric(["refused", sqlstate, reason], count)
    yield logins
    took = snapshot.histograms
    yield _histogram("login_seconds", "From accept to ReadyForQuery, the client's own time included", took.login)
    yield _histogram("authenticator_seconds", "How long authenticators took to agree", took.authenticator)
    yield _histogram("target_connect_seconds", "Connecting to targets", took.connect)
    yield _histogram("target_login_seconds", "Logging in at targets", took.target_login)


def _traffic(snapshot: Snapshot) -> Iterator[Metric]:
    moved = CounterMetricFamily("pgauthproxy_received_bytes", "Bytes relayed, by who sent them", labels=["side"])
    moved.add_metric(["client"], snapshot.bytes_from_client)
    moved.add_metric(["target"], snapshot.bytes_from_target)
    yield moved
    ended = CounterMetricFamily("pgauthproxy_sessions_ended", "Sessions that are over, by why", labels=["reason"])
    for reason, count in sorted(snapshot.ended.items()):
        ended.add_metric([reason], count)
    yield ended
    cancels = CounterMetricFamily(
        "pgauthproxy_cancel_requests", "Cancel requests by what came of them", labels=["outcome"]
    )
    for outcome, count in sorted(snapshot.cancels.items()):
        cancels.add_metric([outcome], count)
    yield cancels


def _targets(snapshot: Snapshot) -> Iterator[Metric]:
    sessions = GaugeMetricFamily("pgauthproxy_sessions", "Sessions that are open", labels=["target"])
    up = GaugeMetricFamily("pgauthproxy_target_up", "Whether a target answered when last tried", labels=["target"])
    logins = CounterMetricFamily("pgauthproxy_target_logins", "Logins at a target that succeeded", labels=["target"])
    failures = CounterMetricFamily("pgauthproxy_target_failures", "Attempts that came to nothing", labels=["target"])
    for row in snapshot.targets:
        sessions.add_metric([row.target], row.sessions)
        up.add_metric([row.target], row.is_up)
        logins.add_metric([row.target], row.logins)
        failures.add_metric([row.target], row.failures)
    yield from (sessions, up, logins, failures)


def _authenticators(snapshot: Snapshot) -> Iterator[Metric]:
    by_kind: dict[str, AuthenticatorRow] = {}
    for row in snapshot.authenticators:
        by_kind[row.kind] = by_kind[row.kind].merge(row) if row.kind in by_kind else row
    for name, text in (
        ("running", "Logins that an authenticator is at work on"),
        ("queued", "Logins that wait for an authenticator"),
        ("processes", "Authenticator processes that stand"),
    ):
        gauge = GaugeMetricFamily(f"pgauthproxy_authenticators_{name}", text, labels=["kind"])
        for kind, row in by_kind.items():
            gauge.add_metric([kind], getattr(row, name))
        yield gauge
    failures = CounterMetricFamily("pgauthproxy_authenticator_failures", "Logins that got no answer at all")
    failures.add_metric([], snapshot.authenticator_failures)
    yield failures


def _processes(snapshot: Snapshot) -> Iterator[Metric]:
    yield _histogram("event_loop_lag_seconds", "How late the event loop is", snapshot.histograms.lag)
    for name, text, field in (
        ("resident_memory_bytes", "Memory of a process of the gateway", "resident"),
        ("open_descriptors", "Descriptors that it has open", "descriptors"),
        ("max_descriptors", "Descriptors that it may have open", "max_descriptors"),
    ):
        gauge = GaugeMetricFamily(f"pgauthproxy_{name}", text, labels=["process"])
        for process in snapshot.processes:
            gauge.add_metric([process.name], getattr(process, field))
        yield gauge
    cpu = CounterMetricFamily("pgauthproxy_cpu_seconds", "CPU that it has used, authenticators not", labels=["process"])
    for process in snapshot.processes:
        cpu.add_metric([process.name], process.cpu_seconds)
    yield cpu


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"pgauthproxy_{name}", text, value=float(value))


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(f"pgauthproxy_{name}", text)
    buckets: list[tuple[str, float]] = []
    count = 0
    for bound, more in zip((*map(str, BOUNDS), "+Inf"), histogram.counts, strict=True):
        count += more
        buckets.append((bound, count))
    family.add_metric([], buckets, histogram.total)
    return family
