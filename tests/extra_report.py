"""
The report in a real browser. Not collected by plain pytest, since it needs headless Chromium and its driver:

    apt-get install chromium chromium-driver; pip install selenium && pytest tests/extra_report.py
"""
import json, os, shutil, time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import envs, evaluate
from worlds.registry import make
from buffer import Buffer, image_name, make_row
from evaluate import play, record, scripted_agent
from test_report import HOSTILE
from test_train import straight, tiny  # noqa: F401  (fixtures)

GAMES = dict(NumberLine=80, EZPoints=60, Blackjack=40, Points24=20)         # 200 episodes, about 1,500 turns


@pytest.fixture(scope="module")
def page(straight, tmp_path_factory):
    """Path of a page of 200 episodes by bad players, one of which says hostile things, judged by a critic."""
    folder = str(tmp_path_factory.mktemp("report") / "data")
    buf = Buffer(folder, create=True)
    obs = dict(image=Image.new("RGB", (80, 80), "teal"), text=HOSTILE)
    buf.append([make_row("hostile", 0, "NumberLine", 0, obs, HOSTILE, source="<b>x</b>", valid=False, reward=-1.0, terminated=True)], {image_name(obs["image"]): obs["image"]})
    for name, n in GAMES.items():
        players = scripted_agent({"expert": 0.4, "random": 0.4, "malformed": 0.2}, np.random.default_rng(0))
        record(play(lambda: make(name), players, list(range(n - (name == "NumberLine"))), split="train", prefix=f"{name}-"), buf)
    run = shutil.copytree(straight, tmp_path_factory.mktemp("run") / "run")
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | dict(beta=0.0)))    # after four updates A is next to 0
    evaluate.main([folder, "--report", "--report_episodes=200", f"--critic={run}"])
    return os.path.join(folder, "report.html")


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.fail("Chromium or its driver is missing: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    d = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield d
    d.quit()


@pytest.fixture
def at(browser, page):
    """The page, freshly opened, with a few short names for what one does there. Afterwards: not a word in the browser's log."""
    began = time.time()
    browser.get("file://" + page)
    browser.execute_script("return document.body.offsetHeight")             # laid out
    all_of = lambda css: browser.find_elements(By.CSS_SELECTOR, css)
    yield SimpleNamespace(d=browser, seconds=time.time() - began, all=all_of, one=lambda css: all_of(css)[0], panel=lambda: all_of("#panel")[0].text,
                          js=browser.execute_script, key=lambda key: browser.switch_to.active_element.send_keys(key), shown=lambda: [e for e in all_of("#list > details") if e.is_displayed()])
    assert browser.get_log("browser") == []


def test_two_hundred_episodes_open_fast(at, page):
    """Under 3 s and 30 MB, and so does an episode; the others are not even built."""
    size = os.path.getsize(page) / 1e6
    print(f"\n{size:.1f} MB, open after {at.seconds:.2f} s")
    assert at.seconds < 3 and size < 30 and len(at.shown()) == 200 and at.one("#count").text == "200 of 200 episodes"
    assert len(at.all(".turn")) == len(at.all("#list > details:first-child .turn"))
    began, turns = time.time(), at.js("return data.episodes.flatMap(e => e.turns).length")
    at.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    while at.js("return document.querySelectorAll('.turn').length") < turns and time.time() - began < 20:
        time.sleep(0.05)
    print(f"all {turns} turns built after {time.time() - began:.2f} s")
    assert time.time() - began < 10


def test_a_click_shows_a_token(at):
    """p, Q, V, A, whether it passes, and ten alternatives with their p and Q, the token itself in bold; hovering shows another one for the moment."""
    assert "Point at a token" in at.panel()
    first, second = at.all(".tok[aria-label]")[:2]
    first.click()
    text = at.panel()
    assert all(word in text for word in ("p\n", "Q\n", "V\n", "A\n", "β", "the filter")) and len(at.all("#panel table tr")) == 11 and len(at.all("#panel tr.said")) == 1
    assert len(at.all("#panel table tr:nth-child(2) td")) == 3 and "pick" in first.get_attribute("class")
    webdriver.ActionChains(at.d).move_to_element(second).perform()
    hovered = at.panel()
    webdriver.ActionChains(at.d).move_to_element(at.one("h1")).perform()
    assert hovered != text and at.panel() == text
    at.one("#panel .close").click()
    assert "Point at a token" in at.panel()


def test_filters_change_what_is_shown(at):
    """Failures, invalid actions, games, and both together; the counts agree with the list."""
    radios = {e.text.rsplit(" ", 1)[0]: (e, int(e.text.rsplit(" ", 1)[1])) for e in at.all("#filters label")}
    assert set(radios) == {"all", "reached the goal", "failed", "invalid actions", "filtered tokens"} and radios["all"][1] == 200 == radios["failed"][1] + radios["reached the goal"][1]
    for name, (radio, n) in radios.items():
        radio.click()
        assert len(at.shown()) == n > 0 and at.one("#count").text == f"{n} of 200 episodes"
    radios["failed"][0].click()
    assert all("missed" in e.text for e in at.shown())
    before = len(at.shown())
    at.one("#filters select").send_keys("Points24")
    assert 0 < len(at.shown()) < before and all("Points24" in e.text for e in at.shown())
    radios["all"][0].click()
    assert len(at.shown()) == GAMES["Points24"]


def test_without_a_mouse(at):
    """Tab reaches an episode's summary and its replies, the arrows walk over tokens and turns, Enter opens, Escape closes the details."""
    at.js("document.querySelectorAll('details').forEach(e => { e.open = false }); data.episodes.find(e => e.turns.length > 3).node.firstChild.focus()")
    at.key(Keys.ENTER)
    time.sleep(0.3)
    at.key(Keys.TAB)
    seen = [at.panel()]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.END):
        at.key(key)
        assert at.d.switch_to.active_element.get_attribute("class").startswith("tok")
        seen.append(at.panel())
    assert seen[0] != seen[1] != seen[2] and seen[3] == seen[1] and seen[5] == seen[0]
    at.key(Keys.ESCAPE)
    assert "Point at a token" in at.panel()


def test_hostile_words_are_only_words(at):
    """They stand on the page as they were said, and run nothing."""
    [episode] = [e for e in at.all("#list > details") if "hostile" in e.text]
    if not episode.get_attribute("open"):
        episode.find_element(By.TAG_NAME, "summary").click()
        time.sleep(0.3)
    said = at.js("return [...arguments[0].querySelectorAll('.tok')].map(e => data.words[e.info[0]]).join('')", episode)
    assert "</script><script>boom()</script>" in said and "<b>x</b>" in episode.text and not episode.find_elements(By.CSS_SELECTOR, "script, b:not(.yes):not(.no), img[onerror]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_readable_on_every_screen(at, width, scheme):
    """Nothing is wider than the screen, text contrasts with what is behind it (4.5 : 1 as WCAG asks), details do not hide the token on a phone."""
    try:
        at.d.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500))
        at.d.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        token = at.all(".tok[aria-label]")[-1]
        at.js("arguments[0].focus()", token)
        time.sleep(0.3)
        assert at.js("return document.documentElement.scrollWidth") <= width
        box, panel = (at.js("const r = arguments[0].getBoundingClientRect(); return [r.top, r.bottom]", e) for e in (token, at.one("#panel")))
        assert 0 <= box[0] and box[1] <= (panel[0] if width < 500 else 800)
        ratios = at.js("""
            const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
            const light = (...colours) => { for (const c of colours) { paint.fillStyle = c; paint.fillRect(0, 0, 1, 1) }
                const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
            const behind = e => e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : ["white"]
            return [...document.querySelectorAll(".tok, .panel td, .prompt, small, summary *, .filters label, p")].filter(e => e.offsetWidth).map(e => {
                const back = behind(e), [a, b] = [light(...back), light(...back, getComputedStyle(e).color)].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.className, e.textContent.slice(0, 20)] })""")
        assert len(ratios) > 100 and min(ratios)[0] >= 4.5, sorted(ratios)[:5]
    finally:
        at.d.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
