"""Questions and answers in the types that authors in Python have, and back."""

from pgauthproxy import authoring
from pgauthproxy.auth.fields import NonsenseError, parse_hosts
from pgauthproxy.auth.model import Question
from pgauthproxy.authoring import Request, Tls
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Encryption, FromClient, Mapping, Password, Started, StoredMd5


def text(value: bytes) -> str:
    """Bytes as authors have them; nothing is lost."""
    return value.decode(errors="surrogateescape")


def request_of(question: Question) -> Request:
    """What an author's function is given."""
    started = question.started
    credential = text(question.credential.reveal()) if question.credential is not None else None
    return Request(
        text(started.user),
        text(started.database),
        parameters={text(name): text(value) for name, value in started.parameters},
        address=started.accepted.address,
        method=question.method,
        session=started.accepted.session,
        password=credential if question.method == "cleartext" else None,
        answer=credential if question.method == "md5" else None,
        salt=question.salt,
        tls=_tls(started.encryption) if started.encryption is not None else None,
    )


def _tls(encryption: Encryption) -> Tls:
    found = encryption.certificate
    certificate = None
    if found is not None:
        certificate = authoring.Certificate(
            found.subject, found.issuer, found.serial, found.alternative_names, found.fingerprint
        )
    return Tls(encryption.version, encryption.server_name, certificate)


def mapping_of(answer: authoring.Mapping, started: Started) -> Mapping:
    """The gateway's own mapping. Raises NonsenseError, which names the field and never a value."""
    try:
        hosts = parse_hosts(answer.host.encode(errors="surrogateescape"))
    except NonsenseError as error:
        raise NonsenseError(str(error).replace("_META_TARGET_HOST", "host")) from None
    database = _bytes(answer.database) if answer.database else started.database
    tls = {
        "mode": answer.tls,
        "ca": answer.tls_ca,
        "cert": answer.tls_cert,
        "key": answer.tls_key,
        "negotiation": answer.tls_negotiation,
        "name": answer.tls_name,
    }
    return Mapping(
        hosts=hosts,
        parameters=(
            (b"user", _bytes(answer.user)),
            (b"database", database),
            *((_bytes(name), _bytes(value)) for name, value in answer.parameters.items()),
        ),
        credential=_credential(answer),
        verifier=Secret(_bytes(answer.verifier)) if answer.verifier else None,
        tls=tuple((field, value) for field, value in tls.items() if value),
        session_seconds=answer.session_seconds,
        idle_timeout=answer.idle_timeout,
        idle_in_transaction_timeout=answer.idle_in_transaction_timeout,
        cache_seconds=answer.cache_seconds,
    )


def authored(mapping: Mapping) -> authoring.Mapping:
    """The same as an author would write it."""
    parameters = {text(name): text(value) for name, value in mapping.parameters}
    credential, tls = mapping.credential, dict(mapping.tls)
    return authoring.Mapping(
        map(str, mapping.hosts),
        parameters.pop("user"),
        database=parameters.pop("database", None) or text(mapping.user),
        password=credential.secret.reveal() if isinstance(credential, Password) else None,
        md5_hash=credential.secret.reveal() if isinstance(credential, StoredMd5) else None,
        credential_from_client=isinstance(credential, FromClient),
        parameters=parameters,
        tls=tls.get("mode"),
        tls_ca=tls.get("ca"),
        tls_cert=tls.get("cert"),
        tls_key=tls.get("key"),
        tls_negotiation=tls.get("negotiation"),
        tls_name=tls.get("name"),
        verifier=mapping.verifier.reveal() if mapping.verifier is not None else None,
        session_seconds=mapping.session_seconds,
        idle_timeout=mapping.idle_timeout,
        idle_in_transaction_timeout=mapping.idle_in_transaction_timeout,
        cache_seconds=mapping.cache_seconds,
    )


def _credential(answer: authoring.Mapping) -> Password | StoredMd5 | FromClient | None:
    if answer.credential_from_client:
        return FromClient()
    if answer.md5_hash is not None:
        return StoredMd5(Secret(_bytes(answer.md5_hash)))
    return Password(Secret(_bytes(answer.password))) if answer.password is not None else None


def _bytes(value: str) -> bytes:
    return value.encode(errors="surrogateescape")
