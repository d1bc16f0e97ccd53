"""The JSON of an HTTP authenticator (docs/http-authenticators.md, docs/http-authenticator.schema.json).

JSON holds text, the protocol bytes: what is no UTF-8 stands in base64, in a field whose name says so.
"""

import base64
import binascii
from typing import Any, Final

import msgspec

from pgauthproxy import authoring
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Denied, Question
from pgauthproxy.auth.typed import mapping_of
from pgauthproxy.authoring import FieldError
from pgauthproxy.stages import Encryption, Mapping, Started

VERSION: Final = 1


class _Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter that is no UTF-8; both parts in base64."""

    name: str
    value: str


class _Certificate(msgspec.Struct, frozen=True):
    subject: str
    issuer: str
    serial: str
    alternative_names: str
    fingerprint: str


class _Tls(msgspec.Struct, frozen=True, omit_defaults=True):
    version: str
    server_name: str = ""
    certificate: _Certificate | None = None


class _Asked(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The body of a request. What is no UTF-8 is in base64, under the name that says so."""

    version: int
    session: str
    address: str
    method: str
    user: str | None = None
    user_base64: str | None = None
    database: str | None = None
    database_base64: str | None = None
    parameters: dict[str, str]
    parameters_base64: list[_Pair] = []
    password: str | None = None
    password_base64: str | None = None
    answer: str | None = None
    salt: str | None = None
    tls: _Tls | None = None


class _TargetTls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    negotiation: str | None = None
    name: str | None = None


class _Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of an answer that lets a client in."""

    host: str | list[str]
    user: str | None = None
    user_base64: str | None = None
    database: str | None = None
    database_base64: str | None = None
    password: str | None = None
    password_base64: str | None = None
    md5_hash: str | None = None
    credential_from_client: bool = False
    parameters: dict[str, str] = {}
    parameters_base64: list[_Pair] = []
    tls: _TargetTls = _TargetTls()
    verifier: str | None = None
    session_seconds: float | None = None
    idle_timeout: float | None = None
    idle_in_transaction_timeout: float | None = None
    cache_seconds: float | None = None


class _Refused(msgspec.Struct, frozen=True):
    """The body of a refusal: `error` is for the client, `reason` for the log. All else is ignored."""

    error: str = ""
    reason: str = ""


def encode_request(question: Question) -> bytes:
    """The JSON of a question."""
    started = question.started
    parameters: dict[str, str] = {}
    odd: list[_Pair] = []
    for name, value in started.parameters:
        try:
            parameters[name.decode()] = value.decode()
        except UnicodeDecodeError:
            odd.append(_Pair(_base64(name), _base64(value)))
    credential = question.credential.reveal() if question.credential is not None else None
    body = _Asked(
        version=VERSION,
        session=started.accepted.session,
        address=started.accepted.address,
        method=question.method,
        parameters=parameters,
        parameters_base64=odd,
        tls=_tls(started.encryption) if started.encryption is not None else None,
        answer=credential.decode() if credential is not None and question.method == "md5" else None,
        salt=question.salt.hex() if question.method == "md5" else None,
        **_either("user", started.user),
        **_either("database", started.database),
        **(_either("password", credential) if credential is not None and question.method == "cleartext" else {}),
    )
    return msgspec.json.encode(body)


def _either(field: str, value: bytes) -> dict[str, Any]:
    """The field as text, or in base64 where it is none."""
    try:
        return {field: value.decode()}
    except UnicodeDecodeError:
        return {f"{field}_base64": _base64(value)}


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _tls(encryption: Encryption) -> _Tls:
    found = encryption.certificate
    certificate = None
    if found is not None:
        certificate = _Certificate(
            found.subject, found.issuer, found.serial, found.alternative_names, found.fingerprint
        )
    return _Tls(encryption.version, encryption.server_name, certificate)


def decode_mapping(body: bytes, started: Started) -> Mapping:
    """The mapping that the JSON of an answer is. Raises NonsenseError, which names the field and never a value."""
    try:
        answered = msgspec.json.decode(body, type=_Answered)
    except msgspec.MsgspecError as error:
        raise NonsenseError(str(error)) from None
    except UnicodeDecodeError:
        raise NonsenseError("JSON is not UTF-8") from None
    except RecursionError:
        raise NonsenseError("JSON is nested too deeply") from None
    parameters = dict(answered.parameters)
    for pair in answered.parameters_base64:
        parameters[_decoded("parameters_base64", pair.name)] = _decoded("parameters_base64", pair.value)
    user = _given("user", answered.user, answered.user_base64)
    if user is None:
        raise NonsenseError("no user for the target")
    try:
        mapping = authoring.Mapping(
            answered.host,
            user,
            database=_given("database", answered.database, answered.database_base64),
            password=_given("password", answered.password, answered.password_base64),
            md5_hash=answered.md5_hash,
            credential_from_client=answered.credential_from_client,
            parameters=parameters,
            tls=answered.tls.mode,
            tls_ca=answered.tls.ca,
            tls_cert=answered.tls.cert,
            tls_key=answered.tls.key,
            tls_negotiation=answered.tls.negotiation,
            tls_name=answered.tls.name,
            verifier=answered.verifier,
            session_seconds=answered.session_seconds,
            idle_timeout=answered.idle_timeout,
            idle_in_transaction_timeout=answered.idle_in_transaction_timeout,
            cache_seconds=answered.cache_seconds,
        )
    except FieldError as error:
        raise NonsenseError(str(error)) from None
    return mapping_of(mapping, started)


def _given(field: str, plain: str | None, encoded: str | None) -> str | None:
    if plain is not None and encoded is not None:
        raise NonsenseError(f"both {field} and {field}_base64")
    return plain if encoded is None else _decoded(f"{field}_base64", encoded)


def _decoded(field: str, value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode(errors="surrogateescape")
    except (binascii.Error, ValueError):
        raise NonsenseError(f"{field} is no base64") from None


def decode_refusal(status: int, body: bytes) -> Denied:
    """The refusal that an answer with such a status is, whatever its body."""
    try:
        refused = msgspec.json.decode(body, type=_Refused)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        refused = _Refused()
    reason = f"authenticator refused with status {status}"
    denied = authoring.Denied(f"{reason}: {refused.reason}" if refused.reason else reason, refused.error)
    return Denied(denied.reason, authoring.told_by(denied))
