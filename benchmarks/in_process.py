"""The authenticator of the benchmarks in the gateway's own process: it accepts whoever knows the one password."""

import os

from peers import LOGIN_ROLES, PASSWORD, SCRAM_VERIFIER

from pgauthproxy.authenticator import Denied, Mapping, Request

TARGET = os.environ["BENCHMARK_TARGET"]


async def decide(request: Request) -> Mapping:
    by_scram = request.user == LOGIN_ROLES["scram-sha-256"]
    if not by_scram and not request.password_is(PASSWORD):
        raise Denied("wrong password")
    return Mapping(TARGET, request.user, password=PASSWORD, verifier=SCRAM_VERIFIER if by_scram else None)
