"""Going over to TLS with a target (PostgreSQL manual, "Message Flow", SSL Session Encryption).

Until the handshake is done, everything here may come from somebody in between: one byte is read and nothing else is
believed, least of all the text of an error (CVE-2021-23222, CVE-2024-10977).
"""

from typing import Final

from pgauthproxy import _wire
from pgauthproxy.errors import TlsRefused
from pgauthproxy.proto import messages
from pgauthproxy.proto.steps import MORE, Login, StartTls, TlsPlan
from pgauthproxy.stages import Encryption

APPLICATION_PROTOCOL: Final = "postgresql"


def start_tls(framer: _wire.Framer, plan: TlsPlan | None) -> Login[Encryption | None]:
    """TLS as planned; None if there is none in the end. Raises TlsRefused."""
    if plan is None:
        return None
    if plan.direct:
        encryption: Encryption = yield StartTls(plan.side)
        if encryption.application_protocol != APPLICATION_PROTOCOL:
            raise TlsRefused("target speaks direct TLS without the application protocol postgresql")
        return encryption
    yield messages.ssl_request()
    while (answer := framer.byte()) is None:
        yield MORE
    if answer not in messages.TLS_ACCEPTED + messages.REQUEST_REFUSED:
        raise TlsRefused("target answered the SSL request with something else than yes or no")
    if framer.pending:
        raise TlsRefused("target sent bytes in plain behind its answer to the SSL request")
    if answer == ord(messages.TLS_ACCEPTED):
        encryption = yield StartTls(plan.side)
        return encryption
    if plan.required:
        raise TlsRefused("target speaks no TLS, which is required")
    return None
