"""What goes wrong, by whose fault it is.

A fault carries two texts that must never be mixed up: `told`, which the client is sent (None: the connection
closes without a word, where PostgreSQL is silent too), and `detail`, which the log gets. Neither may hold a credential.

SQLSTATEs are those of the PostgreSQL manual, appendix A, that the server itself would use.
"""

from typing import ClassVar

PROTOCOL_VIOLATION = "08P01"
CANNOT_CONNECT = "08001"
TARGET_REJECTED = "08004"
CONNECTION_FAILURE = "08006"
FEATURE_NOT_SUPPORTED = "0A000"
IDLE_IN_TRANSACTION_SESSION_TIMEOUT = "25P03"
INVALID_AUTHORIZATION = "28000"
INVALID_PASSWORD = "28P01"  # noqa: S105 (an SQLSTATE)
TOO_MANY_CONNECTIONS = "53300"
ADMIN_SHUTDOWN = "57P01"
CANNOT_CONNECT_NOW = "57P03"
IDLE_SESSION_TIMEOUT = "57P05"
SYSTEM_ERROR = "58000"
INTERNAL_ERROR = "XX000"


class FrameError(ValueError):
    """Bytes that are no message of the protocol, or one that is not allowed here: judged on the header."""


class TlsError(Exception):
    """A TLS connection that cannot go on; the text is OpenSSL's. `alert` is what the peer should still be sent."""

    def __init__(self, reason: str, alert: bytes) -> None:
        super().__init__(reason)
        self.alert = alert


class Fault(Exception):
    """A login that ends, or a session that is ended."""

    whose: ClassVar[str] = "gateway"

    def __init__(self, sqlstate: str, told: bytes | str | None, detail: str | None = None) -> None:
        self.sqlstate = sqlstate
        self.told = told.encode(errors="surrogateescape") if isinstance(told, str) else told
        self.detail = detail if detail is not None else (self.told or b"").decode(errors="backslashreplace")
        super().__init__(self.detail)


class ClientFault(Fault):
    """The client broke the protocol, left, or has the wrong credential."""

    whose = "client"


class AuthenticatorFault(Fault):
    """The authenticator could not be run, took too long, or answered nonsense; a plain "no" is a ClientFault."""

    whose = "authenticator"

    def __init__(self, detail: str) -> None:
        super().__init__(SYSTEM_ERROR, "authentication service failed", detail)


class TargetFault(Fault):
    """The target could not be reached, refused the gateway, or broke the protocol."""

    whose = "target"


class TlsRefused(TargetFault):
    """TLS with the target came to nothing. Where it is only preferred, a connection without it may do."""

    def __init__(self, detail: str) -> None:
        super().__init__(CANNOT_CONNECT, "could not connect to the target server", detail)


class GatewayFault(Fault):
    """The gateway cannot serve: it is full, or shutting down."""


def refused_token(user: bytes, detail: str, told: bytes | None = None) -> ClientFault:
    """28000 for a bearer token, in PostgreSQL's own words (or those of `told`)."""
    text = told or b'OAuth bearer authentication failed for user "' + user + b'"'
    return ClientFault(INVALID_AUTHORIZATION, text, detail)


def wrong_password(user: bytes, detail: str, told: bytes | None = None) -> ClientFault:
    """28P01 in PostgreSQL's own words (or those of `told`), the same for an unknown user as for a wrong password."""
    return ClientFault(INVALID_PASSWORD, told or b'password authentication failed for user "' + user + b'"', detail)
