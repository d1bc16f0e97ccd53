"""Every setting: its type, default, bounds and meaning. `check`, docs/config.md and the loader all read this.

Times are seconds, sizes are bytes.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def _default_parallel() -> int:
    """2 for each core, at least 8"""
    return max(8, 2 * (os.cpu_count() or 1))


class AuthenticatorSettings(_Settings, frozen=True):
    """Who decides about logins."""

    cmd: Annotated[
        list[str],
        Meta(
            description="The authenticator command: a list, or one string that is split as a shell would. "
            "No shell runs it."
        ),
    ] = []
    env: Annotated[
        list[str] | None,
        Meta(description="Names of the environment variables that the command gets. Without it: all of the gateway's."),
    ] = None
    cleartext_password: Annotated[
        bool, Meta(description="Ask clients for the password as it is instead of its salted MD5.")
    ] = False
    timeout: Annotated[
        float, Meta(gt=0, description="How long the command may run. Then TERM goes to its process group.")
    ] = 10.0
    grace: Annotated[float, Meta(ge=0, description="From TERM to KILL.")] = 1.0
    max_parallel: Annotated[
        int, Meta(ge=1, le=1024, description="How many commands run at once; other logins wait in order.")
    ] = msgspec.field(default_factory=_default_parallel)
    max_output: Annotated[
        int, Meta(ge=1, le=1 << 24, description="Bytes of output; a command that prints more is ended.")
    ] = 65_536
    max_output_lines: Annotated[int, Meta(ge=1, description="Lines of output; more are an error.")] = 256
    max_errors: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 24,
            description="Bytes of standard error that reach the log, in at most 256 lines; the rest is dropped.",
        ),
    ] = 65_536


class TargetSettings(_Settings, frozen=True):
    """The servers that sessions are sent to."""

    connect_timeout: Annotated[float, Meta(gt=0, description="For connecting to one address.")] = 5.0
    login_timeout: Annotated[
        float, Meta(gt=0, description="For connecting and logging in, all addresses together.")
    ] = 15.0
    error_text: Annotated[
        bool,
        Meta(
            description="Tell clients the target's own words when it refuses a session (over a local connection). "
            "Off: a neutral text with the same SQLSTATE."
        ),
    ] = False
    max_auth_request: Annotated[int, Meta(ge=12, description="Longest authentication request.")] = 2_000
    max_error: Annotated[int, Meta(ge=64, description="Longest error or notice before the session begins.")] = 30_000
    max_message: Annotated[int, Meta(ge=64, description="Longest other message before the session begins.")] = 65_536
    max_scram_iterations: Annotated[int, Meta(ge=1, description="Most SCRAM iterations that a target may ask for.")] = (
        100_000
    )


class TcpSettings(_Settings, frozen=True):
    """Options of the sockets on both sides."""

    keepalive_idle: Annotated[int, Meta(ge=1, description="Seconds of silence before the first keepalive probe.")] = 60
    keepalive_interval: Annotated[int, Meta(ge=1, description="Seconds between probes.")] = 10
    keepalive_count: Annotated[
        int, Meta(ge=1, description="Probes without an answer before the connection counts as dead.")
    ] = 6
    user_timeout: Annotated[
        float,
        Meta(
            ge=0,
            description="TCP_USER_TIMEOUT: how long sent data may go without acknowledgement. "
            "0 leaves it to the system. "
            "Above 0 it also ends peers that are alive but do not read for so long, a paused COPY for example.",
        ),
    ] = 0.0


class LogSettings(_Settings, frozen=True):
    """What is written to standard error."""

    format: Annotated[Literal["text", "json"], Meta(description="Lines to read, or one JSON object a line.")] = "text"
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="The least that is written.")] = (
        "info"
    )


class Settings(_Settings, frozen=True):
    """All settings."""

    listen: Annotated[
        list[str],
        Meta(
            description="Where clients connect: `host:port`, `:port` (all interfaces), `[v6]:port`, "
            "`unix:/folder:port`, or a list of these."
        ),
    ] = msgspec.field(default_factory=lambda: [":5432"])
    authenticator: AuthenticatorSettings = AuthenticatorSettings()
    target: TargetSettings = TargetSettings()
    tcp: TcpSettings = TcpSettings()
    log: LogSettings = LogSettings()
    max_clients: Annotated[
        int,
        Meta(
            ge=1,
            description="Clients at once; more are refused with 53300. Lowered at start to what descriptors allow.",
        ),
    ] = 10_000
    max_logins: Annotated[
        int,
        Meta(
            ge=1,
            description="Logins in progress at once. When all are taken, the client that has said nothing for longest "
            "makes way; where all have said who they are, more are refused with 53300. "
            "Lowered at start to what descriptors allow.",
        ),
    ] = 512
    login_timeout: Annotated[float, Meta(gt=0, description="From accept to AuthenticationOk, all steps together.")] = (
        60.0
    )
    cancel_timeout: Annotated[float, Meta(gt=0, description="For passing on a cancel request.")] = 10.0
    drain_timeout: Annotated[float, Meta(ge=0, description="How long sessions may go on after SIGTERM or SIGINT.")] = (
        30.0
    )
    close_timeout: Annotated[
        float, Meta(gt=0, description="How long a closing side may take to accept the last bytes that it is owed.")
    ] = 60.0
    buffer_size: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 24,
            description="Bytes that a session may hold in each direction before the sender is paused.",
        ),
    ] = 65_536
    backlog: Annotated[int, Meta(ge=1, description="Connections that may wait to be accepted, for each listener.")] = (
        1_024
    )
    max_startup_packet: Annotated[int, Meta(ge=8, description="Longest startup packet.")] = 10_000
    max_password_message: Annotated[int, Meta(ge=41, description="Longest password message.")] = 65_535


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its dotted path, type with bounds, default (and how to say it), and meaning."""

    path: str
    type: Any
    default: object
    default_text: str
    description: str

    @property
    def environment_name(self) -> str:
        return "PGPROXY_" + self.path.replace(".", "_").upper()


def all_keys(struct: type[msgspec.Struct] = Settings, prefix: str = "") -> Iterator[Key]:
    """All settings, in the order in which they are documented."""
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from all_keys(field.type, f"{prefix}{field.name}.")
        else:
            computed = field.default is msgspec.NODEFAULT
            default = field.default_factory() if computed else field.default
            says = field.default_factory.__doc__ if field.default_factory is _default_parallel else None
            text = says or msgspec.json.encode(default).decode()
            yield Key(prefix + field.name, field.type, default, text, _description(field.type))


def _description(annotated: Any) -> str:
    return next(meta.description for meta in annotated.__metadata__ if isinstance(meta, Meta)) or ""
