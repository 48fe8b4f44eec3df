"""
Test the report in a real browser. Plain pytest does not collect this file: it needs Chromium and its driver.

    apt-get install chromium chromium-driver; pip install selenium && pytest tests/extra_report.py
"""
import json, os, shutil, time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import evaluate
from buffer import Buffer, image_name, make_row
from evaluate import play, record, scripted_agent
from small_runs import straight, tiny  # noqa: F401  (fixtures)
from test_report import HOSTILE
from worlds.registry import make

# 200 episodes, about 1,500 turns
GAMES = dict(NumberLine=80, EZPoints=60, Blackjack=40, Points24=20)

CHROMIUM_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
]

# [[contrast with what is behind it, class, text]] of all texts, as WCAG 2 defines contrast
CONTRASTS = """
const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4
const luminance = (...colours) => {
    for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1) }
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(x => linear(x / 255))
    return .2126 * r + .7152 * g + .0722 * b
}
const behind = e => e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : ["white"]
const texts = ".tok, .panel td, .prompt, small, summary *, .filters label, p"
return [...document.querySelectorAll(texts)].filter(e => e.offsetWidth).map(e => {
    const back = behind(e)
    const front = [...back, getComputedStyle(e).color]
    const [a, b] = [luminance(...back), luminance(...front)].sort((x, y) => y - x)
    return [(a + .05) / (b + .05), e.className, e.textContent.slice(0, 20)]
})
"""

def record_hostile_reply(buf):
    """Append an episode of one turn whose texts try to leave their place."""
    image = Image.new("RGB", (80, 80), "teal")
    row = make_row(
        "hostile",
        0,
        "NumberLine",
        0,
        dict(image=image, text=HOSTILE),
        HOSTILE,
        source="<b>x</b>",
        valid=False,
        reward=-1.0,
        terminated=True,
    )
    buf.append([row], {image_name(image): image})

@pytest.fixture(scope="module")
def page(straight, tmp_path_factory):  # noqa: F811
    """Path of a page of 200 episodes by bad players, one of them hostile, judged by a critic."""
    folder = str(tmp_path_factory.mktemp("report") / "data")
    buf = Buffer(folder, create=True)
    record_hostile_reply(buf)
    for name, n in GAMES.items():
        mix = {"expert": 0.4, "random": 0.4, "malformed": 0.2}
        players = scripted_agent(mix, np.random.default_rng(0))
        if name == "NumberLine":
            # the hostile episode is one of its own
            n -= 1
        episodes = play(
            lambda: make(name),
            players,
            list(range(n)),
            split="train",
            prefix=f"{name}-",
        )
        record(episodes, buf)
    run = shutil.copytree(straight, tmp_path_factory.mktemp("run") / "run")
    # after four updates A is next to 0, so that beta = 0 lets some tokens pass and others not
    config = json.loads((run / "config.json").read_text()) | dict(beta=0.0)
    (run / "config.json").write_text(json.dumps(config))
    evaluate.main([folder, "--report", "--report_episodes=200", f"--critic={run}"])
    return os.path.join(folder, "report.html")

@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        message = "Chromium or its driver is missing: apt-get install chromium chromium-driver"
        pytest.fail(message, pytrace=False)
    options = webdriver.ChromeOptions()
    for flag in CHROMIUM_FLAGS:
        options.add_argument(flag)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()

class Reader:
    """A person in front of the page: finds elements, presses keys, reads the panel."""

    def __init__(self, browser, page):
        self.browser = browser
        began = time.time()
        browser.get("file://" + page)
        # returns when the page is laid out
        self.js("return document.body.offsetHeight")
        self.seconds = time.time() - began

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def all(self, css):
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        return self.all(css)[0]

    def panel(self):
        return self.one("#panel").text

    def shown(self):
        return [episode for episode in self.all("#list > details") if episode.is_displayed()]

    def focused(self):
        return self.browser.switch_to.active_element

    def press(self, key):
        self.focused().send_keys(key)

    def hover(self, element):
        webdriver.ActionChains(self.browser).move_to_element(element).perform()

@pytest.fixture
def reader(browser, page):
    """The page, freshly opened. Afterwards nothing may be in the browser's log."""
    yield Reader(browser, page)
    assert browser.get_log("browser") == []

def test_two_hundred_episodes_open_fast(reader, page):
    """The page opens in 3 s and has at most 30 MB; closed episodes are not even built."""
    size = os.path.getsize(page) / 1e6
    print(f"\n{size:.1f} MB, open after {reader.seconds:.2f} s")
    assert reader.seconds < 3
    assert size < 30
    assert len(reader.shown()) == 200
    assert reader.one("#count").text == "200 of 200 episodes"
    assert len(reader.all(".turn")) == len(reader.all("#list > details:first-child .turn"))

    began = time.time()
    turns = reader.js("return data.episodes.flatMap(e => e.turns).length")
    reader.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    while len(reader.all(".turn")) < turns and time.time() - began < 20:
        time.sleep(0.05)
    print(f"all {turns} turns built after {time.time() - began:.2f} s")
    assert time.time() - began < 10

def test_a_click_shows_a_token(reader):
    """The panel has p, Q, V, A, the filter's verdict and ten alternatives, the token itself in bold.

    Another token shows while the mouse points at it.
    """
    assert "Point at a token" in reader.panel()
    first, second = reader.all(".tok[aria-label]")[:2]
    first.click()
    text = reader.panel()
    for part in ("p\n", "Q\n", "V\n", "A\n", "β", "the filter"):
        assert part in text
    assert len(reader.all("#panel table tr")) == 11
    assert len(reader.all("#panel tr.said")) == 1
    assert len(reader.all("#panel table tr:nth-child(2) td")) == 3
    assert "pick" in first.get_attribute("class")
    reader.hover(second)
    hovered = reader.panel()
    reader.hover(reader.one("h1"))
    assert hovered != text
    assert reader.panel() == text
    reader.one("#panel .close").click()
    assert "Point at a token" in reader.panel()

def test_filters_change_what_is_shown(reader):
    """Kinds of episodes, games, and both together; the counts agree with the list."""
    radios = {}
    counts = {}
    for radio in reader.all("#filters label"):
        name, count = radio.text.rsplit(" ", 1)
        radios[name] = radio
        counts[name] = int(count)
    names = {"all", "reached the goal", "failed", "invalid actions", "filtered tokens"}
    assert set(radios) == names
    assert counts["all"] == 200 == counts["failed"] + counts["reached the goal"]
    for name, radio in radios.items():
        radio.click()
        assert len(reader.shown()) == counts[name] > 0
        assert reader.one("#count").text == f"{counts[name]} of 200 episodes"

    radios["failed"].click()
    failed = reader.shown()
    assert all("missed" in episode.text for episode in failed)
    reader.one("#filters select").send_keys("Points24")
    assert 0 < len(reader.shown()) < len(failed)
    assert all("Points24" in episode.text for episode in reader.shown())
    radios["all"].click()
    assert len(reader.shown()) == GAMES["Points24"]

def test_without_a_mouse(reader):
    """Tab reaches replies, arrows walk over tokens and turns, Enter opens, Escape closes the panel."""
    reader.js("document.querySelectorAll('details').forEach(e => { e.open = false })")
    reader.js("data.episodes.find(e => e.turns.length > 3).node.firstChild.focus()")
    reader.press(Keys.ENTER)
    time.sleep(0.3)
    reader.press(Keys.TAB)
    panels = [reader.panel()]
    keys = [Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.END]
    for key in keys:
        reader.press(key)
        assert reader.focused().get_attribute("class").startswith("tok")
        panels.append(reader.panel())
    assert panels[0] != panels[1] != panels[2]
    assert panels[3] == panels[1]
    assert panels[5] == panels[0]
    reader.press(Keys.ESCAPE)
    assert "Point at a token" in reader.panel()

def test_hostile_words_are_only_words(reader):
    """They are on the page as they were said, and run nothing."""
    [episode] = [e for e in reader.all("#list > details") if "hostile" in e.text]
    if not episode.get_attribute("open"):
        episode.find_element(By.TAG_NAME, "summary").click()
        time.sleep(0.3)
    tokens = "[...arguments[0].querySelectorAll('.tok')].map(e => data.words[e.info[0]])"
    reply = reader.js(f"return {tokens}.join('')", episode)
    assert "</script><script>boom()</script>" in reply
    assert "<b>x</b>" in episode.text
    foreign = "script, b:not(.yes):not(.no), img[onerror]"
    assert not episode.find_elements(By.CSS_SELECTOR, foreign)

def emulate(browser, width, scheme):
    """Give the browser a screen of some width, and a light or dark colour scheme."""
    screen = dict(
        width=width,
        height=800,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_readable_on_every_screen(reader, width, scheme):
    """Nothing is wider than the screen, texts have a contrast of 4.5 : 1 (WCAG), the panel hides no token."""
    box = "const r = arguments[0].getBoundingClientRect(); return [r.top, r.bottom]"
    try:
        emulate(reader.browser, width, scheme)
        token = reader.all(".tok[aria-label]")[-1]
        reader.js("arguments[0].focus()", token)
        time.sleep(0.3)
        assert reader.js("return document.documentElement.scrollWidth") <= width
        top, bottom = reader.js(box, token)
        # on a phone the panel is below the token
        lowest = 800
        if width < 500:
            lowest, _ = reader.js(box, reader.one("#panel"))
        assert 0 <= top and bottom <= lowest
        contrasts = sorted(reader.js(CONTRASTS))
        assert len(contrasts) > 100
        assert contrasts[0][0] >= 4.5, contrasts[:5]
    finally:
        reader.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
