"""An issuer of tokens: keys, tokens that it signs, and the endpoint where it publishes its keys."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

ISSUER = "https://id.example"
AUDIENCE = "db.example"
MINUTES = 300


class Issuer:
    """Signs with the newest of its keys; `keys` are those that it publishes."""

    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP256R1())
        self._number = 0
        self.keys: list[dict[str, Any]] = []
        self.rotate()

    def rotate(self) -> None:
        """From now on another key, and no other, is in use."""
        self._private = ec.generate_private_key(ec.SECP256R1())
        self._number += 1
        fields: dict[str, Any] = ECAlgorithm.to_jwk(self._private.public_key(), as_dict=True)
        self.keys = [{**fields, "kid": self.key_id, "use": "sig", "alg": "ES256"}]

    @property
    def key_id(self) -> str:
        return f"key {self._number}"

    @property
    def key_set(self) -> bytes:
        return json.dumps({"keys": self.keys}).encode()

    def token(self, user: str = "alice", *, key_id: str = "", **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": user, "iat": now, "exp": now + MINUTES} | claims
        return jwt.encode(said, self._private, "ES256", headers={"kid": key_id or self.key_id})


Answer = Callable[[BaseHTTPRequestHandler], None]


class Endpoint:
    """Answers each GET with `answer`, over TLS if it is given a context; counts them."""

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 20

            def do_GET(self) -> None:
                endpoint.requests += 1
                endpoint.answer(self)

            def log_message(self, *_words: object) -> None:
                """Nobody reads it."""

        self.answer = answer
        self.requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        if context is not None:
            # The handshake is each connection's own business.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self._server.server_port
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}/keys"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def publishes(issuer: Issuer) -> Answer:
    return lambda request: respond(request, issuer.key_set)


def respond(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
