"""Users are put into a file and taken out by lines: nothing else of the text changes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pgauthproxy.auth import users_edit, yaml_lines
from pgauthproxy.auth.users_edit import EditError, Keys

TARGETS = "# Where to\ntargets:\n  main: {host: db, user: app}  # the one\n"
KEYS: Keys = {"verifier": "md5" + "0" * 32, "databases": {"*": "main"}}
WRITTEN = f"carol:\n  verifier: md5{'0' * 32}\n  databases:\n    '*': main\n".replace("'", '"')


def indented(text: str, by: int = 2) -> str:
    return "".join(" " * by + line for line in text.splitlines(keepends=True))


ADDED = indented(WRITTEN)
TEXTS = {
    "nothing": ("", "users:\n" + ADDED),
    "comments alone": ("# later\n", "# later\n\nusers:\n" + ADDED),
    "no section": (TARGETS + "# end\n", f"{TARGETS}\nusers:\n{ADDED}# end\n"),
    "no section and no line break at the end": (TARGETS.rstrip("\n"), f"{TARGETS}\nusers:\n{ADDED}"),
    "an empty section": (TARGETS + "users:\n\n# end\n", f"{TARGETS}users:\n{ADDED}\n# end\n"),
    "an empty section with a comment": (TARGETS + "users:  # all\n", f"{TARGETS}users:  # all\n{ADDED}"),
    "braces": (TARGETS + "users: {}\n", f"{TARGETS}users:\n{ADDED}"),
    "braces with a comment": (TARGETS + "users: {}  # all\n", f"{TARGETS}users:  # all\n{ADDED}"),
    "a word for nothing": (TARGETS + "users: ~\n", f"{TARGETS}users:\n{ADDED}"),
    "a section before the targets": ("users:\n\n" + TARGETS, "users:\n" + ADDED + "\n" + TARGETS),
    "a user": (TARGETS + "users:\n  bob: {}\n", f"{TARGETS}users:\n  bob: {{}}\n{ADDED}"),
    "a user and no line break": (TARGETS + "users:\n  bob: {}", f"{TARGETS}users:\n  bob: {{}}\n{ADDED}"),
    "a user in other steps": (
        TARGETS + "users:\n    bob: {}\n",
        f"{TARGETS}users:\n    bob: {{}}\n" + "".join(line.replace("  ", "    ") for line in ADDED.splitlines(True)),
    ),
    "comments behind a user": (
        TARGETS + "users:\n  bob:\n    x: y  # because\n\n    # of bob\n\n  # next\n\n# end\n",
        f"{TARGETS}users:\n  bob:\n    x: y  # because\n\n    # of bob\n{ADDED}\n  # next\n\n# end\n",
    ),
    "a user whose text has lines": (
        TARGETS + "users:\n  bob:\n    x: |\n      y\n      z\n\n# end\n",
        f"{TARGETS}users:\n  bob:\n    x: |\n      y\n      z\n{ADDED}\n# end\n",
    ),
    "targets behind the users": (
        "users:\n  bob:\n    x:\n      - y\n" + TARGETS,
        "users:\n  bob:\n    x:\n      - y\n" + ADDED + TARGETS,
    ),
    "an end of the document": (TARGETS + "users:\n  b: {}\n...\n", f"{TARGETS}users:\n  b: {{}}\n{ADDED}...\n"),
    "carriage returns": (
        (TARGETS + "users:\n  bob: {}\n").replace("\n", "\r\n"),
        f"{TARGETS}users:\n  bob: {{}}\n{ADDED}".replace("\n", "\r\n"),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_user_is_added_and_nothing_else_changes(name: str) -> None:
    before, after = TEXTS[name]
    assert users_edit.add(before, "carol", KEYS) == after


@pytest.mark.parametrize("name", [name for name in TEXTS if "bob" in TEXTS[name][0]])
def test_a_user_that_was_added_is_removed_and_nothing_else_changes(name: str) -> None:
    before, after = TEXTS[name]
    assert users_edit.remove(after, "carol").rstrip("\r\n") == before.rstrip("\r\n")


def test_a_user_is_removed_with_the_comments_that_belong_to_it() -> None:
    before = (
        "users:\n"
        "  # first\n"
        "  alice: {}  # hers\n"
        "  # second\n"
        "  bob:  # his\n"
        "    x: y\n"
        "    # his too\n"
        "\n"
        "  # third\n"
        "  carol:\n"
        "    x: y\n"
        "targets: {}\n"
    )
    assert users_edit.remove(before, "bob") == before.replace("  bob:  # his\n    x: y\n    # his too\n", "")
    assert users_edit.remove(before, "alice") == before.replace("  alice: {}  # hers\n", "")
    assert users_edit.remove(before, "carol") == before.replace("  carol:\n    x: y\n", "")


def test_the_last_user_may_go() -> None:
    gone = users_edit.remove(f"{TARGETS}users:\n{ADDED}", "carol")
    assert gone == f"{TARGETS}users:\n"
    assert users_edit.add(gone, "carol", KEYS) == f"{TARGETS}users:\n{ADDED}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("users:\n  carol: {}\n", "there is a user carol already"),
        ("users:\n  'carol': {}\n", "there is a user carol already"),
        ("users: {bob: {}}\n", "in braces"),
        ("{users: {}}\n", "in braces"),
        ("[users]\n", "no mapping"),
        ("users: [bob]\n", "by hand"),
        ("users:\n  ? bob\n  : x\n", "by hand"),
        ("users: {\n", "line 2: not YAML"),
        ("users: {}\nusers: {}\n", "the file has faults"),
        ("a: &x {}\nb: *x\nusers:\n", "the file has faults"),
        ("users:\n  bob: {}\n---\na: b\n", "line 3: a second document"),
    ],
)
def test_a_text_that_cannot_be_edited_by_lines_is_left_alone(text: str, said: str) -> None:
    with pytest.raises(EditError, match=said):
        users_edit.add(text, "carol", KEYS)


@pytest.mark.parametrize("text", ["", TARGETS, TARGETS + "users:\n", TARGETS + "users:\n  bob: {}\n"])
def test_who_is_not_there_cannot_be_removed(text: str) -> None:
    with pytest.raises(EditError, match="there is no user carol"):
        users_edit.remove(text, "carol")


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(
    names=st.lists(WORDS, min_size=1, max_size=4, unique=True),
    databases=st.dictionaries(WORDS, WORDS, min_size=1, max_size=3),
    allow=st.lists(WORDS, max_size=3),
    start=st.sampled_from([before for before, _ in TEXTS.values()]),
)
def test_whatever_the_words_are_what_was_meant_is_what_is_read(
    names: list[str], databases: dict[str, str], allow: list[str], start: str
) -> None:
    """Words that YAML cannot say are refused."""
    text = start
    meant = (yaml_lines.read(start.encode(), lambda: None).value or {}).get("users") or {}  # type: ignore[union-attr]
    assume(not meant.keys() & set(names))
    keys: Keys = {"verifier": names[0], "databases": databases, "allow": allow}
    for name in names:
        try:
            text = users_edit.add(text, name, keys)
        except EditError:
            assert any(
                not char.isprintable() for char in name + "".join([names[0], *databases, *databases.values(), *allow])
            )
            return
        meant = meant | {name: dict(keys)}
        assert yaml_lines.read(text.encode(), lambda: None).value["users"] == meant  # type: ignore[index,call-overload]
    for name in names:
        text = users_edit.remove(text, name)
    meant = {name: keys for name, keys in meant.items() if name not in names}
    assert (yaml_lines.read(text.encode(), lambda: None).value["users"] or {}) == meant  # type: ignore[index,call-overload]
