"""
Environments that need optional packages: gymnasium's, BabyAI, MiniWoB++. Stand-ins take the packages' place.

    python -m pytest tests/test_worlds.py

tests/extra_envs.py plays the real ones.
"""
import importlib.util
import io, sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from env_helpers import say
from envs import MARKER, Words
from worlds import miniwob
from worlds.gym import Gym
from worlds.miniwob import MiniWoB, format_element, page_elements
from worlds.players import has_expert, scripted_reply
from worlds.registry import make

# ---- gymnasium ----

class Corridor:
    """An environment as gymnasium makes it: three steps to the right."""

    def reset(self, seed=None):
        self.seed = seed
        self.at = 0
        return 0, {}

    def step(self, action):
        step = 1 if action == 1 else -1
        self.at = max(0, self.at + step)
        is_end = self.at == 3
        # gymnasium's environments may return types of numpy.
        return self.at, np.float64(is_end), np.bool_(is_end), False, {}

    def render(self):
        return np.full((20, 30, 3), 60 * self.at, np.uint8)

class Walk(Gym):
    name = "Walk"
    goal = "Go right."
    example = "right"
    kinds = (Words("left", "right"),)
    max_turns = 5
    split = False
    id = "Corridor-v3"
    settings = {"length": 3}

    def expert(self):
        return "right"

@pytest.fixture
def calls(monkeypatch):
    """Replace gymnasium by one that makes corridors, and return the list of the calls of its make()."""
    calls = []

    def make_corridor(id, **settings):
        calls.append((id, settings))
        return Corridor()

    monkeypatch.setitem(sys.modules, "gymnasium", SimpleNamespace(make=make_corridor))
    return calls

def test_gym_wraps_any_environment_with_a_picture_and_names(calls):
    env = Walk(size=40)
    obs, _ = env.reset(seed=1)
    settings = dict(render_mode="rgb_array", disable_env_checker=True, length=3)
    assert calls == [("Corridor-v3", settings)]
    assert obs["image"].size == (40, 40)
    assert say(env, "left", "fly", "right", "right")[:3] == (0.0, False, False)
    assert env.gym.at == 2
    reward, terminated, truncated, info = say(env, "right")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert type(reward) is float
    assert type(terminated) is bool
    assert scripted_reply("expert", env, np.random.default_rng(0)) == f"{MARKER} right"
    assert has_expert(env)

def test_gym_passes_seeds_on(calls):
    env = Walk(size=40)
    env.reset(seed=1)
    seed = env.gym.seed
    say(env, "right", "right", "right")
    fingerprint = env.fingerprint()
    env.reset(seed=1)
    assert env.gym.seed == seed
    assert env.fingerprint() != fingerprint
    env.reset(seed=2)
    assert env.gym.seed != seed


NEEDY = ["FrozenLake", "BabyAI-GoToLocal-v0", "miniwob/click-test-v1", "NumberLine,FrozenLake"]

@pytest.mark.parametrize("name", NEEDY)
def test_a_missing_package_is_one_sentence(monkeypatch, name):
    for package in ("gymnasium", "minigrid", "selenium", "selenium.common.exceptions"):
        monkeypatch.setitem(sys.modules, package, None)
    needs = "needs the package .*pip install -r requirements-envs.txt"
    with pytest.raises(SystemExit, match=needs) as error:
        make(name)
    assert "\n" not in str(error.value)


# ---- MiniWoB++ ----

def node(ref, tag, *children, box=(0, 0, 10, 10), **more):
    """Return a node as core.getDOMInfo() does."""
    left, top, width, height = box
    fields = dict(
        ref=ref,
        tag=tag,
        children=list(children),
        bgColor="rgba(0, 0, 0, 0)",
        classes="",
        left=left,
        top=top,
        width=width,
        height=height,
    )
    return fields | more

def text_node(ref, text):
    """Return a piece of text as a node; such nodes have references below 0."""
    return node(ref, "t", text=text)


CHECKBOX = node(4, "INPUT_checkbox", value=False, box=(10, 60, 12, 12))
TEXTBOX = node(5, "INPUT_text", value="ab", focused=True, box=(10, 80, 100, 20))
BUTTON = node(6, "BUTTON", node(7, "SPAN"), text_node(-2, "Close"), box=(10, 120, 40, 20))
FORM = node(
    1,
    "BODY",
    node(
        2,
        "DIV",
        node(3, "LABEL", CHECKBOX, text_node(-1, "nThOE")),
        TEXTBOX,
        BUTTON,
        node(8, "DIV", text_node(-3, "two"), text_node(-4, "lines")),
        node(9, "DIV"),
        node(10, "DIV", bgColor="rgb(255, 0, 0)"),
        node(11, "BUTTON", text="it's"),
    ),
)

def test_a_page_as_lines():
    """Elements that show a text or take input have a line and a number; what is layout only has none."""
    assert [format_element(element) for element in page_elements(FORM)] == [
        "checkbox off [4]",
        "'nThOE'",
        "textbox 'ab' [5]",
        "button 'Close' [6]",
        "div 'two lines' [8]",
        "div 'rgb(255, 0, 0)' [10]",
        "button \"it's\" [11]",
    ]

class FakeBrowser:
    """Show the form above: button 6 ends the page with a reward of 1, button 11 breaks the browser."""

    current_url = ""

    def __init__(self):
        self.clicks = []
        self.over = False
        self.shots = 0
        process = SimpleNamespace(pid=2**30, wait=lambda: None)
        self.service = SimpleNamespace(process=process)

    def get(self, url):
        self.current_url = url

    def execute_cdp_cmd(self, *args):
        pass

    def get_screenshot_as_png(self):
        # Every screenshot has another colour.
        self.shots += 1
        data = io.BytesIO()
        Image.new("RGB", (500, 240), (self.shots, len(self.clicks), 7)).save(data, "PNG")
        return data.getvalue()

    def execute_script(self, script, *args):
        if "elementClick" in script:
            if args[0] == 11:
                raise OSError("gone")
            self.clicks.append(args[0])
            self.over = args[0] == 6
        elif script.startswith(miniwob.START_SCRIPT):
            self.over = False
            self.seed = args[0]
        goal = f"Click {self.seed % 7}."
        if self.over:
            return [True, True, 1, goal, None]
        return [True, False, 0, goal, FORM]

@pytest.fixture
def sent(monkeypatch):
    """Replace selenium by a stand-in, and return the list of (place, keys) that is sent to the page."""
    sent = []

    class FakeChain:
        """selenium's chain of pointer and key actions."""

        def __init__(self, browser, duration):
            self.place = None
            self.w3c_actions = SimpleNamespace(pointer_action=self)

        def move_to_location(self, x, y):
            self.place = (x, y)
            return self

        def click(self):
            return self

        def send_keys(self, keys):
            self.keys = keys
            return self

        def perform(self):
            sent.append((self.place, self.keys))

    modules = {
        "selenium": SimpleNamespace(),
        "selenium.common": SimpleNamespace(),
        "selenium.common.exceptions": SimpleNamespace(WebDriverException=RuntimeError),
        "selenium.webdriver": SimpleNamespace(ActionChains=FakeChain),
        "urllib3": SimpleNamespace(),
        "urllib3.exceptions": SimpleNamespace(HTTPError=OSError),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return sent

@pytest.fixture
def make_page(sent, monkeypatch, tmp_path):
    """Return a function that makes a MiniWoB environment on a fake browser and resets it."""
    folder = tmp_path / "html" / "miniwob"
    folder.mkdir(parents=True)
    (folder / "click-test.html").write_text("")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(MiniWoB, "idle", [FakeBrowser()])

    def make_it(name="miniwob/click-test-v1", **kw):
        env = make(name, **kw)
        env.reset(seed=0)
        return env

    return make_it

def test_miniwob_acts_by_number_and_by_place(make_page, sent):
    env = make_page(penalty=-0.25)
    prompt = env.prompt()
    assert prompt.startswith(f"Click {env.browser.seed % 7}.\ncheckbox off [4]\n")
    actions = 'click ELEMENT or type ELEMENT "TEXT" or click X Y or type "TEXT" or press Enter'
    assert actions in prompt
    assert say(env, "click 4")[:3] == (0.0, False, False)
    assert env.browser.clicks == [4]
    assert say(env, 'type 5 "abc"')[3]["valid"]
    assert env.browser.clicks == [4, 5]
    assert sent == [(None, "abc")]
    # A control key inside of a text is left out.
    say(env, "click 80 112", 'type "x\ue009y"', "press Enter")
    assert sent[1:] == [((80, 162), ""), (None, "xy"), (None, "\ue007")]

def test_miniwob_takes_what_is_not_there_for_malformed(make_page):
    """It cost the penalty alone once, so that two such clicks were forgiven in success_return."""
    env = make_page(penalty=-0.25)
    by_number = ["click 77", "click 0", "click -1", 'type 9 "a"']
    by_place = ["click 160 10", "click 10 160", "click 10 -1"]
    for action in by_number + by_place:
        before = list(env.browser.clicks)
        assert say(env, action)[0] == -0.25
        assert env.browser.clicks == before
    assert not env.step(f"{MARKER} click 77")[4]["valid"]
    assert not say(env, "click 4")[3]["success_return"]
    assert not env.step(f"{MARKER} press F1")[4]["valid"]

def test_miniwob_keeps_the_last_real_picture(make_page):
    env = make_page()
    say(env, "click 4")
    picture = env.picture().tobytes()
    obs, reward, terminated, truncated, info = env.step(f"{MARKER} click 6")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert obs["image"].tobytes() == picture


BY_NUMBER = ["click 4", 'type 5 "a"']
BY_PLACE = ["click 80 112", 'type "a"']
WAYS = [("element", BY_NUMBER, BY_PLACE), ("coordinate", BY_PLACE, BY_NUMBER)]

@pytest.mark.parametrize("way, valid, invalid", WAYS)
def test_miniwob_by_one_way_only(make_page, way, valid, invalid):
    env = make_page(f"miniwob/click-test-v1:{way}")
    rng = np.random.default_rng(0)
    assert ("checkbox" in env.prompt()) == (way == "element")
    assert env.parse(f"{MARKER} {env.example}")
    assert all(env.parse(f"{MARKER} {action}") for action in [*valid, "press Tab"])
    assert not any(env.parse(f"{MARKER} {action}") for action in invalid)
    samples = [env.parse(scripted_reply("random", env, rng)) for _ in range(200)]
    assert all(samples)
    assert len({action[0].split()[0] for action in samples}) == 3
    numbers = {action[1] for action in samples if action[0] == "click" and len(action) == 2}
    assert numbers <= {4, 5, 6, 8, 10, 11}
    for _ in range(50):
        assert env.parse(scripted_reply("malformed", env, rng)) is None

def test_miniwob_survives_its_browser(make_page):
    """A browser dies: its episode ends as lost, the next one has another browser, close() gives it back."""
    env = make_page()
    old = env.browser
    miniwob.BROWSERS.append(old)
    _, terminated, truncated, _ = say(env, "click 11")
    assert (terminated, truncated) == (False, True)
    assert "browser failed (OSError: gone)" in env.lost
    assert env.browser is None
    assert old not in miniwob.BROWSERS
    MiniWoB.idle.append(FakeBrowser())
    env.reset(seed=1)
    assert not env.lost
    assert env.browser is not old
    env.close()
    assert env.browser is None
    assert len(MiniWoB.idle) == 1

def test_miniwob_unknown_task(make_page):
    unknown = "'miniwob/click-tset-v1' is unknown; nearest: miniwob/click-test-v1"
    with pytest.raises(ValueError, match=unknown):
        make("miniwob/click-tset-v1")

def test_miniwob_task_without_an_expert(make_page, tmp_path):
    """has_expert() says so before anything is recorded.

    The story: it was True for every task, and data_mix found out while it recorded.
    """
    (tmp_path / "html" / "miniwob" / "email-inbox.html").write_text("")
    assert has_expert(make_page())
    assert not has_expert(make("miniwob/email-inbox-v1"))
    assert not has_expert(make("miniwob/click-test-v1,miniwob/email-inbox-v1"))
    with pytest.raises(SystemExit, match="'miniwob/email-inbox-v1' has no expert"):
        make("miniwob/email-inbox-v1").expert()

def test_a_driver_says_itself_why_it_fails(make_page, monkeypatch):
    """The story: Chromium and a driver of another version were "the browser failed", without a reason."""

    def open_browser(env):
        raise RuntimeError("session not created: this driver only supports Chrome 114\nChrome is 120")

    monkeypatch.setattr(MiniWoB, "idle", [])
    monkeypatch.setattr(miniwob, "open_browser", open_browser)
    reason = "only supports Chrome 114 Chrome is 120"
    with pytest.raises(SystemExit, match=f"Chromium failed three times in a row.*{reason}"):
        make("miniwob/click-test-v1").reset(seed=0)

def test_the_expert_avoids_what_covers_its_target(make_page):
    env = make_page("miniwob/click-test-v1:coordinate")
    one = dict(ref=4, role="button", text="ONE", value=None, box=[0, 60, 40, 20])
    two = dict(ref=5, role="button", text="TWO", value=None, box=[10, 65, 60, 40])
    env.elements = [one, two]
    x, y = map(int, env.click(one).split()[1:])
    assert 0 <= x <= 40
    assert 60 <= y <= 80
    assert not (x >= 10 and y >= 65)
