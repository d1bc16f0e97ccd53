"""Holds sessions over TLS open: what `login_load hold` does for plain ones.

    python tls_sessions.py PORT USER DATABASE PASSWORD TOUCH AUTHORITY

For each number on standard input opens that many sessions more and prints how many are open. At end of file it
closes them all. TOUCH 1 sends an empty query behind each login. Answers trust, cleartext and MD5. One failed login
ends the program with status 1. Speaks to 127.0.0.1 alone.
"""

import hashlib
import socket
import ssl
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from processes import LOOPBACK
from tls import CIPHER

PROTOCOL_3_0 = 196608
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
EMPTY_QUERY = b"Q\0\0\0\5\0"
TERMINATE = b"X\0\0\0\4"
AUTH_OK, AUTH_CLEARTEXT, AUTH_MD5 = 0, 3, 5
READ_TIMEOUT_SECONDS = 30.0


class LoginFailed(Exception):
    """The text says at which step."""


@dataclass(frozen=True, slots=True)
class Login:
    """Where to log in and as whom."""

    port: int
    user: str
    database: str
    password: str
    touch: bool

    def open(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain = socket.create_connection((LOOPBACK, self.port), timeout=READ_TIMEOUT_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.sendall(SSL_REQUEST)
        if (answer := plain.recv(1)) != b"S":
            raise LoginFailed(f"SSLRequest was answered {answer!r}")
        session = context.wrap_socket(plain, server_hostname=LOOPBACK)
        cipher = session.cipher()
        if cipher is None or cipher[0] != CIPHER:
            raise LoginFailed(f"the cipher is {cipher}, not {CIPHER}")
        session.sendall(self._startup())
        self._pump(session)
        return session

    def _startup(self) -> bytes:
        texts = ("user", self.user, "database", self.database, "")
        body = struct.pack("!i", PROTOCOL_3_0) + b"".join(text.encode() + b"\0" for text in texts)
        return struct.pack("!i", len(body) + 4) + body

    def _pump(self, session: ssl.SSLSocket) -> None:
        ready_wanted = 2 if self.touch else 1
        while ready_wanted:
            kind, body = read_message(session)
            if kind == b"R":
                self._authenticate(session, body)
            elif kind == b"E":
                raise LoginFailed(f"refused: {body!r}")
            elif kind == b"Z":
                ready_wanted -= 1
                if ready_wanted:
                    session.sendall(EMPTY_QUERY)

    def _authenticate(self, session: ssl.SSLSocket, body: bytes) -> None:
        asked = int.from_bytes(body[:4], "big")
        if asked == AUTH_CLEARTEXT:
            send_password(session, self.password)
        elif asked == AUTH_MD5:
            stored = hashlib.md5((self.password + self.user).encode()).hexdigest()  # noqa: S324  # the protocol's own
            send_password(session, "md5" + hashlib.md5(stored.encode() + body[4:8]).hexdigest())  # noqa: S324
        elif asked != AUTH_OK:
            raise LoginFailed(f"asked for authentication {asked}, which is not spoken here")


def read_message(session: ssl.SSLSocket) -> tuple[bytes, bytes]:
    head = read_exactly(session, 5)
    return head[:1], read_exactly(session, int.from_bytes(head[1:], "big") - 4)


def read_exactly(session: ssl.SSLSocket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        more = session.recv(count - len(read))
        if not more:
            raise LoginFailed("the server closed during login")
        read += more
    return read


def send_password(session: ssl.SSLSocket, text: str) -> None:
    body = text.encode() + b"\0"
    session.sendall(b"p" + struct.pack("!i", len(body) + 4) + body)


def main() -> int:
    try:
        port, user, database, password, touch, authority = sys.argv[1:]
    except ValueError:
        print((__doc__ or "").splitlines()[2].strip(), file=sys.stderr)
        return 2
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(Path(authority))
    login = Login(int(port), user, database, password, touch == "1")
    sessions: list[ssl.SSLSocket] = []
    try:
        for line in sys.stdin:
            sessions.extend(login.open(context) for _ in range(int(line)))
            print(len(sessions), flush=True)
    except (OSError, LoginFailed) as error:
        print(f"tls_sessions: {error}", file=sys.stderr)
        return 1
    for session in sessions:
        session.sendall(TERMINATE)
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
