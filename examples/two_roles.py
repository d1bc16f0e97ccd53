#!/usr/bin/env python3
"""An authenticator: two people, each mapped to a role of their own on one server.

Reads `key=value` lines, prints `key=value` lines; exit status 0 lets the client in, any other refuses.
docs/authenticators.md has the whole contract.
"""

import hashlib
import hmac
import os
import sys

# What the gateway's clients know. Stored as PostgreSQL stores it: hex(md5(password + user)).
STORED = {
    "alice": hashlib.md5(b"wonderlandalice").hexdigest(),
    "bob": hashlib.md5(b"builderbob").hexdigest(),
}
# What only the gateway knows: the role on the server, and its password.
ROLES = {"alice": ("reader", "reader's secret"), "bob": ("writer", "writer's secret")}

# Bytes are kept as they are; lines end at the line feed and nowhere else.
lines = sys.stdin.buffer.read().decode(errors="surrogateescape").split("\n")
fields = dict(line.split("=", 1) for line in lines if "=" in line)

user = fields["user"]
# An unknown user takes the same way, so that nobody learns who exists.
stored = STORED.get(user, "0" * 32)
salt = bytes.fromhex(fields["_SOURCE_SALT"])
expected = "md5" + hashlib.md5(stored.encode() + salt).hexdigest()
if (
    not hmac.compare_digest(fields["_SOURCE_CRED"].encode(errors="surrogateescape"), expected.encode())
    or user not in STORED
):
    sys.exit(1)

role, password = ROLES[user]
sys.stdout.reconfigure(errors="surrogateescape")
print(f"_META_TARGET_HOST={os.environ.get('TARGET_HOST', '127.0.0.1:5432')}")
print(f"_META_TARGET_PASSWORD={password}")
print(f"user={role}")
print(f"database={fields.get('database', user)}")
# Who it really is, for the server's own log.
print(f"application_name=gateway:{user}")
