"""
MiniWoB++: small web tasks in a real Chromium.

The page is a picture and, in the text, a list of lines such as `button 'ONE' [13]`. The agent clicks on
numbers or places, types, and presses keys. In this file: how a page is read, how browsers are opened and
ended, a scripted player for sixteen tasks, and the environment MiniWoB.
"""
import atexit, contextlib, difflib
import importlib.util
import io, os, re, shutil, signal, time, zlib

from PIL import Image

from envs import Command, Env, Words, format_action
from worlds.contract import Unplayable
from worlds.guard import exit_on_kill
from worlds.optional import require

# A page has 160 x 210 pixels. The upper 50 rows show the goal, which is in the prompt, too. Without them the
# picture is square, and at size 160 it shows text pixel for pixel.
PAGE_SIZE = 160
AREA = (0, 50, PAGE_SIZE, 50 + PAGE_SIZE)
KEYS = {
    "Enter": "\ue007",
    "Tab": "\ue004",
    "Backspace": "\ue003",
    "ArrowLeft": "\ue012",
    "ArrowRight": "\ue014",
    "PageUp": "\ue00e",
    "PageDown": "\ue00f",
}
# Selenium's codes for keys. They do not belong into a text.
CONTROL_KEYS = "[\ue000-\uf8ff]"
REASON_COLUMNS = 200  # of what a driver says when it fails

# tag, as core.getDOMInfo() names it -> role in the prompt
ROLES = {
    "input_text": "textbox",
    "input_password": "textbox",
    "textarea": "textbox",
    "input_checkbox": "checkbox",
    "input_radio": "radio",
    "a": "link",
    "button": "button",
    "select": "select",
    "t": "text",
}

# Without animations and without a limit of time, the same seed gives the same page and the same pixels.
START_SCRIPT = """
    if (window.jQuery) jQuery.fx.off = true;
    document.activeElement.blur();
    core.EPISODE_MAX_TIME = 1e9;
    core.endEpisode(0);
    Math.seedrandom(arguments[0]);
    core.setDataMode('train');
    core.startEpisodeReal();
"""
READ_SCRIPT = """
    const utterance = core.getUtterance(), over = WOB_DONE_GLOBAL;
    return [
        WOB_TASK_READY,
        over,
        WOB_RAW_REWARD_GLOBAL,
        utterance.utterance || utterance,
        over ? null : core.getDOMInfo(),
    ];
"""
SLIDER_RANGE_SCRIPT = """
    const slider = $('#slider');
    return slider.slider('option', 'max') - slider.slider('option', 'min');
"""


# ---- reading a page ----
def inner_text(node):
    """Return the text of a node and of everything inside it, joined by spaces."""
    parts = [str(node.get("text") or "")]
    parts += [inner_text(child) for child in node.get("children", [])]
    return " ".join(filter(None, parts))

def leaf_elements(node):
    """Yield the elements in a node that show a text or take input, in the order of the page."""
    tag = node["tag"].lower()
    children = node.get("children", [])
    is_leaf = tag in ROLES or all(child["tag"] == "t" for child in children)
    if not is_leaf:
        for child in children:
            yield from leaf_elements(child)
        return
    text = inner_text(node)
    # A box without text is named by its colour, a slider's handle too. Transparent boxes are only layout.
    if not text and not tag.startswith("input_") and node.get("bgColor", "").startswith("rgb("):
        text = node["bgColor"]
    # The classes of a shape in an SVG are an object.
    is_shape = not isinstance(node.get("classes", ""), str)
    if text or tag in ROLES or "value" in node or is_shape:
        yield dict(
            ref=node["ref"],
            role=ROLES.get(tag, tag),
            text=text,
            value=node.get("value"),
            focused=bool(node.get("focused")),
            classes=str(node.get("classes", "")),
            box=[node["left"], node["top"] - AREA[1], node["width"], node["height"]],
        )

def page_elements(dom):
    """Read what core.getDOMInfo() returns -> [dict(ref, role, text, value, focused, classes, box)].

    box: left, top, width, height in the pixels of AREA. ref: the number of the element; a piece of text
    without a number of its own has a ref below 0.
    """
    return list(leaf_elements(dom))

def format_element(element):
    """Write an element as a line: button 'ONE' [13], checkbox off [5], textbox 'abc' [7], 'a piece of text'.

    The number stands behind the text. A model that reads from left to right has to know the text before it
    can look for the number.
    """
    value = element["value"]
    if type(value) is bool:
        content = "on" if value else "off"
    elif value is None:
        content = repr(element["text"])
    else:
        content = repr(value)
    if element["ref"] <= 0:
        return content
    return f"{element['role']} {content} [{element['ref']}]"

def grid_point(wanted, low, length):
    """Return a coordinate near `wanted` inside of a side that begins at `low`.

    It is one of 8, 24, 40, ..., the middles of the tiny VLM's patches, where such a one lies inside, else one
    of 4, 12, 20, ..., else one of 2, 6, 10, ...: few numbers for a model to tell apart.
    """
    for spacing in (16, 8, 4):
        points = range(spacing // 2, PAGE_SIZE, spacing)
        for point in sorted(points, key=lambda point: abs(point - wanted)):
            if low < point < low + length - 1:
                return point
    return round(wanted)

def click_places(element):
    """Return places (x, y) to click on an element: its middle, then near its corners."""
    left, top, width, height = element["box"]
    places = []
    for across, down in ((0.5, 0.5), (0.1, 0.2), (0.9, 0.2), (0.1, 0.8), (0.9, 0.8)):
        x = grid_point(left + across * width, left, width)
        y = grid_point(top + down * height, top, height)
        places.append((x, y))
    return places

def covers(element, x, y):
    """Tell whether a place lies in the box of an element."""
    left, top, width, height = element["box"]
    return left <= x <= left + width and top <= y <= top + height


# ---- browsers ----
# All browsers that are open, lent to an episode or idle.
BROWSERS = []

def open_browser(env):
    """Open a headless Chromium with a window as wide as the tasks were made for.

    It runs in a process group of its own, so that it can be ended when it hangs. env: the environment's name
    for messages. Unplayable, with one sentence, if selenium, Chromium or its driver is missing.
    """
    webdriver = require(env, "selenium.webdriver")
    binaries = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    driver = shutil.which("chromedriver")
    if not driver or not any(binaries):
        raise Unplayable(f"env={env!r} needs Chromium and its driver: apt-get update && apt-get install -y "
                         "--no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, binaries))
    for flag in ("headless", "disable-gpu", "no-sandbox", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(flag)
    service = webdriver.ChromeService(driver, popen_kw={"start_new_session": True})
    browser = webdriver.Chrome(options, service)
    browser.command_executor.client_config.timeout = 20
    metrics = dict(width=500, height=240, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    BROWSERS.append(browser)
    return browser

def kill_browser(browser):
    """End a browser and its driver, whatever state they are in."""
    BROWSERS.remove(browser)
    # The processes may be gone already.
    with contextlib.suppress(OSError):
        os.killpg(browser.service.process.pid, signal.SIGKILL)
    browser.service.process.wait()

def kill_browsers():
    """End all browsers."""
    for browser in list(BROWSERS):
        kill_browser(browser)

def end_browsers_at_exit():
    """Let all browsers end with the program, be it by its own end, Ctrl-C, `kill` or `timeout`.

    A second call changes nothing.
    """
    atexit.unregister(kill_browsers)
    atexit.register(kill_browsers)
    exit_on_kill()


# ---- the scripted player: one function per kind of task, each returns the next action ----
def quoted_texts(goal):
    """Return the texts in double quotes."""
    return re.findall(r'"([^"]*)"', goal)

def click_label(page):
    """Click on what the goal names, a button first."""
    labels = quoted_texts(page.goal) + re.findall(r"Tab #[0-9]+|ONE", page.goal) + ["Click Me!"]
    # The button that closes a dialog shows an x. Its text says what it does.
    label = "Close" if labels[0] == "x" else labels[0]
    candidates = page.with_role("button") + page.elements
    return page.click(next(element for element in candidates if element["text"] == label))

def select_options(page):
    """Set the checkboxes or the radio button that the goal lists, then submit."""
    wanted = re.match("Select (.*) and click", page.goal).group(1).split(", ")
    # The label of a box is the element behind it.
    for box, label in zip(page.elements, page.elements[1:]):
        is_wrong = box["value"] != (label["text"] in wanted)
        if box["role"] == "checkbox" and is_wrong:
            return page.click(box)
        # A radio button is switched off by switching on another one.
        if box["role"] == "radio" and is_wrong and not box["value"]:
            return page.click(box)
    return page.submit()

def fill_textboxes(page):
    """Write the quoted texts into the text boxes, then submit."""
    texts = quoted_texts(page.goal)
    if page.task == "enter-password":
        # the password, and once more to confirm it
        texts = 2 * texts
    for box, text in zip(page.with_role("textbox"), texts):
        if box["value"] != text:
            return page.type_text(box, text)
    return page.submit()

def focus_textbox(page):
    """Click into the text box that the goal counts, the 2nd one; without a number it is the only one."""
    number = (re.findall("[0-9]", page.goal) or "1")[0]
    return page.click(page.with_role("textbox")[int(number) - 1])

def open_section(page):
    """Open the section, then submit with the button in it."""
    if page.with_role("div"):
        return page.submit()
    return page.click(page.elements[0])

def move_slider(page):
    """Focus the slider's handle, move it by keys to the goal's number, then submit."""
    handle, shown_number = page.elements[:2]
    wanted = int(re.findall("-?[0-9]+", page.goal)[0])
    gap = wanted - int(shown_number["text"])
    if not gap:
        return page.submit()
    if not handle["focused"]:
        return page.click(handle)
    # jQuery's slider moves by a fifth of its range on PageUp and PageDown.
    page_step = page.browser.execute_script(SLIDER_RANGE_SCRIPT) // 5
    keys = ("ArrowLeft", "ArrowRight")
    if 2 * abs(gap) > page_step > 1:
        keys = ("PageDown", "PageUp")
    return f"press {keys[gap > 0]}"


EXPERTS = {
    "click-test": click_label,
    "click-test-2": click_label,
    "click-button": click_label,
    "click-dialog": click_label,
    "click-dialog-2": click_label,
    "click-link": click_label,
    "click-tab": click_label,
    "click-checkboxes": select_options,
    "click-option": select_options,
    "enter-text": fill_textboxes,
    "enter-password": fill_textboxes,
    "login-user": fill_textboxes,
    "focus-text": focus_textbox,
    "focus-text-2": focus_textbox,
    "click-collapsible": open_section,
    "use-slider": move_slider,
}


# ---- the environment ----
def pages_folder(env):
    """Return the folder with the tasks' pages; SystemExit with one sentence if the package is missing."""
    # The package is found, not imported: importing it is slow.
    spec = importlib.util.find_spec("miniwob")
    file = getattr(spec, "origin", None) or require(env, "miniwob").__file__
    return os.path.join(os.path.dirname(file), "html", "miniwob")

def numbers_of(action):
    """List the arguments of an action that are numbers: none, an element, or a place."""
    return [argument for argument in action if type(argument) is int]

class MiniWoB(Env):
    """Play any MiniWoB++ task (package miniwob) in a real Chromium: "miniwob/click-test-2-v1".

    The agent acts by the elements' numbers and by places. With :element behind the name it acts by numbers
    only. With :coordinate it acts by places only: the text is then the goal alone, so it has to look at the
    page. Places are pixels of the page's area below the goal, 160 x 160, whatever the picture's size.
    A reply with a number that no element has, or a place outside of the page, counts as malformed.

    The reward is the page's own, without its discount for time. `success` means all of it, 1. The page's
    clock is off; max_turns ends an episode. The last picture is the last one before the page closed.

    An episode borrows a browser, and close() gives it back. A browser that dies, or does not answer for 20
    seconds, is replaced, and its episode is `lost`.
    """

    max_turns = 20
    one_in = 4
    max_parallel = 4
    # The browsers that no episode uses. All environments share this list.
    idle = []
    element_kinds = (
        Command("click", int, names=("ELEMENT",)),
        Command("type", int, str, names=("ELEMENT", "TEXT")),
    )
    coordinate_kinds = (
        Command("click", int, int, names=("X", "Y")),
        Command("type", str, names=("TEXT",)),
    )

    def __init__(self, name, **kw):
        super().__init__(**kw)
        page, _, self.mode = name.removeprefix("miniwob/").partition(":")
        self.name = name
        self.task = page.removesuffix("-v1")
        self.browser = None
        self.screenshot = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE))
        self.browser_errors = (
            require(name, "selenium.common.exceptions").WebDriverException,
            require(name, "urllib3.exceptions").HTTPError,
            OSError,
        )
        folder = pages_folder(name)
        self.url = f"file://{folder}/{self.task}.html"
        tasks = sorted(file.removesuffix(".html") for file in os.listdir(folder))
        if self.task not in tasks or self.mode not in ("", "element", "coordinate"):
            near = difflib.get_close_matches(self.task, tasks, n=2, cutoff=0)
            names = ", ".join(f"miniwob/{task}-v1" for task in near)
            raise ValueError(f"env={name!r} is unknown; nearest: {names}; with :element or :coordinate "
                             "behind it, or nothing.")
        kinds = []
        if self.mode != "coordinate":
            kinds += self.element_kinds
        if self.mode != "element":
            kinds += self.coordinate_kinds
        self.kinds = (*kinds, Words(*(f"press {key}" for key in KEYS)))
        self.example = "click 80 112" if self.mode == "coordinate" else "click 13"
        if self.task not in EXPERTS:
            # Env's own, which says so: players.has_expert looks at this
            self.expert = super().expert
        end_browsers_at_exit()

    # ---- the browser and its page ----
    def borrow_browser(self):
        """Take a browser for an episode: the own one, an idle one, or a new one."""
        if not self.browser and self.idle:
            self.browser = self.idle.pop()
        if not self.browser:
            self.browser = open_browser(self.name)

    def start(self):
        """Open the task's page with a seed from self.rng.

        SystemExit if Chromium fails three times in a row.
        """
        for _ in range(3):
            try:
                self.borrow_browser()
                if self.browser.current_url != self.url:
                    self.browser.get(self.url)
                # Move the pointer away: the button under it would look different.
                corner = dict(type="mouseMoved", x=0, y=0)
                self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", corner)
                self.read_page(START_SCRIPT, int(self.rng.integers(2**31)))
                return
            except self.browser_errors as error:
                self.drop_browser(error)
        raise SystemExit(f"env={self.name!r}: Chromium failed three times in a row: {self.lost}.")

    def read_page(self, script="", *args):
        """Run a script in the page, then read goal and elements -> (whether the episode is over, reward)."""
        # Some pages come up slowly: look again for up to two seconds.
        for _ in range(40):
            answer = self.browser.execute_script(script + READ_SCRIPT, *args)
            ready, over, reward, goal, dom = answer
            if ready:
                break
            script = ""
            time.sleep(0.05)
        if not over:
            self.goal = goal
            self.elements = page_elements(dom)
            self.screenshot_is_current = False
        return over, reward

    def drop_browser(self, error):
        """End a browser that failed, and mark the episode as lost."""
        if self.browser:
            kill_browser(self.browser)
        self.browser = None
        # selenium's own str() adds a stack trace
        message = getattr(error, "msg", "") or str(error)
        reason = " ".join(f"{type(error).__name__}: {message}".split())
        self.lost = f"the browser failed ({reason[:REASON_COLUMNS].rstrip(': ')})"

    def close(self):
        """Give the browser back, or end it if enough others are idle."""
        if self.browser and len(self.idle) < self.max_parallel:
            self.idle.append(self.browser)
        elif self.browser:
            kill_browser(self.browser)
        self.browser = None

    # ---- acting ----
    def act(self, action):
        """Play an action and read the page; a browser that fails ends the episode without a reward."""
        try:
            self.perform(action)
            over, reward = self.read_page()
        except self.browser_errors as error:
            self.drop_browser(error)
            return 0.0, False, True
        self.success = over and reward >= 1
        return (float(reward) if over else 0.0), over, False

    def is_there(self, action):
        """Tell whether the page has the element or the place that an action names."""
        numbers = numbers_of(action)
        if len(numbers) == 2:
            return all(0 <= number < PAGE_SIZE for number in numbers)
        return all(number in self.refs() for number in numbers)

    def refs(self):
        """Return the numbers of the elements."""
        return [element["ref"] for element in self.elements if element["ref"] > 0]

    def perform(self, action):
        """Play an action in the page."""
        command, *arguments = action
        numbers = numbers_of(action)
        texts = [argument for argument in arguments if type(argument) is str]
        keys = re.sub(CONTROL_KEYS, "", "".join(texts))
        if command.startswith("press "):
            keys = KEYS[command.removeprefix("press ")]
        chain = require(self.name, "selenium.webdriver").ActionChains(self.browser, duration=0)
        is_place = len(numbers) == 2
        if is_place:
            x, y = numbers
            chain.w3c_actions.pointer_action.move_to_location(x + AREA[0], y + AREA[1]).click()
        elif numbers:
            [ref] = numbers
            self.browser.execute_script("core.elementClick(arguments[0]);", ref)
        if keys or is_place:
            chain.send_keys(keys).perform()

    def sample(self, rng):
        """Draw an action from the numbers on the page and the words of the goal."""
        kind = self.kinds[rng.integers(len(self.kinds))]
        if isinstance(kind, Words):
            return kind.sample(rng)
        return format_action((kind.word, *(self.sample_argument(name, rng) for name in kind.names)))

    def sample_argument(self, name, rng):
        """Draw an argument: ELEMENT, X, Y or TEXT."""
        if name == "ELEMENT":
            return int(rng.choice(self.refs() or [0]))
        if name == "TEXT":
            return str(rng.choice(re.findall(r"\w+", self.goal)))
        return int(rng.integers(PAGE_SIZE))

    # ---- what the agent observes ----
    def picture(self):
        """Take a screenshot where the page may have changed, and resize it."""
        if self.browser and not self.screenshot_is_current:
            try:
                png = self.browser.get_screenshot_as_png()
                self.screenshot = Image.open(io.BytesIO(png)).convert("RGB").crop(AREA)
                self.screenshot_is_current = True
            except self.browser_errors as error:
                self.drop_browser(error)
        return self.screenshot.resize((self.size, self.size), Image.LANCZOS)

    def text(self):
        if self.mode == "coordinate":
            return ""
        return "\n".join(map(format_element, self.elements))

    def fingerprint(self):
        """Return the task, the goal and a checksum of the elements."""
        content = [(e["role"], e["text"], e["value"], e["box"]) for e in self.elements]
        return f"{self.task} {self.goal} {zlib.crc32(repr(content).encode())}"

    # ---- for the scripted player ----
    def expert(self):
        """Return the next action of the scripted player; most tasks have none, see __init__."""
        return EXPERTS[self.task](self)

    def with_role(self, role):
        """Return the elements of a role."""
        return [element for element in self.elements if element["role"] == role]

    def submit(self):
        """Return the action that clicks on the last button."""
        return self.click(self.with_role("button")[-1])

    def click(self, element):
        """Return the action that clicks on an element, at a place that no later element covers."""
        if self.mode != "coordinate":
            return f"click {element['ref']}"
        later = self.elements[self.elements.index(element) + 1 :]
        places = click_places(element)
        for x, y in places:
            if not any(covers(other, x, y) for other in later):
                return f"click {x} {y}"
        # All are covered.
        x, y = places[0]
        return f"click {x} {y}"

    def type_text(self, box, text):
        """Return the next action on the way to a text in a text box."""
        value = box["value"]
        is_typed = text.startswith(value)
        if self.mode != "coordinate" and is_typed:
            return format_action(("type", box["ref"], text[len(value) :]))
        # A key, and a text without a number, go to the text box that has the focus.
        if not box["focused"]:
            return self.click(box)
        if not is_typed:
            # Another player has written something else.
            return "press Backspace"
        return format_action(("type", text[len(value) :]))
