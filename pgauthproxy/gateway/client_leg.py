"""The client's side of a session while it logs in: the gateway is the server here."""

import secrets
from dataclasses import dataclass
from typing import Final

from pgauthproxy.errors import PROTOCOL_VIOLATION, ClientFault, Fault
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.proto import client_login, messages, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.startup import CancelRequest, StartupMessage
from pgauthproxy.stages import Started

SALT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What is asked of clients. `method` is `md5` or `cleartext`; the bounds are on length fields, in bytes."""

    method: str
    max_startup_packet: int
    max_password_message: int


class ClientLeg(Leg):
    """Reads what the client wants and how it proves itself; tells it why not."""

    async def receive_startup(self, policy: ClientPolicy) -> StartupMessage | CancelRequest:
        return await self.drive(startup.receive_startup(self.framer, policy.max_startup_packet))

    async def receive_proof(self, started: Started, policy: ClientPolicy) -> Proof:
        if policy.method == "md5":
            salt = secrets.token_bytes(SALT_BYTES)
            login = client_login.receive_md5(self.framer, started.user, salt, policy.max_password_message)
        else:
            login = client_login.receive_cleartext(self.framer, started.user, policy.max_password_message)
        return await self.drive(login)

    def refuse(self, fault: Fault) -> None:
        """Says why, where PostgreSQL would say anything, and closes."""
        if fault.told is not None and not self.gone:
            self.send(messages.fatal(fault.sqlstate, fault.told))
        self.close()

    def gone_fault(self) -> Fault:
        return ClientFault(PROTOCOL_VIOLATION, None, "client left during its login")
