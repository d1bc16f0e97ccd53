"""What several files of this folder need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgauthproxy.gateway.client_leg import ClientLeg
from pgauthproxy.gateway.leg import Leg
from tests.gateway.legs import ConnectLeg, Side


@pytest.fixture
def connect_leg() -> Iterator[ConnectLeg]:
    """Makes legs whose transport stands, or, with `opened=False`, does not yet."""
    made: list[Side] = []

    def make(kind: type[Leg] = ClientLeg, *, opened: bool = True) -> Side:
        made.append(Side(kind))
        if opened:
            made[-1].leg.connection_made(made[-1].transport)
        return made[-1]

    yield make
    for side in made:
        side.socket.close()
        side.peer.close()
