#!/usr/bin/env python3
"""The authenticator of two_roles.py as an HTTP service, with nothing but Python's own library.

    two_roles_http.py [port]

docs/http-authenticators.md has what it is sent and what it may answer.
"""

import hashlib
import hmac
import json
import os
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the gateway's clients know.
PASSWORDS = {"alice": "wonderland", "bob": "builder"}
# What only the gateway knows: the role on the server, and its password.
ROLES = {"alice": ("reader", "reader's secret"), "bob": ("writer", "writer's secret")}


def judge(asked: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping for a request, None for "no"."""
    user = asked.get("user", "")
    # An unknown user takes the same way, so that nobody learns who exists.
    password = PASSWORDS.get(user, "")
    if asked["method"] == "md5":
        stored = hashlib.md5((password + user).encode()).hexdigest()
        expected = "md5" + hashlib.md5(stored.encode() + bytes.fromhex(asked["salt"])).hexdigest()
        given = asked["answer"]
    else:
        expected, given = password, asked.get("password", "")
    if not hmac.compare_digest(given.encode(), expected.encode()) or user not in ROLES:
        return None
    role, secret = ROLES[user]
    host = os.environ.get("TARGET_HOST", "127.0.0.1:5432")
    return {"host": host, "user": role, "password": secret, "parameters": {"application_name": f"gateway:{user}"}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which keeps connections

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mapping = judge(asked)
        status = HTTPStatus.FORBIDDEN if mapping is None else HTTPStatus.OK
        body = json.dumps({"reason": "unknown user or wrong password"} if mapping is None else mapping).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_line: object) -> None:
        """The gateway's log says it all."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8080), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()
