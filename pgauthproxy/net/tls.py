"""TLS contexts: what is spoken with clients and targets, on which certificates, and what is then known of the peer.

Contexts are built once for each combination of settings, in a thread where files are read; a handshake only takes one.
Keys that others may read are refused, as PostgreSQL refuses them.
"""

import asyncio
import base64
import functools
import hashlib
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pgauthproxy import private_file
from pgauthproxy._tls import Channel
from pgauthproxy.errors import AuthenticatorFault, TlsError
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address, Certificate, Encryption, TargetTls

APPLICATION_PROTOCOL: Final = "postgresql"
DEFAULT_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
CLIENT_CERTIFICATES: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}
TARGET_MODES: Final = ("disable", "prefer", "require", "verify-ca", "verify-full")
VERIFYING_MODES: Final = ("verify-ca", "verify-full")
NEGOTIATIONS: Final = ("postgres", "direct")
SYSTEM_ROOTS: Final = "system"
HOST_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,255}")
PEM_CERTIFICATE: Final = re.compile(rb"-----BEGIN (?:X509 )?CERTIFICATE-----(.+?)-----END ", re.DOTALL)
MAX_KEPT: Final = 256
K = TypeVar("K")
V = TypeVar("V")


class TlsConfigError(Exception):
    """Certificates, keys or settings that cannot be used; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of a certificate chain and its key, both in PEM."""

    cert: str
    key: str


def load_certificate(context: ssl.SSLContext, files: CertificateFiles) -> None:
    """Raises TlsConfigError."""
    check_key_file(files.key)

    def refuse_to_ask() -> str:
        raise TlsConfigError(f"{files.key}: is encrypted, and nobody is there to be asked for its password")

    try:
        context.load_cert_chain(files.cert, files.key, password=refuse_to_ask)
    except ssl.SSLError as error:
        raise TlsConfigError(f"{files.cert}, {files.key}: not a certificate and its key: {error.reason}") from None
    except OSError as error:
        # OpenSSL does not say of which it is.
        path = files.cert if not os.access(files.cert, os.R_OK) else files.key
        raise TlsConfigError(f"{path}: {error.strerror}") from None


def check_key_file(path: str) -> None:
    """Refuses a key that others may read. Raises TlsConfigError."""
    try:
        private_file.check(os.stat(path))
    except OSError as error:
        raise TlsConfigError(f"{path}: {error.strerror}") from None
    except private_file.PrivateFileError as error:
        raise TlsConfigError(f"{path}: {error}") from None


def load_authorities(context: ssl.SSLContext, path: str) -> None:
    """Raises TlsConfigError."""
    try:
        if path == SYSTEM_ROOTS:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsConfigError(f"{path}: no certificates of authorities: {error.reason}") from None
    except OSError as error:
        raise TlsConfigError(f"{path}: {error.strerror}") from None


def binding_of(certificate: bytes) -> bytes:
    """The hash of a certificate (DER) that both ends bind to: tls-server-end-point (RFC 5929, section 4.1).

    Empty where that is not defined: for signatures without a hash of their own, as Ed25519's.
    """
    from cryptography import exceptions, x509

    try:
        algorithm = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
    except (ValueError, x509.InvalidVersion, exceptions.UnsupportedAlgorithm):
        return b""
    if algorithm is None:
        return b""
    name = "sha256" if algorithm.name in ("md5", "sha1") else algorithm.name
    try:
        return hashlib.new(name, certificate).digest()
    except ValueError:
        return b""


def read_certificate(certificate: bytes) -> Certificate:
    """What a verified certificate (DER) says. Raises TlsError if it cannot be read."""
    from cryptography import x509

    try:
        found = x509.load_der_x509_certificate(certificate)
        try:
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            names = x509.SubjectAlternativeName([])
        alternative_names = ",".join(filter(None, map(_alternative_name, names)))
        subject, issuer = found.subject.rfc4514_string(), found.issuer.rfc4514_string()
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise TlsError(f"a certificate that cannot be read: {type(error).__name__}", b"") from None
    return Certificate(
        subject=_on_one_line(subject),
        issuer=_on_one_line(issuer),
        serial=f"{found.serial_number:x}",
        alternative_names=_on_one_line(alternative_names),
        fingerprint=hashlib.sha256(certificate).hexdigest(),
    )


def _alternative_name(name: Any) -> str:
    from cryptography import x509

    kinds = ((x509.DNSName, "DNS"), (x509.RFC822Name, "email"), (x509.UniformResourceIdentifier, "URI"))
    for kind, word in (*kinds, (x509.IPAddress, "IP")):
        if isinstance(name, kind):
            # A comma in a value would look like the next name.
            return f"{word}:{str(name.value).replace(',', '%2C')}"
    return ""


def _on_one_line(text: str) -> str:
    """Control characters as RFC 4514 writes them, so that no name can forge a line."""
    return "".join(
        char if char.isprintable() else "".join(f"\\{byte:02X}" for byte in char.encode(errors="surrogatepass"))
        for char in text
    )


def describe(channel: Channel, binding: bytes, server_name: str) -> Encryption:
    """What is known of a connection after its handshake; its peer's certificate if that was verified."""
    tls = channel.tls
    certificate = None
    if tls.context.verify_mode != ssl.CERT_NONE and (presented := tls.getpeercert(binary_form=True)):
        certificate = read_certificate(presented)
    cipher = tls.cipher()
    return Encryption(
        version=tls.version() or "",
        cipher=cipher[0] if cipher else "",
        server_name=server_name,
        application_protocol=tls.selected_alpn_protocol() or "",
        binding=binding,
        certificate=certificate,
    )


def _first_certificate(path: str) -> bytes:
    """The gateway's own certificate (DER): the first of a file that OpenSSL has taken, whatever stands round it."""
    found = PEM_CERTIFICATE.search(Path(path).read_bytes())
    if found is None:
        raise TlsConfigError(f"{path}: no certificate in the form that begins with -----BEGIN CERTIFICATE-----")
    return base64.b64decode(found[1])


class ClientSide:
    """TLS with clients: the gateway is the server."""

    def __init__(
        self,
        default: CertificateFiles,
        hosts: Mapping[str, CertificateFiles],
        client_ca: str,
        client_cert: str,
        min_version: str,
        ciphers: str,
    ) -> None:
        """Reads all files. Raises TlsConfigError."""
        self._bindings: dict[ssl.SSLContext, bytes] = {}
        self._client_ca = client_ca
        self._client_cert = client_cert
        self._min_version = min_version
        self._ciphers = ciphers
        self._default = self._context(default)
        self._hosts = {name.lower(): self._context(files) for name, files in hosts.items()}
        self._default.sni_callback = self._chosen_by_name

    def _context(self, files: CertificateFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = VERSIONS[self._min_version]
        try:
            context.set_ciphers(self._ciphers)
        except (ssl.SSLError, ValueError):
            raise TlsConfigError(f"tls.ciphers: {self._ciphers}: no cipher of that name") from None
        context.set_alpn_protocols([APPLICATION_PROTOCOL])
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        # libpq resumes nothing: TLS 1.3 spares the tickets. Those of TLS 1.2 stay, since without them OpenSSL would
        # keep each client's session in memory.
        context.num_tickets = 0
        load_certificate(context, files)
        context.verify_mode = CLIENT_CERTIFICATES[self._client_cert]
        if self._client_ca:
            load_authorities(context, self._client_ca)
        self._bindings[context] = binding_of(_first_certificate(files.cert))
        return context

    def _chosen_by_name(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        """Takes the certificate of the host that the client asks for, if there is one of its own."""
        if name is None:
            return None
        if not HOST_NAME.fullmatch(name):
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.asked_name = name  # type: ignore[attr-defined]  # OpenSSL tells it only now
        connection.context = self._hosts.get(name.lower(), self._default)
        return None

    def open(self) -> Channel:
        return Channel(self._default, server_side=True)

    def describe(self, channel: Channel) -> Encryption:
        name: str = getattr(channel.tls, "asked_name", "")
        return describe(channel, self._bindings[channel.tls.context], name)

    def remember(self, channel: Channel) -> None:
        """Nothing: a resumed session is the client's wish."""


class TargetSide:
    """TLS with one target: the gateway is the client."""

    def __init__(self, context: ssl.SSLContext, name: str, sessions: "Sessions") -> None:
        self._context = context
        self._name = name
        self._sessions = sessions

    def open(self) -> Channel:
        session = self._sessions.find(self._context, self._name)
        try:
            return Channel(self._context, server_side=False, server_hostname=self._name or None, session=session)
        except ValueError:
            raise TlsError("the target's name is none that TLS can ask for", b"") from None

    def describe(self, channel: Channel) -> Encryption:
        presented = channel.tls.getpeercert(binary_form=True) or b""
        return describe(channel, _binding_of_peer(presented), self._name)

    def remember(self, channel: Channel) -> None:
        """Keeps what lets the next connection resume this one's session, if the target gave that."""
        self._sessions.keep(self._context, self._name, channel.tls.session)


# Targets show the same few certificates over and over.
_binding_of_peer = functools.lru_cache(MAX_KEPT)(binding_of)


class Sessions:
    """The latest session of each target that can be resumed."""

    def __init__(self) -> None:
        self._kept: dict[tuple[ssl.SSLContext, str], ssl.SSLSession] = {}

    def find(self, context: ssl.SSLContext, name: str) -> ssl.SSLSession | None:
        return self._kept.get((context, name))

    def keep(self, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None) -> None:
        if session is not None and session.has_ticket:
            _keep(self._kept, (context, name), session)


class TargetContexts:
    """How each target's TLS is set up: one context for each combination of settings, built at its first use."""

    def __init__(self, defaults: TargetTls) -> None:
        self._defaults = defaults
        self._contexts: dict[TargetTls, ssl.SSLContext] = {}
        self._plans: dict[tuple[TargetTls, str], TlsPlan] = {}
        self._sessions = Sessions()

    async def plan(self, wishes: tuple[tuple[str, str], ...], host: Address) -> TlsPlan | None:
        """How to speak to a host; `wishes` are a mapping's, on top of the configuration's. None for plain.

        Raises AuthenticatorFault if the settings make no sense together or name files that cannot be used.
        """
        settings = resolve(self._defaults, wishes)
        # As libpq has it, TLS is for networks.
        if settings.mode == "disable" or host.is_socket_folder:
            return None
        name = settings.name or host.host
        plan = self._plans.get((settings, name))
        if plan is None:
            plan = TlsPlan(
                side=TargetSide(await self._context(settings), name, self._sessions),
                required=settings.mode != "prefer",
                verified=settings.mode in VERIFYING_MODES,
                direct=settings.negotiation == "direct",
            )
            _keep(self._plans, (settings, name), plan)
        return plan

    async def _context(self, settings: TargetTls) -> ssl.SSLContext:
        context = self._contexts.get(settings)
        if context is None:
            try:
                context = await asyncio.to_thread(build_target_context, settings)
            except TlsConfigError as error:
                raise AuthenticatorFault(f"TLS to the target cannot be set up: {error}") from None
            _keep(self._contexts, settings, context)
        return context


def _keep(kept: dict[K, V], key: K, value: V) -> None:
    """Keeps it; the oldest goes when there are too many."""
    kept.pop(key, None)
    if len(kept) >= MAX_KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = value


@functools.lru_cache(MAX_KEPT)
def resolve(defaults: TargetTls, wishes: tuple[tuple[str, str], ...]) -> TargetTls:
    """The settings for one target, with libpq's rules for what follows from what. Raises AuthenticatorFault."""
    asked = dict(wishes)
    settings = {field: asked.get(field, getattr(defaults, field)) for field in TargetTls.__struct_fields__}
    if settings["ca"] == SYSTEM_ROOTS and "mode" not in asked and settings["mode"] in ("prefer", "require"):
        settings["mode"] = "verify-full"
    found = TargetTls(**settings)
    if fault := fault_of(found):
        raise AuthenticatorFault(f"TLS to the target: {fault}")
    if found.mode == "require" and found.ca:
        return TargetTls(**settings | {"mode": "verify-ca"})
    return found


def fault_of(settings: TargetTls) -> str | None:
    """What is wrong with these settings taken together, or None."""
    if settings.mode not in TARGET_MODES:
        return f"mode is none of {', '.join(TARGET_MODES)}"
    if settings.negotiation not in NEGOTIATIONS:
        return f"negotiation is none of {', '.join(NEGOTIATIONS)}"
    if settings.mode in VERIFYING_MODES and not settings.ca:
        return f"mode {settings.mode} needs a ca to verify with (a file, or {SYSTEM_ROOTS})"
    if settings.ca == SYSTEM_ROOTS and settings.mode not in ("verify-full", "disable"):
        return f"ca {SYSTEM_ROOTS} needs mode verify-full: anybody can have a certificate of those authorities"
    if settings.negotiation == "direct" and settings.mode == "prefer":
        return "negotiation direct needs mode require or better"
    if bool(settings.cert) != bool(settings.key):
        return "cert and key need each other"
    return None


def verifying_context(ca: str) -> ssl.SSLContext:
    """TLS towards servers of other protocols, which must prove who they are; `ca` is a file, or empty for the system's.

    Raises TlsConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_authorities(context, ca or SYSTEM_ROOTS)
    return context


def build_target_context(settings: TargetTls) -> ssl.SSLContext:
    """Reads all files. Raises TlsConfigError."""
    # Certificates of targets will be read; loading this takes a tenth of a second, and this runs in a thread.
    import cryptography.x509

    assert cryptography.x509  # noqa: S101 (it is loaded now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([APPLICATION_PROTOCOL])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.check_hostname = settings.mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if settings.mode in VERIFYING_MODES else ssl.CERT_NONE
    if settings.mode in VERIFYING_MODES:
        load_authorities(context, settings.ca)
    if settings.cert:
        load_certificate(context, CertificateFiles(settings.cert, settings.key))
    return context
