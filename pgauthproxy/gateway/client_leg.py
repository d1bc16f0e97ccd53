"""The client's side of a session while it logs in: the gateway is the server here."""

import secrets
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final

from pgauthproxy.errors import PROTOCOL_VIOLATION, ClientFault, Fault, TlsError
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.proto import client_login, messages, proxy_header, scram, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.startup import CancelRequest, StartupMessage
from pgauthproxy.proto.steps import TlsSide
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Started

SALT_BYTES: Final = 4
METHODS: Final = ("md5", "cleartext", "scram-sha-256", "cert", "oauth")


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What is asked of clients. `method` is a name of METHODS; the bounds are on length fields, in bytes.

    `token_error` is what a client without a good bearer token is told of where to get one.
    """

    method: str
    max_startup_packet: int
    max_password_message: int
    max_sasl_message: int
    tls_required: bool
    token_error: bytes = b""


class ClientLeg(Leg):
    """Reads what the client wants and how it proves itself; tells it why not."""

    async def receive_proxy_header(self) -> str:
        """Where a load balancer says that the client comes from; empty if the connection's own address is meant."""
        return await self.drive(proxy_header.receive_proxy_header(self.framer))

    def receive_startup(
        self, policy: ClientPolicy, tls: TlsSide | None, *, local: bool
    ) -> Awaitable[StartupMessage | CancelRequest]:
        """`local` clients come over a Unix socket, where TLS is not spoken nor needed."""
        return self.drive(
            startup.receive_startup(
                self.framer,
                policy.max_startup_packet,
                None if local else tls,
                tls_required=policy.tls_required and not local,
            )
        )

    def receive_password(self, started: Started, policy: ClientPolicy) -> Awaitable[Proof]:
        """The answer to a request for a password, or for its MD5."""
        if policy.method == "md5":
            salt = secrets.token_bytes(SALT_BYTES)
            login = client_login.receive_md5(self.framer, started.user, salt, policy.max_password_message)
        else:
            login = client_login.receive_cleartext(self.framer, started.user, policy.max_password_message)
        return self.drive(login)

    async def receive_scram(self, started: Started, verifier: scram.Verifier, policy: ClientPolicy) -> scram.Keys:
        """The client's keys, once it has proved that it knows the password of this verifier."""
        binding = b"" if started.encryption is None else started.encryption.binding
        login = client_login.receive_scram(self.framer, started.user, verifier, binding, policy.max_sasl_message)
        return await self.drive(login)

    async def receive_token(self, started: Started, policy: ClientPolicy) -> Secret:
        """The client's bearer token."""
        login = client_login.receive_oauthbearer(
            self.framer, started.user, policy.token_error, policy.max_password_message
        )
        return await self.drive(login)

    async def refuse_token(self, policy: ClientPolicy) -> None:
        """Ends the exchange of a token that will not do."""
        await self.drive(client_login.refuse_oauthbearer(self.framer, policy.token_error, policy.max_password_message))

    def refuse(self, fault: Fault) -> None:
        """Says why, where PostgreSQL would say anything and the client could hear it, and closes."""
        if fault.told is not None and not self.gone and not self.shaking_hands:
            self.send(messages.fatal(fault.sqlstate, fault.told))
        self.close()

    def gone_fault(self) -> Fault:
        detail = "client left during its login"
        return ClientFault(
            PROTOCOL_VIOLATION, None, f"{detail}: {self.error}" if isinstance(self.error, TlsError) else detail
        )

    def tls_fault(self, error: TlsError) -> Fault:
        return ClientFault(PROTOCOL_VIOLATION, None, f"TLS with the client failed: {error}")
