"""Tokens in the place of passwords: which are taken, which are not, and what their claims are good for."""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from pgauthproxy.auth.https import BadAnswerError
from pgauthproxy.auth.jwt import JwtAuthenticator, JwtPolicy, KeySource, Rule, find_claim
from pgauthproxy.auth.keysets import KeptKeys, KeySet
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Question
from pgauthproxy.auth.targets import Target, TargetSpec
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Event, Noticed, ignore
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Mapping, Started

ISSUER, AUDIENCE = "https://id.example", "db.example"
ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
CURVES = {"ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
POLICY = JwtPolicy(
    algorithms=ALGORITHMS,
    issuer=ISSUER,
    audience=(AUDIENCE, "second.example"),
    leeway=10.0,
    required_claims=(),
    max_token=4096,
    user_claim="sub",
    user_is="{user}",
    end_with_token=False,
)
EVERYBODY = Rule("everybody")


def private_key(algorithm: str, number: int = 0) -> Any:
    return made_once(algorithm, number)


@functools.cache
def made_once(algorithm: str, number: int) -> Any:
    if algorithm.startswith(("RS", "PS")):
        return rsa.generate_private_key(65537, 1024 if number < 0 else 2048)
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(CURVES.get(algorithm, ec.SECP256R1)())


def public_jwk(algorithm: str, number: int = 0, **more: Any) -> dict[str, Any]:
    key = private_key(algorithm, number).public_key()
    fields: dict[str, Any] = get_default_algorithms()[algorithm].to_jwk(key, as_dict=True)
    return {**fields, "kid": f"{algorithm}-{number}", **more}


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims(**more: Any) -> dict[str, Any]:
    """Those of a good token; None takes one away."""
    now = int(time.time())
    all_claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 300} | more
    return {name: value for name, value in all_claims.items() if value is not None}


def token(algorithm: str = "ES256", number: int = 0, header: dict[str, Any] | None = None, **more: Any) -> bytes:
    named = {"kid": f"{algorithm}-{number}"} | (header or {})
    return jwt.encode(claims(**more), private_key(algorithm, number), algorithm, headers=named).encode()


def part(content: str | bytes) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(header: str, body: str) -> bytes:
    """A token of this very text, with a true signature."""
    text = part(header) + b"." + part(body)
    algorithm = get_default_algorithms()["ES256"]
    return text + b"." + part(algorithm.sign(text, private_key("ES256")))


Ask = Callable[..., Mapping]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Asks an authenticator with this policy and these rules once."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(*(public_jwk(algorithm) for algorithm in ALGORITHMS)))
    source = KeySource(str(file), "", "", refresh=300.0, interval=10.0, timeout=1.0)
    targets = {
        name: Target(TargetSpec(host="127.0.0.1:5432", user=f"{name}-{{user}}"))
        for name in ("everybody", "admins", "readers")
    }

    def once(shown: bytes, *rules: Rule, user: bytes = b"alice", policy: JwtPolicy = POLICY) -> Mapping:
        async def asking() -> Mapping:
            authenticator = JwtAuthenticator(source, policy, rules or [EVERYBODY], lambda: targets, ignore)
            await authenticator.start()
            try:
                started = Started(Accepted("1", "[local]"), ((b"user", user), (b"database", b"shop")))
                return await authenticator.ask(Question(started, "cleartext", Secret(shown), bytes(4)))
            finally:
                await authenticator.close()

        return asyncio.run(asking())

    return once


def policy(**changes: Any) -> JwtPolicy:
    return JwtPolicy(**{name: getattr(POLICY, name) for name in JwtPolicy.__dataclass_fields__} | changes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_good_token_lets_its_user_in(ask: Ask, algorithm: str) -> None:
    mapping = ask(token(algorithm))
    assert mapping.user == b"everybody-alice"
    assert mapping.database == b"shop"
    assert mapping.session_seconds is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_that_names_no_key_is_tried_with_all_of_its_algorithm(ask: Ask, algorithm: str) -> None:
    shown = jwt.encode(claims(), private_key(algorithm), algorithm).encode()
    assert ask(shown).user == b"everybody-alice"


def test_a_token_may_be_for_several_audiences(ask: Ask) -> None:
    assert ask(token(aud=["other.example", "second.example"])).user == b"everybody-alice"


def test_the_leeway_holds_both_ways(ask: Ask) -> None:
    now = int(time.time())
    assert ask(token(exp=now - 5)).user == b"everybody-alice"
    assert ask(token(nbf=now + 5, iat=now + 5)).user == b"everybody-alice"


# Fixed, for the tests' names to be the same in every process and their meaning in a run that takes long.
LONG_AGO, FAR_AWAY = 1_000_000_000, 4_000_000_000
BAD_CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"exp": LONG_AGO}, "expired"),
    ({"exp": None}, '"exp"'),
    ({"exp": "tomorrow"}, "exp"),
    ({"exp": True}, "expired"),
    ({"exp": [1]}, "exp"),
    ({"nbf": FAR_AWAY}, "not yet valid"),
    ({"nbf": "later"}, "nbf"),
    ({"iat": FAR_AWAY}, "not yet valid"),
    ({"aud": "other.example"}, "Audience"),
    ({"aud": []}, '"aud"'),
    ({"aud": None}, '"aud"'),
    ({"aud": [AUDIENCE, 1]}, "InvalidAudienceError"),
    ({"aud": {"db.example": 1}}, "InvalidAudienceError"),
    ({"iss": "https://mallory.example"}, "issuer"),
    ({"iss": ISSUER + "/"}, "issuer"),
    ({"iss": None}, '"iss"'),
    ({"sub": "bob"}, "another user"),
    ({"sub": "Alice"}, "another user"),
    ({"sub": "alice "}, "another user"),
    ({"sub": None}, "another user"),
    ({"sub": ["alice"]}, "Subject"),
]


@pytest.mark.parametrize(("changed", "why"), BAD_CLAIMS, ids=[json.dumps(changed) for changed, _ in BAD_CLAIMS])
def test_a_token_whose_claims_are_wrong_is_refused(ask: Ask, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(Denied, match=why):
        ask(token(**changed))


def test_an_issuer_is_one(ask: Ask) -> None:
    with pytest.raises(Denied, match="iss"):
        ask(signed('{"alg":"ES256"}', json.dumps(claims(iss=[ISSUER]))))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "-1", "1" + "0" * 400])
def test_a_time_that_is_no_time_does_no_harm(ask: Ask, number: str) -> None:
    body = json.dumps(claims(exp="@")).replace('"@"', number)
    shown = signed('{"alg":"ES256","kid":"ES256-0"}', body)
    if number.startswith("10"):
        assert ask(shown, policy=policy(end_with_token=True)).session_seconds == 1e8
    else:
        with pytest.raises(Denied):
            ask(shown)


def test_a_token_without_a_signature_is_refused(ask: Ask) -> None:
    for algorithm in ("none", "None", "NONE"):
        header = part(json.dumps({"alg": algorithm, "kid": "ES256-0"}))
        body = part(json.dumps(claims()))
        with pytest.raises(Denied, match="not a token"):
            ask(header + b"." + body + b".")
        with pytest.raises(Denied, match="algorithm that is not allowed"):
            ask(header + b"." + body + b".AAAA")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize("of", ["RS256", "ES256"])
def test_a_public_key_is_not_taken_for_a_shared_secret(ask: Ask, algorithm: str, of: str) -> None:
    pem = private_key(of).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = part(json.dumps({"alg": algorithm, "kid": f"{of}-0"})) + b"." + part(json.dumps(claims()))
    # By the standard's own means, since the library refuses to make such a token.
    digest = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}[algorithm]
    with pytest.raises(Denied, match="algorithm that is not allowed"):
        ask(text + b"." + part(hmac.digest(pem, text, digest)))


def test_a_token_of_an_algorithm_that_is_not_allowed_is_refused_though_its_key_is_known(ask: Ask) -> None:
    with pytest.raises(Denied, match="algorithm that is not allowed: 'RS256'"):
        ask(token("RS256"), policy=policy(algorithms=("ES256",)))
    with pytest.raises(Denied, match="algorithm that is not allowed"):
        ask(token("ES256", header={"alg": None}))


def test_a_key_serves_its_own_algorithm_alone(ask: Ask) -> None:
    with pytest.raises(Denied, match="key that is not known"):
        ask(token("ES256", header={"kid": "RS256-0"}))


def test_a_token_of_an_unknown_key_is_refused(ask: Ask) -> None:
    with pytest.raises(Denied, match="key that is not known: 'ES256-7'"):
        ask(token("ES256", 7))
    with pytest.raises(Denied, match="wrong signature"):
        ask(token("ES256", 7, header={"kid": "ES256-0"}))


def test_a_token_brings_no_key_of_its_own(ask: Ask) -> None:
    own = {"jwk": public_jwk("ES256", 7), "jku": "https://mallory.example/keys", "x5u": "https://mallory.example"}
    with pytest.raises(Denied, match="wrong signature"):
        ask(token("ES256", 7, header={"kid": "ES256-0", **own}))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_token_that_was_changed_is_refused(ask: Ask, place: int) -> None:
    parts = token().split(b".")
    text = base64.urlsafe_b64decode(parts[place] + b"==")
    changed = text.replace(b"alice", b"mallo").replace(b"ES256-0", b"RS256-0") if place < 2 else text[::-1]
    assert changed != text
    parts[place] = part(changed)
    with pytest.raises(Denied):
        ask(b".".join(parts))


@pytest.mark.parametrize(
    "header",
    [
        '{"alg":"ES256","alg":"ES256"}',
        '{"alg":"none","alg":"ES256"}',
        '{"alg":"ES256","kid":"ES256-0","kid":"RS256-0"}',
        '{"alg":"ES256","x":{"y":1,"y":2}}',
        '{"alg":"ES256","crit":["exp"],"exp":1}',
        '{"alg":"ES256","crit":["b64"],"b64":false}',
        '{"alg":"ES256","crit":[]}',
        '{"alg":"ES256","b64":true}',
        '{"alg":"ES256","kid":1}',
        '{"alg":"ES256","kid":["ES256-0"]}',
        '{"alg":["ES256"]}',
        '{"alg":null}',
        '{"kid":"ES256-0"}',
        "{}",
        "[]",
        '"ES256"',
        "",
        "{",
        '{"alg":"ES256"} x',
        "[" * 1500,
        '{"a":' * 700,
    ],
)
def test_a_header_that_is_not_clear_is_none(ask: Ask, header: str) -> None:
    with pytest.raises(Denied):
        ask(signed(header, json.dumps(claims())))


@pytest.mark.parametrize(
    "body",
    [
        '{"sub":"bob",' + json.dumps(claims())[1:],
        json.dumps(claims())[:-1] + ',"groups":["a"],"groups":["b"]}',
        json.dumps([claims()]),
        "null",
        "",
        "{",
        "[" * 1500,
    ],
)
def test_claims_that_are_not_clear_are_none(ask: Ask, body: str) -> None:
    with pytest.raises(Denied, match="not a token"):
        ask(signed('{"alg":"ES256"}', body))


@pytest.mark.parametrize(
    "shown",
    [
        b"",
        b"secret",
        b"a.b",
        b"..",
        b"a.b.c.d",
        b"a.b.c.d.e",
        b"\xff.\xff.\xff",
        b"e30.e30.e30=",
        b"e30.e30.\n",
        b"a b",
    ],
)
def test_what_is_no_token_is_refused(ask: Ask, shown: bytes) -> None:
    with pytest.raises(Denied):
        ask(shown)


def test_a_token_above_the_bound_is_not_looked_at(ask: Ask) -> None:
    assert ask(token(x="y" * 1000)).user == b"everybody-alice"
    for size in (4096, 1 << 20):
        with pytest.raises(Denied, match="token of more than 4096 bytes"):
            ask(token(x="y" * size))


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=20))
def test_no_bytes_do_more_than_be_refused(one: bytes, two: bytes, three: bytes) -> None:
    kept = JwtAuthenticator.__new__(JwtAuthenticator)
    kept._policy = POLICY
    for shown in (one, one + b"." + two + b"." + three, part(one) + b"." + part(two) + b"." + part(three)):
        with pytest.raises(Denied):
            kept._read_header(shown)


# Claims


def test_the_users_claim_may_be_any_and_look_as_the_settings_say(ask: Ask) -> None:
    by_mail = policy(user_claim="email", user_is="{user}@db.example")
    assert ask(token(sub="4711", email="alice@db.example"), policy=by_mail).user == b"everybody-alice"
    for mail in ("alice@mallory.example", "alice", "bob@db.example", None):
        with pytest.raises(Denied, match="another user"):
            ask(token(email=mail), policy=by_mail)
    nested = policy(user_claim="person.login")
    assert ask(token(person={"login": "alice"}), policy=nested).user == b"everybody-alice"


def test_claims_that_the_settings_require_must_be_there(ask: Ask) -> None:
    demanding = policy(required_claims=("email_verified",))
    assert ask(token(email_verified=True), policy=demanding).user == b"everybody-alice"
    with pytest.raises(Denied, match="email_verified"):
        ask(token(), policy=demanding)


def test_the_first_rule_that_fits_says_where_to(ask: Ask) -> None:
    rules = [
        Rule("admins", "groups", contains="dba"),
        Rule("admins", "realm_access.roles", contains="dba"),
        Rule("readers", "department", equals="sales"),
        Rule("readers", "scope", contains="db:read"),
        Rule("readers", "https://db.example/level", equals="3"),
        Rule("readers", "trusted", equals="true"),
    ]
    for given_claims, target in (
        ({"groups": ["dba"], "department": "sales"}, b"admins-alice"),
        ({"realm_access": {"roles": ["x", "dba"]}}, b"admins-alice"),
        ({"department": "sales"}, b"readers-alice"),
        ({"scope": "openid db:read"}, b"readers-alice"),
        ({"https://db.example/level": 3}, b"readers-alice"),
        ({"trusted": True}, b"readers-alice"),
    ):
        assert ask(token(**given_claims), *rules).user == target
    for refused in (
        {},
        {"groups": ["dbas", "DBA", ["dba"]]},
        {"groups": {"dba": True}},
        {"scope": "db:readwrite"},
        {"department": ["sales"]},
        {"trusted": 1},
        {"realm_access": "roles"},
    ):
        with pytest.raises(Denied, match="no rule has a target"):
            ask(token(**refused), *rules)


def test_a_claim_is_found_by_its_name_before_its_path() -> None:
    assert find_claim({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert find_claim({"a": {"b": {"c": 3}}}, "a.b.c") == 3
    assert find_claim({"a": [1]}, "a.b") is None


def test_the_session_ends_with_its_token_if_that_is_asked(ask: Ask) -> None:
    seconds = ask(token(exp=int(time.time()) + 100), policy=policy(end_with_token=True)).session_seconds
    assert seconds is not None
    assert 50 < seconds <= 100
    in_the_leeway = ask(token(exp=int(time.time()) - 3), policy=policy(end_with_token=True)).session_seconds
    assert in_the_leeway is not None
    assert 0 < in_the_leeway < 1


def test_nothing_of_a_token_is_in_the_reason_of_its_refusal(ask: Ask) -> None:
    for shown in (token(sub="bob"), token(exp=1), token("ES256", 7), token()[:-20], b"hunter2.hunter2.!"):
        with pytest.raises(Denied) as denied:
            ask(shown)
        for piece in shown.split(b"."):
            assert piece.decode() not in denied.value.reason


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"issuer": ""}, "needs issuer, audience"),
        ({"audience": ()}, "needs issuer, audience"),
        ({"user_is": "alice"}, "jwt.user_is"),
    ],
)
def test_a_policy_that_lets_too_many_in_is_refused(ask: Ask, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AuthenticatorConfigError, match=words):
        ask(token(), policy=policy(**changes))


@pytest.mark.parametrize(
    "rule", [Rule("nowhere"), Rule("readers", "a"), Rule("readers", "a", "b", "c"), Rule("readers", "", "b")]
)
def test_a_rule_that_says_nothing_is_refused(ask: Ask, rule: Rule) -> None:
    with pytest.raises(AuthenticatorConfigError, match=r"jwt\.rules"):
        ask(token(), rule)


# Keys


def test_keys_that_are_for_something_else_are_not_taken() -> None:
    good = public_jwk("ES256")
    secret = get_default_algorithms()["ES256"].to_jwk(private_key("ES256", 1), as_dict=True)
    for useless in (
        {**good, "use": "enc"},
        {**good, "alg": "ES384"},
        {**good, "key_ops": ["encrypt"]},
        {**good, "key_ops": "verify"},
        {**good, "crv": "P-384"},
        {**good, "crv": None},
        {**good, "x": "AAAA"},
        {**good, "x": 1},
        {**good, "kid": 1},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "ES256-0"},
        {"kty": "EC"},
        {**secret, "kid": "private"},
        public_jwk("ES384"),
        public_jwk("RS256", -1),
        None,
        "ES256",
    ):
        with pytest.raises(BadAnswerError, match="without a key"):
            KeySet(json.dumps({"keys": [useless]}).encode(), ("ES256", "RS256"))
    found = KeySet(key_set({**good, "use": "sig", "alg": "ES256", "key_ops": ["verify"]}), ("ES256", "RS256"))
    assert len(found.find("ES256-0", "ES256")) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b'{"keys":{}}', b'{"keys":[]}', b"[" * 100_000, b"\xff", b'{"keys":"x"}']
)
def test_a_key_set_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(BadAnswerError):
        KeySet(body, ALGORITHMS)


def test_a_key_set_has_a_bound() -> None:
    with pytest.raises(BadAnswerError, match="at most 100 keys"):
        KeySet(key_set(*[public_jwk("ES256")] * 101), ALGORITHMS)


class Issuer:
    """Publishes keys, counts how often they are read, and may be down."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.down = False
        self.readings = 0
        self.events: list[Event] = []

    async def read(self) -> bytes:
        self.readings += 1
        await asyncio.sleep(0)
        if self.down:
            raise ConnectionRefusedError
        return key_set(*self.keys)

    def kept(self, refresh: float = 300.0, interval: float = 300.0) -> KeptKeys:
        return KeptKeys(self.read, ALGORITHMS, refresh, interval, self.events.append)


def test_keys_are_read_once_for_all_who_wait_for_them() -> None:
    async def play() -> None:
        issuer = Issuer(public_jwk("ES256"))
        kept = issuer.kept()
        found = await asyncio.gather(*(kept.find("ES256-0", "ES256") for _ in range(50)))
        assert all(len(keys) == 1 for keys in found)
        assert issuer.readings == 1

    asyncio.run(play())


def test_a_key_that_is_not_known_is_looked_for_once_in_a_while_however_many_ask() -> None:
    async def play() -> None:
        issuer = Issuer(public_jwk("ES256"))
        kept = issuer.kept(interval=300.0)
        await kept.find("ES256-0", "ES256")
        for number in range(50):
            assert await kept.find(f"unknown-{number}", "ES256") == []
        assert issuer.readings == 1

    asyncio.run(play())


def test_a_key_that_the_issuer_has_changed_to_is_found_without_waiting_for_the_old_ones_to_age() -> None:
    async def play() -> None:
        issuer = Issuer(public_jwk("ES256"))
        kept = issuer.kept(interval=0.0)
        await kept.find("ES256-0", "ES256")
        issuer.keys = [public_jwk("ES256", 1)]
        assert len(await kept.find("ES256-1", "ES256")) == 1
        assert await kept.find("ES256-0", "ES256") == []
        assert len(await kept.find(None, "ES256")) == 1

    asyncio.run(play())


def test_old_keys_serve_while_new_ones_are_read_and_as_long_as_the_issuer_is_down() -> None:
    async def play() -> None:
        issuer = Issuer(public_jwk("ES256"))
        kept = issuer.kept(refresh=0.0, interval=0.0)
        await kept.find("ES256-0", "ES256")
        issuer.down = True
        for _ in range(5):
            assert len(await kept.find("ES256-0", "ES256")) == 1
            await asyncio.sleep(0.001)
        assert await kept.find("ES256-1", "ES256") == []
        issuer.down, issuer.keys = False, [public_jwk("ES256", 1)]
        assert len(await kept.find("ES256-1", "ES256")) == 1
        await kept.close()
        noticed = [event.what for event in issuer.events if isinstance(event, Noticed)]
        assert set(noticed) == {"keys of tokens not read, the old ones stay"}

    asyncio.run(play())


def test_without_any_keys_there_is_no_answer_rather_than_a_no() -> None:
    async def play() -> None:
        issuer = Issuer()
        issuer.down = True
        kept = issuer.kept(interval=300.0)
        for _ in range(3):
            with pytest.raises(AuthenticatorFault, match="no keys to verify tokens with: ConnectionRefusedError"):
                await kept.find("ES256-0", "ES256")
        assert issuer.readings == 1

    asyncio.run(play())


def test_a_client_that_leaves_does_not_take_the_reading_of_keys_with_it() -> None:
    async def play() -> None:
        issuer = Issuer(public_jwk("ES256"))
        kept = issuer.kept()
        leaving = asyncio.ensure_future(kept.find("ES256-0", "ES256"))
        staying = asyncio.ensure_future(kept.find("ES256-0", "ES256"))
        await asyncio.sleep(0)
        leaving.cancel()
        assert len(await staying) == 1
        assert leaving.cancelled()

    asyncio.run(play())
