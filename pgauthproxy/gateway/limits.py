"""How many clients, and how many logins in progress, there may be; and whose place a newcomer may take.

Clients that connect and say nothing are what a flood is made of. When all places for logins are taken, the one
that has said nothing for longest makes way; one that has named itself keeps its place. Only from then on does it count
as a client, so that the silent take no place of those who want to log in.
"""

from collections.abc import Callable
from typing import Final

from pgauthproxy.errors import TOO_MANY_CONNECTIONS, Fault, GatewayFault

Evict = Callable[[Fault], None]
FULL_TEXT: Final = "sorry, too many clients already"


def too_many(what: str) -> GatewayFault:
    """53300; `what` is for the log."""
    return GatewayFault(TOO_MANY_CONNECTIONS, FULL_TEXT, what)


class Limits:
    """Counts of one gateway. What is taken is given back by the session that took it."""

    def __init__(self, max_clients: int, max_logins: int) -> None:
        self.max_clients = max_clients
        self.max_logins = max_logins
        self.clients = 0
        self.logins = 0
        self._silent: dict[int, Evict] = {}

    def begin_login(self, number: int, evict: Evict) -> None:
        """Takes a place for a login. Raises GatewayFault if there is none, and none can be had."""
        if self.logins >= self.max_logins:
            if not self._silent:
                raise too_many(f"{self.logins} logins in progress (max_logins)")
            oldest = next(iter(self._silent))
            self._silent.pop(oldest)(too_many("made way for a newer client: it had said nothing (max_logins)"))
        self.logins += 1
        self._silent[number] = evict

    def named(self, number: int) -> None:
        """This one has said what it wants: it makes way for nobody any more."""
        self._silent.pop(number, None)

    def begin_client(self) -> None:
        """Takes a place for a client. Raises GatewayFault if there is none."""
        if self.clients >= self.max_clients:
            raise too_many(f"{self.clients} clients (max_clients)")
        self.clients += 1

    def take_up_client(self) -> None:
        """A client that another process has let in has its place, even if there are more than there may be."""
        self.clients += 1

    def end_login(self, number: int) -> None:
        self._silent.pop(number, None)
        self.logins -= 1

    def end_client(self) -> None:
        self.clients -= 1
