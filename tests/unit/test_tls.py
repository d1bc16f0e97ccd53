"""TLS as it is configured: files that may be used, what certificates say, and which settings go together."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import itertools
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import NameOID

from pgauthproxy._tls import Channel
from pgauthproxy.errors import AuthenticatorFault, TlsError
from pgauthproxy.net import tls
from pgauthproxy.net.tls import (
    CertificateFiles,
    ClientSide,
    Sessions,
    TargetContexts,
    TlsConfigError,
    binding_of,
    build_target_context,
    check_key_file,
    fault_of,
    read_certificate,
    resolve,
)
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address, Certificate, TargetTls
from tests.channels import NAME, authority, channels, client_context, server_context, shake_hands

HOST = Address("127.0.0.1", 5432)
CIPHERS = tls.DEFAULT_CIPHERS


def issued(folder: Path, *names: str, stem: str = "server") -> CertificateFiles:
    """The files of a certificate of the authority's, for these names."""
    made = authority().issue_cert(*(names or (NAME,)))
    files = CertificateFiles(str(folder / f"{stem}.crt"), str(folder / f"{stem}.key"))
    made.cert_chain_pems[0].write_to_path(files.cert)
    made.private_key_pem.write_to_path(files.key)
    os.chmod(files.key, 0o600)
    return files


@pytest.fixture
def ca(tmp_path: Path) -> str:
    """The file of the authority's own certificate."""
    path = tmp_path / "ca.crt"
    authority().cert_pem.write_to_path(str(path))
    return str(path)


# Key files


MODES = {0o600: "own", 0o400: "own", 0o700: "own", 0o640: "root", 0o440: "root"}
"""Who may own a key of this mode, besides root."""


@pytest.mark.parametrize("owner", ["own", "root", "other"])
@pytest.mark.parametrize(
    "mode",
    [0o600, 0o400, 0o700, 0o640, 0o440, 0o660, 0o650, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o777],
    ids=oct,
)
def test_a_key_that_others_may_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, mode: int
) -> None:
    key = tmp_path / "server.key"
    key.touch()
    key.chmod(mode)
    # Only root can give files away, so the owner is made up.
    found = list(key.stat())
    found[4] = {"own": 1234, "root": 0, "other": 4321}[owner]
    monkeypatch.setattr(os, "stat", lambda _path: os.stat_result(found))
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    if owner == "other":
        says = "must belong to root or to the gateway's user"
    elif mode in MODES and (owner == "root" or MODES[mode] == "own"):
        check_key_file(str(key))
        return
    else:
        says = "others may read it; it must have mode 0600, or 0640 if root owns it"
    with pytest.raises(TlsConfigError, match=says):
        check_key_file(str(key))


def test_a_key_is_a_file_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(TlsConfigError, match=r"/none: No such file or directory$"):
        check_key_file(str(tmp_path / "none"))
    with pytest.raises(TlsConfigError, match="not a regular file"):
        check_key_file(str(tmp_path))
    with pytest.raises(TlsConfigError, match="not a regular file"):
        check_key_file("/dev/null")


# Certificates that can be used, or not


def client_side(
    files: CertificateFiles,
    *,
    hosts: dict[str, CertificateFiles] | None = None,
    client_ca: str = "",
    client_cert: str = "none",
    min_version: str = "1.2",
    ciphers: str = CIPHERS,
) -> ClientSide:
    return ClientSide(files, hosts or {}, client_ca, client_cert, min_version, ciphers)


def test_a_certificate_and_its_key_can_be_used(tmp_path: Path) -> None:
    assert client_side(issued(tmp_path)).open().established is False


@pytest.mark.parametrize("missing", ["cert", "key"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    files = issued(tmp_path)
    path = getattr(files, missing)
    os.unlink(path)
    with pytest.raises(TlsConfigError, match=f"^{path}: No such file or directory$"):
        client_side(files)


def test_a_key_of_another_certificate_is_none_of_this_one(tmp_path: Path) -> None:
    files, other = issued(tmp_path), issued(tmp_path, stem="other")
    mixed = CertificateFiles(files.cert, other.key)
    with pytest.raises(
        TlsConfigError, match=r"server\.crt, .*other\.key: not a certificate and its key: KEY_VALUES_MIS"
    ):
        client_side(mixed)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
@pytest.mark.parametrize("which", ["cert", "key"])
def test_what_is_no_certificate_or_key_is_told_in_one_line(tmp_path: Path, content: bytes, which: str) -> None:
    files = issued(tmp_path)
    Path(getattr(files, which)).write_bytes(content)
    with pytest.raises(TlsConfigError, match="not a certificate and its key") as raised:
        client_side(files)
    assert "\n" not in str(raised.value)


def test_a_key_with_a_password_asks_nobody(tmp_path: Path) -> None:
    files = issued(tmp_path)
    key = serialization.load_pem_private_key(Path(files.key).read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"hunter2"),
    )
    Path(files.key).write_bytes(encrypted)
    with pytest.raises(TlsConfigError, match="is encrypted, and nobody is there to be asked"):
        client_side(files)


def test_a_chain_may_hold_anything_else_too(tmp_path: Path, ca: str) -> None:
    files = issued(tmp_path)
    plain = client_side(files)
    leaf, authority_pem = Path(files.cert).read_bytes(), Path(ca).read_bytes()
    Path(files.cert).write_bytes(
        b"# f\xfcr die Datenbank\r\n" + leaf.replace(b"\n", b"\r\n") + b"and\n" + authority_pem
    )
    assert list(client_side(files)._bindings.values()) == list(plain._bindings.values())


def test_a_certificate_in_another_form_is_named_and_not_a_crash(tmp_path: Path) -> None:
    files = issued(tmp_path)
    trusted = Path(files.cert).read_text().replace(" CERTIFICATE", " TRUSTED CERTIFICATE")
    Path(files.cert).write_text(trusted)
    with pytest.raises(TlsConfigError, match=r"server\.crt: no certificate in the form that begins with"):
        client_side(files)


@pytest.mark.parametrize("ciphers", ["", "NONSENSE", "ECDHE+NONSENSE", "\udcff", "a\0b"])
def test_ciphers_that_nobody_knows_are_told(tmp_path: Path, ciphers: str) -> None:
    with pytest.raises(TlsConfigError, match=r"^tls\.ciphers: .*: no cipher of that name$"):
        client_side(issued(tmp_path), ciphers=ciphers)


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_authorities_that_are_none_are_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "authorities"
    if content is not None:
        path.write_bytes(content)
    for use in (
        lambda: client_side(issued(tmp_path), client_ca=str(path), client_cert="require"),
        lambda: build_target_context(TargetTls("verify-ca", str(path))),
    ):
        with pytest.raises(TlsConfigError, match=r"authorities: (No such file|no certificates of authorities)"):
            use()


def test_all_hosts_certificates_are_looked_at_from_the_start(tmp_path: Path) -> None:
    missing = CertificateFiles("/no/such.crt", "/no/such.key")
    with pytest.raises(TlsConfigError, match=r"^/no/such\.key: No such file"):
        client_side(issued(tmp_path), hosts={"other": missing})


# What certificates are bound with


Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
Hash = hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512
RSA = rsa.generate_private_key(65537, 2048)


def signed(
    key: Key = RSA,
    algorithm: Hash | None = None,
    *,
    subject: x509.Name | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
    pss: bool = False,
) -> bytes:
    """A certificate that signs itself; DER."""
    name = subject if subject is not None else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")])
    now = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 0xABCDEF, now, now + datetime.timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    salted = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH) if pss else None
    return builder.sign(key, algorithm, rsa_padding=salted).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("key", "algorithm", "pss", "bound_with"),
    [
        (RSA, hashes.SHA256(), False, "sha256"),
        (RSA, hashes.SHA384(), False, "sha384"),
        (RSA, hashes.SHA512(), False, "sha512"),
        (RSA, hashes.SHA224(), False, "sha224"),
        (RSA, hashes.SHA256(), True, "sha256"),
        (RSA, hashes.SHA384(), True, "sha384"),
        (ec.generate_private_key(ec.SECP256R1()), hashes.SHA256(), False, "sha256"),
        (ec.generate_private_key(ec.SECP384R1()), hashes.SHA384(), False, "sha384"),
        (ec.generate_private_key(ec.SECP256R1()), hashes.SHA512(), False, "sha512"),
    ],
    ids=lambda value: getattr(value, "name", None) or type(value).__name__,
)
def test_a_certificate_is_bound_with_the_hash_that_it_was_signed_with(
    key: Key, algorithm: Hash, bound_with: str, *, pss: bool
) -> None:
    certificate = signed(key, algorithm, pss=pss)
    assert binding_of(certificate) == hashlib.new(bound_with, certificate).digest()


# Of RSA with SHA-256, SHA-1 and MD5: only the last byte differs. Nobody signs with the latter two any more.
SIGNED_WITH = {
    name: bytes.fromhex("2a864886f70d0101") + bytes([last]) for name, last in (("sha256", 11), ("sha1", 5), ("md5", 4))
}


@pytest.mark.parametrize("weak", ["sha1", "md5"])
def test_a_weak_hash_is_replaced_by_sha256(weak: str) -> None:
    certificate = signed(RSA, hashes.SHA256()).replace(SIGNED_WITH["sha256"], SIGNED_WITH[weak])
    found = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
    assert found is not None
    assert found.name == weak
    assert binding_of(certificate) == hashlib.sha256(certificate).digest()


def of_version_4(certificate: bytes) -> bytes:
    version = certificate.index(b"\xa0\x03\x02\x01\x02") + 4
    return certificate[:version] + b"\x03" + certificate[version + 1 :]


@pytest.mark.parametrize(
    "certificate",
    [
        signed(ed25519.Ed25519PrivateKey.generate()),
        signed(RSA, hashes.SHA256()).replace(SIGNED_WITH["sha256"], SIGNED_WITH["sha256"][:-1] + b"\x7f"),
        of_version_4(signed(RSA, hashes.SHA256())),
        signed(RSA, hashes.SHA256())[:100],
        b"garbage",
        b"",
    ],
    ids=["Ed25519", "unknown", "version 4", "cut off", "garbage", "none"],
)
def test_a_certificate_without_a_hash_of_its_own_cannot_be_bound(certificate: bytes) -> None:
    assert binding_of(certificate) == b""


# What certificates say


def named(*attributes: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])


def common_name(value: str) -> x509.Name:
    return named((NameOID.COMMON_NAME, value))


def read(subject: x509.Name, *alternatives: x509.GeneralName) -> Certificate:
    extensions = (x509.SubjectAlternativeName(alternatives),) if alternatives else ()
    return read_certificate(signed(RSA, hashes.SHA256(), subject=subject, extensions=extensions))


def test_a_certificate_says_whom_it_is_for_and_who_says_so() -> None:
    subject = named(
        (NameOID.COUNTRY_NAME, "AT"), (NameOID.ORGANIZATION_NAME, "Example, Inc."), (NameOID.COMMON_NAME, "Zoë +1")
    )
    certificate = signed(RSA, hashes.SHA256(), subject=subject)
    assert read_certificate(certificate) == Certificate(
        subject="CN=Zoë \\+1,O=Example\\, Inc.,C=AT",
        issuer="CN=Zoë \\+1,O=Example\\, Inc.,C=AT",
        serial="abcdef",
        alternative_names="",
        fingerprint=hashlib.sha256(certificate).hexdigest(),
    )


def test_the_other_names_of_a_certificate_stand_in_its_order() -> None:
    names = [
        x509.DNSName("db.example.com"),
        x509.RFC822Name("alice@example.com"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
        x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
        x509.UniformResourceIdentifier("spiffe://example.com/alice"),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4")),
        x509.DirectoryName(common_name("alice")),
        x509.OtherName(x509.ObjectIdentifier("1.2.3.4"), b"\x04\x01x"),
        x509.DNSName("*.example.com"),
    ]
    assert read(common_name("alice"), *names).alternative_names == (
        "DNS:db.example.com,email:alice@example.com,IP:192.0.2.1,IP:2001:db8::1,URI:spiffe://example.com/alice,"
        "DNS:*.example.com"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("alice\nuser=mallory", "CN=alice\\0Auser=mallory"),
        ("alice\r\n", "CN=alice\\0D\\0A"),
        ("a\x1b[31mb", "CN=a\\1B[31mb"),
        ("a\x7fb", "CN=a\\7Fb"),
        ("a\x85b", "CN=a\\C2\\85b"),
        ("a\u2028b", "CN=a\\E2\\80\\A8b"),
        ("a\u202eb", "CN=a\\E2\\80\\AEb"),
        ("a\u00a0b", "CN=a\\C2\\A0b"),
        ("alice,CN=admin", "CN=alice\\,CN=admin"),
        ("alice+CN=admin", "CN=alice\\+CN=admin"),
        ('a"b<c>d;e\\f', 'CN=a\\"b\\<c\\>d\\;e\\\\f'),
        ("alice\\0Aadmin", "CN=alice\\\\0Aadmin"),
        (" a ", "CN=\\ a\\ "),
        ("#a", "CN=\\#a"),
    ],
)
def test_no_name_can_forge_a_line_or_another_name(value: str, shown: str) -> None:
    found = read(common_name(value))
    assert found.subject == found.issuer == shown
    assert found.subject.isprintable()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("spiffe://a/b,DNS:admin", "URI:spiffe://a/b%2CDNS:admin"),
        ("spiffe://a/b\nuser=mallory", "URI:spiffe://a/b\\0Auser=mallory"),
        ("spiffe://a/b\r\x00", "URI:spiffe://a/b\\0D\\00"),
        (",,", "URI:%2C%2C"),
    ],
)
def test_no_other_name_can_forge_a_line_or_another_name(value: str, shown: str) -> None:
    assert read(common_name("alice"), x509.UniformResourceIdentifier(value)).alternative_names == shown


def test_two_of_a_kind_in_one_part_of_a_name_stay_together() -> None:
    both = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.COMMON_NAME, "a"), x509.NameAttribute(NameOID.USER_ID, "b")]
    )
    assert read(x509.Name([both])).subject in ("CN=a+UID=b", "UID=b+CN=a")


@pytest.mark.parametrize(
    "certificate",
    [
        b"",
        b"garbage",
        signed(RSA, hashes.SHA256())[:100],
        of_version_4(signed(RSA, hashes.SHA256())),
        # An X.400 address, which nobody has.
        signed(
            RSA,
            hashes.SHA256(),
            extensions=(x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x02\xa3\x00"),),
        ),
        signed(
            RSA,
            hashes.SHA256(),
            extensions=(x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"garbage"),),
        ),
    ],
    ids=["none", "garbage", "cut off", "version 4", "X.400 address", "names that are none"],
)
def test_a_certificate_that_cannot_be_read_is_an_error_of_tls(certificate: bytes) -> None:
    with pytest.raises(TlsError, match=r"^a certificate that cannot be read: \w+$"):
        read_certificate(certificate)


# TLS with clients


def met(side: ClientSide, client: Channel) -> Any:
    """What is known of a client that has shaken hands."""
    server = side.open()
    shake_hands(client, server)
    return side.describe(server)


def asking_for(name: str | None, *, context: ssl.SSLContext | None = None) -> Channel:
    return Channel(context or unverifying(), server_side=False, server_hostname=name)


def unverifying() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize(("wish", "cheap"), [("none", True), ("optional", False), ("require", False)])
def test_a_server_that_has_answered_is_past_the_costly_unless_it_asks_for_a_certificate(
    tmp_path: Path, ca: str, wish: str, cheap: bool
) -> None:
    server = client_side(issued(tmp_path), client_ca=ca, client_cert=wish).open()
    client = asking_for(None)
    hello = client.handshake(b"")
    assert not server.past_the_costly
    assert server.handshake(hello[:20]) == b""
    assert not server.past_the_costly
    assert server.handshake(hello[20:])
    assert server.past_the_costly is cheap
    assert not client.past_the_costly


def test_what_is_spoken_with_a_client_is_known(tmp_path: Path) -> None:
    files = issued(tmp_path)
    client = asking_for(NAME, context=client_context())
    found = met(client_side(files), client)
    presented = client.tls.getpeercert(binary_form=True)
    assert presented is not None
    assert found.binding == hashlib.sha256(presented).digest()
    assert (found.version, found.server_name) == ("TLSv1.3", NAME)
    assert found.cipher.startswith("TLS_")
    assert found.application_protocol == client.tls.selected_alpn_protocol() == "postgresql"
    assert found.certificate is None


def test_a_client_that_names_no_host_and_no_protocol_is_served(tmp_path: Path) -> None:
    found = met(client_side(issued(tmp_path)), asking_for(None))
    assert (found.server_name, found.application_protocol) == ("", "")


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("one.example.com", "one.example.com"),
        ("ONE.Example.COM", "one.example.com"),
        ("two.example.com", "two.example.com"),
        ("three.example.com", NAME),
        ("one.example.com.evil.com", NAME),
        ("xn--bcher-kva.example", NAME),
        (None, NAME),
    ],
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_each_host_has_its_own_certificate(
    tmp_path: Path, asked: str | None, served: str, version: ssl.TLSVersion
) -> None:
    hosts = {name: issued(tmp_path, name.lower(), stem=name) for name in ("One.example.com", "two.example.com")}
    side = client_side(issued(tmp_path), hosts=hosts)
    context = unverifying()
    context.maximum_version = version
    context.set_alpn_protocols(["postgresql"])
    client = asking_for(asked, context=context)
    found = met(side, client)
    presented = client.tls.getpeercert(binary_form=True)
    assert presented is not None
    assert read_certificate(presented).alternative_names == f"DNS:{served}"
    # What the two are bound with is the certificate that was shown.
    assert found.binding == hashlib.sha256(presented).digest()
    assert found.server_name == (asked or "")
    assert found.application_protocol == "postgresql"


@pytest.mark.parametrize("name", ["a b", "a'b", "a=b", "a;b", "a/b", "a\tb", "a\nb"])
def test_a_name_that_no_host_has_is_not_known(tmp_path: Path, name: str) -> None:
    client = asking_for(name)
    with pytest.raises(TlsError) as raised:
        met(client_side(issued(tmp_path)), client)
    with pytest.raises(TlsError, match=r"UNRECOGNIZED_NAME$"):
        client.handshake(raised.value.alert)


def with_certificate(*names: str) -> ssl.SSLContext:
    context = unverifying()
    authority().issue_cert(*names).configure_cert(context)
    return context


@pytest.mark.parametrize("wish", ["optional", "require"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_clients_certificate_is_known_once_it_is_verified(
    tmp_path: Path, ca: str, wish: str, version: ssl.TLSVersion
) -> None:
    context = with_certificate("alice@example.com")
    context.maximum_version = version
    found = met(client_side(issued(tmp_path), client_ca=ca, client_cert=wish), asking_for(None, context=context))
    assert found.certificate.alternative_names == "email:alice@example.com"
    assert found.certificate.issuer == read_certificate(ssl.PEM_cert_to_DER_cert(Path(ca).read_text())).subject


def test_a_clients_certificate_that_nobody_asked_for_is_none(tmp_path: Path, ca: str) -> None:
    side = client_side(issued(tmp_path), client_ca=ca)
    assert met(side, asking_for(None, context=with_certificate("alice@example.com"))).certificate is None


def test_a_client_without_a_certificate_is_let_in_unless_one_is_required(tmp_path: Path, ca: str) -> None:
    files = issued(tmp_path)
    assert met(client_side(files, client_ca=ca, client_cert="optional"), asking_for(None)).certificate is None
    with pytest.raises(TlsError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        met(client_side(files, client_ca=ca, client_cert="require"), asking_for(None))


@pytest.mark.parametrize("wish", ["optional", "require"])
def test_a_certificate_of_nobody_we_trust_is_refused_even_if_none_is_needed(tmp_path: Path, ca: str, wish: str) -> None:
    context = unverifying()
    certificate = x509.load_der_x509_certificate(signed(RSA, hashes.SHA256()))
    pem, key = tmp_path / "own.crt", tmp_path / "own.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        RSA.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context.load_cert_chain(pem, key)
    side = client_side(issued(tmp_path), client_ca=ca, client_cert=wish)
    with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED"):
        met(side, asking_for(None, context=context))


@pytest.mark.parametrize("oldest", ["1.2", "1.3"])
def test_a_client_that_speaks_nothing_new_enough_is_refused(tmp_path: Path, oldest: str) -> None:
    context = unverifying()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    side = client_side(issued(tmp_path), min_version=oldest)
    if oldest == "1.2":
        assert met(side, asking_for(None, context=context)).version == "TLSv1.2"
    else:
        with pytest.raises(TlsError, match="UNSUPPORTED_PROTOCOL"):
            met(side, asking_for(None, context=context))


@pytest.mark.parametrize("cipher", ["AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-SHA", "DHE-RSA-AES256-GCM-SHA384"])
def test_what_has_no_forward_secrecy_or_no_integrity_of_its_own_is_not_spoken(tmp_path: Path, cipher: str) -> None:
    context = unverifying()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    with pytest.raises(TlsError, match="NO_SHARED_CIPHER"):
        met(client_side(issued(tmp_path)), asking_for(None, context=context))


def test_tickets_are_for_those_who_need_them(tmp_path: Path) -> None:
    side = client_side(issued(tmp_path))
    for version, has_ticket in ((ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, False)):
        context = unverifying()
        context.maximum_version = version
        client = asking_for(None, context=context)
        met(side, client)
        assert client.tls.session is not None
        assert client.tls.session.has_ticket is has_ticket


def test_clients_are_not_remembered(tmp_path: Path) -> None:
    side = client_side(issued(tmp_path))
    server = side.open()
    shake_hands(asking_for(None), server)
    side.remember(server)
    context = unverifying()
    again = side.open()
    shake_hands(asking_for(None, context=context), again)
    assert not again.tls.session_reused


# How settings for targets go together


CA_FILE = "/etc/ca.crt"
MODES_OF_TLS = ["disable", "prefer", "require", "verify-ca", "verify-full"]
COMBINATIONS = [
    TargetTls(mode, ca, cert, key, negotiation)
    for mode, ca, cert, key, negotiation in itertools.product(
        MODES_OF_TLS, ["", CA_FILE, "system"], ["", "a.crt"], ["", "a.key"], ["postgres", "direct"]
    )
]
RULES: list[tuple[Callable[[TargetTls], bool], str]] = [
    (lambda of: of.mode.startswith("verify") and not of.ca, "needs a ca to verify with"),
    (
        lambda of: of.ca == "system" and of.mode in ("prefer", "require", "verify-ca"),
        "ca system needs mode verify-full",
    ),
    (lambda of: of.negotiation == "direct" and of.mode == "prefer", "negotiation direct needs mode require or better"),
    (lambda of: (of.cert == "") != (of.key == ""), "cert and key need each other"),
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda settings: "-".join(map(str, vars_of(settings))))
def test_every_combination_of_settings_is_in_order_or_says_why_not(settings: TargetTls) -> None:
    broken = [says for is_broken, says in RULES if is_broken(settings)]
    fault = fault_of(settings)
    if broken:
        assert fault is not None
        assert any(says in fault for says in broken)
    else:
        assert fault is None


def vars_of(settings: TargetTls) -> tuple[str, ...]:
    return tuple(getattr(settings, field) for field in TargetTls.__struct_fields__)


@pytest.mark.parametrize("mode", ["", "allow", "Require", "verify", "verify-full ", "off"])
def test_a_mode_is_one_of_libpqs(mode: str) -> None:
    assert fault_of(TargetTls(mode)) == "mode is none of disable, prefer, require, verify-ca, verify-full"


@pytest.mark.parametrize("negotiation", ["", "Direct", "tls", "requiredirect"])
def test_a_negotiation_is_one_of_libpqs(negotiation: str) -> None:
    assert fault_of(TargetTls("require", negotiation=negotiation)) == "negotiation is none of postgres, direct"


@pytest.mark.parametrize("wished", COMBINATIONS, ids=lambda settings: "-".join(map(str, vars_of(settings))))
def test_what_is_wished_for_is_had_or_refused_and_never_less(wished: TargetTls) -> None:
    wishes = tuple(zip(TargetTls.__struct_fields__, vars_of(wished), strict=True))
    if any(is_broken(wished) for is_broken, _ in RULES):
        with pytest.raises(AuthenticatorFault, match=r"^TLS to the target: "):
            resolve(TargetTls(), wishes)
        return
    settings = resolve(TargetTls(), wishes)
    stricter = "verify-ca" if wished.mode == "require" and wished.ca else wished.mode
    assert settings == TargetTls(stricter, *vars_of(wished)[1:])


@pytest.mark.parametrize("default", MODES_OF_TLS)
@pytest.mark.parametrize("wished", [None, *MODES_OF_TLS])
def test_a_wish_beats_the_configuration(default: str, wished: str | None) -> None:
    defaults = TargetTls(default, CA_FILE)
    mode = wished or default
    expected = "verify-ca" if mode == "require" else mode
    wishes = () if wished is None else (("mode", wished),)
    assert resolve(defaults, wishes) == TargetTls(expected, CA_FILE)


@pytest.mark.parametrize("field", ["ca", "cert", "key", "negotiation", "name"])
def test_what_is_not_wished_for_is_as_the_configuration_has_it(field: str) -> None:
    defaults = TargetTls("verify-full", CA_FILE, "a.crt", "a.key", "direct", "db")
    other = {"negotiation": "postgres"}.get(field, "other")
    changed = resolve(defaults, ((field, other),))
    for each in TargetTls.__struct_fields__:
        assert getattr(changed, each) == (other if each == field else getattr(defaults, each))


@pytest.mark.parametrize("default", MODES_OF_TLS)
@pytest.mark.parametrize("wished", [None, *MODES_OF_TLS])
def test_the_systems_authorities_verify_the_name_too_or_are_refused(default: str, wished: str | None) -> None:
    wishes = (("ca", "system"), *((("mode", wished),) if wished else ()))
    asked = wished or default
    # As libpq has it: they make a mode that nobody asked for stricter, and contradict one that somebody did.
    unasked = wished is None and asked in ("prefer", "require")
    if asked in ("disable", "verify-full") or unasked:
        assert resolve(TargetTls(default, CA_FILE), wishes) == TargetTls("verify-full" if unasked else asked, "system")
    else:
        with pytest.raises(AuthenticatorFault, match="ca system needs mode verify-full"):
            resolve(TargetTls(default, CA_FILE), wishes)


# TLS with targets


def planned(contexts: TargetContexts, *wishes: tuple[str, str], host: Address = HOST) -> TlsPlan | None:
    return asyncio.run(contexts.plan(wishes, host))


def plan(contexts: TargetContexts, *wishes: tuple[str, str], host: Address = HOST) -> TlsPlan:
    found = planned(contexts, *wishes, host=host)
    assert found is not None
    return found


def context_of(found: TlsPlan) -> ssl.SSLContext:
    return found.side._context  # type: ignore[attr-defined, no-any-return]  # a TargetSide's


@pytest.mark.parametrize(
    ("mode", "negotiation", "required", "verified"),
    [
        ("prefer", "postgres", False, False),
        ("require", "postgres", True, False),
        ("require", "direct", True, False),
        ("verify-ca", "postgres", True, True),
        ("verify-ca", "direct", True, True),
        ("verify-full", "postgres", True, True),
        ("verify-full", "direct", True, True),
    ],
)
def test_a_plan_says_what_the_mode_means(
    ca: str, mode: str, negotiation: str, *, required: bool, verified: bool
) -> None:
    authorities = ca if verified else ""
    found = plan(TargetContexts(TargetTls(mode, authorities, negotiation=negotiation)))
    assert (found.required, found.verified, found.direct) == (required, verified, negotiation == "direct")
    context = context_of(found)
    assert context.verify_mode == (ssl.CERT_REQUIRED if verified else ssl.CERT_NONE)
    assert context.check_hostname is (mode == "verify-full")
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("mode", ["prefer", "require"])
def test_over_a_socket_and_where_it_is_not_wanted_there_is_no_tls(mode: str) -> None:
    contexts = TargetContexts(TargetTls(mode))
    assert planned(contexts, host=Address("/run/postgresql", 5432)) is None
    assert planned(contexts, ("mode", "disable")) is None


def test_a_context_is_built_once_for_each_combination_and_a_plan_for_each_name(ca: str) -> None:
    contexts = TargetContexts(TargetTls())
    strict = (("mode", "verify-full"), ("ca", ca))
    first = plan(contexts)
    assert plan(contexts) is first
    assert plan(contexts, ("mode", "prefer")) is first
    elsewhere = plan(contexts, host=Address("db.example.com", 6432))
    assert elsewhere is not first
    assert context_of(elsewhere) is context_of(first)
    assert plan(contexts, host=Address("127.0.0.1", 6432)) is first
    assert context_of(plan(contexts, *strict)) is not context_of(first)
    assert plan(contexts, *strict) is plan(contexts, *strict)
    assert context_of(plan(contexts, ("name", "db"), *strict)) is not context_of(first)
    # Certificates that were read anew are those of new contexts.
    assert context_of(plan(TargetContexts(TargetTls()))) is not context_of(first)


def test_not_all_combinations_and_names_are_kept_for_ever() -> None:
    contexts = TargetContexts(TargetTls())
    first = plan(contexts)
    for number in range(tls.MAX_KEPT):
        plan(contexts, host=Address(f"db{number}", 5432))
    assert len(contexts._plans) == tls.MAX_KEPT
    assert plan(contexts) is not first
    assert len(contexts._plans) == tls.MAX_KEPT


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ((("mode", "verify-full"),), "TLS to the target: mode verify-full needs a ca"),
        ((("mode", "off"),), "TLS to the target: mode is none of"),
        ((("cert", "a.crt"),), "TLS to the target: cert and key need each other"),
        (
            (("mode", "verify-ca"), ("ca", "/no/such.crt")),
            "TLS to the target cannot be set up: /no/such.crt: No such file or directory",
        ),
        (
            (("cert", "/no/such.crt"), ("key", "/no/such.key")),
            "TLS to the target cannot be set up: /no/such.key: No such file or directory",
        ),
    ],
)
def test_wishes_that_cannot_be_fulfilled_are_the_authenticators_fault(
    wishes: tuple[tuple[str, str], ...], says: str
) -> None:
    contexts = TargetContexts(TargetTls())
    for _ in range(2):
        with pytest.raises(AuthenticatorFault) as raised:
            planned(contexts, *wishes)
        assert raised.value.detail.startswith(says)
        assert raised.value.told == b"authentication service failed"


def test_a_key_that_others_may_read_opens_no_target(tmp_path: Path) -> None:
    files = issued(tmp_path)
    os.chmod(files.key, 0o644)
    with pytest.raises(AuthenticatorFault, match="others may read it"):
        planned(TargetContexts(TargetTls("require", "", files.cert, files.key)))


def reached(found: TlsPlan, server: Channel | None = None) -> Any:
    """What is known of a target that has shaken hands; its session is kept."""
    channel = found.side.open()
    shake_hands(channel, server or channels()[1])
    encryption = found.side.describe(channel)
    found.side.remember(channel)
    return channel, encryption


def test_what_is_spoken_with_a_target_is_known(ca: str) -> None:
    found = plan(TargetContexts(TargetTls("verify-full", ca)), host=Address(NAME, 5432))
    channel, encryption = reached(found)
    presented = channel.tls.getpeercert(binary_form=True)
    assert (encryption.version, encryption.server_name, encryption.application_protocol) == (
        "TLSv1.3",
        NAME,
        "postgresql",
    )
    assert encryption.binding == hashlib.sha256(presented).digest()
    assert encryption.certificate == read_certificate(presented)


def test_a_certificate_that_was_not_verified_is_only_bound_to() -> None:
    channel, encryption = reached(plan(TargetContexts(TargetTls("require"))))
    assert encryption.certificate is None
    assert encryption.binding == hashlib.sha256(channel.tls.getpeercert(binary_form=True)).digest()


def test_a_target_is_who_its_certificate_says_and_not_what_it_is_called(ca: str) -> None:
    contexts = TargetContexts(TargetTls("verify-full", ca))
    with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED: IP address mismatch"):
        reached(plan(contexts))
    with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED: Hostname mismatch"):
        reached(plan(contexts, host=Address("other.example.com", 5432)))
    assert reached(plan(contexts, ("name", NAME)))[1].server_name == NAME
    # Whoever the authority knows will do here.
    assert reached(plan(contexts, ("mode", "verify-ca")))[1].certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("127.0.0.1").configure_cert(context)
    assert (
        reached(plan(contexts), Channel(context, server_side=True))[1].certificate.alternative_names == "IP:127.0.0.1"
    )


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_a_target_of_another_authority_is_none(tmp_path: Path, mode: str) -> None:
    other = tmp_path / "other.crt"
    other.write_bytes(
        x509.load_der_x509_certificate(signed(RSA, hashes.SHA256())).public_bytes(serialization.Encoding.PEM)
    )
    found = plan(TargetContexts(TargetTls(mode, str(other), name=NAME)))
    with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED"):
        reached(found)


def test_a_certificate_is_shown_to_a_target_that_asks(tmp_path: Path, ca: str) -> None:
    files = issued(tmp_path, "gateway@example.com")
    found = plan(TargetContexts(TargetTls("verify-full", ca, files.cert, files.key, name=NAME)))
    server = Channel(server_context(asks=True), server_side=True)
    reached(found, server)
    presented = server.tls.getpeercert(binary_form=True)
    assert presented is not None
    assert read_certificate(presented).alternative_names == "email:gateway@example.com"


@pytest.mark.parametrize("name", [".example.com", "a..b", "a" * 64 + ".com", "\ud800"])
def test_a_target_whose_name_tls_cannot_ask_for_is_none(name: str) -> None:
    found = plan(TargetContexts(TargetTls("require")), host=Address(name, 5432))
    with pytest.raises(TlsError, match="the target's name is none that TLS can ask for"):
        found.side.open()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_session_is_resumed_where_the_target_offers_it(ca: str, version: str) -> None:
    contexts = TargetContexts(TargetTls("verify-full", ca, name=NAME))
    found = plan(contexts)
    for resumed in (False, True, True):
        channel, encryption = reached(found, channels(version)[1])
        assert channel.tls.session_reused is resumed
        # What is known of the target stands in the session.
        assert encryption.certificate.alternative_names == f"DNS:{NAME}"
        assert encryption.binding


def test_a_session_is_resumed_with_no_other_target_and_on_no_other_terms(ca: str) -> None:
    contexts = TargetContexts(TargetTls("require", name=NAME))
    reached(plan(contexts))
    for other in (
        plan(contexts, ("name", "other")),
        plan(contexts, ("mode", "verify-full"), ("ca", ca)),
        plan(TargetContexts(TargetTls("require", name=NAME))),
    ):
        channel = other.side.open()
        shake_hands(channel, channels()[1])
        assert not channel.tls.session_reused


def test_the_latest_session_of_each_target_is_kept_and_not_all_of_them() -> None:
    sessions, context = Sessions(), client_context()
    made = []
    for _ in range(2):
        channel = Channel(context, server_side=False, server_hostname=NAME)
        shake_hands(channel, channels()[1])
        made.append(channel.tls.session)
    sessions.keep(context, "db", None)
    assert sessions.find(context, "db") is None
    for session in made:
        sessions.keep(context, "db", session)
        assert sessions.find(context, "db") is session
    for number in range(tls.MAX_KEPT - 1):
        sessions.keep(context, f"db{number}", made[0])
        # Keeping one anew takes no place of another.
        sessions.keep(context, "db", made[1])
    assert len(sessions._kept) == tls.MAX_KEPT
    assert sessions.find(context, "db0") is made[0]
    sessions.keep(context, "one more", made[0])
    assert sessions.find(context, "db0") is None
    assert sessions.find(context, "db") is made[1]
