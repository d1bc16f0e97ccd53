"""A pool of worker processes, asked directly: who is served when."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from pgauthproxy.auth.command import SaidSink
from pgauthproxy.auth.model import AuthenticatorConfigError, Question
from pgauthproxy.auth.worker import WorkerAuthenticator, WorkerLimits
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Started

ECHOES = """
import os
import sys
lines = []
for line in sys.stdin:
    if line == "\\n":
        print("_META_TARGET_HOST=127.0.0.1", *lines, sep="\\n", end="\\n\\n", flush=True)
        lines = []
    elif line.startswith("user="):
        lines.append(line.rstrip())
"""

COMPLAIN = """
import os, time
lines = []
def complain(line):
    for piece in ("about ", line[:3], line[3:]):
        os.write(2, piece.encode())
        time.sleep(0.02)
    if "bob" in line:
        os.write(2, b"unended")
"""


def silence(session: str, lines: tuple[str, ...], dropped: int) -> None:
    """Hears what processes say, and keeps it to itself."""


def pool(program: str, least: int = 1, most: int = 1, said: SaidSink = silence) -> WorkerAuthenticator:
    limits = WorkerLimits(least, most, timeout=10.0, grace=5.0, max_output=65_536, max_lines=256)
    return WorkerAuthenticator([sys.executable, "-c", program], {}, limits, said)


def question(user: str) -> Question:
    parameters = ((b"user", user.encode()),)
    return Question(Started(Accepted("1", "127.0.0.1:1"), parameters), "md5", Secret(b"md5" + b"0" * 32), bytes(4))


@pytest.mark.parametrize(("least", "most"), [(1, 1), (2, 4)])
def test_each_gets_its_own_answer_and_who_waits_longest_comes_first(least: int, most: int) -> None:
    async def ask_all() -> tuple[list[bytes], list[str]]:
        authenticator = pool(ECHOES, least, most)
        await authenticator.start()
        served: list[str] = []

        async def ask(user: str) -> bytes:
            mapping = await authenticator.ask(question(user))
            served.append(user)
            return mapping.user

        try:
            return list(await asyncio.gather(*(ask(f"user{number}") for number in range(100)))), served
        finally:
            await authenticator.close()

    answers, served = asyncio.run(ask_all())
    assert answers == [f"user{number}".encode() for number in range(100)]
    if most == 1:
        assert served == [f"user{number}" for number in range(100)]


def test_reloading_replaces_every_process_and_loses_no_question() -> None:
    async def run() -> tuple[set[int], set[int], list[bytes]]:
        authenticator = pool(ECHOES, 3, 3)
        await authenticator.start()
        try:
            before = {worker.pid for worker in authenticator.workers}
            asking = [asyncio.create_task(authenticator.ask(question(f"user{number}"))) for number in range(50)]
            await authenticator.reload()
            answers = [mapping.user for mapping in await asyncio.gather(*asking)]
            return before, {worker.pid for worker in authenticator.workers}, answers
        finally:
            await authenticator.close()

    before, after, answers = asyncio.run(run())
    assert len(after) == 3
    assert not before & after
    assert answers == [f"user{number}".encode() for number in range(50)]


def test_a_command_that_cannot_be_started_stops_the_start(tmp_path: Path) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    limits = WorkerLimits(1, 1, timeout=1.0, grace=1.0, max_output=65_536, max_lines=256)
    authenticator = WorkerAuthenticator([str(script)], {}, limits, lambda *_: None)
    with pytest.raises(AuthenticatorConfigError, match=r"authenticator\.cmd: .*broken: No such file or directory"):
        asyncio.run(authenticator.start())


def test_nobody_waits_for_processes_that_keep_failing() -> None:
    async def run() -> list[str]:
        authenticator = pool("raise SystemExit(1)")
        await authenticator.start()
        reasons = []
        try:
            for _ in range(5):
                with pytest.raises(AuthenticatorFault) as raised:
                    await authenticator.ask(question("alice"))
                reasons.append(str(raised.value))
            return reasons
        finally:
            await authenticator.close()

    reasons = asyncio.run(run())
    assert reasons[-1] == "authenticator workers keep failing: the last one closed its output"


def test_one_that_retires_while_it_is_asked_loses_no_question() -> None:
    once = ECHOES.replace("        lines = []\n    elif", "        break\n    elif")

    async def run() -> list[bytes]:
        authenticator = pool(once, 1, 2)
        await authenticator.start()
        try:
            return [(await authenticator.ask(question(f"user{number}"))).user for number in range(20)]
        finally:
            await authenticator.close()

    assert asyncio.run(run()) == [f"user{number}".encode() for number in range(20)]


def test_one_whose_input_is_closed_when_it_is_asked_is_one_that_retires() -> None:
    once = ECHOES.replace("        lines = []\n    elif", "        break\n    elif")
    closes = f"import os\n{once}\nos.close(0)\nprint('closed', file=sys.stderr, flush=True)\nos.read(3, 1)"

    async def run() -> list[bytes]:
        closed = asyncio.Event()
        # The process lives on, and holds its output open, until it has the end of this pipe: by then it was asked.
        held, release = os.pipe()
        os.set_inheritable(held, True)
        authenticator = pool(closes.replace("os.read(3,", f"os.read({held},"), 1, 2, lambda *_: closed.set())
        await authenticator.start()
        try:
            first = (await authenticator.ask(question("alice"))).user
            await closed.wait()
            asking = asyncio.ensure_future(authenticator.ask(question("bob")))
            await asyncio.sleep(0)
            os.close(release)
            return [first, (await asking).user]
        finally:
            await authenticator.close()
            os.close(held)

    assert asyncio.run(run()) == [b"alice", b"bob"]


def test_what_it_complains_of_is_lines_however_they_are_written() -> None:
    says = ECHOES.replace(
        "if line == ", "if line.startswith('user='):\n        complain(line)\n    if line == "
    ).replace("lines = []\n", COMPLAIN, 1)

    async def run() -> list[str]:
        heard: list[str] = []
        both = asyncio.Event()

        def said(session: str, lines: tuple[str, ...], dropped: int) -> None:
            heard.extend(lines)
            if len(heard) == 3:
                both.set()

        authenticator = pool(says, said=said)
        await authenticator.start()
        try:
            await authenticator.ask(question("alice"))
            await authenticator.ask(question("bob"))
        finally:
            await authenticator.close()
        async with asyncio.timeout(10):
            await both.wait()
        return heard

    assert asyncio.run(run()) == ["about user=alice", "about user=bob", "unended"]
