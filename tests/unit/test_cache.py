"""What is remembered of an authenticator's answers, for how long, and under what."""

from __future__ import annotations

import asyncio

import pytest

from pgauthproxy.auth.cache import CachedAuthenticator
from pgauthproxy.auth.model import Denied, Question
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Encryption, Mapping, Started

VERIFIER = Secret(b"md5" + b"0" * 32)


class Counting:
    """Answers what it was given, after as many turns of the loop as it was told; counts how often it is asked."""

    def __init__(self, seconds: float | None, verifier: Secret | None = None, turns: int = 0) -> None:
        self.asked = 0
        self.reloaded = 0
        self.seconds = seconds
        self.refuses = False
        self._verifier = verifier
        self._turns = turns

    async def start(self) -> None:
        return

    async def ask(self, question: Question) -> Mapping:
        self.asked += 1
        for _ in range(self._turns):
            await asyncio.sleep(0)
        if self.refuses:
            raise Denied("no")
        parameters = ((b"user", b"number %d" % self.asked),)
        return Mapping((Address("h", 1),), parameters, None, verifier=self._verifier, cache_seconds=self.seconds)

    async def reload(self) -> None:
        self.reloaded += 1

    async def close(self) -> None:
        return


def question(
    user: str = "alice",
    password: str = "secret",
    method: str = "cleartext",
    address: str = "10.0.0.1:1000",
    encryption: Encryption | None = None,
    **parameters: str,
) -> Question:
    pairs = {"user": user, **parameters}
    started = Started(Accepted("1", address), tuple((k.encode(), v.encode()) for k, v in pairs.items()), encryption)
    credential = None if method == "scram-sha-256" else Secret(password.encode())
    return Question(started, method, credential, bytes(4))


def asked_for(inner: Counting, *questions: Question, max_seconds: float = 300.0, max_entries: int = 100) -> int:
    """How often the inner one was asked, when these were asked in turn."""

    async def ask_all() -> int:
        guard = CachedAuthenticator(inner, max_seconds, max_entries)
        for each in questions:
            await guard.ask(each)
        return inner.asked

    return asyncio.run(ask_all())


def test_the_same_question_is_asked_once() -> None:
    assert asked_for(Counting(60), question(), question(), question(address="10.0.0.1:2000")) == 1


def test_without_a_word_of_the_authenticator_nothing_is_kept() -> None:
    assert asked_for(Counting(None), question(), question()) == 2


@pytest.mark.parametrize(
    "other",
    [
        question("bob"),
        question(password="another"),
        question(address="10.0.0.2:1000"),
        question(application_name="psql"),
        question(encryption=Encryption("TLSv1.3", "c", "db.example", "", b"", None)),
        question(use="alice"),
    ],
    ids=["user", "password", "address", "parameter", "server name", "parameter's name"],
)
def test_another_question_is_another_answer(other: Question) -> None:
    assert asked_for(Counting(60), question(), other) == 2


def test_no_two_ways_to_cut_the_words_are_the_same() -> None:
    assert asked_for(Counting(60), question(a="bc"), question(ab="c")) == 2


@pytest.mark.parametrize("method", ["md5", "scram-sha-256"])
def test_where_the_gateway_must_compare_only_answers_with_a_verifier_are_kept(method: str) -> None:
    assert asked_for(Counting(60), question(method=method), question(method=method)) == 2
    again = question(password="another answer to another salt", method=method)
    assert asked_for(Counting(60, VERIFIER), question(method=method), again) == 1


def test_the_configuration_bounds_how_long() -> None:
    assert asked_for(Counting(1000), question(), question(), max_seconds=1e-9) == 2


def test_the_least_lately_used_goes_first() -> None:
    alice, bob, carol = question("alice"), question("bob"), question("carol")
    assert asked_for(Counting(60), alice, bob, alice, carol, alice, max_entries=2) == 3
    assert asked_for(Counting(60), alice, bob, alice, carol, bob, max_entries=2) == 4


def test_zero_seconds_and_a_reload_empty_it() -> None:
    async def ask_all() -> list[int]:
        inner = Counting(60)
        guard = CachedAuthenticator(inner, 300, 100)
        seen = []
        await guard.ask(question())
        inner.seconds = 0
        await guard.ask(question("bob"))
        inner.seconds = 60
        await guard.ask(question())
        seen.append(inner.asked)
        await guard.reload()
        await guard.ask(question())
        return [*seen, inner.asked, inner.reloaded]

    assert asyncio.run(ask_all()) == [3, 4, 1]


def test_a_refusal_is_never_kept() -> None:
    async def ask_all() -> int:
        inner = Counting(60)
        inner.refuses = True
        guard = CachedAuthenticator(inner, 300, 100)
        for _ in range(3):
            with pytest.raises(Denied):
                await guard.ask(question())
        return inner.asked

    assert asyncio.run(ask_all()) == 3


def test_the_same_login_at_the_same_time_is_asked_about_once() -> None:
    async def ask_at_once() -> tuple[int, set[bytes]]:
        inner = Counting(60, turns=5)
        guard = CachedAuthenticator(inner, 300, 100)
        await guard.ask(question("somebody before"))
        mappings = await asyncio.gather(*(guard.ask(question()) for _ in range(50)))
        return inner.asked, {mapping.user for mapping in mappings}

    assert asyncio.run(ask_at_once()) == (2, {b"number 2"})


def test_one_that_leaves_while_others_wait_for_its_answer_holds_nobody_up() -> None:
    async def ask_and_leave() -> int:
        inner = Counting(60, turns=5)
        guard = CachedAuthenticator(inner, 300, 100)
        await guard.ask(question("somebody before"))
        first = asyncio.create_task(guard.ask(question()))
        others = [asyncio.create_task(guard.ask(question())) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        return len(await asyncio.gather(*others))

    assert asyncio.run(ask_and_leave()) == 3


def test_no_password_is_kept() -> None:
    async def ask() -> str:
        guard = CachedAuthenticator(Counting(60), 300, 100)
        await guard.ask(question(password="correct horse"))
        return repr(vars(guard))

    assert "correct horse" not in asyncio.run(ask())
