"""The dashboard in a browser, on a server that converts layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.browser import browser, site, slow_engine
from tests.server.conftest import MODEL
from tests.server.site import Site

__all__ = ["browser", "site"]

KEY, ADMIN = "sk-api-0123456789", "sk-admin-0123456789"
NETWORK = "Failed to load resource"
PHONE = {"width": 360, "height": 740}


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page, in which no script fails and nothing meets the policy's refusal."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert [error for error in errors if NETWORK not in error] == []


def see(page: Any, selector: str, text: str) -> None:
    """Waits until an element says something."""
    page.locator(selector).filter(has_text=text).first.wait_for()


def until(page: Any, expression: str) -> None:
    """Waits until an expression holds in the page."""
    page.wait_for_function(f"() => {expression}")


def row(name: str) -> str:
    """Selector of the row of a request with this `X-Request-Id`."""
    return f'tr[data-request^="{name}~"]'


def say(page: Any, text: str) -> None:
    """Sends a message in the playground."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def serious(page: Any) -> list[tuple[str, list[str]]]:
    """What axe finds that keeps people from using the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def overflow(page: Any) -> int:
    """Pixels by which the page is wider than the window."""
    found: int = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
    return found


def test_it_loads_and_tells_what_it_is(page: Any, site: Site) -> None:
    page.goto(site.address)
    see(page, "#status", "Live")
    see(page, "h1", "tiny/model")
    see(page, "#no-requests", "No request is open")
    see(page, "#overview-text", "No request is running")
    assert page.locator("#overview .layer").count() == 4
    assert page.locator("figure canvas").count() == 5
    see(page, "#memory-text", "Running requests hold 0 B")


def test_a_conversion_is_seen(page: Any, site: Site) -> None:
    page.goto(site.address)
    with site.request("one"), site.request("two", dsla={"max_level": 1}):
        for name in ("one", "two"):
            see(page, f"{row(name)} td", "0 of 3")
            assert page.locator(f"{row(name)} .cell").count() == 4
        assert page.locator(".cell.converted").count() == 0
        site.engine.set_level(3)
        see(page, f"{row('one')} td", "3 of 3")
        see(page, f"{row('two')} td", "1 of 3")
        marked = page.locator(f"{row('one')} .strip")
        assert "3 of 4 layers converted: 0, 2, 3" in (marked.get_attribute("aria-label") or "")
        assert page.locator(f"{row('two')} .cell").nth(2).get_attribute("class") == "cell converted"
        see(
            page, "#overview-text", "2 requests are running. 4 of 8 layers in all of them together are converted (50%)."
        )
        share = page.locator("#overview .share").nth(2)
        assert float(share.evaluate("node => node.style.getPropertyValue('--share')")) == 1
        see(page, "#latest", "2 requests: 4 layers converted: the level was set by hand.")
        see(page, "#changes", "The level was set to 3 by hand.")
        see(page, "#level-text", "Set by hand: all requests go to level 3")
    until(page, "document.querySelectorAll('#requests tr').length === 0")


def test_tokens_speed_and_memory_are_live(page: Any, site: Site) -> None:
    page.goto(site.address)
    with site.request("one"):
        see(page, f"{row('one')} td", " of 4,000 written")
        said = page.locator(f"{row('one')} td[data-label=Tokens]")
        before = said.text_content()
        until(page, f"document.querySelector('td[data-label=Tokens]').textContent !== {before!r}")
        until(page, "/[1-9][\\d.]* tokens/.test(document.querySelector('#throughput-chart .legend').textContent)")
        until(page, "/Half within \\d/.test(document.querySelector('#itl-chart .legend').textContent)")
        until(
            page, "/KV caches \\d+(\\.\\d)? [KM]iB/.test(document.querySelector('#memory-chart .legend').textContent)"
        )


def test_a_request_is_cancelled(page: Any, site: Site) -> None:
    page.goto(site.address)
    with site.request("one"), site.request("two"):
        page.locator(f"{row('one')} button").click()
        see(page, "#cancel-text", "was cancelled")
        page.locator(row("one")).wait_for(state="detached")
        assert [request["id"].split("~")[0] for request in site.engine.stats()["requests"]] == ["two"]
        see(page, "#changes", "was cancelled.")


def test_the_level_is_set_with_the_keyboard_and_given_back(page: Any, site: Site) -> None:
    page.goto(site.address)
    see(page, "#level-text", "Automatic")
    assert page.locator("#automatic").is_checked()
    page.focus("#level")
    page.keyboard.press("End")
    see(page, "#level-text", "Set by hand: all requests go to level 3")
    assert site.engine.stats()["level"] == 3
    assert not page.locator("#automatic").is_checked()
    page.focus("#automatic")
    page.keyboard.press("Space")
    see(page, "#level-text", "Automatic")
    assert site.engine.stats()["level"] is None


def test_the_playground_says_at_which_level_each_part_was_written(page: Any, site: Site) -> None:
    page.goto(site.address)
    page.fill("#max-tokens", "250")
    page.fill("#prompt", "<b>Tell</b> me of the fox")
    page.keyboard.press("Enter")
    page.locator('.part[data-level="0"]').wait_for()
    site.engine.set_level(2)
    page.locator('.part[data-level="2"]').wait_for()
    see(page, ".note", "Computed at level 0, level 2 from token")
    assert page.locator(".chip").all_text_contents() == ["level 0", "level 2"]
    assert page.locator(".question").text_content() == "<b>Tell</b> me of the fox"
    assert page.locator(".question b").count() == 0
    assert page.locator("#send").is_enabled()


def test_an_answer_is_stopped_and_a_chat_begins_anew(page: Any, site: Site) -> None:
    page.goto(site.address)
    page.fill("#max-tokens", "3000")
    page.select_option("#quality", "full")
    page.fill("#prompt", "fox")
    page.click("#send")
    page.locator(".part").first.wait_for()
    page.click("#stop")
    see(page, ".note", "Stopped.")
    until(page, "document.querySelectorAll('#requests tr').length === 0")
    page.click("#new-chat")
    assert page.locator("#messages > *").count() == 0


def test_a_new_chat_during_an_answer_knows_nothing_of_it(page: Any, site: Site) -> None:
    asked: list[list[str]] = []

    def note(request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            asked.append([message["content"] for message in json.loads(request.post_data)["messages"]])

    page.on("request", note)
    page.goto(site.address)
    page.fill("#max-tokens", "3000")
    say(page, "fox")
    page.locator(".part").first.wait_for()
    page.click("#new-chat")
    assert page.locator("#messages > *").count() == 0
    assert page.locator("#send").is_enabled() and page.locator("#stop").is_disabled()
    page.fill("#max-tokens", "2")
    say(page, "dog")
    see(page, ".note", "Computed at")
    say(page, "cat")
    until(page, "[...document.querySelectorAll('.note')].filter((node) => node.textContent).length === 2")
    assert page.locator(".question").all_text_contents() == ["dog", "cat"]
    assert [(each[0], len(each)) for each in asked] == [("fox", 1), ("dog", 1), ("dog", 3)]
    until(page, "document.querySelectorAll('#requests tr').length === 0")


def test_an_answer_goes_on_while_the_state_is_not_told(page: Any, site: Site) -> None:
    page.goto(site.address)
    see(page, "#status", "Live")
    page.fill("#max-tokens", "200")
    say(page, "fox")
    page.locator(".part").first.wait_for()
    page.route("**/admin/state*", lambda route: route.abort())
    see(page, "#status", "The server does not answer since")
    assert page.locator("#send").is_disabled(), "the answer has ended too early to tell"
    see(page, ".note", "Computed at level 0")


def test_whoever_reads_further_up_is_left_there(page: Any, site: Site) -> None:
    page.set_viewport_size(PHONE)
    page.goto(site.address)
    page.fill("#max-tokens", "3000")
    say(page, "fox")
    box = "document.getElementById('messages')"
    rest = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight"
    until(page, f"{box}.scrollHeight > {box}.clientHeight + 50")
    until(page, f"{rest} < 1")
    page.evaluate(f"() => {{ {box}.scrollTop = 10; }}")
    height = page.evaluate(f"() => {box}.scrollHeight")
    until(page, f"{box}.scrollHeight > {height}")
    assert page.evaluate(f"() => {box}.scrollTop") == 10
    page.evaluate(f"() => {{ {box}.scrollTop = {box}.scrollHeight; }}")
    height = page.evaluate(f"() => {box}.scrollHeight")
    until(page, f"{box}.scrollHeight > {height} && {rest} < 1")
    page.click("#stop")


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
def test_a_server_that_comes_back_with_another_model_is_asked_for_that(page: Any, site: Site, noticed: bool) -> None:
    page.goto(site.address)
    page.fill("#max-tokens", "2")
    say(page, "fox")
    see(page, ".note", "Computed at")
    if not noticed:
        page.route("**/admin/state*", lambda route: route.fulfill(status=403, json={"error": {"message": "not now"}}))
    site.stop()
    if noticed:
        see(page, "#status", "The server does not answer since")
    site.model = "tiny/other"
    site.start()
    if noticed:
        see(page, "h1", "tiny/other")
    else:
        say(page, "dog")
        see(page, ".note", "There is no answer: The requested model does not exist; this server has 'tiny/other'")
    page.click("#new-chat")
    say(page, "cat")
    see(page, ".note", "Computed at")


def test_it_says_that_the_server_is_gone_and_goes_on_when_it_is_back(page: Any, site: Site) -> None:
    page.goto(site.address)
    see(page, "#status", "Live")
    site.stop()
    see(page, "#status", "The server does not answer since")
    assert page.locator("body").get_attribute("data-server") == "gone"
    site.start()
    see(page, "#status", "Live")
    with site.request("after"):
        page.locator(row("after")).wait_for()


def test_admin_and_api_keys_are_asked_for_and_stay_in_the_tab(page: Any) -> None:
    with Site(MODEL, slow_engine, api_keys=(KEY,), admin_key=ADMIN) as site:
        page.goto(site.address)
        see(page, "#status", "The server asks for the admin key")
        for none in ("sk-schlüssel", "“sk-admin-0123456789”", "two words"):
            page.fill("#admin-key", none)
            page.keyboard.press("Enter")
            see(page, "#admin-key-error", "This is no key")
            assert page.locator("#admin-key-form").is_visible() and page.locator("#admin-key").input_value() == ""
            page.fill("#admin-key", "sk-wrong")
            page.keyboard.press("Enter")
            see(page, "#admin-key-why", "Incorrect API key")
            assert page.locator("#admin-key-error").text_content() == ""
        page.fill("#admin-key", KEY)
        page.keyboard.press("Enter")
        see(page, "#admin-key-why", "This key is not for here")
        page.fill("#admin-key", ADMIN)
        page.keyboard.press("Enter")
        see(page, "#status", "Live")
        assert page.locator("#admin-key-form").is_hidden()
        page.fill("#max-tokens", "4")
        page.fill("#prompt", "fox")
        page.keyboard.press("Enter")
        see(page, "#api-key-why", "No API key was given")
        page.fill("#api-key", "sk-schlüssel")
        page.keyboard.press("Enter")
        see(page, "#api-key-error", "This is no key")
        page.fill("#api-key", f" {KEY} ")
        page.keyboard.press("Enter")
        see(page, ".note", "Computed at level 0")
        assert page.evaluate("() => Object.values(sessionStorage).sort()") == sorted([KEY, ADMIN])
        assert page.evaluate("() => [document.cookie, Object.keys(localStorage).length]") == ["", 0]


def test_names_are_text_and_never_html(page: Any) -> None:
    name = '<img src=x onerror="document.title=1">'
    with Site(name, slow_engine) as site:
        page.goto(site.address)
        see(page, "h1", name)
        assert page.locator("h1 img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [None, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_serious(page: Any, site: Site, scheme: str, size: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    if size:
        page.set_viewport_size(size)
    page.goto(site.address)
    with site.request("one"):
        site.engine.set_level(2)
        see(page, f"{row('one')} td", "2 of 3")
        page.fill("#max-tokens", "2")
        page.fill("#prompt", "fox")
        page.keyboard.press("Enter")
        see(page, ".note", "Computed at")
        assert serious(page) == []
        assert overflow(page) <= 0
    site.stop()
    see(page, "#status", "The server does not answer since")
    assert serious(page) == []
    assert overflow(page) <= 0
    site.start()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [None, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_serious_in_the_forms_for_keys(page: Any, scheme: str, size: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    if size:
        page.set_viewport_size(size)
    with Site(MODEL, slow_engine, api_keys=(KEY,), admin_key=ADMIN) as site:
        page.goto(site.address)
        see(page, "#admin-key-why", "No API key was given")
        say(page, "fox")
        see(page, "#api-key-why", "No API key was given")
        page.fill("#api-key", "sk-schlüssel")
        page.keyboard.press("Enter")
        see(page, "#api-key-error", "This is no key")
        assert serious(page) == []
        assert overflow(page) <= 0


def test_the_theme_is_chosen_and_kept(page: Any, site: Site) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(site.address)
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    see(page, "#theme", "Theme: light")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    see(page, "#theme", "Theme: light")
    assert page.evaluate(background) == light
    page.click("#theme")
    page.click("#theme")
    see(page, "#theme", "Theme: automatic")
    assert page.evaluate(background) == dark
