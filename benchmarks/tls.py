"""What the rows over TLS have in common: one authority, one certificate with its key, and what clients offer.

Strategy: the clients decide. They offer one version of TLS, one cipher and one group, through OpenSSL's own
configuration, so that every server agrees on the same three or the login fails. Left to themselves the servers
would choose different groups, and some would ask the clients to begin anew: a round trip that is no proxy's doing.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from processes import LOOPBACK, MeasurementFailed, group_of, run, unprivileged_user

PROTOCOL = "TLSv1.3"
CIPHER = "TLS_AES_256_GCM_SHA384"
GROUP = "P-256"
TLS_MATERIAL = f"an ECDSA certificate on P-256, key exchange on {GROUP}"

OPENSSL_CONFIGURATION = f"""\
openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = clients
[clients]
MinProtocol = {PROTOCOL}
Ciphersuites = {CIPHER}
Groups = {GROUP}
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:true
[server]
subjectAltName = IP:{LOOPBACK}
"""
# A newer psql prints a table and an older one a sentence; both name the protocol before the cipher.
CONNECTION_INFORMATION = re.compile(r"(TLSv[\d.]+)\b.*?\b(TLS_\w+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """One certificate and its key for all servers, and what their clients need. All lie in one folder."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def authority(self) -> Path:
        return self.folder / "authority.crt"

    @property
    def openssl_configuration(self) -> Path:
        return self.folder / "openssl.cnf"

    def client_environment(self) -> dict[str, str]:
        """libpq's and OpenSSL's settings for a client that speaks nothing else."""
        return {
            "PGSSLMODE": "verify-ca",
            "PGSSLROOTCERT": str(self.authority),
            "PGSSLMINPROTOCOLVERSION": PROTOCOL,
            "OPENSSL_CONF": str(self.openssl_configuration),
        }


def make_certificate(folder: Path) -> TlsFiles:
    """An authority of its own and one certificate by it."""
    files = TlsFiles(folder)
    files.openssl_configuration.write_text(OPENSSL_CONFIGURATION)
    configuration, authority_key, request = files.openssl_configuration, folder / "authority.key", folder / "server.csr"
    new = ("-config", configuration, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", *new, "-keyout", files.key, "-subj", "/CN=server", "-out", request)
    _openssl(
        *("req", *new, "-keyout", authority_key, "-subj", "/CN=authority", "-x509", "-extensions", "authority"),
        *("-days", "30", "-out", files.authority),
    )
    _openssl(
        *("x509", "-req", "-in", request, "-CA", files.authority, "-CAkey", authority_key, "-CAcreateserial"),
        *("-extfile", configuration, "-extensions", "server", "-days", "30", "-out", files.certificate),
    )
    _let_servers_read(files.key)
    return files


def _openssl(*words: str | Path) -> None:
    run(["openssl", *map(str, words)], timeout=60)


def _let_servers_read(key: Path) -> None:
    """All of them take a key of mode 0640 that root owns; when we are not root they run as we do."""
    group = group_of(unprivileged_user())
    if group is not None:
        os.chown(key, -1, group)
    key.chmod(0o600 if group is None else 0o640)


def negotiated(information: str) -> str:
    """Protocol and cipher, from what psql says about its connection."""
    found = CONNECTION_INFORMATION.search(information)
    if found is None or found.groups() != (PROTOCOL, CIPHER):
        raise MeasurementFailed(f"the connection is not {PROTOCOL} with {CIPHER}: {information.strip()!r}")
    return " ".join(found.groups())
