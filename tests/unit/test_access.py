"""Who may connect at all, and how those who may not are told of."""

from __future__ import annotations

import asyncio

import pytest

from pgauthproxy.events import Event, Noticed
from pgauthproxy.gateway import access
from pgauthproxy.gateway.access import Access, Denials

LOCAL = "[local]"


@pytest.mark.parametrize(
    ("allow", "deny", "address", "refusal"),
    [
        ([], [], "192.0.2.1:1", None),
        ([], [], "[2001:db8::1]:1", None),
        (["192.0.2.0/24"], [], "192.0.2.1:1", None),
        (["192.0.2.0/24"], [], "192.0.3.1:1", "not in allow"),
        (["192.0.2.0/24"], [], "[2001:db8::1]:1", "not in allow"),
        (["2001:db8::/32"], [], "[2001:db8:1::1]:1", None),
        (["2001:db8::/32"], [], "192.0.2.1:1", "not in allow"),
        ([], ["192.0.2.0/24"], "192.0.2.1:1", "in deny"),
        ([], ["192.0.2.0/24"], "192.0.3.1:1", None),
        (["192.0.2.0/24"], ["192.0.2.7"], "192.0.2.7:1", "in deny"),
        (["192.0.2.7"], ["192.0.2.0/24"], "192.0.2.7:1", "in deny"),
        (["192.0.2.0/24"], ["192.0.2.7"], "192.0.2.8:1", None),
        (["192.0.2.0/24"], [], LOCAL, None),
        ([], ["0.0.0.0/0", "::/0"], LOCAL, None),
        ([], ["local"], LOCAL, "in deny"),
        (["local"], ["local"], LOCAL, "in deny"),
        (["local"], [], "127.0.0.1:1", "not in allow"),
        (["fe80::/10"], [], "[fe80::1%eth0]:1", None),
    ],
)
def test_deny_wins_and_an_empty_allow_is_everybody(
    allow: list[str], deny: list[str], address: str, refusal: str | None
) -> None:
    assert Access(allow, deny).refusal(address) == refusal


@pytest.mark.parametrize("texts", [["10.0.0.1/8"], ["everybody"], ["10.0.0.0/8", ""]])
def test_what_is_no_network_is_named(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"host bits|is no network"):
        Access(texts, [])
    with pytest.raises(ValueError, match=r"host bits|is no network"):
        Access([], texts)


def test_a_flood_of_denied_connections_is_a_line_at_once_and_one_for_each_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access, "REPORT_SECONDS", 0.05)
    told: list[Event] = []

    async def flood() -> None:
        again = asyncio.Event()

        def hear(event: Event) -> None:
            told.append(event)
            if len(told) == 2:
                again.set()

        denials = Denials(hear)
        for number in range(1000):
            denials.note(f"192.0.2.1:{number}", "in deny")
        assert len(told) == 1
        async with asyncio.timeout(20):
            await again.wait()
        # A period without any (its timer stands before this one): the next one is the first again.
        await asyncio.sleep(0.15)
        denials.note("192.0.2.2:7", "not in allow")
        assert len(told) == 3
        denials.note("192.0.2.3:7", "not in allow")
        denials.flush()

    asyncio.run(flood())
    assert told == [
        Noticed("warning", "connections denied", (("count", count), ("client", client), ("reason", reason)))
        for count, client, reason in (
            (1, "192.0.2.1:0", "in deny"),
            (999, "192.0.2.1:999", "in deny"),
            (1, "192.0.2.2:7", "not in allow"),
            (1, "192.0.2.3:7", "not in allow"),
        )
    ]
