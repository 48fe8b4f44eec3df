"""
MiniWoB++: web pages in a real Chromium.
"""
import atexit, contextlib, difflib, importlib.util, io, os, re, shutil, signal, sys, threading, time, zlib

from PIL import Image

from envs import Command, Env, Words, format_action, require

AREA = (0, 50, 160, 210)        # of a page's 160 x 210 pixels; above it stands the goal, which the prompt has too: this way text is shown pixel for pixel at size 160
KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Backspace": "\ue003", "ArrowLeft": "\ue012", "ArrowRight": "\ue014", "PageUp": "\ue00e", "PageDown": "\ue00f"}
ROLES = {"input_text": "textbox", "input_password": "textbox", "textarea": "textbox", "input_checkbox": "checkbox", "input_radio": "radio", "a": "link", "button": "button", "select": "select", "t": "text"}
PAGE = "const said = core.getUtterance(), over = WOB_DONE_GLOBAL; return [WOB_TASK_READY, over, WOB_RAW_REWARD_GLOBAL, said.utterance || said, over ? null : core.getDOMInfo()];"
START_SCRIPT = "if (window.jQuery) jQuery.fx.off = true; document.activeElement.blur(); core.EPISODE_MAX_TIME = 1e9; core.endEpisode(0); Math.seedrandom(arguments[0]); core.setDataMode('train'); core.startEpisodeReal(); "

def page_elements(dom):
    """What core.getDOMInfo() gives -> [dict(ref, role, text, value, focused, classes, box)] of what says something or takes input, in the page's order.
    box: left, top, width, height in the pixels of AREA. A piece of text that has no number of its own has a ref below 0."""
    inside = lambda node: " ".join(filter(None, [str(node.get("text") or ""), *map(inside, node.get("children", []))]))
    def walk(node):
        tag, children = node["tag"].lower(), node.get("children", [])
        whole = tag in ROLES or all(child["tag"] == "t" for child in children)
        text = inside(node) if whole else ""
        if not text and not tag.startswith("input_") and node.get("bgColor", "").startswith("rgb("):
            text = node["bgColor"]                                  # a coloured box or a slider's handle; transparent ones are only there for the layout
        if whole and (text or tag in ROLES or "value" in node or not isinstance(node.get("classes", ""), str)):    # the last: a shape in an SVG
            yield dict(ref=node["ref"], role=ROLES.get(tag, tag), text=text, value=node.get("value"), focused=bool(node.get("focused")), classes=str(node.get("classes", "")),
                       box=[node["left"], node["top"] - AREA[1], node["width"], node["height"]])
        for child in () if whole else children:
            yield from walk(child)
    return list(walk(dom))

def format_element(e):        # button 'ONE' [13] | checkbox off [5] | textbox 'abc' [7] | 'a piece of text'; who reads from left to right has to have seen the text to find its number behind it
    said = ("on" if e["value"] else "off") if type(e["value"]) is bool else repr(e["text"] if e["value"] is None else e["value"])
    return f"{e['role']} {said} [{e['ref']}]" if e["ref"] > 0 else said

def open_browser(env):
    """A headless Chromium with a window as wide as the tasks were made for, in a process group of its own, so that it can be ended when it hangs."""
    webdriver, found = require(env, "selenium.webdriver"), [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chromedriver")]
    if not found[3] or not any(found[:3]):
        raise SystemExit(f"env={env!r} needs Chromium and its driver: apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, found))
    for flag in ("headless", "disable-gpu", "no-sandbox", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(found[3], popen_kw={"start_new_session": True}))
    browser.command_executor.client_config.timeout = 20
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=500, height=240, deviceScaleFactor=1, mobile=False))
    BROWSERS.append(browser)
    return browser

def kill_browser(browser):
    BROWSERS.remove(browser)
    with contextlib.suppress(OSError):                              # gone already
        os.killpg(browser.service.process.pid, signal.SIGKILL)
    browser.service.process.wait()

BROWSERS = []               # all that are open
atexit.register(lambda: [kill_browser(browser) for browser in list(BROWSERS)])

class MiniWoB(Env):
    """Any MiniWoB++ task (package miniwob) in a real Chromium: "miniwob/click-test-2-v1" acts by number and by place; with :element behind it by the numbers
    in the text only, with :coordinate by places only (the text is then the task alone, the page is to be seen). Places are pixels of the page's
    area below the goal, 160 x 160, whatever the picture's size. A number that no element has and a place outside of the page parse, but cost the penalty. Reward: the page's own without
    its discount for time; `success`: all of it, 1. The page's clock is off, max_turns ends an episode; the last picture is the last before the page closed.
    A browser is lent to one episode at a time; one that dies, or does not answer for 20 s, is replaced, and its episode is `lost`."""
    max_turns, one_in, max_parallel, idle = 20, 4, 4, []
    element = (Command("click", int, names=("ELEMENT",)), Command("type", int, str, names=("ELEMENT", "TEXT")))
    coordinate = (Command("click", int, int, names=("X", "Y")), Command("type", str, names=("TEXT",)))
    def __init__(self, name, **kw):
        super().__init__(**kw)
        page, _, self.way = name.removeprefix("miniwob/").partition(":")
        self.name, self.task, self.browser, self.shot = name, page.removesuffix("-v1"), None, Image.new("RGB", (160, 160))
        self.failures = (require(name, "selenium.common.exceptions").WebDriverException, require(name, "urllib3.exceptions").HTTPError, OSError)
        folder = os.path.join(os.path.dirname(getattr(importlib.util.find_spec("miniwob"), "origin", None) or require(name, "miniwob").__file__), "html", "miniwob")
        self.url, tasks = f"file://{folder}/{self.task}.html", sorted(file.removesuffix(".html") for file in os.listdir(folder))
        if self.task not in tasks or self.way not in ("", "element", "coordinate"):
            near = difflib.get_close_matches(self.task, tasks, n=2, cutoff=0)
            raise ValueError(f"env={name!r} is unknown; nearest: {', '.join(f'miniwob/{task}-v1' for task in near)}; with :element or :coordinate behind it, or nothing.")
        self.kinds = (*(self.element if self.way != "coordinate" else ()), *(self.coordinate if self.way != "element" else ()), Words(*(f"press {key}" for key in KEYS)))
        self.example = "click 80 112" if self.way == "coordinate" else "click 13"
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an end by `kill` or `timeout`, too, takes the browsers with it

    def start(self):
        for attempt in range(3):
            try:
                self.browser = self.browser or (self.idle.pop() if self.idle else open_browser(self.name))
                if self.browser.current_url != self.url:
                    self.browser.get(self.url)
                self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", dict(type="mouseMoved", x=0, y=0))     # no button glows under the last episode's pointer
                self.look(START_SCRIPT, int(self.rng.integers(2 ** 31)))
                return
            except self.failures as error:
                self.fail(error)
        raise SystemExit(f"env={self.name!r}: Chromium failed three times in a row: {self.lost}.")
    def look(self, script="", *args):
        """Runs a script in the page, then reads it -> (is the episode over, its reward)."""
        for wait in range(40):                                      # some pages come up slowly
            ready, over, reward, goal, dom = self.browser.execute_script((script if not wait else "") + PAGE, *args)
            if ready:
                break
            time.sleep(0.05)
        if not over:
            self.goal, self.elements, self.seen = goal, page_elements(dom), False
        return over, reward
    def fail(self, error):
        if self.browser:
            kill_browser(self.browser)
        self.browser, self.lost = None, f"the browser failed ({type(error).__name__})"
    def close(self):
        if self.browser:
            self.idle.append(self.browser) if len(self.idle) < self.max_parallel else kill_browser(self.browser)
        self.browser = None

    def act(self, action):
        try:
            if not self.perform(action):
                return self.penalty, False, False
            over, reward = self.look()
        except self.failures as error:
            self.fail(error)
            return 0.0, False, True
        self.success = over and reward >= 1
        return (float(reward) if over else 0.0), over, False
    def perform(self, action):
        """Plays an action in the page; False if it names what is not there."""
        numbers, text = [a for a in action[1:] if type(a) is int], "".join(a for a in action[1:] if type(a) is str)
        keys = KEYS[action[0].removeprefix("press ")] if action[0].startswith("press ") else re.sub("[\ue000-\uf8ff]", "", text)      # those are control keys
        chain = require(self.name, "selenium.webdriver").ActionChains(self.browser, duration=0)
        if len(numbers) == 1:
            if numbers[0] not in [e["ref"] for e in self.elements if e["ref"] > 0]:
                return False
            self.browser.execute_script("core.elementClick(arguments[0]);", numbers[0])
        elif numbers:
            if not all(0 <= number < 160 for number in numbers):
                return False
            chain.w3c_actions.pointer_action.move_to_location(numbers[0] + AREA[0], numbers[1] + AREA[1]).click()
        if keys or len(numbers) == 2:
            chain.send_keys(keys).perform()
        return True

    def picture(self):
        if self.browser and not self.seen:
            try:
                self.shot, self.seen = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB").crop(AREA), True
            except self.failures as error:
                self.fail(error)
        return self.shot.resize((self.size, self.size), Image.LANCZOS)
    def text(self): return "" if self.way == "coordinate" else "\n".join(map(format_element, self.elements))
    def fingerprint(self): return f"{self.task} {self.goal} {zlib.crc32(repr([(e['role'], e['text'], e['value'], e['box']) for e in self.elements]).encode())}"
    def sample(self, rng):                                          # of the numbers and words that are there
        kind = self.kinds[rng.integers(len(self.kinds))]
        refs, words = [e["ref"] for e in self.elements if e["ref"] > 0] or [0], re.findall(r"\w+", self.goal)
        draw = dict(ELEMENT=lambda: int(rng.choice(refs)), X=lambda: int(rng.integers(160)), Y=lambda: int(rng.integers(160)), TEXT=lambda: str(rng.choice(words)))
        return kind.sample(rng) if isinstance(kind, Words) else format_action((kind.word, *(draw[name]() for name in kind.names)))

    def expert(self):
        """The next action of a scripted player; ValueError for a task that has none."""
        said, buttons = re.findall(r'"([^"]*)"', self.goal), [e for e in self.elements if e["role"] == "button"]
        boxes, texts = [e for e in self.elements if e["role"] == "textbox"], {"enter-text": said, "enter-password": 2 * said, "login-user": said}.get(self.task)
        if self.task in ("click-test", "click-test-2", "click-button", "click-dialog", "click-dialog-2", "click-link", "click-tab"):
            label = (said + re.findall(r"Tab #[0-9]+|ONE", self.goal) + ["Click Me!"])[0]
            return self.click(next(e for e in buttons + self.elements if e["text"] == ("Close" if label == "x" else label)))
        if self.task in ("click-checkboxes", "click-option"):
            wanted = re.match("Select (.*) and click", self.goal).group(1).split(", ")
            wrong = [box for box, label in zip(self.elements, self.elements[1:]) if box["role"] in ("checkbox", "radio") and box["value"] != (label["text"] in wanted)]
            return self.click(next((box for box in wrong if box["role"] == "checkbox" or not box["value"]), buttons[-1]))
        if texts:
            return next((self.type(box, text) for box, text in zip(boxes, texts) if box["value"] != text), self.click(buttons[-1]))
        if self.task in ("focus-text", "focus-text-2"):
            return self.click(boxes[int((re.findall("[0-9]", self.goal) or "1")[0]) - 1])
        if self.task == "click-collapsible":
            return self.click(buttons[-1] if any(e["role"] == "div" for e in self.elements) else self.elements[0])
        if self.task == "use-slider":
            handle, shown = self.elements[:2]
            gap = int(re.findall("-?[0-9]+", self.goal)[0]) - int(shown["text"])
            page = self.browser.execute_script("return $('#slider').slider('option', 'max') - $('#slider').slider('option', 'min')") // 5
            keys = ("PageDown", "PageUp") if 2 * abs(gap) > page > 1 else ("ArrowLeft", "ArrowRight")
            return self.click(buttons[-1]) if not gap else f"press {keys[gap > 0]}" if handle["focused"] else self.click(handle)
        raise ValueError(f"env={self.name!r} has no scripted expert: collect its data by a random player or a model, or write one in MiniWoB.expert.")
    def click(self, e):
        if self.way != "coordinate":
            return f"click {e['ref']}"
        over = [other["box"] for other in self.elements[self.elements.index(e) + 1:]]       # a place that no later element covers
        free = [(x, y) for x, y in self.places(e) if not any(l <= x <= l + w and t <= y <= t + h for l, t, w, h in over)]
        return "click {} {}".format(*(free or self.places(e))[0])
    def places(self, e):
        """In its middle, then its corners: one of 8, 24, 40, ..., the middles of the tiny VLM's patches, where such a one lies inside, else of 4, 12, 20, ...: few numbers to tell apart."""
        left, top, width, height = e["box"]
        step = lambda x, low, long: next((y for size in (16, 8, 4) for y in sorted(range(size // 2, 160, size), key=lambda y: abs(y - x)) if low < y < low + long - 1), round(x))
        return [(step(left + dx * width, left, width), step(top + dy * height, top, height)) for dx, dy in ((0.5, 0.5), (0.1, 0.2), (0.9, 0.2), (0.1, 0.8), (0.9, 0.8))]
    def type(self, e, text):
        if e["value"] and not text.startswith(e["value"]):          # somebody wrote something else: away with it
            return "press Backspace" if e["focused"] else self.click(e)
        action = text[len(e["value"]):]
        return format_action(("type", e["ref"], action)) if self.way != "coordinate" else format_action(("type", action)) if e["focused"] else self.click(e)

