"""Certificates and settings of TLS: what the gateway refuses to start with, warns of, and loads anew on SIGHUP."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pgauthproxy.throwaway import UNPRIVILEGED_USER
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import Run, assert_one_clear_line, configure
from tests.tls import Authority, Identity, TlsClient, pem_of
from tests.wire import SSL_REQUEST, RawClient, message, startup

EXPOSED = "passwords cross the network in clear"
LOADED = "certificates loaded anew"
NOT_LOADED = "certificates not loaded, the old ones stay"
AS_ROOT = os.geteuid() == 0
MINE = {"cert": "mine.pem", "key": "mine.key"}


@pytest.fixture
def files(folder: Path, authority: Authority) -> Path:
    """The working directory with files of TLS in it: `mine` and `other` fit, everything else is broken somehow."""
    mine = authority.issue("settings", "localhost")
    other = authority.issue("other settings", "localhost")
    for name, identity in (("mine", mine), ("other", other)):
        shutil.copy(identity.cert, folder / f"{name}.pem")
        write_key(folder / f"{name}.key", identity.key.read_bytes())
    shutil.copy(authority.cert, folder / "authority.pem")
    (folder / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n")
    (folder / "empty.pem").touch()
    (folder / "words.pem").write_text("just words\n")
    write_key(folder / "open.key", mine.key.read_bytes(), 0o644)
    write_key(folder / "words.key", b"just words\n")
    key = load_pem_private_key(mine.key.read_bytes(), None)
    write_key(folder / "encrypted.key", pem_of(key, b"a password"))
    (folder / "folder.key").mkdir()
    return folder


def write_key(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.touch(0o600)
    path.write_bytes(content)
    path.chmod(mode)


# What cannot be used, and the words that say so.
BROKEN = [
    pytest.param({"cert": "missing.pem", "key": "mine.key"}, ["tls", "missing.pem", "No such file"], id="no cert"),
    pytest.param({"cert": "mine.pem", "key": "missing.key"}, ["tls", "missing.key", "No such file"], id="no key"),
    pytest.param({"cert": "garbage.pem", "key": "mine.key"}, ["tls", "garbage.pem"], id="a cert of garbage"),
    pytest.param({"cert": "empty.pem", "key": "mine.key"}, ["tls", "empty.pem"], id="an empty cert"),
    pytest.param({"cert": "words.pem", "key": "mine.key"}, ["tls", "words.pem"], id="a cert of words"),
    pytest.param({"cert": "mine.pem", "key": "words.key"}, ["tls", "words.key"], id="a key of words"),
    pytest.param({"cert": "mine.pem", "key": "folder.key"}, ["tls", "folder.key", "not a regular"], id="a folder"),
    pytest.param({"cert": "mine.pem", "key": "other.key"}, ["tls", "other.key"], id="another's key"),
    pytest.param({"cert": "mine.pem", "key": "open.key"}, ["open.key", "others may read", "0600"], id="an open key"),
    pytest.param({"cert": "mine.pem", "key": "encrypted.key"}, ["tls", "encrypted"], id="an encrypted key"),
    pytest.param({"cert": "mine.pem"}, ["tls.cert", "tls.key"], id="a cert alone"),
    pytest.param({"key": "mine.key"}, ["tls.cert", "tls.key"], id="a key alone"),
    pytest.param({"mode": "require"}, ["tls.mode", "require", "tls.cert"], id="required without a cert"),
    pytest.param({"mode": "allow"}, ["tls.mode", "allow", "tls.cert"], id="allowed without a cert"),
    pytest.param({"mode": "perhaps"}, ["tls.mode", "perhaps"], id="a mode that is none"),
    pytest.param(MINE | {"client_cert": "require"}, ["tls.client_cert", "tls.client_ca"], id="nobody to verify with"),
    pytest.param(
        MINE | {"client_cert": "optional"}, ["tls.client_cert", "tls.client_ca"], id="nobody to verify with, optional"
    ),
    pytest.param(MINE | {"client_ca": "missing.pem"}, ["tls", "missing.pem", "No such file"], id="no client_ca"),
    pytest.param(MINE | {"client_ca": "garbage.pem"}, ["tls", "garbage.pem"], id="a client_ca of garbage"),
    pytest.param(MINE | {"client_ca": "empty.pem"}, ["tls", "empty.pem"], id="an empty client_ca"),
    pytest.param(MINE | {"min_version": "1.1"}, ["tls.min_version", "1.1"], id="an old version"),
    pytest.param(MINE | {"min_version": 1.3, "ciphers": "NO-SUCH"}, ["tls.ciphers", "NO-SUCH"], id="no such cipher"),
    pytest.param(MINE | {"hosts": {"a.example": {"cert": "mine.pem"}}}, ["tls.hosts", "key"], id="a host without key"),
    pytest.param(
        MINE | {"hosts": {"a.example": {"cert": "mine.pem", "key": "other.key"}}},
        ["tls", "other.key"],
        id="a host with another's key",
    ),
    pytest.param(
        MINE | {"hosts": {"a.example": {"cert": "mine.pem", "key": "open.key"}}},
        ["open.key", "others may read"],
        id="a host with an open key",
    ),
    pytest.param(MINE | {"certificate": "x"}, ["tls.certificate", "did you mean"], id="a setting that is none"),
]
BROKEN_FOR_TARGETS = [
    pytest.param({"mode": "verify-full"}, ["target.tls", "verify-full", "ca"], id="verify-full without a ca"),
    pytest.param({"mode": "verify-ca"}, ["target.tls", "verify-ca", "ca"], id="verify-ca without a ca"),
    pytest.param(
        {"mode": "verify-ca", "ca": "system"}, ["target.tls", "system", "verify-full"], id="verify-ca by system"
    ),
    pytest.param({"mode": "sometimes"}, ["target.tls.mode", "sometimes"], id="a mode that is none"),
    pytest.param({"negotiation": "direct"}, ["target.tls", "direct", "require"], id="direct but only preferred"),
    pytest.param({"negotiation": "indirect"}, ["target.tls.negotiation", "indirect"], id="a negotiation that is none"),
    pytest.param({"cert": "mine.pem"}, ["target.tls", "cert and key"], id="a cert alone"),
    pytest.param({"key": "mine.key"}, ["target.tls", "cert and key"], id="a key alone"),
    pytest.param({"cert": "mine.pem", "key": "other.key"}, ["target.tls", "other.key"], id="another's key"),
    pytest.param({"cert": "mine.pem", "key": "open.key"}, ["target.tls", "open.key", "0600"], id="an open key"),
    pytest.param({"cert": "mine.pem", "key": "encrypted.key"}, ["target.tls", "encrypted"], id="an encrypted key"),
    pytest.param({"mode": "verify-ca", "ca": "missing.pem"}, ["target.tls", "missing.pem"], id="no ca"),
    pytest.param({"mode": "verify-ca", "ca": "garbage.pem"}, ["target.tls", "garbage.pem"], id="a ca of garbage"),
    pytest.param({"mode": "require", "ca": "missing.pem"}, ["target.tls", "missing.pem"], id="no ca, required"),
]


@pytest.mark.parametrize(("tls", "words"), BROKEN)
def test_settings_that_cannot_be_used_are_named_in_one_line(
    run: Run, files: Path, tls: dict[str, Any], words: list[str]
) -> None:
    configure(files, tls=tls)
    assert_refused(run, words)


@pytest.mark.parametrize(("tls", "words"), BROKEN_FOR_TARGETS)
def test_settings_for_targets_that_cannot_be_used_are_named_in_one_line(
    run: Run, files: Path, tls: dict[str, Any], words: list[str]
) -> None:
    configure(files, target={"tls": tls})
    assert_refused(run, words)


def assert_refused(run: Run, words: list[str]) -> None:
    done = run("check")
    # What it prints of the settings that could be read is no part of it.
    done.stdout = ""
    assert_one_clear_line(done, *words)


def test_nothing_is_served_with_settings_that_cannot_be_used(run: Run, files: Path) -> None:
    configure(files, tls={"cert": "mine.pem", "key": "open.key"})
    assert_one_clear_line(run(), "open.key", "others may read")
    configure(files, target={"tls": {"mode": "require", "ca": "missing.pem"}})
    assert_one_clear_line(run(), "target.tls", "missing.pem")


def test_each_fault_has_a_line_of_its_own(run: Run, files: Path) -> None:
    configure(files, tls={"cert": "mine.pem", "key": "open.key"}, target={"tls": {"mode": "verify-full"}})
    done = run("check")
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["tls", "target.tls"]


def test_method_cert_needs_certificates(run: Run, files: Path) -> None:
    for tls in ({}, MINE, MINE | {"client_ca": "authority.pem"}, MINE | {"mode": "disable"}):
        configure(files, tls=tls, authenticator={"cmd": ["./authenticator"], "method": "cert"})
        assert_refused(run, ["authenticator.method", "cert", "tls.client_cert"])


@pytest.mark.parametrize(
    "tls",
    [
        MINE,
        MINE | {"mode": "require", "client_ca": "authority.pem", "client_cert": "require", "min_version": "1.3"},
        MINE | {"hosts": {"a.example": {"cert": "other.pem", "key": "other.key"}}},
        {"mode": "disable", "cert": "missing.pem", "key": "missing.key"},
    ],
)
def test_settings_that_can_be_used_pass(run: Run, files: Path, tls: dict[str, Any]) -> None:
    configure(files, tls=tls, target={"tls": {"mode": "verify-full", "ca": "system"}})
    done = run("check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ok"), done.stderr


def test_check_shows_the_settings_of_tls(run: Run, files: Path) -> None:
    hosts = {name: {"cert": "other.pem", "key": "other.key"} for name in ("a.example", "b.example")}
    configure(files, tls=MINE | {"hosts": hosts}, target={"tls": {"mode": "require"}})
    said = run("check").stdout
    assert "tls.cert = mine.pem  (file pgauthproxy.yaml)" in said
    assert "tls.hosts = a.example, b.example  (file pgauthproxy.yaml)" in said
    assert "tls.mode = allow  (default)" in said
    assert "target.tls.mode = require  (file pgauthproxy.yaml)" in said


def test_variables_set_tls_too(run: Run, files: Path) -> None:
    configure(files)
    variables = {
        "PGPROXY_TLS_CERT": "mine.pem",
        "PGPROXY_TLS_KEY": "mine.key",
        "PGPROXY_TLS_MODE": "require",
        "PGPROXY_TLS_HOSTS": "{a.example: {cert: other.pem, key: other.key}}",
        "PGPROXY_TARGET_TLS_MODE": "verify-full",
        "PGPROXY_TARGET_TLS_CA": "system",
    }
    done = run("check", **variables)
    assert done.returncode == 0, done.stderr
    assert "tls.hosts = a.example  (environment PGPROXY_TLS_HOSTS)" in done.stdout
    assert "target.tls.ca = system  (environment PGPROXY_TARGET_TLS_CA)" in done.stdout


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(lambda pem: b"# f\xfcr alle\n" + pem + b"\xff\xfe\n", id="words that are no UTF-8"),
        pytest.param(lambda pem: pem.replace(b" CERT", b" X509 CERT"), id="an older name for it"),
        pytest.param(lambda pem: pem.replace(b"\n", b"\r\n"), id="line ends of Windows"),
    ],
)
def test_what_openssl_reads_is_read(run: Run, files: Path, written: Callable[[bytes], bytes]) -> None:
    (files / "mine.pem").write_bytes(written((files / "mine.pem").read_bytes()))
    configure(files, tls=MINE)
    done = run("check")
    assert (done.returncode, done.stderr) == (0, "")


# Who may read a key

needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can give files away")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_that_only_its_owner_reads_is_used(run: Run, files: Path, mode: int) -> None:
    write_key(files / "mine.key", (files / "mine.key").read_bytes(), mode)
    configure(files, tls=MINE)
    assert run("check").returncode == 0


@pytest.mark.parametrize("mode", [0o604, 0o660, 0o602, 0o650, 0o644, 0o666, 0o777])
def test_a_key_that_others_can_read_or_change_is_refused(run: Run, files: Path, mode: int) -> None:
    write_key(files / "mine.key", (files / "mine.key").read_bytes(), mode)
    configure(files, tls=MINE)
    assert_refused(run, ["mine.key", "others may read it"])


@needs_root
def test_a_key_of_root_may_be_read_by_a_group(run: Run, files: Path) -> None:
    write_key(files / "mine.key", (files / "mine.key").read_bytes(), 0o640)
    configure(files, tls=MINE)
    assert run("check").returncode == 0


@pytest.mark.skipif(AS_ROOT, reason="a key of root may be read by a group")
def test_a_key_of_anybody_else_may_not_be_read_by_a_group(run: Run, files: Path) -> None:
    write_key(files / "mine.key", (files / "mine.key").read_bytes(), 0o640)
    configure(files, tls=MINE)
    assert_refused(run, ["mine.key", "others may read it"])


@needs_root
def test_a_key_of_another_user_is_refused(run: Run, files: Path) -> None:
    shutil.chown(files / "mine.key", UNPRIVILEGED_USER)
    configure(files, tls=MINE)
    assert_refused(run, ["mine.key", "must belong to root or to the gateway's user"])


def test_a_key_may_be_reached_by_a_link(run: Run, files: Path) -> None:
    (files / "link.key").symlink_to("mine.key")
    configure(files, tls={"cert": "mine.pem", "key": "link.key"})
    assert run("check").returncode == 0
    write_key(files / "mine.key", (files / "mine.key").read_bytes(), 0o644)
    assert_refused(run, ["link.key", "others may read it"])


def test_an_encrypted_key_is_refused_without_asking_anybody(run: Run, files: Path) -> None:
    configure(files, tls={"cert": "mine.pem", "key": "encrypted.key"})
    # In a session of its own there is no terminal that could be asked.
    done = run("check", before=["setsid", "--wait"])
    done.stdout = ""
    assert_one_clear_line(done, "encrypted.key", "encrypted")


# Warnings


@pytest.mark.parametrize(
    ("listen", "method", "mode", "warned"),
    [
        ("0.0.0.0:0", "cleartext", None, True),
        ("0.0.0.0:0", "cleartext", "allow", True),
        ("0.0.0.0:0", "cleartext", "require", False),
        ("0.0.0.0:0", "md5", None, False),
        ("0.0.0.0:0", "scram-sha-256", None, False),
        ("127.0.0.1:0", "cleartext", None, False),
        ("127.0.0.2:0", "cleartext", "allow", False),
        ("localhost:0", "cleartext", None, False),
    ],
)
def test_passwords_in_clear_beyond_loopback_are_warned_about(
    start_gateway: StartGateway,
    mapped: Path,
    authority: Authority,
    listen: str,
    method: str,
    mode: str | None,
    *,
    warned: bool,
) -> None:
    tls = {} if mode is None else authority.issue("warned", "localhost").settings | {"mode": mode}
    gateway = start_gateway(mapped, listen=listen, authenticator={"method": method}, tls=tls)
    gateway.stop()
    lines = gateway.log_lines(EXPOSED)
    assert len(lines) == warned
    for line in lines:
        assert (line["level"], line["remedy"]) == ("warning", "tls.mode: require")
        assert line["addresses"] == f"0.0.0.0:{gateway.port}"


def test_a_unix_socket_is_not_beyond_loopback(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> None:
    gateway = start_gateway(mapped, listen=f"unix:{tmp_path}:5432", authenticator={"method": "cleartext"})
    gateway.stop()
    assert not gateway.log_lines(EXPOSED)


# SIGHUP


class Reloading:
    """A gateway that asks every client for a certificate, and its files, which a test writes anew."""

    def __init__(self, gateway: Gateway, folder: Path, authority: Authority) -> None:
        self.gateway = gateway
        self.identity = Identity(folder / "mine.pem", folder / "mine.key")
        self.client_ca = folder / "authority.pem"
        self._loaded = 0
        self._context = authority.client_context(authority.issue("reloading client", common_name="reloading"))

    def take(self, identity: Identity) -> None:
        self.identity.cert.write_bytes(identity.cert.read_bytes())
        self.identity.key.write_bytes(identity.key.read_bytes())

    def reload(self, event: str = LOADED) -> dict[str, Any]:
        """Sends SIGHUP; returns the line that is to come of it."""
        known = len(self.gateway.log_lines(event))
        self.gateway.process.send_signal(signal.SIGHUP)
        return self.gateway.wait_for(event, known + 1)

    def connect(self, context: ssl.SSLContext | None = None) -> TlsClient:
        return TlsClient(self.gateway.port, context or self._context)

    def shows(self) -> bytes:
        """The certificate that a new client is shown; it is let in."""
        with self.connect() as client:
            client.log_in()
            client.assert_served()
            return client.tls.getpeercert(binary_form=True) or b""


@pytest.fixture
def reloading(files: Path, start_gateway: StartGateway, mapped: Path, authority: Authority) -> Reloading:
    tls = {
        "cert": str(files / "mine.pem"),
        "key": str(files / "mine.key"),
        "client_ca": str(files / "authority.pem"),
        "client_cert": "require",
    }
    return Reloading(start_gateway(mapped, tls=tls), files, authority)


def test_new_certificates_are_loaded_and_sessions_not_touched(reloading: Reloading, authority: Authority) -> None:
    new = authority.issue("new", "localhost")
    with reloading.connect() as session:
        session.log_in()
        before = session.tls.getpeercert(binary_form=True)
        reloading.take(new)
        reloading.reload()
        session.assert_served()
        assert before != new.der
        assert reloading.shows() == new.der
        session.assert_served()
    assert not reloading.gateway.log_lines("session ended")[:-2]


def test_a_login_in_progress_goes_on(reloading: Reloading, authority: Authority) -> None:
    with reloading.connect() as client:
        client.send(startup())
        client.read_message()
        reloading.take(authority.issue("newer", "localhost"))
        reloading.reload()
        client.send(message(b"p", b"md5" + b"0" * 32 + b"\0"))
        client.read_until(b"Z")
        client.assert_served()


def ruin_cert(found: Reloading) -> None:
    found.identity.cert.write_text("just words\n")


def ruin_key(found: Reloading) -> None:
    found.identity.key.write_text("just words\n")


def remove_key(found: Reloading) -> None:
    found.identity.key.unlink()


def open_key(found: Reloading) -> None:
    found.identity.key.chmod(0o644)


def ruin_authority(found: Reloading) -> None:
    found.client_ca.write_text("just words\n")


def take_half(found: Reloading) -> None:
    found.identity.cert.write_bytes((found.identity.cert.parent / "other.pem").read_bytes())


@pytest.mark.parametrize("ruin", [ruin_cert, ruin_key, remove_key, open_key, ruin_authority, take_half])
def test_broken_ones_leave_the_old_in_force_and_are_named(
    reloading: Reloading, authority: Authority, ruin: Callable[[Reloading], None]
) -> None:
    old = reloading.shows()
    with reloading.connect() as session:
        session.log_in()
        ruin(reloading)
        line = reloading.reload(NOT_LOADED)
        assert line["level"] == "error"
        assert str(reloading.identity.cert.parent) in line["reason"]
        session.assert_served()
        assert reloading.shows() == old
    # Once they are right again, they are taken.
    with contextlib.suppress(FileNotFoundError):
        reloading.identity.key.unlink()
    reloading.identity.key.touch(0o600)
    new = authority.issue("mended", "localhost")
    reloading.take(new)
    reloading.client_ca.write_bytes(authority.cert.read_bytes())
    reloading.reload()
    assert reloading.shows() == new.der


def test_an_authority_that_is_gone_lets_nobody_in_any_more(
    reloading: Reloading, authority: Authority, stranger: Authority
) -> None:
    context = authority.client_context(stranger.issue("of the new authority", common_name="new"))
    with reloading.connect() as session:
        session.log_in()
        reloading.client_ca.write_bytes(stranger.cert.read_bytes())
        reloading.reload()
        with pytest.raises((ssl.SSLError, ConnectionError)), reloading.connect() as refused:
            refused.log_in()
        with reloading.connect(context) as client:
            client.log_in()
            client.assert_served()
        session.assert_served()


def test_a_session_of_a_certificate_whose_authority_is_gone_cannot_be_resumed(
    reloading: Reloading, authority: Authority, stranger: Authority
) -> None:
    context = authority.client_context(authority.issue("resuming later", common_name="later"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with reloading.connect(context) as client:
        client.log_in()
        session = client.tls.session
    assert session is not None
    reloading.client_ca.write_bytes(stranger.cert.read_bytes())
    reloading.reload()
    with RawClient(reloading.gateway.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(client.socket, server_hostname="localhost", session=session)


def test_without_tls_the_signal_does_no_harm(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped)
    with RawClient(gateway.port) as client:
        client.log_in()
        for count in range(1, 4):
            gateway.process.send_signal(signal.SIGHUP)
            gateway.wait_for(LOADED, count)
        client.assert_served()


def test_many_signals_cost_no_descriptors(reloading: Reloading) -> None:
    reloading.shows()
    reloading.reload()
    before = reloading.gateway.descriptors
    for _ in range(20):
        reloading.reload()
    assert reloading.gateway.descriptors <= before
