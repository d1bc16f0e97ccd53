"""An authenticator of each kind, from its settings."""

import contextlib
import hashlib
import secrets
from pathlib import Path

import msgspec

from pgauthproxy.auth import references
from pgauthproxy.auth.cache import CachedAuthenticator
from pgauthproxy.auth.calls import CallLimits
from pgauthproxy.auth.chain import ChainAuthenticator
from pgauthproxy.auth.command import CommandAuthenticator, CommandLimits, SaidSink
from pgauthproxy.auth.http import HttpAuthenticator, HttpLimits
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.auth.python import PythonAuthenticator
from pgauthproxy.auth.targets import Target, TargetFault, build_target
from pgauthproxy.auth.users import UsersAuthenticator, UsersPolicy
from pgauthproxy.auth.worker import WorkerAuthenticator, WorkerLimits
from pgauthproxy.config.load import authenticator_environment
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import AuthenticatorSaid, Noticed, Sink
from pgauthproxy.net.tls import TlsConfigError, build_target_context, resolve
from pgauthproxy.secret import Secret
from pgauthproxy.stages import TargetTls


def build_authenticator(settings: Settings, sink: Sink) -> Authenticator:
    """The authenticator that the settings ask for, not started yet. Raises AuthenticatorConfigError."""
    cache = settings.authenticator.cache
    found = _of_kind(settings, settings, sink)
    if settings.authenticator.vault.address:
        found = _vault(settings, found, sink)
    return CachedAuthenticator(found, cache.max_seconds, cache.max_entries) if cache.max_seconds else found


def _of_kind(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    """What these settings ask for; how clients prove themselves stands in the whole ones."""
    match settings.authenticator.decided_kind:
        case "command":
            return _command(settings, sink)
        case "worker":
            return _worker(settings, sink)
        case "python":
            return _python(settings, sink)
        case "http":
            return _http(settings, sink)
        case "users":
            return _users(settings, whole, sink)
        case "ldap":
            return _ldap(settings, whole, sink)
        case "jwt":
            return _jwt(settings, whole, sink)
        case "chain":
            return _chain(settings, whole, sink)
        case None:
            raise AuthenticatorConfigError("authenticator.cmd: no authenticator is configured")


def _chain(settings: Settings, whole: Settings, sink: Sink) -> ChainAuthenticator:
    links: list[tuple[str, Authenticator]] = []
    faults: list[str] = []
    for number, link in enumerate(settings.authenticator.chain, 1):
        targets = settings.authenticator.targets | link.targets
        alone = msgspec.structs.replace(settings, authenticator=msgspec.structs.replace(link, targets=targets))
        try:
            links.append((f"{number} ({link.decided_kind})", _of_kind(alone, whole, sink)))
        except AuthenticatorConfigError as error:
            faults += (f"authenticator.chain, {number}: {fault}" for fault in error.faults)
    if faults:
        raise AuthenticatorConfigError(*faults)
    return ChainAuthenticator(links)


def _command(settings: Settings, sink: Sink) -> CommandAuthenticator:
    wanted = settings.authenticator
    limits = CommandLimits(
        timeout=wanted.timeout,
        grace=wanted.grace,
        max_parallel=wanted.max_parallel,
        max_output=wanted.max_output,
        max_lines=wanted.max_output_lines,
        max_errors=wanted.max_errors,
    )
    return CommandAuthenticator(wanted.cmd, authenticator_environment(settings), limits, _said(sink))


def _worker(settings: Settings, sink: Sink) -> WorkerAuthenticator:
    wanted = settings.authenticator
    limits = WorkerLimits(
        least=wanted.workers.min,
        most=wanted.workers.max,
        timeout=wanted.timeout,
        grace=wanted.grace,
        max_output=wanted.max_output,
        max_lines=wanted.max_output_lines,
    )
    return WorkerAuthenticator(wanted.cmd, authenticator_environment(settings), limits, _said(sink))


def _said(sink: Sink) -> SaidSink:
    """Passes on what an authenticator's process writes to its standard error."""
    return lambda session, lines, dropped: sink(AuthenticatorSaid(session, lines, dropped))


def _users(settings: Settings, whole: Settings, sink: Sink) -> UsersAuthenticator:
    return UsersAuthenticator(
        Path(settings.authenticator.users.file),
        UsersPolicy(whole.method, made_up_from(whole), whole.authenticator.scram_iterations),
        target_fault(whole),
        lambda level, what, facts: sink(Noticed(level, what, facts)),
    )


def _ldap(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.ldap import LdapAuthenticator, LdapPolicy, Rule
    except ModuleNotFoundError as error:
        raise _missing("ldap", error) from None
    wanted = settings.authenticator.ldap

    def read_policy() -> LdapPolicy:
        return LdapPolicy(
            urls=tuple(wanted.url),
            start_tls=wanted.start_tls,
            allow_plain=wanted.allow_plain,
            ca=wanted.ca,
            user_dn=wanted.user_dn,
            base=wanted.base,
            filter=wanted.filter,
            scope=wanted.scope,
            bind_dn=wanted.bind_dn,
            bind_password=_secret_of("authenticator.ldap.bind_password", wanted.bind_password),
            name_attribute=wanted.name_attribute,
            group_filter=wanted.group_filter,
            timeout=wanted.timeout,
            max_parallel=wanted.max_parallel,
        )

    rules = [Rule(rule.target, rule.group, rule.filter) for rule in wanted.rules]
    return LdapAuthenticator(read_policy, rules, lambda: _named_targets(settings, whole), sink)


def _jwt(settings: Settings, whole: Settings, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.jwt import JwtAuthenticator, JwtPolicy, KeySource, Rule
    except ModuleNotFoundError as error:
        raise _missing("jwt", error) from None
    wanted = settings.authenticator.jwt
    source = KeySource(
        file=wanted.jwks_file,
        url=wanted.jwks_url,
        ca=wanted.jwks_ca,
        refresh=wanted.jwks_seconds,
        interval=wanted.jwks_min_seconds,
        timeout=wanted.jwks_timeout,
    )
    policy = JwtPolicy(
        algorithms=tuple(wanted.algorithms),
        issuer=wanted.issuer,
        audience=tuple(wanted.audience),
        leeway=wanted.leeway,
        required_claims=tuple(wanted.required_claims),
        max_token=wanted.max_token,
        user_claim=wanted.user_claim,
        user_is=wanted.user_is,
        end_with_token=wanted.end_with_token,
    )
    rules = [Rule(rule.target, rule.claim, rule.equals, rule.contains) for rule in wanted.rules]
    return JwtAuthenticator(source, policy, rules, lambda: _named_targets(settings, whole), sink)


def _vault(settings: Settings, inner: Authenticator, sink: Sink) -> Authenticator:
    try:
        from pgauthproxy.auth.vault import VaultAuthenticator
        from pgauthproxy.auth.vault_client import VaultPolicy
    except ModuleNotFoundError as error:
        raise _missing("vault", error) from None
    wanted = settings.authenticator.vault

    def read_policy() -> VaultPolicy:
        return VaultPolicy(
            address=wanted.address,
            ca=wanted.ca,
            namespace=wanted.namespace,
            token=_secret_of("authenticator.vault.token", wanted.token),
            role_id=wanted.role_id,
            secret_id=_secret_of("authenticator.vault.secret_id", wanted.secret_id),
            approle_mount=wanted.approle_mount,
            timeout=wanted.timeout,
        )

    return VaultAuthenticator(read_policy, inner, sink)


def _missing(extra: str, error: ModuleNotFoundError) -> AuthenticatorConfigError:
    return AuthenticatorConfigError(
        f"authenticator.{extra}: needs the package {error.name}: pip install 'pgauthproxy[{extra}]'"
    )


def _secret_of(key: str, text: str) -> Secret:
    """A secret that is given by reference, or as it is. Raises AuthenticatorConfigError, which names the key."""
    try:
        return references.resolve(text)
    except AuthenticatorConfigError as error:
        raise AuthenticatorConfigError(f"{key}: {error}") from None


def _named_targets(settings: Settings, whole: Settings) -> dict[str, Target]:
    """The targets that rules may name. Raises AuthenticatorConfigError with all faults."""
    targets: dict[str, Target] = {}
    faults: list[str] = []
    for name, spec in settings.authenticator.targets.items():
        try:
            targets[name] = build_target(spec, target_fault(whole))
        except AuthenticatorConfigError as error:
            faults += (f"authenticator.targets.{name}.{fault}" for fault in error.faults)
    if faults:
        raise AuthenticatorConfigError(*faults)
    return targets


def _python(settings: Settings, sink: Sink) -> PythonAuthenticator:
    wanted = settings.authenticator
    return PythonAuthenticator(wanted.callable, CallLimits(wanted.timeout, wanted.grace, wanted.max_parallel), sink)


def _http(settings: Settings, sink: Sink) -> HttpAuthenticator:
    wanted = settings.authenticator
    limits = HttpLimits(wanted.timeout, wanted.http.max_in_flight, wanted.max_output)
    return HttpAuthenticator(wanted.http.url, wanted.http.headers, wanted.http.ca, limits, sink)


def target_fault(settings: Settings) -> TargetFault:
    """Says what is wrong with a target on top of the configuration: its own TLS settings, and where it borrows.

    Reads the files that it names.
    """

    def fault(target: Target) -> str | None:
        if target.borrows and not settings.authenticator.vault.address:
            return "password: a credential of vault: is asked for, and authenticator.vault.address is not set"
        if not target.tls:
            return None
        try:
            build_target_context(resolve(target_tls(settings), target.tls))
        except AuthenticatorFault as error:
            return f"tls: {error.detail}"
        except TlsConfigError as error:
            return f"tls: {error}"
        return None

    return fault


def target_tls(settings: Settings) -> TargetTls:
    """TLS with targets, where the authenticator says nothing else."""
    tls = settings.target.tls
    return TargetTls(tls.decided_mode, tls.ca, tls.cert, tls.key, tls.negotiation, tls.name)


def made_up_from(settings: Settings) -> Secret:
    """The secret that the salts of refused users are made from: as stable as the operator has made it."""
    if settings.authenticator.scram_seed:
        return Secret(settings.authenticator.scram_seed.encode())
    if settings.tls_mode != "disable":
        # What is wrong with the key is told where TLS is set up with it.
        with contextlib.suppress(OSError):
            return Secret(hashlib.sha256(Path(settings.tls.key).read_bytes()).digest())
    return Secret(secrets.token_bytes(32))
