"""What the settings ask for and the machine does not have, and what is made of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pgauthproxy import build, kinds
from pgauthproxy.config.schema import (
    AuthenticatorSettings,
    CertificateSettings,
    Settings,
    TargetSettings,
    TargetTlsSettings,
    TlsSettings,
)
from pgauthproxy.events import ignore
from pgauthproxy.proto import messages
from pgauthproxy.stages import TargetTls
from tests.channels import NAME, authority

AUTHENTICATOR = AuthenticatorSettings(cmd=["true"])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A certificate and its key, as settings have them."""
    issued = authority().issue_cert(NAME)
    cert, key = tmp_path / "server.crt", tmp_path / "server.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    return {"cert": str(cert), "key": str(key)}


def faults(**settings: Any) -> list[str]:
    return build.examine(Settings(**{"authenticator": AUTHENTICATOR} | settings), ignore)[1]


def test_what_can_be_had_has_no_fault(files: dict[str, Any]) -> None:
    ca = files["cert"]
    assert faults() == []
    assert faults(tls=TlsSettings(**files, client_ca=ca, client_cert="optional")) == []
    assert faults(tls=TlsSettings(**files, hosts={"other": CertificateSettings(**files)})) == []
    strict = TargetTlsSettings(mode="verify-full", ca=ca, negotiation="direct", **files)
    assert faults(target=TargetSettings(tls=strict)) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"listen": ["nowhere"]}, "listen: nowhere: an address is written host:port"),
        ({"authenticator": AuthenticatorSettings()}, "authenticator.cmd: no authenticator is configured"),
        ({"authenticator": AuthenticatorSettings(cmd=["/no/such"])}, "authenticator.cmd: /no/such: not found"),
        ({"tls": TlsSettings(cert="/no/such.crt", key="/no/such.key")}, "tls: /no/such.key: No such file or directory"),
        (
            {"target": TargetSettings(tls=TargetTlsSettings(mode="verify-ca"))},
            "target.tls: mode verify-ca needs a ca to verify with",
        ),
        (
            {"target": TargetSettings(tls=TargetTlsSettings(mode="verify-ca", ca="/no/such.crt"))},
            "target.tls: /no/such.crt: No such file or directory",
        ),
        (
            {"target": TargetSettings(tls=TargetTlsSettings(negotiation="direct"))},
            "target.tls: negotiation direct needs mode require or better",
        ),
    ],
)
def test_what_cannot_be_had_is_a_line(settings: dict[str, Any], says: str) -> None:
    (fault,) = faults(**settings)
    assert fault.startswith(says)


def test_all_that_cannot_be_had_is_told_at_once() -> None:
    found = faults(
        listen=["nowhere"],
        authenticator=AuthenticatorSettings(),
        tls=TlsSettings(cert="/no/such.crt", key="/no/such.key"),
        target=TargetSettings(tls=TargetTlsSettings(cert="/no/such.crt")),
    )
    assert [fault.partition(":")[0] for fault in found] == ["listen", "authenticator.cmd", "tls", "target.tls"]


def test_certificates_that_are_not_used_are_not_looked_at() -> None:
    unused = TlsSettings(mode="disable", cert="/no/such.crt", key="/no/such.key")
    assert faults(tls=unused) == []
    assert build.build_client_tls(Settings(tls=unused)) is None
    assert kinds.made_up_from(Settings(tls=unused))
    unused_too = TargetTlsSettings(mode="disable", ca="/no/such.crt")
    assert faults(target=TargetSettings(tls=unused_too)) == []


def test_what_refused_users_are_shown_is_as_stable_as_the_operator_has_made_it(files: dict[str, Any]) -> None:
    def twice(settings: Settings) -> tuple[Any, Any]:
        one, other = (kinds.made_up_from(settings) for _ in range(2))
        return one, other

    seeded = Settings(authenticator=AuthenticatorSettings(scram_seed="seed"), tls=TlsSettings(**files))
    with_key = Settings(tls=TlsSettings(**files))
    for settings in (seeded, with_key):
        one, other = twice(settings)
        assert one == other
    assert twice(seeded)[0] != twice(with_key)[0]
    # Nothing of the key itself is in it.
    assert twice(with_key)[0].reveal() not in Path(files["key"]).read_bytes()
    one, other = twice(Settings())
    assert one != other


def test_the_settings_for_targets_are_what_the_gateway_uses(files: dict[str, Any]) -> None:
    tls = TargetTlsSettings(mode="verify-full", ca="system", negotiation="direct", name="db", **files)
    settings = Settings(target=TargetSettings(tls=tls, protocol="3.2"))
    expected = TargetTls("verify-full", "system", files["cert"], files["key"], "direct", "db")
    assert kinds.target_tls(settings) == expected
    policy = build.build_targets(settings).policy
    assert (policy.version, policy.tls) == (messages.PROTOCOL_3_2, expected)
    assert build.build_targets(Settings()).policy.version == messages.PROTOCOL_3_0
