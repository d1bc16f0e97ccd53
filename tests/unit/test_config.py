"""Settings: what beats what, how each is written, and what is said when something is wrong."""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from pgauthproxy.auth.targets import TargetSpec
from pgauthproxy.config import load, schema
from pgauthproxy.config.load import ConfigError, Loaded
from pgauthproxy.config.schema import CertificateSettings, Settings

Load = Callable[..., Loaded]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Loads a file with this content, with these flags and this environment."""

    def read(
        content: str = "", flags: Mapping[str, object] | None = None, environment: Mapping[str, str] | None = None
    ) -> Loaded:
        file = tmp_path / "settings"
        file.write_bytes(content.encode())
        return load.load(file, flags or {}, environment or {})

    return read


@pytest.fixture
def faults(loaded: Load, tmp_path: Path) -> Callable[..., list[str]]:
    """The faults of such settings, without the file's name before them."""

    def read(*arguments: object) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            loaded(*arguments)
        assert str(raised.value) == "\n".join(raised.value.faults)
        return [re.sub(f"^(file )?{tmp_path}/settings: ", "", fault) for fault in raised.value.faults]

    return read


def value(settings: Settings, path: str) -> object:
    found: object = settings
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_an_empty_file_means_the_defaults(loaded: Load) -> None:
    settings = loaded()
    for key in schema.all_keys():
        assert value(settings.settings, key.path) == key.default
    assert set(settings.origins.values()) == {"default"}
    assert settings.warnings == ()


def test_flag_beats_environment_beats_file_beats_default(loaded: Load, tmp_path: Path) -> None:
    content, environment, flags = "max_clients: 1", {"PGPROXY_MAX_CLIENTS": "2"}, {"max_clients": "3"}
    seen = [
        (settings.settings.max_clients, settings.origins["max_clients"])
        for settings in (
            loaded(),
            loaded(content),
            loaded(content, {}, environment),
            loaded(content, flags, environment),
        )
    ]
    assert seen == [
        (10_000, "default"),
        (1, f"file {tmp_path}/settings"),
        (2, "environment PGPROXY_MAX_CLIENTS"),
        (3, "flag"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "authenticator: {cleartext_password: true}",
        "Authenticator: {CLEARTEXT_Password: true}",
        "AUTHENTICATOR:\n  Cleartext_password: yes",
        "authenticator.cleartext_password: true",
    ],
)
def test_keys_are_case_insensitive(loaded: Load, content: str) -> None:
    assert loaded(content).settings.authenticator.cleartext_password is True


@pytest.mark.parametrize("name", ["PGPROXY_CLEAR_PASSWD", "PGPROXY_AUTHENTICATOR_CLEARTEXT_PASSWORD"])
@pytest.mark.parametrize(
    ("text", "means"), [*((word, True) for word in load.TRUE_WORDS), *((word, False) for word in load.FALSE_WORDS)]
)
def test_a_bool_is_written_as_go_writes_it(loaded: Load, name: str, text: str, means: bool) -> None:
    content = f"authenticator: {{cleartext_password: {str(not means).lower()}}}"
    assert loaded(content, {}, {name: text}).settings.authenticator.cleartext_password is means
    assert loaded(f"authenticator: {{cleartext_password: '{text}'}}").settings.authenticator.cleartext_password is means


@pytest.mark.parametrize("text", ["yes", "on", "tRUE", "2", " 1", "y"])
def test_another_word_is_no_bool(faults: Callable[..., list[str]], text: str) -> None:
    assert faults("", {}, {"PGPROXY_CLEAR_PASSWD": text}) == [
        "environment PGPROXY_CLEAR_PASSWD: authenticator.cleartext_password: neither true nor false"
    ]


def test_an_empty_variable_counts_as_not_set(loaded: Load) -> None:
    assert loaded("max_clients: 1", {}, {"PGPROXY_MAX_CLIENTS": ""}).settings.max_clients == 1


def test_a_key_without_a_value_counts_as_not_set(loaded: Load) -> None:
    assert loaded("max_clients:\nauthenticator:\ntarget:\n  error_text: ~").settings == Settings()


COMPANIONS = {
    "audit.required": {"PGPROXY_AUDIT_FILE": "/some/where"},
    "audit.statements": {"PGPROXY_AUDIT_FILE": "/some/where"},
    "tls.cert": {"PGPROXY_TLS_KEY": "a.key"},
    "tls.key": {"PGPROXY_TLS_CERT": "a.crt"},
    "tls.client_cert": {"PGPROXY_TLS_CLIENT_CA": "ca.crt"},
    "authenticator.kind": {"PGPROXY_AUTHENTICATOR_CMD": "one"},
    "authenticator.workers.min": {"PGPROXY_AUTHENTICATOR_WORKERS_MAX": "50"},
    "reserved_clients": {"PGPROXY_ADMIN_USERS": "{root: a verifier}"},
    "group": {"PGPROXY_USER": "postgres"},
}
"""What some settings cannot be without."""

VALUES: dict[str, tuple[str, object]] = {
    "authenticator.cmd": ("one two", ["one", "two"]),
    "authenticator.chain": ("[{cmd: one}]", [schema.AuthenticatorSettings(cmd=["one"])]),
    "authenticator.http.headers": ("{X-One: two}", {"X-One": "two"}),
    "authenticator.targets": ("{db: {host: a, user: b}}", {"db": TargetSpec(host="a", user="b")}),
    "authenticator.ldap.name_attribute": ("cn", "cn"),
    "authenticator.ldap.rules": ("[{target: db}]", [schema.LdapRule(target="db")]),
    "authenticator.ldap.max_parallel": ("42", 42),
    "authenticator.jwt.algorithms": ("ES256,EdDSA", ["ES256", "EdDSA"]),
    "authenticator.jwt.rules": ("[{target: db}]", [schema.JwtRule(target="db")]),
    "authenticator.max_parallel": ("42", 42),
    "authenticator.workers.min": ("42", 42),
    "authenticator.workers.max": ("42", 42),
    "target.warm": ("42", 42),
    "admin.users": ("{alice: a verifier}", {"alice": "a verifier"}),
    "admin.stats_users": ("{alice: a verifier}", {"alice": "a verifier"}),
}
"""What some settings can be, and others of their type not."""


def another_value(key: schema.Key) -> tuple[str, object]:
    """A value that is not the default, as text and as it is meant."""
    if key.path in VALUES:
        return VALUES[key.path]
    words = literals(key.type)
    if words:
        other = next(word for word in words if word != key.default)
        return other, other
    others: dict[type, tuple[str, object]] = {
        bool: ("true", True),
        int: ("4242", 4242),
        float: ("4.5", 4.5),
        list: ("one,two", ["one", "two"]),
        type(None): ("one,two", ["one", "two"]),
        str: ("/some/where", "/some/where"),
        dict: ("{db: {cert: a, key: b}}", {"db": CertificateSettings(cert="a", key="b")}),
    }
    return others[type(key.default)]


def literals(part: Any) -> tuple[str, ...]:
    """The words that a type allows, wherever in it they stand."""
    if get_origin(part) is Literal:
        return get_args(part)
    return tuple(word for inner in get_args(part) for word in literals(inner))


@pytest.mark.parametrize("key", list(schema.all_keys()), ids=lambda key: key.path)
def test_every_key_has_a_variable(loaded: Load, key: schema.Key) -> None:
    text, expected = another_value(key)
    name = "PGPROXY_" + key.path.upper().replace(".", "_")
    settings = loaded("", {}, {name: text, **COMPANIONS.get(key.path, {})})
    assert value(settings.settings, key.path) == expected != key.default
    assert settings.origins[key.path] == f"environment {name}"


@pytest.mark.parametrize(
    ("content", "cmd"),
    [
        ("cmd: [/usr/bin/decide, --for, 'the shop']", ["/usr/bin/decide", "--for", "the shop"]),
        ("cmd: /usr/bin/decide --for 'the shop'", ["/usr/bin/decide", "--for", "the shop"]),
        ("cmd: decide, or not", ["decide,", "or", "not"]),
        ("cmd: decide $HOME ~ *.py | tee", ["decide", "$HOME", "~", "*.py", "|", "tee"]),
        ("cmd: []", []),
        ("cmd: ''", []),
    ],
)
def test_a_command_is_a_list_or_one_string_that_no_shell_reads(loaded: Load, content: str, cmd: list[str]) -> None:
    assert loaded(f"authenticator:\n  {content}").settings.authenticator.cmd == cmd


@pytest.mark.parametrize(
    ("content", "listen"),
    [
        ("listen: :5432", [":5432"]),
        ("listen: ':5432, [::1]:6000'", [":5432", "[::1]:6000"]),
        ("listen: ['127.0.0.1:5432', 'unix:/run:5432']", ["127.0.0.1:5432", "unix:/run:5432"]),
    ],
)
def test_listen_is_one_address_or_several(loaded: Load, content: str, listen: list[str]) -> None:
    assert loaded(content).settings.listen == listen


def test_one_of_several_addresses_may_be_a_mapping(loaded: Load) -> None:
    content = "listen: ['127.0.0.1:5432', {Address: ':6432', PROXY_protocol: true}]\nproxy_protocol_from: 10.0.0.1"
    settings = loaded(content).settings
    assert [(each.address, each.proxy_protocol) for each in settings.listeners] == [
        ("127.0.0.1:5432", False),
        (":6432", True),
    ]
    assert settings.proxy_protocol_from == ["10.0.0.1"]


@pytest.mark.parametrize(
    "content",
    [
        "tls: {hosts: {db.example.com: {cert: a.crt, key: a.key}, other: {cert: b.crt, key: b.key}}}",
        "TLS:\n  Hosts:\n    db.example.com: {cert: a.crt, key: a.key}\n    other: {cert: b.crt, key: b.key}",
        "tls.hosts: {db.example.com: {cert: a.crt, key: a.key}, other: {cert: b.crt, key: b.key}}",
    ],
)
def test_the_names_of_hosts_are_no_keys(loaded: Load, content: str) -> None:
    assert loaded(content).settings.tls.hosts == {
        "db.example.com": CertificateSettings(cert="a.crt", key="a.key"),
        "other": CertificateSettings(cert="b.crt", key="b.key"),
    }


@pytest.mark.parametrize(
    ("content", "method"),
    [
        ("", "md5"),
        ("cleartext_password: false", "md5"),
        ("cleartext_password: true", "cleartext"),
        ("{cleartext_password: true, method: cleartext}", "cleartext"),
        ("{cleartext_password: false, method: cleartext}", "cleartext"),
        ("method: md5", "md5"),
        ("method: scram-sha-256", "scram-sha-256"),
    ],
)
def test_the_method_is_named_or_is_what_cleartext_password_says(loaded: Load, content: str, method: str) -> None:
    settings = loaded(f"authenticator: {content}" if content.startswith("{") else f"authenticator:\n  {content}")
    assert settings.settings.method == method


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        ("", "disable"),
        ("cert: a, key: b", "allow"),
        ("cert: a, key: b, mode: disable", "disable"),
        ("cert: a, key: b, mode: allow", "allow"),
        ("cert: a, key: b, mode: require", "require"),
        ("mode: disable", "disable"),
    ],
)
def test_tls_is_to_be_had_once_there_is_a_certificate(loaded: Load, content: str, mode: str) -> None:
    assert loaded(f"tls: {{{content}}}").settings.tls_mode == mode


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "authenticator: {cleartext_password: true, method: md5}",
            "authenticator.cleartext_password: contradicts authenticator.method md5",
        ),
        ("tls: {mode: allow}", "tls.mode: allow needs tls.cert and tls.key"),
        ("tls: {mode: require}", "tls.mode: require needs tls.cert and tls.key"),
        ("tls: {cert: a}", "tls.cert, tls.key: need each other"),
        ("tls: {key: a}", "tls.cert, tls.key: need each other"),
        ("tls: {cert: a, key: b, client_cert: require}", "tls.client_cert: require needs tls.client_ca"),
        (
            "{authenticator: {method: cert}, tls: {cert: a, key: b, client_ca: c}}",
            "authenticator.method: cert needs TLS, and tls.client_cert optional or require",
        ),
        (
            "{authenticator: {method: cert}, tls: {client_ca: c, client_cert: require}}",
            "authenticator.method: cert needs TLS, and tls.client_cert optional or require",
        ),
    ],
)
def test_what_does_not_go_together_is_told(faults: Callable[..., list[str]], content: str, says: str) -> None:
    assert faults(content) == [says]


def test_a_number_may_stand_in_quotes(loaded: Load) -> None:
    settings = loaded("max_clients: '7'\nlogin_timeout: '1.5'\ndrain_timeout: 2").settings
    assert (settings.max_clients, settings.login_timeout, settings.drain_timeout) == (7, 1.5, 2.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("lisen: x", "unknown key lisen, did you mean listen?"),
        ("authenticator: {command: x}", "unknown key authenticator.command, did you mean authenticator.cmd?"),
        ("cleartext_password: true", "unknown key cleartext_password, did you mean authenticator.cleartext_password?"),
        ("listen: {port: 1}", "unknown key listen.port, did you mean listen?"),
        ("listen: [{adress: ':1'}]", "listen: unknown key adress, did you mean address?"),
        ("Max_Client: 1", "unknown key max_client, did you mean max_clients?"),
        ("xyzzy: 1", "unknown key xyzzy"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    faults: Callable[..., list[str]], content: str, says: str
) -> None:
    assert faults(content) == [says]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("max_clients: many", "max_clients: Expected `int`, got `str`"),
        ("max_clients: 1.5", "max_clients: Expected `int`, got `float`"),
        ("max_clients: 0", "max_clients: Expected `int` >= 1"),
        ("max_clients: [1]", "max_clients: Expected `int`, got `array`"),
        ("login_timeout: 0", "login_timeout: Expected `float` > 0.0"),
        ("login_timeout: -1", "login_timeout: Expected `float` > 0.0"),
        ("login_timeout: .nan", "login_timeout: Expected `float` > 0.0"),
        ("buffer_size: 16777217", "buffer_size: Expected `int` <= 16777216"),
        ("log: {format: xml}", "log.format: Invalid enum value 'xml'"),
        ("listen: 5432", "listen: Expected `array`, got `int`"),
        ("authenticator: {cmd: 'a \"b'}", "authenticator.cmd: No closing quotation"),
        ("tls: {hosts: db}", "tls.hosts: Expected `object`, got `str`"),
        ("tls: {hosts: '{'}", "tls.hosts: not YAML"),
        ("tls: {hosts: {db: {cert: a}}}", "tls.hosts: Object missing required field `key` - at `$[...]`"),
        ("tls: {min_version: 1.1}", "tls.min_version: Invalid enum value '1.1'"),
        ("authenticator: {method: trust}", "authenticator.method: Invalid enum value 'trust'"),
        ("target: {protocol: '3.1'}", "target.protocol: Invalid enum value '3.1'"),
        ("authenticator: {cleartext_password: 7}", "authenticator.cleartext_password: Expected `bool`, got `int`"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_right_one(
    faults: Callable[..., list[str]], content: str, says: str
) -> None:
    assert faults(content) == [says]


@pytest.mark.parametrize("quote", ["", "'"])
def test_a_version_is_no_number(loaded: Load, quote: str) -> None:
    content = f"tls: {{min_version: {quote}1.3{quote}}}\ntarget: {{protocol: {quote}3.2{quote}}}"
    settings = loaded(content).settings
    assert (settings.tls.min_version, settings.target.protocol) == ("1.3", "3.2")


def test_all_faults_are_told_at_once(faults: Callable[..., list[str]]) -> None:
    content = "lisen: x\nmax_clients: 0\nauthenticator: {timeout: soon}"
    assert faults(content, {"log.level": "loud"}, {"PGPROXY_MAX_LOGINS": "few"}) == [
        "unknown key lisen, did you mean listen?",
        "max_clients: Expected `int` >= 1",
        "authenticator.timeout: Expected `float`, got `str`",
        "environment PGPROXY_MAX_LOGINS: max_logins: Expected `int`, got `str`",
        "flag: log.level: Invalid enum value 'loud'",
    ]


def test_a_value_that_something_beats_is_not_looked_at(loaded: Load) -> None:
    assert loaded("max_clients: none", {}, {"PGPROXY_MAX_CLIENTS": "5"}).settings.max_clients == 5


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("PGPROXY_LISTENS", "environment variable PGPROXY_LISTENS is not used, did you mean PGPROXY_LISTEN?"),
        ("PGPROXY_CLEAR_PASSWORD", "environment variable PGPROXY_CLEAR_PASSWORD is not used"),
    ],
)
def test_a_variable_that_is_nearly_one_is_a_warning(loaded: Load, name: str, says: str) -> None:
    (warning,) = loaded("", {}, {name: "1"}).warnings
    assert warning.startswith(says)


@pytest.mark.parametrize(
    "name", ["PGPROXY_PORT_5432_TCP", "PGPROXY_SERVICE_HOST", "pgproxy_listen", "LISTEN", "PGHOST"]
)
def test_other_variables_are_let_be(loaded: Load, name: str) -> None:
    settings = loaded("", {}, {name: "tcp://192.0.2.1:5432"})
    assert settings.settings == Settings()
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a list", "not a mapping of keys to values"),
        ("just text", "not a mapping of keys to values"),
        ("a: [", "not YAML: "),
        ("a: !!python/object/apply:os.getcwd []", "not YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(faults: Callable[..., list[str]], content: str, says: str) -> None:
    (fault,) = faults(content)
    assert fault.startswith(says)
    assert "\n" not in fault


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/no/such/file: No such file or directory$"):
        load.load(Path("/no/such/file"), {}, {})
    with pytest.raises(ConfigError, match=r"Is a directory$"):
        load.load(tmp_path, {}, {})


def test_without_a_file_the_two_names_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (warning,) = load.load(None, {}, {}).warnings
    assert warning == "no configuration file: looked for pgAuthProxy.yaml and pgauthproxy.yaml in . and /etc"
    for name, clients in (("pgauthproxy.yaml", 1), ("pgAuthProxy.yaml", 2)):
        (tmp_path / name).write_text(f"max_clients: {clients}")
        loaded = load.load(None, {}, {})
        assert (loaded.settings.max_clients, loaded.origins["max_clients"]) == (clients, f"file {name}")
        assert loaded.warnings == ()


def test_text_outside_ascii_is_read_as_utf8_whatever_the_locale(loaded: Load) -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        settings = loaded("authenticator: {cmd: [ä]}").settings
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert settings.authenticator.cmd == ["ä"]


def test_the_command_gets_the_whole_environment_or_what_is_named(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"ONE", b"1")
    monkeypatch.setitem(os.environb, b"TWO", b"\xff=2")
    assert load.authenticator_environment(loaded().settings) == dict(os.environb)
    settings = loaded("authenticator: {env: [TWO, NOT_THERE]}").settings
    assert load.authenticator_environment(settings) == {b"TWO": b"\xff=2"}
    assert load.authenticator_environment(loaded("authenticator: {env: []}").settings) == {}
