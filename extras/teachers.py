"""
Players that are not here: a model behind a server, and a person at the terminal. `python evaluate.py --agent=openai ...` and `--agent=human` play them.
"""
import base64, email.utils, http.client, io, json, os, random, re, sys, time, urllib.request
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image

import envs
from configurator import ConfigError, show

BACKOFF, LONGEST = 1.0, 60.0  # seconds before a request's second try, doubled for each further one; the most that is waited, whatever a server asks for


def openai_agent(cfg, counts):
    """A player for `play`: a model behind a server that speaks OpenAI's chat-completions protocol, asked about all environments at once; `counts`, a Counter, learns what happened.
    What may pass (time-outs, lost connections, 408, 409, 425, 429, 5xx, answers without a text) is tried again; then the turn, and its episode, is lost. What will not (no such server,
    key, model; a request that is refused before any was answered; nothing but losses) is a ConfigError."""
    if not cfg.model or not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", cfg.base_url):      # an address with a password in it would be printed
        raise ConfigError("--agent=openai needs a server's address and a model's name, for instance --base_url=http://localhost:8000/v1 --model=NAME; a key goes into OPENAI_API_KEY.")
    key, body = os.environ.get(cfg.api_key_env, "").strip(), dict(model=cfg.model, temperature=cfg.temperature, max_tokens=cfg.max_tokens)
    if not re.fullmatch(r"[!#-\[\]-~]*", key) or not key and cfg.api_key_env != "OPENAI_API_KEY":
        raise ConfigError("The environment variable that --api_key_env names is not set, or what it holds is no key.")
    escaped = [rf"(?:\\?{re.escape(c)}|(?:\\u00|%){ord(c):02x})" for c in key]
    secret = re.compile("".join(escaped) + "|" + "".join(escaped[:max(8, len(key) // 2)]) + r"[\w.~+/=\\%-]*", re.I)   # however a server echoes it: whole, escaped, cut off
    hide, gone, jitter = lambda text: secret.sub("[key]", text) if key else text, 0, random.Random()
    local = re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])[:/]", cfg.base_url + "/")
    opener = urllib.request.OpenerDirector()    # a bare one: every status is an answer, no redirect is followed (it would take the key along)
    for handler in (urllib.request.ProxyHandler({} if local else None), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)

    def post(content):
        """One try -> (HTTP status, body, headers); without an answer (0, why, {}), or -1 if there is no server to connect to."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data, end, raw = json.dumps(body | dict(messages=[dict(role="user", content=content)])).encode(), time.monotonic() + cfg.timeout, b""
        try:
            with opener.open(urllib.request.Request(f"{cfg.base_url.rstrip('/')}/chat/completions", data, headers), timeout=cfg.timeout) as answer:
                while part := answer.read1(2 ** 16):
                    raw += part
                    if len(raw) > 2 ** 22 or time.monotonic() > end:
                        return 0, "longer than 4 MB" if len(raw) > 2 ** 22 else "time-out", {}
                return answer.status, raw.decode("utf-8", "replace"), answer.headers
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as e:
            reason = getattr(e, "reason", e)
            if isinstance(reason, (TimeoutError, ConnectionError, http.client.HTTPException)) and not isinstance(reason, (ConnectionRefusedError, http.client.InvalidURL)):
                return 0, "time-out" if isinstance(reason, TimeoutError) else "connection lost", {}
            return -1, f"no connection: {reason}", {}

    def read(text):
        """The body of an answer -> (reply, ""), or (None, what is wrong with it)."""
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
            wrong = "no text" if not isinstance(reply, str) else "longer than asked for" if len(reply) > 64 * cfg.max_tokens else ""
        except (ValueError, RecursionError):
            wrong = "no JSON"
        except (TypeError, LookupError):
            wrong = "no choices"
        # a key of a few characters, `EMPTY` or `x`, may well be a word of the reply; half a character (a lone surrogate) could not be tokenised
        return (None, wrong) if wrong else ((hide(reply) if len(key) > 7 else reply).encode("utf-8", "replace").decode(), "")

    def ask(content):
        """All tries for one turn -> (reply or None, Counter of what happened, what went wrong last, the sentence that ends it all or "")."""
        seen = Counter()
        for k in range(cfg.retries + 1):
            status, text, headers = post(content)
            reply, wrong = read(text) if status == 200 else (None, f"HTTP {status}" if status > 0 else text.partition(":")[0])
            seen.update(["requests", wrong or "replies"])
            if reply is not None:
                return reply, seen, "", ""
            if status == 400 and "max_completion_tokens" in text and body.pop("max_tokens", 0):      # newer models of OpenAI's call it so
                body["max_completion_tokens"] = cfg.max_tokens
                return ask(content)
            why = show(hide(f"{wrong}: {headers.get('Location') or text}" if status > 0 else text), 300)
            passes = status in (0, 200, 408, 409, 425, 429) or status >= 500 and status != 501 or status == -1 and counts["replies"]
            if status in (401, 403, 404) or status == 429 and "insufficient_quota" in text or not passes and not counts["replies"]:
                remedy = {-1: "start the server, or correct --base_url", 401: f"put the server's key into the environment variable {cfg.api_key_env}",
                          403: f"the key in {cfg.api_key_env} must be one that may use this model", 404: "--base_url mostly ends in /v1, and --model must be a name that it lists under /models"}
                return None, seen, why, f"{cfg.base_url}, model {cfg.model!r}: {why}; {remedy.get(status, 'see what it says about the address, the model, the picture or the settings')}."
            if not passes or k == cfg.retries:
                break
            pause = min(LONGEST, asked_to_wait(headers.get("Retry-After", "")) + BACKOFF * 2 ** k * jitter.uniform(0.5, 1.0))    # not all at once again
            seen["seconds waited"] += pause
            time.sleep(pause)
        return None, seen + Counter(["turns given up"]), why, ""

    def act(envs_, rows, images):
        nonlocal gone
        contents, answers, alone = [], [], int(not counts["replies"])       # the first request goes alone: what is wrong for all is said once
        for row, image in zip(rows, images):
            image.save(file := io.BytesIO(), "png")
            picture = dict(type="image_url", image_url=dict(url=f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"))
            contents.append([picture if part["type"] == "image" else part for part in row["messages"][0]["content"]])
        for some in filter(None, (contents[:alone], contents[alone:])):
            with ThreadPool(len(some)) as pool:     # its threads are daemons: Ctrl-C does not wait for an answer
                for reply, seen, why, stop in pool.map(ask, some, 1):
                    counts.update(seen)
                    if stop:
                        raise ConfigError(stop)
                    answers.append(dict(reply=reply or "", source=f"openai:{cfg.model}") | (dict(lost=why) if reply is None else {}))
        gone = 0 if any("lost" not in a for a in answers) else gone + len(answers)
        if gone >= max(8, cfg.num_envs):
            raise ConfigError(f"{cfg.base_url}, model {cfg.model!r}: no answer to the last {gone} turns ({answers[-1]['lost']}): look after the server, then go on with another --seed.")
        return answers
    return act


def asked_to_wait(text):
    """A Retry-After header, a number or a date -> seconds, 0 for what is neither."""
    try:
        return max(0.0, float(text) if re.fullmatch(r"[0-9.]{1,9}", text) else email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def human_agent(folder):
    """A player for `play`: a person at the terminal, who types an action's words or a whole reply. EOFError when they have had enough."""
    def act(envs_, rows, images):
        [env], [row], [image], path = envs_, rows, images, os.path.join(folder, "picture.png")
        image.save(path)
        print(f"\nTurn {env.turns + 1} of at most {env.max_turns}, return so far {env.total:g}. The picture: {path}\n{row['messages'][0]['content'][1]['text']}")
        if sys.stdout.isatty():     # a small rendering of 40 columns: a half block has two pixels, one in its own colour, one in the background's
            small = np.asarray(image.convert("RGB").resize((40, 2 * max(1, round(20 * image.height / image.width))), Image.LANCZOS))
            print("\n".join("".join("\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*up, *down) for up, down in zip(*small[y:y + 2])) + "\033[0m" for y in range(0, len(small), 2)))
        while not (said := input("action (quit ends)> ").encode("utf-8", "replace").decode().strip()):
            pass
        if said == "quit":
            raise EOFError
        return [dict(reply=said if envs.MARKER in said or not env.marker else f"{envs.MARKER} {said}", source="human")]
    return act
