"""A disk that is full under the audit log: who gets in, what operators see, and what the log has to say of it later."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Gateway, StartGateway
from tests.system.conftest import assert_serves, wait_until
from tests.system.operators import samples
from tests.wire import RawClient, error_fields, password, startup

CANNOT = ("57P03", "the gateway cannot accept logins at the moment")
MEGABYTE = 1 << 20
DISK_BYTES = 64 << 10
FAILING, LOST = "pgauthproxy_audit_failing", "pgauthproxy_audit_lost_lines_total"
PART = 50
"""Bytes that have room, and less than any line."""
ENOUGH = 60
"""Logins whose lines are more than what may be left of a disk's last block."""


def lines_of(file: Path, event: str = "") -> list[dict[str, Any]]:
    """The lines of an audit log, each of which must be whole."""
    lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    return [line for line in lines if not event or line["event"] == event]


def limit_files(gateway: Gateway, size: int) -> None:
    """No file of the gateway may grow beyond this size, as on a disk that is full."""
    for pid in gateway.family:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("required", [True, False])
def test_a_disk_that_is_full_for_a_while_leaves_whole_lines_and_their_number(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path, *, required: bool
) -> None:
    file = tmp_path / "audit.log"
    # Far beyond what the log itself may grow to.
    file.write_bytes(b"\n" * MEGABYTE)
    gateway = start_gateway(mapped, audit={"file": str(file), "required": required})
    assert_serves(gateway.port)
    wait_until(lambda: lines_of(file, "end"), "the session's end")
    limit_files(gateway, file.stat().st_size + PART)
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        client.read_message()
        if required:
            assert client.read_fatal() == CANNOT
        else:
            client.read_until(b"Z")
            client.assert_served()
    gateway.wait_for("refused" if required else "session ended", 1 if required else 2)
    limit_files(gateway, resource.RLIM_INFINITY)
    assert_serves(gateway.port)
    assert gateway.stop() == 0
    lines = lines_of(file)
    lost = next(number for number, line in enumerate(lines) if line["event"] == "lost")
    # The numbers tell which are missing.
    assert lines[lost]["sequence"] - lines[lost]["lines"] == lines[lost - 1]["sequence"] == 3
    after = [line["sequence"] for line in lines[lost:]]
    assert after == list(range(after[0], after[0] + len(after)))
    assert [line["event"] for line in lines[lost + 1 :]] == ["login", "end", "closed"]
    gateway.wait_for("audit can be written again")


class Disk:
    """A file system of its own, if one may be mounted; otherwise a limit on files does what a full one does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._filler = folder / "filler"
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        self.is_real = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
        self.file = folder / "audit.log"
        if not self.is_real:
            self.file.write_bytes(b"\n" * MEGABYTE)

    def fill(self, gateway: Gateway) -> None:
        if not self.is_real:
            limit_files(gateway, self.file.stat().st_size + PART)
            return
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                continue

    def clear(self, gateway: Gateway) -> None:
        if self.is_real:
            self._filler.unlink()
        else:
            limit_files(gateway, resource.RLIM_INFINITY)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    yield found
    if found.is_real:
        # The gateway may have its file there still.
        subprocess.run(["umount", "--lazy", str(found.file.parent)], check=True)


def told(gateway: Gateway) -> tuple[str, str] | None:
    """Why a client is not let in, if it is not."""
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        while (said := client.read_message())[0] not in (b"Z", b"E"):
            continue
        if said[0] == b"Z":
            client.assert_served()
            return None
        fields = error_fields(said[1])
        return fields["C"], fields["M"]


def assert_sound(lines: list[dict[str, Any]]) -> int:
    """Numbers follow each other, but for those that a line says are missing; how many these are."""
    last = missing = 0
    for line in lines:
        if line["event"] == "lost":
            missing += line["lines"]
            assert line["sequence"] == last + line["lines"]
        else:
            assert line["sequence"] == last + 1
        last = line["sequence"]
    return missing


@pytest.mark.parametrize("required", [True, False])
def test_operators_see_a_disk_that_is_full_and_logins_resume_when_there_is_room(
    start_gateway: StartGateway, mapped: Path, disk: Disk, *, required: bool
) -> None:
    audit = {"file": str(disk.file), "required": required}
    gateway = start_gateway(mapped, audit=audit, admin={"listen": "127.0.0.1:0"})
    assert told(gateway) is None
    assert (samples(gateway)[FAILING], samples(gateway)[LOST]) == (0, 0)
    disk.fill(gateway)
    heard = [told(gateway) for _ in range(ENOUGH)]
    # What is left of the last block is used.
    assert heard[-10:] == [CANNOT if required else None] * 10
    wait_until(lambda: samples(gateway)[FAILING] == 1, "operators to see it")
    assert samples(gateway)[LOST] > 0
    assert gateway.wait_for("audit cannot be written")["reason"] in ("No space left on device", "File too large")
    assert len(gateway.log_lines("audit cannot be written")) == 1
    disk.clear(gateway)
    assert told(gateway) is None
    gateway.wait_for("audit can be written again")
    wait_until(lambda: samples(gateway)[FAILING] == 0, "operators to see it")
    missing = samples(gateway)[LOST]
    gateway.wait_for("session ended", 2 + heard.count(None))
    assert gateway.stop() == 0
    lines = lines_of(disk.file)
    assert lines[-1]["event"] == "closed"
    assert assert_sound(lines) == missing
    if required:
        assert len(lines_of(disk.file, "login")) == 2 + heard.count(None)


def test_processes_that_share_a_full_disk_leave_whole_lines_and_their_numbers(
    start_gateway: StartGateway, mapped: Path, disk: Disk
) -> None:
    gateway = start_gateway(mapped, audit={"file": str(disk.file), "required": True}, workers=2)
    for _ in range(3):
        # Whoever finds room again first has not been the one that found it missing.
        disk.fill(gateway)
        wait_until(lambda: told(gateway) == CANNOT, "the disk to be full")
        disk.clear(gateway)
        for _ in range(10):
            assert_serves(gateway.port)
    assert gateway.stop() == 0
    lines = lines_of(disk.file)
    assert len({line["pid"] for line in lines}) == 3
    for pid in {line["pid"] for line in lines}:
        assert_sound([line for line in lines if line["pid"] == pid])
