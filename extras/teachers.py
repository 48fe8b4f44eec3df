"""
Play with someone who is not part of this program: a model behind a server, or a person at the terminal.

    python evaluate.py --agent=openai --base_url=http://localhost:8000/v1 --model=NAME --env=EZPoints
    python evaluate.py --agent=human --env=EZPoints --save=data/me
"""
import base64
import email.utils
import http.client
import io, itertools, json, os, random, re, string, sys, time
import urllib.request
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image

import envs
from extras.flag_mistakes import ConfigError, show
from extras.value_checks import ADDRESS

# seconds before the second try of a request; doubled for each further one
BACKOFF = 1.0
# the longest pause in seconds, whatever a server asks for
LONGEST = 60.0

MAX_ANSWER_BYTES = 2**22
NO_CONNECTION = -1
NO_ANSWER = 0
# What may pass: an answer without a text (200), a time-out, a conflict, too early, too many requests.
PASSING = (NO_ANSWER, 200, 408, 409, 425, 429)

SHOWN_CHARACTERS = 2000
# Parts of a key, in characters, that are cut out of a reply, and out of an error.
PART_IN_REPLY = 8
PART_IN_ERROR = 6
# A shorter key, `EMPTY` for one, is hidden as a whole and in errors only.
SHORT_KEY = 8
# A character as a server may write it: \u002B, %2b, \/ or plain.
CHARACTER = re.compile(r"(?:\\u00|%)([0-9a-f]{2})|\\?(.)", re.I | re.S)
# A word whose middle is stars, dots or crosses.
MASKED = re.compile(r"([\w\[\]-]*)(?:\*+|\u2022+|\u2026|\.{2,}|[xX]{3,})([\w\[\]-]*)")
LOWER = {ord(c): c.lower() for c in string.ascii_uppercase}


# ---- a model behind a server: its key, its address, its answers ----

def read_key(variable):
    """Read the API key from an environment variable; "" if OPENAI_API_KEY is not set."""
    key = os.environ.get(variable, "").strip()
    is_key = re.fullmatch(r"[!#-\[\]-~]*", key)
    if not is_key or (not key and variable != "OPENAI_API_KEY"):
        raise ConfigError("The environment variable that --api_key_env names is not set, or what it holds "
                          "is no key.")
    return key

def lower(text):
    """Lower the ASCII letters of a text; str.lower can change its length."""
    return text.translate(LOWER)

def hide_parts(text, key, n):
    """Replace each part of a key that is n characters or longer, also where they are escaped or percented."""
    units = list(CHARACTER.finditer(text))
    characters = lower("".join(unit[2] or chr(int(unit[1], 16)) for unit in units))
    n = min(n, len(key))
    parts = {lower(key[i : i + n]) for i in range(len(key) - n + 1)}
    hidden = [False] * len(units)
    for i in range(len(units) - n + 1):
        if characters[i : i + n] in parts:
            hidden[i : i + n] = [True] * n
    clean = ""
    for is_hidden, run in itertools.groupby(zip(hidden, units), lambda pair: pair[0]):
        clean += "[key]" if is_hidden else "".join(unit[0] for _, unit in run)
    return clean

def hide_ends(text, key):
    """Replace what a server leaves of a key that it masks: `sk-p****wxyz`, `a key that ends in wxyz`."""

    def replace(match):
        left, right = match.groups()
        is_left = left.endswith("[key]") or (len(left) > 1 and key.startswith(left))
        is_right = right.startswith("[key]") or (len(right) > 1 and key.endswith(right))
        return "[key]" if is_left or is_right else match[0]

    text = MASKED.sub(replace, text)
    return re.sub(rf"(?<![\w-]){re.escape(key[-4:])}(?![\w-])", "[key]", text)

def make_opener(base_url):
    """Make a bare opener: every status is an answer, and no redirect is followed.

    A redirect would take the key along. A local server is asked without the system's proxy.
    """
    is_local = re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])[:/]", base_url + "/")
    proxies = {} if is_local else None
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPSHandler())
    return opener

def message_content(row, image):
    """Turn an observation into the content of a message: the picture as a data address, and the text."""
    file = io.BytesIO()
    image.save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    picture = dict(type="image_url", image_url=dict(url=f"data:image/png;base64,{data}"))
    parts = row["messages"][0]["content"]
    return [picture if part["type"] == "image" else part for part in parts]

def read_body(answer, end):
    """Read an answer to its end, or to a limit of bytes, or of time on the monotonic clock.

    Returns (status, body, headers) like OpenAIAgent.post.
    """
    raw = b""
    while part := answer.read1(2**16):
        raw += part
        if len(raw) > MAX_ANSWER_BYTES:
            return NO_ANSWER, "longer than 4 MB", {}
        if time.monotonic() > end:
            return NO_ANSWER, "time-out", {}
    return answer.status, raw.decode("utf-8", "replace"), answer.headers

def connection_fault(error):
    """Sort the error of a request without an answer -> (status, reason, {}) like OpenAIAgent.post."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return NO_ANSWER, "time-out", {}
    is_permanent = isinstance(reason, (ConnectionRefusedError, http.client.InvalidURL))
    if isinstance(reason, (ConnectionError, http.client.HTTPException)) and not is_permanent:
        return NO_ANSWER, "connection lost", {}
    return NO_CONNECTION, f"no connection: {reason}", {}

def retry_after_seconds(text):
    """Read a Retry-After header, a number or a date -> seconds from now; 0 if it is neither."""
    try:
        if re.fullmatch(r"[0-9.]{1,9}", text):
            return max(0.0, float(text))
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0

def join_parts(content):
    """Join the text parts of a reply that comes in parts (thinking, text, ...); return others unchanged."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if part.get("type") in ("text", "output_text")]
    return "".join(texts) if texts else None

class OpenAIAgent:
    """A player for `play`: a model behind a server of OpenAI's chat-completions protocol.

    It is asked about all environments at once. What may pass (time-outs, lost connections, 408, 409, 425,
    429, 5xx, answers without a text) is tried again; then the turn, and with it its episode, is lost. What
    will not pass is a ConfigError: no such server, key or model; a request that is refused before any was
    answered; nothing but losses.

    cfg: the settings of evaluate.py. counts: a Counter that learns what happened.
    """

    def __init__(self, cfg, counts):
        # an address with a password in it would be printed
        if not cfg.model or not ADDRESS.fullmatch(cfg.base_url):
            raise ConfigError("--agent=openai needs a server's address and a model's name, for instance "
                              "--base_url=http://localhost:8000/v1 --model=NAME; a key goes into "
                              "OPENAI_API_KEY.")
        self.cfg = cfg
        self.counts = counts
        self.key = read_key(cfg.api_key_env)
        self.opener = make_opener(cfg.base_url)
        self.settings = dict(model=cfg.model, temperature=cfg.temperature, max_tokens=cfg.max_tokens)
        self.jitter = random.Random()
        self.losses_in_a_row = 0

    @property
    def has_worked(self):
        """Tell whether the server has replied: then one that is gone may come back."""
        return self.counts["replies"] > 0

    def __call__(self, envs_, rows, images):
        """Reply to observations, as `play` asks for it; a lost turn has `lost`, the reason."""
        contents = [message_content(row, image) for row, image in zip(rows, images)]
        # The very first request goes alone: what is wrong for all of them is reported once.
        n_first = 0 if self.has_worked else 1
        answers = self.ask_together(contents[:n_first]) + self.ask_together(contents[n_first:])
        if all("lost" in answer for answer in answers):
            self.losses_in_a_row += len(answers)
        else:
            self.losses_in_a_row = 0
        if self.losses_in_a_row >= max(8, self.cfg.num_envs):
            raise ConfigError(f"{self.name()}: no answer to the last {self.losses_in_a_row} turns "
                              f"({answers[-1]['lost']}): see to the server, then continue with another "
                              "--seed.")
        return answers

    def ask_together(self, contents):
        """Ask about several prompts at once, each in a thread -> list of answers."""
        if not contents:
            return []
        answers = []
        # The threads of this pool are daemons: Ctrl-C does not wait for an answer.
        with ThreadPool(len(contents)) as pool:
            for answer, events, failure in pool.map(self.ask, contents, 1):
                self.counts.update(events)
                if failure:
                    raise ConfigError(failure)
                answers.append(answer)
        return answers

    def ask(self, content):
        """Ask about one prompt, with all tries.

        Returns the answer for `play`, a Counter of what happened, and the sentence that ends the run, or "".
        """
        events = Counter()
        for attempt in range(self.cfg.retries + 1):
            status, text, headers = self.post(content)
            reply, fault = self.read_answer(status, text)
            events.update(["requests", fault or "replies"])
            if reply is not None:
                return self.answer(reply), events, ""
            if self.takes_other_limit(status, text):
                return self.ask(content)
            reason = self.describe(status, text, headers, fault)
            if self.is_fatal(status, text):
                failure = f"{self.name()}: {reason}; {self.remedy(status)}."
                return self.answer("", lost=reason), events, failure
            if not self.may_pass(status) or attempt == self.cfg.retries:
                break
            pause = self.pause(attempt, headers)
            events["seconds waited"] += pause
            time.sleep(pause)
        events["turns given up"] += 1
        return self.answer("", lost=reason), events, ""

    # ---- one request ----

    def post(self, content):
        """Ask about one prompt, once -> (HTTP status, body, headers), see `send`."""
        body = self.settings | dict(messages=[dict(role="user", content=content)])
        return self.send("chat/completions", body)

    def send(self, path, body=None):
        """Send one request, a GET where there is no body -> (HTTP status, body, headers).

        Without an answer: (NO_ANSWER, reason, {}), or (NO_CONNECTION, reason, {}) if there is no server.
        """
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.cfg.base_url.rstrip('/')}/{path}"
        data = None if body is None else json.dumps(body).encode()
        end = time.monotonic() + self.cfg.timeout
        try:
            request = urllib.request.Request(url, data, headers)
            with self.opener.open(request, timeout=self.cfg.timeout) as answer:
                return read_body(answer, end)
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            return connection_fault(error)

    def read_answer(self, status, text):
        """Read what the server sent -> (reply, ""), or (None, what is wrong)."""
        if status > 0 and status != 200:
            return None, f"HTTP {status}"
        if status != 200:
            return None, text.partition(":")[0]
        try:
            reply = join_parts(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, RecursionError):
            return None, "no JSON"
        except (TypeError, LookupError, AttributeError):
            return None, "no choices"
        if not isinstance(reply, str):
            return None, "no text"
        if len(reply) > 64 * self.cfg.max_tokens:
            return None, "longer than asked for"
        return self.clean(reply), ""

    def clean(self, reply):
        """Take the key out of a reply, and half a character (a lone surrogate), which cannot be tokenised."""
        # A short key may well be a word of the reply.
        if len(self.key) >= SHORT_KEY:
            reply = hide_parts(reply, self.key, max(PART_IN_REPLY, len(self.key) // 3))
        return reply.encode("utf-8", "replace").decode()

    def answer(self, reply, **lost):
        """Make an answer for `play`."""
        return dict(reply=reply, source=f"openai:{self.cfg.model}", **lost)

    # ---- what to do without a reply ----

    def takes_other_limit(self, status, text):
        """Switch to the name that newer models of OpenAI use for the limit, if the server asks for it."""
        if status != 400 or "max_completion_tokens" not in text or not self.settings.pop("max_tokens", 0):
            return False
        self.settings["max_completion_tokens"] = self.cfg.max_tokens
        return True

    def may_pass(self, status):
        """Tell whether another try may succeed."""
        if status == NO_CONNECTION:
            # a server that has answered before may come back
            return self.has_worked
        return status in PASSING or (status >= 500 and status != 501)

    def is_fatal(self, status, text):
        """Tell whether no further request of this run can succeed."""
        is_refused = status in (401, 403, 404)
        is_out_of_quota = status == 429 and "insufficient_quota" in text
        never_worked = not self.may_pass(status) and not self.has_worked
        return is_refused or is_out_of_quota or never_worked

    def pause(self, attempt, headers):
        """Return the seconds to wait before the next try.

        1, 2, 4, ... seconds less a random half, so that requests do not all come back at once, and on top
        what the server asks for.
        """
        backoff = BACKOFF * 2**attempt * self.jitter.uniform(0.5, 1.0)
        return min(LONGEST, retry_after_seconds(headers.get("Retry-After", "")) + backoff)

    def describe(self, status, text, headers, fault):
        """Describe a fault on one line, in the server's words, without the key."""
        if status > 0:
            text = f"{fault}: {headers.get('Location') or text}"
        # more than is shown, so that a key at the cut is hidden as well
        return show(self.hide_key(text[:SHOWN_CHARACTERS]), 300)

    def remedy(self, status):
        """Say what to do about a fault that will not pass."""
        key_env = self.cfg.api_key_env
        remedies = {
            NO_CONNECTION: "start the server, or correct --base_url",
            401: f"put the server's key into the environment variable {key_env}",
            403: f"the key in {key_env} must be one that may use this model",
            404: "--base_url mostly ends in /v1, and --model must be a name that it lists under /models",
        }
        otherwise = "see what it says about the address, the model, the picture or the settings"
        return remedies.get(status, otherwise)

    def name(self):
        """Name the server and the model, for messages."""
        return f"{self.cfg.base_url}, model {self.cfg.model!r}"

    def hide_key(self, text):
        """Replace the key in a server's error, whole or in part."""
        if not self.key:
            return text
        text = hide_parts(text, self.key, PART_IN_ERROR)
        return hide_ends(text, self.key) if len(self.key) > SHORT_KEY else text


# ---- a person at the terminal ----

def human_agent(folder):
    """Make a player for `play`: a person who types an action or a whole reply.

    The current picture lies in `folder`. EOFError when the person has had enough.
    """

    def act(envs_, rows, images):
        [env] = envs_
        [row] = rows
        [image] = images
        path = os.path.join(folder, "picture.png")
        image.save(path)
        turn = f"Turn {env.turns + 1} of at most {env.max_turns}"
        print(f"\n{turn}, return so far {env.total:g}. The picture: {path}")
        print(row["messages"][0]["content"][1]["text"])
        if sys.stdout.isatty():
            print(render(image))
        text = read_line()
        if envs.MARKER not in text and env.marker:
            text = f"{envs.MARKER} {text}"
        return [dict(reply=text, source="human")]

    return act

def read_line():
    """Ask until something is typed; EOFError for `quit`."""
    text = ""
    while not text:
        text = input("action (quit ends)> ").encode("utf-8", "replace").decode().strip()
    if text == "quit":
        raise EOFError
    return text

def render(image, columns=40):
    """Draw a picture with terminal colours, two pixels per character.

    An upper half block has the upper pixel as its own colour and the lower one as its background.
    """
    height = 2 * max(1, round(columns / 2 * image.height / image.width))
    pixels = np.asarray(image.convert("RGB").resize((columns, height), Image.LANCZOS))
    lines = []
    for y in range(0, height, 2):
        blocks = []
        for upper, lower in zip(pixels[y], pixels[y + 1]):
            blocks.append("\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*upper, *lower))
        lines.append("".join(blocks) + "\033[0m")
    return "\n".join(lines)
