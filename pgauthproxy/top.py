"""`pgauthproxy top`: what the live page shows, in a terminal; once and plain where there is none.

What answers at an address need not be a gateway: its texts are made printable here too.
"""

import contextlib
import datetime
import http.client
import os
import select
import shutil
import signal
import socket
import sys
import termios
import time
import tty
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from pgauthproxy.net.listen import ListenAddress
from pgauthproxy.ops.log import printable
from pgauthproxy.ops.snapshot import RefusalRow, SessionRow, TargetRow
from pgauthproxy.ops.view import View
from pgauthproxy.secret import Secret

TIMEOUT_SECONDS: Final = 10.0
MAX_ANSWER: Final = 1 << 24
"""Bytes; a gateway's answers are far below."""
EVERYWHERE: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (what is listened on)
"""What to connect to where all interfaces are listened on."""
ENTER: Final = "\x1b[?1049h\x1b[?25l"
LEAVE: Final = "\x1b[?25h\x1b[?1049l"
HOME: Final = "\x1b[H"
REST_OF_LINE: Final = "\x1b[K"
BELOW: Final = "\x1b[J"
BOLD: Final = "\x1b[1m"
USUAL: Final = "\x1b[0m"
LEAVING_KEYS: Final = b"qQ"
MAX_REFUSALS: Final = 5
"""Lines for refusals on a screen."""
GAP: Final = "  "
PARTS: Final = (50, 95, 99)
UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


class TopError(Exception):
    """The gateway cannot be looked at; the text is one line for the operator."""


class _Connection(http.client.HTTPConnection):
    """To an address that a gateway listens on."""

    def __init__(self, address: ListenAddress) -> None:
        host = "localhost" if address.folder else EVERYWHERE.get(address.host, address.host)
        super().__init__(host, timeout=TIMEOUT_SECONDS)
        self._address = address

    def connect(self) -> None:
        if self._address.folder:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT_SECONDS)
            self.sock.connect(self._address.socket_path)
        else:
            port = self._address.port
            number = int(port) if port.isdecimal() else socket.getservbyname(port, "tcp")
            self.sock = socket.create_connection((self.host, number), TIMEOUT_SECONDS)


def fetch(address: ListenAddress, token: Secret | None) -> View:
    """What a gateway shows of itself. Raises TopError."""
    where = address.socket_path if address.folder else f"{address.host}:{address.port}"
    headers = {"Authorization": f"Bearer {token.reveal().decode()}"} if token is not None else {}
    connection = _Connection(address)
    try:
        connection.request("GET", "/state", headers=headers)
        response = connection.getresponse()
        body = response.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TopError(f"{where}: {reason}") from None
    finally:
        connection.close()
    if response.status == http.client.UNAUTHORIZED:
        raise TopError(f"{where}: the gateway wants another admin.token")
    if response.status != http.client.OK:
        raise TopError(f"{where}: {response.status} {printable(body).strip()}")
    try:
        return msgspec.json.decode(body, type=View)
    except msgspec.DecodeError as error:
        raise TopError(f"{where}: this is no answer of a gateway: {error}") from None


def run(look: Callable[[], View], seconds: float, *, once: bool) -> None:
    """Shows it until somebody presses q or Ctrl-C; once, and plain, if that is asked for or there is no terminal.

    Raises TopError if the first look fails.
    """
    view = look()
    if once or not sys.stdout.isatty():
        for line in lines(view, None):
            print(line)
        return
    with contextlib.suppress(KeyboardInterrupt), _screen():
        previous, failure = None, ""
        while True:
            _show(screen_lines(view, previous, failure))
            if _is_left(seconds):
                return
            try:
                view, previous, failure = look(), view, ""
            except TopError as error:
                failure = f"{error}, trying again"


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """A screen of its own, and keys that need no Enter."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Either way the terminal is to be left as it was.
        signal.signal(number, signal.default_int_handler)
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    sys.stdout.write(ENTER)
    try:
        if before is not None:
            tty.setcbreak(sys.stdin)
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _is_left(seconds: float) -> bool:
    """Waits so long; whether a key was pressed that means enough."""
    until = time.monotonic() + seconds
    watched = [sys.stdin] if sys.stdin.isatty() else []
    while (left := until - time.monotonic()) > 0:
        if select.select(watched, [], [], left)[0]:
            pressed = os.read(sys.stdin.fileno(), 1024)
            if not pressed or any(key in LEAVING_KEYS for key in pressed):
                return True
    return False


def _show(shown: Sequence[str]) -> None:
    sys.stdout.write(HOME + "".join(line + REST_OF_LINE + "\r\n" for line in shown[:-1]))
    sys.stdout.write(shown[-1] + REST_OF_LINE + BELOW)
    sys.stdout.flush()


def screen_lines(view: View, previous: View | None, failure: str) -> list[str]:
    """As many lines as the terminal has, none wider than it is. The first is bold."""
    columns, height = shutil.get_terminal_size()
    found = lines(view, previous, height)
    if failure:
        found[1] = printable(failure)
    cut = [cut_to(line, columns) for line in found[: max(2, height)]]
    return [BOLD + cut[0] + USUAL, *cut[1:]]


def lines(view: View, previous: View | None, height: int | None = None) -> list[str]:
    """All that there is to show; of sessions and refusals what fits the height, if there is one."""
    found = [_title(view), _rates(view, previous), ""]
    found += table(("TARGET", "STATE", "SESSIONS", "LOGINS", "FAILURES", "LAST ERROR"), map(_target, view.targets))
    refusals = view.refusals[::-1]
    if height is not None:
        refusals = refusals[:MAX_REFUSALS]
    refused = table(("REFUSED", "SQLSTATE", "USER", "DATABASE", "CLIENT", "REASON"), map(_refusal, refusals))
    heads = (
        "SESSION",
        "STATE",
        "USER",
        "DATABASE",
        "CLIENT",
        "BECAME",
        "TARGET",
        "SINCE",
        "FROM CLIENT",
        "FROM TARGET",
    )
    sessions = view.sessions
    if height is not None:
        sessions = sessions[: max(1, height - len(found) - len(refused) - 4)]
    left_out = len(view.sessions) - len(sessions) + view.sessions_left_out
    found += ["", *table(heads, (_session(row, view.at) for row in sessions))]
    if left_out:
        found.append(f"and {left_out} more")
    return [*found, "", *refused]


def _title(view: View) -> str:
    state = "shutting down" if view.draining else "logins are paused" if view.paused else "serving"
    queued = sum(row.queued for row in view.authenticators)
    return (
        f"pgauthproxy {printable(view.version)}{GAP}{state}{GAP}up {age(view.at - view.started)}{GAP}"
        f"sessions {view.open}{GAP}logging in {view.logging_in} ({queued} wait){GAP}"
        f"logins {view.accepted}{GAP}refused {sum(view.refused.values())}"
    )


def _rates(view: View, previous: View | None) -> str:
    point = view.point
    known = [each for each in (view.history or []) if each.p50 is not None]
    parts = [f"logins {point.logins:.1f}/s", f"refused {point.refused:.1f}/s"] if point is not None else []
    if known:
        took = (known[-1].p50, known[-1].p95, known[-1].p99)
        parts.append(
            "login time "
            + " ".join(f"p{part} {(each or 0) * 1000:.1f} ms" for part, each in zip(PARTS, took, strict=True))
        )
    if previous is not None and view.at > previous.at:
        passed = view.at - previous.at
        for side in ("client", "target"):
            moved = getattr(view, f"bytes_from_{side}") - getattr(previous, f"bytes_from_{side}")
            parts.append(f"from {side}s {size(max(0, moved) / passed)}/s")
    return GAP.join(parts)


def _target(row: TargetRow) -> tuple[str, ...]:
    state = "up" if row.is_up else "DOWN"
    return (row.target, state, str(row.sessions), str(row.logins), str(row.failures), row.last_error)


def _refusal(row: RefusalRow) -> tuple[str, ...]:
    at = datetime.datetime.fromtimestamp(row.at).strftime("%H:%M:%S")
    return (at, row.sqlstate, row.user, row.database, row.client, row.reason)


def _session(row: SessionRow, now: float) -> tuple[str, ...]:
    became = f"{row.target_user} @ {row.target_database}" if row.target else ""
    moved = size(row.bytes_from_client), size(row.bytes_from_target)
    return (
        row.session,
        row.state,
        row.user,
        row.database,
        row.client,
        became,
        row.target,
        age(now - row.since),
        *moved,
    )


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Lines whose columns are below each other; the last column is as wide as it is."""
    whole = [heads, *(tuple(printable(cell) for cell in row) for row in rows)]
    widths = [max(width_of(row[at]) for row in whole) for at in range(len(heads) - 1)]
    return [
        GAP.join([*(padded(cell, width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in whole
    ]


def age(seconds: float) -> str:
    """1:02:03, with days before it where there are any."""
    whole = max(0, round(seconds))
    days = f"{whole // 86400} d " if whole >= 86400 else ""
    return f"{days}{whole % 86400 // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def size(count: float) -> str:
    """Bytes, in the unit that fits."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.1f} {UNITS[unit]}" if unit and count < 100 else f"{count:.0f} {UNITS[unit]}"


def width_of(text: str) -> int:
    """Cells that a text takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def padded(text: str, width: int) -> str:
    return text + " " * (width - width_of(text))


def cut_to(text: str, width: int) -> str:
    """As much of a text as so many cells hold."""
    if width_of(text) <= width:
        return text
    taken = 0
    for at, character in enumerate(text):
        taken += _cells(character)
        if taken > width:
            return text[:at]
    return text
