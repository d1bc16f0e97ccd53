"""What the gateway may do: another user once it listens, and no way back.

Everything that it reads it must be able to read as that user, since it reads certificates and users anew while it runs.
So the settings are examined with that user's rights (`acting_as`) before anything is bound.
"""

import contextlib
import ctypes
import grp
import importlib
import os
import pwd
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ROOT: Final = 0
PR_SET_DUMPABLE: Final = 4
PR_SET_NO_NEW_PRIVS: Final = 38
IMPORTED_LATE: Final = ("concurrent.futures.thread", "cryptography.x509", "encodings.idna", "uvloop")
"""What is otherwise imported when it is first of use. Python itself may stand where only root can read."""


class PrivilegesError(Exception):
    """The gateway cannot become what it is to be; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A user, its group and all groups that it is in, as numbers."""

    user: int
    group: int
    groups: tuple[int, ...]


def find(user: str, group: str) -> Identity | None:
    """Whom to become; None if nobody is named, or it is who we are. Raises PrivilegesError."""
    if not user:
        return None
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        raise PrivilegesError(f"user: {user}: there is no such user") from None
    try:
        number = grp.getgrnam(group).gr_gid if group else found.pw_gid
    except KeyError:
        raise PrivilegesError(f"group: {group}: there is no such group") from None
    if os.geteuid() != ROOT:
        if (os.geteuid(), os.getegid()) == (found.pw_uid, number):
            return None
        raise PrivilegesError(f"user: {user}: only root can become another user")
    return Identity(found.pw_uid, number, tuple(os.getgrouplist(user, number)))


@contextlib.contextmanager
def acting_as(identity: Identity | None) -> Iterator[None]:
    """What is opened in the block is opened with these rights."""
    if identity is None:
        yield
        return
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    user, group, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.setgroups(identity.groups)
    os.setegid(identity.group)
    os.seteuid(identity.user)
    try:
        yield
    finally:
        os.seteuid(user)
        os.setegid(group)
        os.setgroups(groups)


def become(identity: Identity | None) -> None:
    """For good. Raises PrivilegesError if there is a way back."""
    if identity is None:
        return
    os.setgroups(identity.groups)
    os.setgid(identity.group)
    os.setuid(identity.user)
    if identity.user != ROOT:
        with contextlib.suppress(PermissionError):
            os.setuid(ROOT)
            raise PrivilegesError("user: the rights of root could not be given up")


def forbid_new() -> None:
    """From here on no program that is started gets more rights than its caller. Raises PrivilegesError."""
    if sys.platform != "linux":
        raise PrivilegesError("no_new_privs: only Linux has this")
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise PrivilegesError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")


def hide_memory() -> None:
    """From here on no core dump of this process is made, and no debugger of its own user gets at what it knows.

    Not of the programs that it starts, but for the limit on the size of core dumps, which they inherit (prctl(2),
    PR_SET_DUMPABLE).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
