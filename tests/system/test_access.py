"""Lists of networks: who is on the wrong one is closed upon before anything is read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.conftest import StartGateway
from tests.system.conftest import Run, assert_one_clear_line, assert_serves, configure, wait_until
from tests.wire import RawClient, startup


def is_turned_away(port: int, source: str) -> bool:
    """Whether a client from there gets nothing but the end of the connection."""
    with RawClient(port, source=source) as client:
        return client.read_to_end() == b""


def test_who_is_in_deny_is_closed_upon_without_a_word(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, deny=["127.0.0.2", "127.0.1.0/24"])
    assert is_turned_away(gateway.port, "127.0.0.2")
    assert is_turned_away(gateway.port, "127.0.1.77")
    assert_serves(gateway.port)
    line = gateway.wait_for("connections denied")
    assert (line["level"], line["count"], line["reason"]) == ("warning", 1, "in deny")
    assert line["client"].startswith("127.0.0.2:")
    assert gateway.log_lines("refused") == []


def test_who_is_not_in_allow_is_closed_upon_without_a_word(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, allow=["127.0.0.2", "127.0.0.3"], deny=["127.0.0.3"])
    assert is_turned_away(gateway.port, "127.0.0.1")
    assert is_turned_away(gateway.port, "127.0.0.3")
    with RawClient(gateway.port, source="127.0.0.2") as client:
        client.log_in()
        client.assert_served()
    assert gateway.wait_for("connections denied")["reason"] == "not in allow"


def test_what_a_denied_client_sends_is_answered_by_nothing(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, deny=["127.0.0.1"])
    with RawClient(gateway.port, source="127.0.0.1") as client:
        try:
            client.send(startup())
        except (BrokenPipeError, ConnectionResetError):
            return
        assert client.read_to_end() == b""


def test_a_client_over_ipv4_is_one_of_ipv4_on_a_listener_for_both(start_gateway: StartGateway, mapped: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    gateway = start_gateway(mapped, listen=":0", deny=["127.0.0.2", "::1"])
    assert is_turned_away(gateway.port, "127.0.0.2")
    with RawClient(gateway.port, socket.AF_INET6) as client:
        assert client.read_to_end() == b""
    assert_serves(gateway.port)


def test_unix_sockets_are_let_in_unless_they_are_denied(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "open", tmp_path / "closed"]
    for folder in folders:
        folder.mkdir()
    start_gateway(mapped, listen=f"unix:{folders[0]}:5432", allow=["192.0.2.0/24"])
    closed = start_gateway(mapped, listen=f"unix:{folders[1]}:5432", deny=["local"])
    with RawClient.of_folder(folders[0], 5432) as client:
        client.log_in()
        client.assert_served()
    with RawClient.of_folder(folders[1], 5432) as client:
        assert client.read_to_end() == b""
    assert closed.wait_for("connections denied")["client"] == "[local]"


def test_many_denied_connections_leave_nothing_and_do_not_fill_the_log(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, deny=["127.0.0.2"])
    before = gateway.descriptors
    for _ in range(300):
        assert is_turned_away(gateway.port, "127.0.0.2")
    wait_until(lambda: gateway.descriptors == before, "everything to be given back")
    assert_serves(gateway.port)
    assert len(gateway.log_lines("connections denied")) <= 3
    # What was counted since is told at the end.
    gateway.stop()
    assert sum(line["count"] for line in gateway.log_lines("connections denied")) == 300


@pytest.mark.parametrize("key", ["allow", "deny"])
def test_a_list_with_what_is_no_network_stops_the_start(folder: Path, run: Run, key: str) -> None:
    configure(folder, **{key: ["10.0.0.1/8"]})
    assert_one_clear_line(run(), f"{key}: ", "host bits")
    checked = run("check")
    assert checked.returncode == 2
    assert f"pgauthproxy: {key}: " in checked.stderr
