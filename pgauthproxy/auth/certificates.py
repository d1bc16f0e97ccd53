"""What a client's certificate must be for a user that logs in by one."""

import re
from typing import Final

import msgspec

from pgauthproxy.stages import Certificate

# What is the same however it is written; everything else is read and written once to know its form.
PLAIN_SUBJECT: Final = re.compile(r"((CN|L|ST|O|OU|C|STREET|DC|UID)=[\w.@-]+( [\w.@-]+)*(,|$))+(?<!,)", re.ASCII)
FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
NAME_KINDS: Final = ("DNS:", "email:", "URI:", "IP:")


class CertificateSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As an operator writes it: what is given must fit, all of it.

    `subject` in the form of RFC 4514, `san` one alternative name as `email:alice@example.com`, `fingerprint` the
    SHA-256 of the certificate.
    """

    subject: str = ""
    san: str = ""
    fingerprint: str = ""


class CertificateRule:
    """Tells a user's certificate from others'. The certificate is a verified one."""

    def __init__(self, spec: CertificateSpec) -> None:
        """Raises ValueError, whose text begins with the key that it is about."""
        if not (spec.subject or spec.san or spec.fingerprint):
            raise ValueError("needs a subject, a san or a fingerprint")
        self._subject = _subject(spec.subject)
        self._san = spec.san
        self._fingerprint = spec.fingerprint.replace(":", "").lower()
        if spec.san and not spec.san.startswith(NAME_KINDS):
            raise ValueError(f"san: must begin with one of {', '.join(NAME_KINDS)}")
        if spec.fingerprint and not FINGERPRINT.fullmatch(self._fingerprint):
            raise ValueError("fingerprint: is no SHA-256 in hex digits")

    def fits(self, certificate: Certificate) -> bool:
        """Whether everything that was given is so."""
        return (
            (not self._subject or self._subject == certificate.subject)
            and (not self._san or self._san in certificate.alternative_names.split(","))
            and (not self._fingerprint or self._fingerprint == certificate.fingerprint)
        )


def _subject(text: str) -> str:
    """A subject in the one form that `Certificate` has. Raises ValueError."""
    if not text or PLAIN_SUBJECT.fullmatch(text):
        return text
    from cryptography import x509

    try:
        return x509.Name.from_rfc4514_string(text).rfc4514_string()
    except ValueError:
        raise ValueError(f"subject: {text!r} is none in the form of RFC 4514, as CN=alice,O=Example is") from None
