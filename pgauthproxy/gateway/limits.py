"""How many clients, and how many logins in progress, there may be; and whose place a newcomer may take.

Clients that connect and say nothing are what a flood is made of. When all places for logins are taken, the one
that has said nothing for longest makes way; one that has named itself keeps its place. Only from then on does it count
as a client, so that the silent take no place of those who want to log in.

What anybody may claim takes nothing away from whom it is claimed to be: a user's own places, and those that are kept
for some users, are only taken once the client has proved who it is.

Counts are the ledger's, which holds for all processes of the gateway. Who makes way is found in this one alone.
"""

from collections.abc import Callable
from typing import Final

from pgauthproxy._ledger import CLIENTS, LOGINS, Ledger
from pgauthproxy.auth.networks import network_key
from pgauthproxy.errors import TOO_MANY_CONNECTIONS, Fault, GatewayFault

Evict = Callable[[Fault], None]
FULL_TEXT: Final = "sorry, too many clients already"
NO_BOUND: Final = 1 << 60
NONE: Final = -1


def too_many(what: str) -> GatewayFault:
    """53300; `what` is for the log."""
    return GatewayFault(TOO_MANY_CONNECTIONS, FULL_TEXT, what)


class Place:
    """What one client has taken, to be given back whatever becomes of it."""

    __slots__ = ("address", "is_client", "user")

    def __init__(self) -> None:
        self.is_client = False
        self.user = NONE
        self.address = NONE


class Limits:
    """Counts of the gateway. What is taken is given back by the session that took it. Bounds that are 0 are none."""

    def __init__(
        self,
        max_clients: int,
        max_logins: int,
        *,
        per_user: int = 0,
        per_address: int = 0,
        reserved: int = 0,
        reserved_for: frozenset[bytes] = frozenset(),
        ledger: Ledger | None = None,
    ) -> None:
        self.max_clients = max_clients
        self.max_logins = max_logins
        self.per_user = per_user
        self.per_address = per_address
        self.reserved = reserved
        self.reserved_for = reserved_for
        self.own_clients = NO_BOUND
        """How many clients this process has descriptors for, whatever others have."""
        self.ledger = ledger or Ledger()
        self._own = 0
        self._silent: dict[int, Evict] = {}

    @property
    def clients(self) -> int:
        return self.ledger.total(CLIENTS)

    @property
    def logins(self) -> int:
        return self.ledger.total(LOGINS)

    def bind(self, other: "Limits") -> None:
        """Takes over the bounds of another one, but for `own_clients`, for whoever comes from here on."""
        self.max_clients = other.max_clients
        self.max_logins = other.max_logins
        self.per_user = other.per_user
        self.per_address = other.per_address
        self.reserved = other.reserved
        self.reserved_for = other.reserved_for

    def begin_login(self, number: int, evict: Evict) -> None:
        """Takes a place for a login. Raises GatewayFault if there is none, and none can be had."""
        if not self.ledger.begin(LOGINS, self.max_logins):
            if not self._silent:
                raise too_many(f"{self.logins} logins in progress (max_logins)")
            oldest = next(iter(self._silent))
            self._silent.pop(oldest)(too_many("made way for a newer client: it had said nothing (max_logins)"))
            # Until the other has gone there is one more.
            self.ledger.begin(LOGINS, NO_BOUND)
        self._silent[number] = evict

    def named(self, number: int) -> None:
        """This one has said what it wants: it makes way for nobody any more."""
        self._silent.pop(number, None)

    def end_login(self, number: int) -> None:
        self._silent.pop(number, None)
        self.ledger.end(LOGINS)

    def begin_client(self, user: bytes, address: str) -> Place:
        """Takes a place for a client that says it is this user. Raises GatewayFault if there is none.

        For users that places are kept for there may be one yet, once they have proved themselves (`prove`).
        """
        place = Place()
        place.is_client = self._begin(kept=self.reserved)
        if not place.is_client and user not in self.reserved_for:
            kept = f", {self.reserved} kept free (reserved_clients)" if self.reserved else ""
            raise too_many(f"{self._so_many()}{kept}")
        if self.per_address and (key := network_key(address)):
            place.address = self.ledger.take(b"a" + key, self.per_address)
            if place.address == NONE:
                self.end_client(place)
                raise too_many(f"{self.per_address} clients of this address (max_clients_per_address)")
        return place

    def prove(self, place: Place, user: bytes) -> None:
        """The client is who it says it is. Raises GatewayFault if there is no place for this user any more."""
        if not place.is_client:
            place.is_client = self._begin()
            if not place.is_client:
                raise too_many(f"{self._so_many()}, none kept free any more")
        if self.per_user:
            place.user = self.ledger.take(b"u" + user, self.per_user)
            if place.user == NONE:
                raise too_many(f"{self.per_user} clients of this user (max_clients_per_user)")

    def take_up(self, user: bytes, address: str) -> Place:
        """A client that another process has let in has its place, even if there are more than there may be."""
        place = Place()
        place.is_client = self.ledger.begin(CLIENTS, NO_BOUND)
        self._own += 1
        if self.per_user:
            place.user = self.ledger.take(b"u" + user, NO_BOUND)
        if self.per_address and (key := network_key(address)):
            place.address = self.ledger.take(b"a" + key, NO_BOUND)
        return place

    def end_client(self, place: Place) -> None:
        """Gives back what a client has taken; a second time nothing."""
        if place.is_client:
            place.is_client = False
            self._own -= 1
            self.ledger.end(CLIENTS)
        for index in (place.user, place.address):
            if index != NONE:
                self.ledger.give(index)
        place.user = place.address = NONE

    def _begin(self, *, kept: int = 0) -> bool:
        """Counts one more client, if that leaves so many places free, here and of all."""
        if self._own >= self.own_clients - kept or not self.ledger.begin(CLIENTS, max(0, self.max_clients - kept)):
            return False
        self._own += 1
        return True

    def _so_many(self) -> str:
        if self._own >= self.own_clients - self.reserved and self.own_clients < self.max_clients:
            return f"{self._own} clients in this worker, which has no descriptors for more"
        return f"{self.clients} clients (max_clients)"
