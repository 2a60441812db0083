"""The page at `/` in headless Chromium, as a person uses it: `make test-page`.

WRITE_SCREENSHOTS=1 writes the pictures of docs/page.md.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="`make test-page` installs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="`make test-page` installs axe")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
# Without the second line Chromium asks its maker's hosts at every start.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium`")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Person:
    """Somebody at the page of a server."""

    def __init__(self, browser: sync_api.Browser, url: str, **options: object) -> None:
        self.context = browser.new_context(viewport={"width": 1100, "height": 760}, **options)
        self.page = self.context.new_page()
        self.url = url
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def settings(self, **values: str) -> None:
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"#{name}", value)
        self.page.click("#settings-dialog button[value=save]")

    def say(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def turn(self, number: int) -> sync_api.Locator:
        """The turn with this number, once it has ended."""
        turn = self.page.locator(".turn").nth(number - 1)
        turn.get_by_role("button", name=re.compile("^Fork")).wait_for(timeout=120_000)
        return turn

    def usage(self, number: int) -> tuple[int, int, int]:
        """Tokens of a turn: read, of them cached, written."""
        text = self.turn(number).locator(".meta span").first.inner_text()
        read, cached, wrote = re.fullmatch(r"read (\d+) tokens, (\d+) of them cached; wrote (\d+)", text).groups()
        return int(read), int(cached), int(wrote)

    def picture(self, name: str) -> None:
        if os.environ.get("WRITE_SCREENSHOTS"):
            self.page.screenshot(path=IMAGES / f"{name}.png")

    def check_accessibility(self) -> None:
        results = axe.Axe().run(self.page)
        assert results.violations_count == 0, results.generate_report()


@pytest.fixture
def person(browser: sync_api.Browser, default_server: ServerProcess) -> Iterator[Person]:
    person = Person(browser, default_server.url, color_scheme="light")
    yield person
    person.context.close()
    assert person.errors == []
    # Nothing leaves this host.
    assert [url for url in person.asked if not url.startswith(person.url)] == []


def sessions(url: str, headers: dict[str, str] | None = None) -> dict[int, int]:
    """Turns of each session on the server."""
    data = httpx.get(f"{url}/v1/sessions", params={"limit": 1000}, headers=headers).json()["data"]
    return {session["id"]: session["turns"] for session in data}


def test_a_conversation_of_three_turns_edited_forked_rewound_and_reloaded(person: Person) -> None:
    before = sessions(person.url)
    person.settings(temperature="0", max_tokens="40")
    person.say("What is the capital of Japan?")
    assert "Tokyo" in person.turn(1).inner_text()
    person.say("How many people live there?")
    assert "Tokyo" in person.turn(2).inner_text()
    person.say("Write a short list of three cities.")
    person.turn(3)
    read, cached, _ = person.usage(3)
    assert read - cached < 40  # what came before is not computed again
    person.check_accessibility()
    person.picture("page-light")
    person.page.click("#theme")
    person.check_accessibility()
    person.picture("page-dark")

    mine = next(iter(sessions(person.url).keys() - before.keys()))
    assert sessions(person.url)[mine] == 3
    person.turn(3).get_by_role("button", name="Edit the message of turn 3").click()
    sync_api.expect(person.page.locator("#prompt")).to_have_value("Write a short list of three cities.")
    assert person.page.locator(".turn").count() == 2
    person.say("Name a river.")
    person.turn(3)
    assert sessions(person.url)[mine] == 3

    person.turn(1).get_by_role("button", name="Fork after turn 1").click()
    person.page.locator("#conversations li").nth(1).wait_for()
    assert person.page.locator(".turn").count() == 1
    person.say("What language do people speak there?")
    person.turn(2)
    after = sessions(person.url)
    (branch,) = after.keys() - before.keys() - {mine}
    assert (after[mine], after[branch]) == (3, 2)

    person.page.reload()
    assert person.page.locator("#conversations li").count() == 2
    person.page.keyboard.press("Alt+ArrowDown")
    person.turn(3)
    person.turn(1).get_by_role("button", name="Rewind to turn 1").click()
    sync_api.expect(person.page.locator(".turn")).to_have_count(1)
    assert sessions(person.url)[mine] == 1


def test_stop_keeps_what_was_generated(person: Person) -> None:
    person.settings(temperature="0", max_tokens="2000")
    person.say("Write a very long story about a ship.")
    person.page.locator(".turn .said").nth(1).get_by_text(re.compile(r"\w{3}")).first.wait_for()
    person.page.keyboard.press("Escape")
    stopped = person.turn(1)
    assert person.usage(1)[2] < 2000
    assert stopped.inner_text()
    assert person.page.is_visible("#send")


def test_a_session_that_the_server_lost_is_told_again(person: Person) -> None:
    before = sessions(person.url)
    person.settings(temperature="0", max_tokens="24")
    person.say("What is the capital of Japan?")
    person.turn(1)
    (mine,) = sessions(person.url).keys() - before.keys()
    httpx.delete(f"{person.url}/v1/sessions/{mine}").raise_for_status()
    person.say("How many people live there?")
    assert "Tokyo" in person.turn(2).inner_text()
    # What was told again is one turn there; the page goes on counting as it did.
    assert sessions(person.url)[mine] == 1
    person.say("Name a river.")
    person.turn(3)
    person.turn(2).get_by_role("button", name="Rewind to turn 2").click()
    sync_api.expect(person.page.locator(".turn")).to_have_count(2)
    assert sessions(person.url)[mine] == 1
    person.turn(1).get_by_role("button", name="Rewind to turn 1").click()
    sync_api.expect(person.page.locator(".turn")).to_have_count(1)
    person.say("How many people live there?")
    assert "Tokyo" in person.turn(2).inner_text()


def test_a_refused_turn_gives_the_words_back(person: Person) -> None:
    person.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "full"}})
    )
    person.say("Hello")
    sync_api.expect(person.page.locator("#notice")).to_have_text("full")
    assert person.page.input_value("#prompt") == "Hello"
    assert person.page.locator(".turn").count() == 0


def test_what_a_model_says_never_becomes_html(person: Person) -> None:
    words = "# A\\n<img src=x onerror=alert(1)> **b** `c` [d](javascript:alert(1))"
    words += "\\n\\n- one\\n- two\\n\\n```py\\nx = 1\\n```"
    done = '{"choices":[{"delta":{},"finish_reason":"stop"}]}'
    body = f'data: {{"choices":[{{"delta":{{"content":"{words}"}}}}]}}\n\ndata: {done}\n\ndata: [DONE]\n\n'
    person.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    person.say("Hello")
    said = person.turn(1).locator(".answer .said")
    assert said.locator("img").count() == 0
    assert said.locator("a").count() == 0
    assert said.locator("strong").inner_text() == "b"
    assert said.locator("li").all_inner_texts() == ["one", "two"]
    assert said.locator("pre code").inner_text() == "x = 1"
    assert "<img src=x onerror=alert(1)>" in said.inner_text()


def test_thoughts_are_folded_and_calls_are_answered(person: Person) -> None:
    call = '{"index":0,"id":"c1","type":"function","function":{"name":"weather","arguments":"{\\"city\\":\\"Rome\\"}"}}'
    pieces = ['{"reasoning_content":"Hm."}', f'{{"tool_calls":[{call}]}}']
    chunks = [f'{{"choices":[{{"delta":{piece}}}]}}' for piece in pieces]
    chunks += ['{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}', "[DONE]"]
    body = "".join(f"data: {chunk}\n\n" for chunk in chunks)
    sent = []

    def answer(route: sync_api.Route) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=body)

    person.page.route("**/v1/chat/completions", answer)
    person.settings(tools='[{"type":"function","function":{"name":"weather","parameters":{"type":"object"}}}]')
    person.say("How is the weather in Rome?")
    turn = person.turn(1)
    thoughts = turn.locator("details.thoughts")
    assert thoughts.get_attribute("open") is None
    thoughts.locator("summary").click()
    assert "Hm." in thoughts.inner_text()
    assert '"city": "Rome"' in turn.locator("pre").inner_text()
    turn.locator("form.call textarea").fill("sunny")
    turn.get_by_role("button", name="Send results").click()
    person.turn(2)
    assert sent[0]["tools"][0]["function"]["name"] == "weather"
    # The server has heard of nothing here: it is told the whole conversation.
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "tool"]
    assert sent[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def test_phone_width(person: Person) -> None:
    person.page.set_viewport_size({"width": 390, "height": 760})
    person.settings(temperature="0", max_tokens="24")
    person.say("What is the capital of Japan?")
    person.turn(1)
    person.say("How many people live there?")
    person.turn(2)
    person.check_accessibility()
    person.picture("page-phone")
    assert not person.page.is_visible("#sidebar")
    person.page.click("#menu")
    assert person.page.is_visible("#new")
    person.check_accessibility()
    person.page.click("#new")
    assert not person.page.is_visible("#sidebar")
    width = person.page.locator("body").evaluate("body => body.scrollWidth")
    assert width <= 390


def test_the_page_about_the_server(person: Person) -> None:
    body = {"prompt": "Write a long story.", "request_output_len": 300, "ignore_eos": True}
    person.page.goto(f"{person.url}/#server")
    sync_api.expect(person.page.locator("#kv-text")).to_have_text(re.compile(r"Of \d+ blocks, \d+ are in use"))
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(httpx.post, f"{person.url}/generate", json=body, timeout=120) for _ in range(8)]
        busy = re.compile(r"Now [1-9][\d.,]*, at most [\d.,]+\.")
        sync_api.expect(person.page.locator("#rate-text")).to_have_text(busy, timeout=30_000)
        three = re.compile(r"(\S+ ){3}\S+")
        sync_api.expect(person.page.locator("#rate polyline")).to_have_attribute("points", three, timeout=30_000)
        person.check_accessibility()
        person.picture("page-server")
        assert [reply.result().status_code for reply in asked] == [200] * 8
    tiles = person.page.locator("#tiles").inner_text()
    assert "Running" in tiles
    assert "Preemptions" in tiles
    sync_api.expect(person.page.locator("#usage")).to_contain_text("completion tokens")


def test_a_conversation_from_the_key_to_the_reload(browser: sync_api.Browser, tmp_path: Path) -> None:
    key = {"Authorization": "Bearer secret"}
    with serving(tmp_path, "--api-key", "secret") as server:
        person = Person(browser, server.url)
        sync_api.expect(person.page.locator("#key-dialog")).to_be_visible()
        person.page.fill("#key", "secret")
        person.page.click("#key-dialog button[value=save]")
        sync_api.expect(person.page.locator("#model")).to_contain_text("SmolLM2")
        person.settings(temperature="0", max_tokens="8")
        for number, words in enumerate(["Hello", "Name a river.", "Name a city."], 1):
            person.say(words)
            person.turn(number)
        assert list(sessions(server.url, key).values()) == [3]

        person.turn(2).get_by_role("button", name="Fork after turn 2").click()
        person.page.locator("#conversations li").nth(1).wait_for()
        person.turn(2).get_by_role("button", name="Edit the message of turn 2").click()
        sync_api.expect(person.page.locator("#prompt")).to_have_value("Name a river.")
        person.settings(max_tokens="2000")
        person.say("Write a very long story about a ship.")
        person.page.locator(".turn").nth(1).get_by_role("button", name="Fork").wait_for(state="detached")
        person.page.locator(".turn .said").nth(3).get_by_text(re.compile(r"\w{3}")).first.wait_for()
        person.page.keyboard.press("Escape")
        stopped = person.turn(2).inner_text()
        assert 0 < person.usage(2)[2] < 2000
        assert sorted(sessions(server.url, key).values()) == [2, 3]

        # The key, the conversations and the stopped answer are there again.
        person.page.reload()
        sync_api.expect(person.page.locator("#conversations li")).to_have_count(2)
        assert person.turn(2).inner_text() == stopped
        person.say("Thank you.")
        person.page.keyboard.press("Escape")
        person.turn(3)
        assert sorted(sessions(server.url, key).values()) == [3, 3]
        assert person.errors == []
        person.context.close()


def test_an_operator_sees_what_each_key_uses(browser: sync_api.Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[key]]\nname = "watch"\nkey = "sk-watch"\noperator = true\n[[key]]\nname = "w\\"eb"\nkey = "sk-web"\n',
        "utf-8",
    )
    with serving(tmp_path, "--keys", str(keys)) as server:
        body = {"prompt": "Hello", "request_output_len": 7, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/generate", json=body, headers={"Authorization": "Bearer sk-web"}, timeout=60)
        prompt = reply.json()["usage"]["prompt_tokens"]
        person = Person(browser, server.url)
        person.page.fill("#key", "sk-watch")
        person.page.click("#key-dialog button[value=save]")
        sync_api.expect(person.page.locator("#model")).to_contain_text("SmolLM2")
        person.page.goto(f"{person.url}/#server")
        row = person.page.locator("#keys tbody tr", has_text='w"eb')
        sync_api.expect(row).to_have_text(f'w"eb001{prompt}07')
        person.check_accessibility()
        person.context.close()
