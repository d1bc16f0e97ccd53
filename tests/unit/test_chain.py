"""Several authenticators in a row."""

from __future__ import annotations

import asyncio

import pytest

from pgauthproxy.auth.chain import ChainAuthenticator
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Question, UnknownUser
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Mapping, Started

QUESTION = Question(Started(Accepted("1", "[local]"), ((b"user", b"alice"),)), "md5")
AGREED = Mapping((Address("h", 1),), ((b"user", b"x"),), None)


class Link:
    """Answers with a mapping, or raises."""

    def __init__(
        self, answer: Mapping | Exception, at_start: Exception | None = None, at_reload: Exception | None = None
    ) -> None:
        self.life: list[str] = []
        self._answer = answer
        self._at_start = at_start
        self._at_reload = at_reload

    async def start(self) -> None:
        if self._at_start is not None:
            raise self._at_start
        self.life.append("started")

    async def ask(self, question: Question) -> Mapping:
        self.life.append("asked")
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    async def reload(self) -> None:
        if self._at_reload is not None:
            raise self._at_reload
        self.life.append("reloaded")

    async def close(self) -> None:
        self.life.append("closed")


def chain(*links: Link) -> ChainAuthenticator:
    return ChainAuthenticator([(f"{number} (link)", link) for number, link in enumerate(links, 1)])


def test_the_first_that_agrees_decides() -> None:
    first, second, third = Link(Denied("not mine")), Link(AGREED), Link(AGREED)
    assert asyncio.run(chain(first, second, third).ask(QUESTION)) is AGREED
    assert (first.life, second.life, third.life) == (["asked"], ["asked"], [])


def test_a_failure_ends_the_row() -> None:
    second = Link(AGREED)
    with pytest.raises(AuthenticatorFault, match="broken"):
        asyncio.run(chain(Link(AuthenticatorFault("broken")), second).ask(QUESTION))
    assert second.life == []


def test_where_all_refuse_the_log_gets_every_reason_and_the_client_the_last_word() -> None:
    links = Link(Denied("no such user", b"first word")), Link(Denied("expired", b"last word")), Link(Denied("unknown"))
    with pytest.raises(Denied) as raised:
        asyncio.run(chain(*links).ask(QUESTION))
    assert raised.value.reason == "1 (link): no such user; 2 (link): expired; 3 (link): unknown"
    assert raised.value.told == b"last word"


@pytest.mark.parametrize("known_first", [True, False])
def test_a_user_whom_one_knows_is_held_to_their_own_verifier(known_first: bool) -> None:
    known = Link(Denied("not from there", verifier=Secret(b"their own")))
    links = [Link(Denied("no")), Link(UnknownUser("nobody", verifier=Secret(b"made up")))]
    with pytest.raises(Denied) as raised:
        asyncio.run(chain(*([known, *links] if known_first else [*links, known])).ask(QUESTION))
    assert raised.value.verifier == Secret(b"their own")
    with pytest.raises(Denied) as raised:
        asyncio.run(chain(*links).ask(QUESTION))
    assert raised.value.verifier == Secret(b"made up")


def test_one_that_cannot_start_closes_those_before_it() -> None:
    first, second, third = Link(AGREED), Link(AGREED, AuthenticatorConfigError("no")), Link(AGREED)
    with pytest.raises(AuthenticatorConfigError):
        asyncio.run(chain(first, second, third).start())
    assert (first.life, third.life) == (["started", "closed"], [])


def test_all_live_and_end_together() -> None:
    links = Link(AGREED), Link(AGREED)

    async def live() -> None:
        whole = chain(*links)
        await whole.start()
        await whole.reload()
        await whole.close()

    asyncio.run(live())
    assert [link.life for link in links] == [["started", "reloaded", "closed"]] * 2


def test_a_link_that_cannot_be_reloaded_keeps_none_of_the_others_old() -> None:
    first = Link(AGREED, at_reload=AuthenticatorConfigError("no file", "no key"))
    second = Link(AGREED)
    third = Link(AGREED, at_reload=AuthenticatorConfigError("no host"))
    fourth = Link(AGREED)
    with pytest.raises(AuthenticatorConfigError) as raised:
        asyncio.run(chain(first, second, third, fourth).reload())
    assert raised.value.faults == ("1 (link): no file", "1 (link): no key", "3 (link): no host")
    assert (second.life, fourth.life) == (["reloaded"], ["reloaded"])
