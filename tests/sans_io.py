"""Drives a login that does no I/O with bytes alone, in any chunking.

A peer is a list of turns. A turn is what the peer sends once the login waits for it: bytes, or a function of all that
the login has sent by then. Turns are cut into chunks, never joined: a peer that waits for an answer cannot do that.

TLS is played: a login that starts it is told what was agreed on, and reads what the peer says in it. The turn in which
it is started is the peer's ClientHello, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pgauthproxy import _wire
from pgauthproxy._tls import Channel
from pgauthproxy.errors import Fault
from pgauthproxy.proto import scram
from pgauthproxy.proto.steps import DeriveKey, Login, Perform, StartTls
from pgauthproxy.stages import Encryption

Turn = bytes | Callable[[bytes], bytes]
Cut = Callable[[bytes], Iterable[bytes]]


@dataclass(frozen=True)
class Waiting:
    """The login wants more than the peer had to say."""


@dataclass(frozen=True)
class Raised:
    """The login ended with this Fault."""

    whose: str
    sqlstate: str
    told: bytes | None
    detail: str


class PlayedTls:
    """A side of TLS that a login may name and must leave to whoever drives it."""

    def open(self) -> Channel:
        raise AssertionError("a login does no TLS by itself")

    def describe(self, channel: Channel) -> Encryption:
        raise AssertionError("a login does no TLS by itself")

    def remember(self, channel: Channel) -> None:
        raise AssertionError("a login does no TLS by itself")


TLS: Final = PlayedTls()


def encrypted(*, alpn: str = "postgresql", binding: bytes = b"") -> Encryption:
    """What a peer and a login have agreed on."""
    return Encryption("TLSv1.3", "TLS_AES_256_GCM_SHA384", "", alpn, binding, None)


@dataclass(frozen=True)
class Outcome:
    """How a login went: what it sent, step by step; how it ended; what came behind what it read, if it returned."""

    sent: tuple[bytes | StartTls, ...]
    ending: Any
    rest: bytes = b""
    derived: tuple[tuple[bytes, int], ...] = field(default=())


def chunkings(data: bytes) -> list[list[bytes]]:
    """Whole, byte by byte, and cut in two at every point."""
    return [[data], [data[i : i + 1] for i in range(len(data))], *([data[:i], data[i:]] for i in range(1, len(data)))]


def run(
    login: Login[Any],
    framer: _wire.Framer,
    turns: Sequence[Turn],
    cut: Cut = lambda turn: (turn,),
    encryption: Encryption | None = None,
    perform: Callable[[Any], object] | None = None,
) -> Outcome:
    """Runs a login that reads from this framer until it ends or the peer has nothing more to say."""
    sent: list[bytes | StartTls] = []
    derived: list[tuple[bytes, int]] = []
    turns_left = list(turns)
    chunks: list[bytes] = []
    answer: object = None

    def outcome(ending: Any, rest: bytes = b"") -> Outcome:
        return Outcome(tuple(sent), ending, rest, tuple(derived))

    try:
        while True:
            step = login.send(answer)
            answer = None
            if isinstance(step, bytes):
                sent.append(step)
            elif isinstance(step, DeriveKey):
                derived.append((step.salt, step.iterations))
                answer = scram.salted_password(step.password.reveal(), step.salt, step.iterations)
            elif isinstance(step, Perform):
                assert perform is not None, "a login that should ask for nothing"
                answer = perform(step.statement)
            elif isinstance(step, StartTls):
                assert encryption is not None, "a login that should not start TLS"
                sent.append(step)
                framer.take_rest()
                chunks, answer = [], encryption
            else:
                while not chunks:
                    if not turns_left:
                        return outcome(Waiting())
                    turn = turns_left.pop(0)
                    said = b"".join(part for part in sent if isinstance(part, bytes))
                    chunks = list(cut(turn if isinstance(turn, bytes) else turn(said)))
                framer.feed(chunks.pop(0))
    except StopIteration as stop:
        return outcome(stop.value, framer.take_rest() + b"".join(chunks))
    except Fault as fault:
        return outcome(Raised(fault.whose, fault.sqlstate, fault.told, fault.detail))


def run_in_every_chunking(
    login: Callable[[_wire.Framer], Login[Any]],
    turns: Sequence[Turn],
    longest: int = 150,
    encryption: Encryption | None = None,
    perform: Callable[[Any], object] | None = None,
) -> Outcome:
    """How a login goes; it must go the same way whole, byte by byte, and with each turn cut at each point."""

    def cut_at(point: int) -> Cut:
        return lambda turn: [part for part in (turn[:point], turn[point:]) if part]

    def attempt(cut: Cut) -> Outcome:
        framer = _wire.Framer({})
        return run(login(framer), framer, turns, cut, encryption, perform)

    whole = attempt(lambda turn: (turn,))
    assert attempt(lambda turn: (turn[at : at + 1] for at in range(len(turn)))) == whole, "byte by byte"
    for point in range(1, longest):
        assert attempt(cut_at(point)) == whole, f"cut at {point}"
    return whole
