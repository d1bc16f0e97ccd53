#!/usr/bin/env python3
"""The authenticator of two_roles.py with pgauthproxy.authenticator: one file is a command, a worker, and in-process.

cmd: [python3, two_roles_typed.py]
callable: "two_roles_typed:main"
"""

import os

from pgauthproxy.authenticator import Denied, Mapping, Request, authenticator

# What the gateway's clients know.
PASSWORDS = {"alice": "wonderland", "bob": "builder"}
# What only the gateway knows: the role on the server, and its password.
ROLES = {"alice": ("reader", "reader's secret"), "bob": ("writer", "writer's secret")}


@authenticator
def main(request: Request) -> Mapping:
    # An unknown user takes the same way, so that nobody learns who exists.
    if not request.password_is(PASSWORDS.get(request.user)):
        raise Denied("unknown user or wrong password")
    role, password = ROLES[request.user]
    return Mapping(
        os.environ.get("TARGET_HOST", "127.0.0.1:5432"),
        role,
        password=password,
        # Who it really is, for the server's own log.
        parameters={**request.client_settings, "application_name": f"gateway:{request.user}"},
    )


if __name__ == "__main__":
    main.run()
