"""The live page: who may see it and act on it, what stands in it, and that it is of use by keyboard and in the dark."""

from __future__ import annotations

import http.client
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pgauthproxy.build import examine
from pgauthproxy.config.schema import AdminSettings, AuthenticatorSettings, Settings
from pgauthproxy.events import ignore
from pgauthproxy.ops.page import page as document
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import assert_serves, wait_until
from tests.system.operators import address_of, ask, raw
from tests.wire import RawClient, password, startup

TOKEN = "a-token-of-the-operators"
LOCAL = {"listen": "127.0.0.1:0"}
GUARDED = LOCAL | {"token": TOKEN}
BEARER = f"Bearer {TOKEN}"
TRUSTED = ("/state", "/events")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def refuse_one(gateway: Gateway, user: str = "mallory", database: str = "postgres") -> None:
    with RawClient(gateway.port) as client:
        client.send(startup(user=user, database=database) + password())
        client.read_until(b"E")


# Who may see it


def test_the_document_itself_shows_nothing_and_lets_nothing_else_in(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    answer = ask(gateway, "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Cache-Control"] == "no-store"


def test_the_document_needs_nothing_from_elsewhere_and_makes_no_markup_of_text() -> None:
    text = document()[0].decode()
    for word in ("http:", "https:", "src=", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("):
        assert word not in text.replace("http://www.w3.org/2000/svg", ""), word
    assert "style=" not in text
    assert " onclick" not in text


@pytest.mark.parametrize("path", TRUSTED)
def test_what_the_page_lives_on_needs_the_token(start_gateway: StartGateway, mapped: Path, path: str) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": TOKEN}):
        answer = ask(gateway, path, **headers)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert ask(gateway, f"{path}?token={TOKEN}").status == 401
    assert gateway.wait_for("wrong admin token")["path"] == path
    assert TOKEN not in gateway.log.read_text()


def test_without_a_token_this_machine_may_look_and_nobody_acts(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    state = ask(gateway, "/state").json
    assert (state["can_act"], state["token_is_set"]) == (False, False)
    assert ask(gateway, "/kill", "POST", b'{"session": "1"}').status == 403


def test_without_a_token_other_machines_see_nothing(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin={"listen": "0.0.0.0:0"})
    for path in TRUSTED:
        assert ask(gateway, path).status == 403
    assert ask(gateway, "/metrics").status == 200


def test_a_stranger_s_name_leads_nowhere_even_with_the_token(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=GUARDED | {"listen": "0.0.0.0:0"})
    for path in ("/", "/state", "/events"):
        assert ask(gateway, path, Host="rebound.example", Authorization=BEARER).status == 421


@pytest.mark.parametrize("token", ["short", "ä" * 20, "file:/no/such", "env:NO_SUCH_VARIABLE"])
def test_a_token_that_protects_nothing_keeps_the_gateway_from_starting(token: str) -> None:
    settings = Settings(authenticator=AuthenticatorSettings(cmd=["true"]), admin=AdminSettings(token=token))
    (fault,) = examine(settings, ignore)[1]
    assert fault.startswith("admin.token: ")


# What it is told


def test_the_state_has_sessions_refusals_targets_and_history(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres
) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    refuse_one(gateway)
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")

        def state() -> Any:
            return ask(gateway, "/state", Authorization=BEARER).json

        wait_until(lambda: state()["open"] == 1 and state()["history"], "the session and a point of history")
        found = state()
        (session,) = found["sessions"]
        assert (session["user"], session["target_user"]) == ("carol", "postgres")
        assert session["target"] == f"127.0.0.1:{postgres.port}"
        (refusal,) = found["refusals"]
        assert (refusal["user"], refusal["sqlstate"]) == ("mallory", "28P01")
        assert refusal["reason"] == "authenticator refused with exit status 1"
        assert found["targets"][0]["is_up"] is True
        wait_until(lambda: any(point["logins"] for point in state()["history"]), "the login to be history")
        assert any(point["p50"] for point in state()["history"])


def test_events_come_each_second_and_only_the_first_has_all_of_history(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    connection = http.client.HTTPConnection(address_of(gateway), timeout=WAIT_SECONDS)
    connection.request("GET", "/events", headers={"Authorization": BEARER})
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "text/event-stream"
    seen = []
    while len(seen) < 2:
        line = response.readline()
        if line.startswith(b"data: "):
            seen.append(json.loads(line.removeprefix(b"data: ")))
    response.close()
    connection.close()
    assert seen[0]["history"] is not None
    assert seen[1]["history"] is None
    assert_serves(gateway.port)


def test_a_session_is_killed_by_post_with_the_token_alone(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")
        session = gateway.wait_for("login")["session"]
        body = json.dumps({"session": session}).encode()
        assert ask(gateway, "/kill", "POST", body).status == 401
        assert ask(gateway, "/kill", "GET", Authorization=BEARER).status == 405
        assert ask(gateway, "/kill", "POST", body, Authorization=BEARER, Origin="http://evil.example").status == 403
        assert ask(gateway, "/kill", "POST", b"not JSON", Authorization=BEARER).status == 400
        client.assert_served()
        assert ask(gateway, "/kill", "POST", body, Authorization=BEARER).json == {"ended": 1}
        assert client.read_fatal()[0] == "57P01"
    assert ask(gateway, "/kill", "POST", body, Authorization=BEARER).json == {"ended": 0}
    act = gateway.wait_for("admin act")
    assert (act["act"], act["outcome"]) == (f"KILL {session}", "1 ended")
    assert act["client"].startswith("127.0.0.1:")


def test_a_browser_of_another_origin_gets_no_leave_to_ask(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    preflight = ask(gateway, "/kill", "OPTIONS", Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert preflight.status == 405
    assert not any(name.lower().startswith("access-control") for name in preflight.headers)


def test_a_body_that_never_comes_holds_nothing_up(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    big = raw(gateway, b"POST /kill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
    assert big.startswith(b"HTTP/1.1 413 ")


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose console must stay free of errors, those of its policy included."""
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(WAIT_SECONDS * 1000)
    expect.set_options(timeout=WAIT_SECONDS * 1000)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "console",
        # That the gateway says no, or is gone, is what some tests are about.
        lambda said: (
            faults.append(said.text) if said.type == "error" and "Failed to load resource" not in said.text else None
        ),
    )
    yield opened
    context.close()
    assert faults == []


def test_sessions_refusals_and_targets_are_shown_live(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres, page: Page
) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    page.goto(f"http://{address_of(gateway)}/")
    expect(page.locator("#status")).to_have_text("Serving")
    refuse_one(gateway)
    with RawClient(gateway.port) as client:
        client.log_in(user="carol", application_name="reports")
        row = page.locator("#sessions tr", has_text="carol")
        expect(row).to_contain_text("postgres @ postgres")
        expect(row).to_contain_text("reports")
        expect(page.locator("#refusals tr")).to_contain_text("authenticator refused with exit status 1")
        expect(page.locator("#targets tr")).to_contain_text(f"127.0.0.1:{postgres.port}")
        expect(page.locator("#targets .up")).to_have_text("up")
        expect(page.locator("#open")).to_have_text("1")
        expect(page.locator("#time-chart")).to_have_attribute("aria-label", re.compile("lately p50 "))
        expect(page.locator("#time-chart path.one")).to_have_attribute("d", re.compile("^M"))
        expect(row.get_by_role("button")).to_be_disabled()
    expect(page.locator("#sessions tr")).to_have_count(0)


def test_markup_from_clients_stays_text(start_gateway: StartGateway, mapped: Path, page: Page) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    evil = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>"
    refuse_one(gateway, "mallory", evil)
    page.goto(f"http://{address_of(gateway)}/")
    with RawClient(gateway.port) as client:
        client.log_in(user="'\"><b>carol", application_name=evil)
        expect(page.locator("#sessions tr")).to_contain_text(evil)
        expect(page.locator("#refusals tr")).to_contain_text(evil)
        assert page.locator("td img, td script, td b").count() == 0
        expect(page).to_have_title("pgauthproxy: 1 sessions")


def test_a_session_is_killed_by_keyboard_alone(start_gateway: StartGateway, mapped: Path, page: Page) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    page.goto(f"http://{address_of(gateway)}/")
    expect(page.get_by_role("alert")).to_contain_text("admin token")
    page.get_by_label("Admin token").focus()
    page.keyboard.type("a wrong token of nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not the one")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Serving")
    expect(page.locator("#token-form")).to_be_hidden()
    assert TOKEN not in page.url
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")
        button = page.get_by_role("button", name=re.compile("^Kill session .* of carol$"))
        expect(button).to_be_enabled()
        button.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("of carol (127.0.0.1:")
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        client.assert_served()
        expect(button).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="End the session")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("was ended")
        assert client.read_fatal()[0] == "57P01"
    gateway.wait_for("admin act")


def test_what_has_the_focus_keeps_it_while_the_page_lives(
    start_gateway: StartGateway, mapped: Path, page: Page
) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    page.goto(f"http://{address_of(gateway)}/")
    page.get_by_label("Admin token").fill(TOKEN)
    page.keyboard.press("Enter")
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        first.log_in(user="carol")
        button = page.get_by_role("button", name=re.compile("of carol$"))
        button.focus()
        second.log_in(user="dave")
        expect(page.locator("#sessions tr")).to_have_count(2)
        expect(button).to_be_focused()
        page.get_by_label("Show those with").fill("dave")
        expect(page.locator("#sessions tr")).to_have_count(1)


def test_a_lost_gateway_is_told(start_gateway: StartGateway, mapped: Path, page: Page) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    page.goto(f"http://{address_of(gateway)}/")
    expect(page.locator("#status")).to_have_text("Serving")
    assert gateway.stop() == 0
    expect(page.locator("#status")).to_have_text("Connection lost, trying again…")


CONTRAST = """
() => {
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (rgb) => {
    const part = (value) => value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(rgb[0]) + 0.7152 * part(rgb[1]) + 0.0722 * part(rgb[2]);
  };
  const ground = (found) => {
    for (; found; found = found.parentElement) {
      const color = parse(getComputedStyle(found).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const worst = [];
  for (const found of document.querySelectorAll("h1, h2, p, span, dt, dd, th, td, caption, label, button, input")) {
    if (!found.checkVisibility() || found.disabled || !found.textContent.trim()) continue;
    const [one, two] = [light(parse(getComputedStyle(found).color)), light(ground(found))];
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (contrast < 4.5) worst.push(found.outerHTML.slice(0, 80) + " " + contrast.toFixed(2));
  }
  return worst;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(
    start_gateway: StartGateway, mapped: Path, page: Page, scheme: Any
) -> None:
    gateway = start_gateway(mapped, admin=GUARDED)
    page.emulate_media(color_scheme=scheme)
    page.goto(f"http://{address_of(gateway)}/")
    page.get_by_label("Admin token").fill(TOKEN)
    page.keyboard.press("Enter")
    refuse_one(gateway)
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")
        expect(page.locator("#sessions tr")).to_have_count(1)
        expect(page.locator("#refusals tr")).to_have_count(1)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        assert page.evaluate(CONTRAST) == []


def test_everything_has_a_name_and_a_role(start_gateway: StartGateway, mapped: Path, page: Page) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    page.goto(f"http://{address_of(gateway)}/")
    expect(page.locator("#status")).to_have_text("Serving")
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")
        expect(page.locator("#sessions tr")).to_have_count(1)
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("region").count() >= 5
        for table in page.get_by_role("table").all():
            assert table.locator("caption").inner_text()
            assert table.locator("thead th:not([scope=col])").count() == 0
        for chart in page.locator("svg").all():
            assert chart.get_attribute("role") == "img"
            assert len(chart.get_attribute("aria-label") or "") > 10
        unnamed = page.evaluate(
            "() => [...document.querySelectorAll('button, input')].filter((found) => "
            "!(found.textContent.trim() || found.getAttribute('aria-label') || found.labels?.length)).length"
        )
        assert unnamed == 0
        identifiers = page.evaluate("() => [...document.querySelectorAll('[id]')].map((found) => found.id)")
        assert len(identifiers) == len(set(identifiers))
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to sessions")).to_be_focused()


def test_the_page_needs_no_more_room_than_a_phone_has(start_gateway: StartGateway, mapped: Path, page: Page) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"http://{address_of(gateway)}/")
    with RawClient(gateway.port) as client:
        client.log_in(user="carol", application_name="a long name of an application " * 5)
        expect(page.locator("#sessions tr")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
