"""
How well it went: success with intervals, return, share of valid actions; greedy and sampled, with the picture and without.

    python evaluate.py out/numberline                                   # a trained run, on held-out starts
    python evaluate.py out/numberline --episodes=1000 --temperature=0.5
    python evaluate.py out/numberline --agent=expert                    # another player on the same starts; --save=data/x records it, on training starts
    python evaluate.py --env=NumberLine --agent=human --save=data/me    # without a run; a config file works too: config/ezpoints.py --agent=...
    python evaluate.py --agent=openai --base_url=http://localhost:8000/v1 --model=NAME --env=NumberLine --episodes=200 --save=data/teacher
    python evaluate.py out/numberline --report                          # out/numberline/report.html to look at, a GIF a game, curves.svg
    python evaluate.py out/numberline/data --report                     # a folder of episodes, as that run's critic sees it
"""
import base64, email.utils, functools, http.client, io, json, math, os, random, re, sys, tempfile, time, urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html import escape
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import envs
from agent_rl import advantages, filter_weight, shaped, state_value
from buffer import Buffer, batch, make_row, reply_text
from configurator import ConfigError, check_config, configure, parse_block, show
from model import build, latest_checkpoint

# --- config ---
episodes: int = None # episodes of each table row; None: the run's eval_episodes
agent = ''           # who plays: '' the run's model; openai: a model behind a server; human: a person at the terminal; expert, random, malformed, biased: a script
env = ''             # what `agent` plays where no run says so: the environment, and the side of its picture in pixels; '' and None: train.py's, or the config file's
size: int = None
save = ''            # folder to record into: an agent's episodes, then on training starts, or the model's sampled ones; '' records nothing
temperature = 1.0    # of the sampled row, of the server's model
q_weight = 0.0       # adds q_weight * A to the logits: the critic corrects the policy at play; 0 is the plain policy
seed = 0             # of the sampling; the held-out starts do not depend on it
report = False       # write report.html: the table, the curves, and episodes with what the critic thinks of every token
report_episodes = 100 # at most that many on the page
critic = ''          # run folder whose critic judges a folder of episodes; '': the run that the folder lies in, if there is one
# agent=openai: any server of the chat-completions protocol (vLLM, SGLang, llama.cpp, a vendor)
base_url = ''        # for instance http://localhost:8000/v1
model = ''           # its name there
api_key_env = 'OPENAI_API_KEY' # the environment variable that holds the key, if the server wants one; the key itself is never written anywhere
max_tokens = 256     # of a reply
num_envs = 32        # episodes that an agent plays at once, so the number of requests at once (a person plays one)
timeout = 60.0       # seconds until an answer must be there, whole
retries = 6          # of a request that failed, after 1, 2, 4, ... seconds, or when the server says; then its episode is given up
# --- end of config ---

PLAYERS = ("expert", "random", "malformed", "biased")
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")   # its config block has the settings of a run, and their defaults
TEST_SEEDS = 10 ** 6  # held-out starts are drawn by seeds from here on
BACKOFF, LONGEST = 1.0, 60.0  # seconds before a request's second try, doubled for each further one; the most that is waited, whatever a server asks for


def wilson(k, n, z=1.96):
    """95 % interval of a share k / n (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, c = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (p + z * z / (2 * n) - half) / c), min(1.0, (p + z * z / (2 * n) + half) / c)


def environment(run_cfg):
    """make_env of a run, for `play`: its environment, or its several."""
    return lambda: envs.make(run_cfg.env, size=run_cfg.size, penalty=run_cfg.penalty, invalid=run_cfg.invalid, max_turns=run_cfg.max_turns)


def held_out(env, n):
    """n seeds of starts that training never draws (all of them where a game is too small to hold some out), as many different
    ones as there are. A seed is not a state: starts are told apart by `env.fingerprint()`. Of several tasks seed i is task i's, modulo their number."""
    if tasks := getattr(env, "tasks", None):
        seeds = [held_out(task, -(-n // len(tasks))) for task in tasks]
        return [seeds[i % len(tasks)][i // len(tasks)] for i in range(n)]
    seeds, seen, tries = [], set(), 0
    while len(seeds) < n and tries < (4 * n if env.workers else 500 + 20 * n):     # where starts are slow to draw, some may come twice
        env.reset(seed=TEST_SEEDS + tries, options={"split": "test"})
        if env.fingerprint() not in seen:
            seen.add(env.fingerprint())
            seeds.append(TEST_SEEDS + tries)
        tries += 1
    env.close()
    return [seeds[i % len(seeds)] for i in range(n)]


@functools.lru_cache(maxsize=16)
def starts(make_env, n):
    """The held-out starts of a run's environment, drawn once: each evaluation plays the same, and a web page is slow to deal."""
    return held_out(make_env(), n)


def model_agent(vlm, max_new_tokens, temperature, generator, q_weight=0.0, hide=False):
    """A player for `play`: the VLM. hide=True shows it a grey picture, to see whether it looks."""
    def act(envs_, rows, images):
        if hide:
            images = [Image.new("RGB", im.size, (127, 127, 127)) for im in images]
        prompts = [vlm.encode(r["messages"], [im], key=(r["messages"][0]["content"][1]["text"], "hidden" if hide else r["images_file_names"][0]))
                   for r, im in zip(rows, images)]
        ids, logps = vlm.generate(prompts, max_new_tokens, temperature, generator, q_weight)
        return [dict(reply=vlm.decode(i), reply_ids=i, logprobs=lp, source="model") for i, lp in zip(ids, logps)]
    return act


def scripted_agent(mix, rng):
    """A player for `play`: each turn one of the scripted players, by its share in `mix`."""
    def act(envs_, rows, images):
        return [dict(zip(("reply", "source"), envs.mixture(mix, env, rng))) for env in envs_]
    return act


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


def play(make_env, act, seeds, num_envs=32, split="test", prefix="", bar=None):
    """Play one episode for each seed, num_envs at a time (of several tasks, each in turn); yields dicts (env, rows, images, success, success_return,
    episode_return, turns, valid, tag) as episodes end. act(envs, rows, images) -> list of dict(reply, source, [reply_ids, logprobs], [lost: why there is none]).
    An episode whose environment is lost (a dead browser), or a reply in it, is played once more, then dropped, counted and reported."""
    todo, live, lost = list(enumerate(seeds))[::-1], [], Counter()
    spare = [make_env()]
    spare += [make_env() for _ in range(min(num_envs, len(seeds), spare[0].workers or num_envs) - 1)]
    def begin(job):
        env, n, seed = job
        return SimpleNamespace(env=env, obs=env.reset(seed=seed, options={"split": split, "task": n})[0], seed=seed, n=n, name=f"{prefix}{n}", rows=[], images={})
    with tqdm(total=len(seeds), desc=bar, disable=None if bar else True, leave=False) as progress, ThreadPoolExecutor(spare[0].workers or 1) as pool:
        at_once = pool.map if spare[0].workers else map             # threads pay where a step waits for another process
        while todo or live:
            live += at_once(begin, [(spare.pop(), *todo.pop()) for _ in range(min(len(spare), len(todo)))])
            pending = [make_row(e.name, len(e.rows), e.env.name, e.seed, e.obs) for e in live]
            replies = act([e.env for e in live], pending, [e.obs["image"] for e in live])
            outcomes = at_once(lambda e, r: e.env.step(r["reply"]), live, replies)
            for e, row, r, (obs, reward, terminated, truncated, info) in zip(list(live), pending, replies, list(outcomes)):
                if why := r.pop("lost", "") or e.env.lost:
                    lost[e.n] += 1
                    if lost[e.n] == 1:
                        todo.append((e.n, e.seed))
                    else:
                        tqdm.write(f"{e.env.name}, seed {e.seed}: dropped, {why}; {sum(k > 1 for k in lost.values())} of {len(seeds)} episodes so far.")
                    live.remove(e), spare.append(e.env), e.env.close()
                    continue
                outcome = dict(action=info["action"], valid=bool(info["valid"]), reward=float(reward), terminated=bool(terminated), truncated=bool(truncated), success=bool(info["success"]))
                e.images[row["images_file_names"][0]] = e.obs["image"]
                e.rows.append(make_row(e.name, len(e.rows), e.env.name, e.seed, e.obs, **r, **outcome))
                e.obs = obs
                if terminated or truncated:
                    turns, valid, ret = len(e.rows), [x["valid"] for x in e.rows], sum(x["reward"] for x in e.rows)
                    if truncated and not terminated:  # its value is the bootstrap
                        last = make_row(e.name, len(e.rows), e.env.name, e.seed, obs, source="end", success=bool(info["success"]))
                        e.images[last["images_file_names"][0]] = obs["image"]
                        e.rows.append(last)
                    yield dict(env=e.env.name, rows=e.rows, images=e.images, success=bool(info["success"]), success_return=bool(info["success_return"]), episode_return=ret,
                               turns=turns, valid=sum(valid), tag=e.env.tag())
                    live.remove(e), spare.append(e.env), e.env.close()
                    progress.update()


def record(episodes, buffer, chunk=200):
    """Append played episodes to a buffer, some at a time; returns how many. Those before an error or Ctrl-C are kept."""
    rows, images, n = [], {}, 0
    try:
        for n, e in enumerate(episodes, 1):
            rows, images = rows + e["rows"], images | e["images"]
            if n % chunk == 0:
                buffer.append(rows, images)
                rows, images = [], {}
    finally:
        buffer.append(rows, images)
    return n


def summary(episodes):
    """Episodes -> one dictionary of numbers; success rates with their Wilson 95 % intervals, by tag too where the environment has some, and
    by_env where several were played."""
    if not episodes:
        raise SystemExit("No episode could be played to its end: see above why each was dropped.")
    n, share = len(episodes), lambda key, of: sum(e[key] for e in of)
    out = dict(episodes=n, episode_return=share("episode_return", episodes) / n, turns=share("turns", episodes) / n,
               valid=share("valid", episodes) / share("turns", episodes))
    for key in ("success", "success_return"):
        out[key], out[key + "_95"] = share(key, episodes) / n, [round(x, 4) for x in wilson(share(key, episodes), n)]
    if len(names := dict.fromkeys(e["env"] for e in episodes)) > 1:
        return out | dict(by_env={name: summary([e for e in episodes if e["env"] == name]) for name in names})
    tags = sorted({e["tag"] for e in episodes} - {""})
    if tags:
        groups = {t: [e for e in episodes if e["tag"] == t] for t in tags}
        out["by_tag"] = {t: dict(episodes=len(g), success=share("success", g) / len(g)) for t, g in groups.items()}
    return out


def evaluate(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, hide=False, num_envs=64, bar=None, buffer=None):
    """Play the held-out starts -> summary. Its random stream is its own: evaluation never perturbs training."""
    generator = torch.Generator(vlm.device).manual_seed(seed)
    act = model_agent(vlm, max_new_tokens, temperature, generator, q_weight, hide)
    played = list(play(make_env, act, starts(make_env, episodes), num_envs, prefix=f"eval{seed}-", bar=bar))
    if buffer is not None:
        record(played, buffer)
    return summary(played)


def full_evaluation(vlm, make_env, episodes, max_new_tokens, temperature=1.0, seed=0, q_weight=0.0, buffer=None, only=("greedy", "sampled", "hidden"), prefix=""):
    """The rows of the table: {name: summary}."""
    ways = dict(greedy=("greedy", dict(temperature=0.0)), sampled=(f"sampled, T={temperature:g}", dict(temperature=temperature, buffer=buffer)),
                hidden=("picture hidden, greedy", dict(temperature=0.0, hide=True)))
    return {prefix + name: evaluate(vlm, make_env, episodes, max_new_tokens, seed=seed, q_weight=q_weight, bar=name, **kw) for name, kw in (ways[k] for k in only)}


def recorded(stats):
    """Buffer.stats() as a row of the table: turns an episode, with intervals, and so for each environment of several."""
    n = stats["episodes"]
    row = stats | dict(turns=stats["turns"] / n) | {k + "_95": wilson(round(stats[k] * n), n) for k in ("success", "success_return")}
    return row | dict(by_env={name: recorded(of) for name, of in stats["by_env"].items()}) if "by_env" in stats else row


def offline_results(run):
    """What a run with two phases had reached before it played itself: {name: summary}, empty for others."""
    file = os.path.join(run, "eval_offline.json")
    if not os.path.exists(file):
        return {}
    with open(file) as f:
        return json.load(f)


def table(results):
    """{name: summary} -> text, one aligned line each."""
    rows = [row for name, s in results.items() for row in ((name, s), *((f"  {env}", of) for env, of in s.get("by_env", {}).items()))]
    wide = max([28, *(len(name) + 1 for name, _ in rows)])
    lines = [f"{'':<{wide}}{'goal reached':>24}{'summed reward > 0':>26}{'return':>9}{'turns':>7}{'valid':>8}{'n':>6}"]
    for name, s in rows:
        cells = [f"{100 * s[k]:.1f} % [{100 * s[k + '_95'][0]:.1f}, {100 * s[k + '_95'][1]:.1f}]" if k + "_95" in s else f"{100 * s[k]:.1f} %" for k in ("success", "success_return")]
        lines.append(f"{name:<{wide}}{cells[0]:>24}{cells[1]:>26}{s['episode_return']:>9.3f}{s['turns']:>7.2f}{100 * s['valid']:>7.1f}%{s['episodes']:>6}")
        lines += [f"    {tag:<24}{100 * g['success']:>12.1f} %  of {g['episodes']}" for tag, g in s.get("by_tag", {}).items()]
    return "\n".join(lines)


# ---- the report: one HTML file with everything in it ----
def choose(buf, n, start=0):
    """n episodes of those from row `start` on, evenly from every game's reached and missed ones -> {episode: how many of its kind it stands for}."""
    kinds, chosen = {}, {}
    for name, turns in buf.episodes.items():
        if turns[0] >= start:
            kinds.setdefault((buf.rows[turns[0]].get("env", ""), buf.rows[turns[-1]]["success"]), []).append(name)
    for left, kind in zip(range(len(kinds), 0, -1), sorted(kinds.values(), key=len)):   # a small kind leaves its share to the larger ones
        m = min(len(kind), -(-(n - len(chosen)) // left))
        chosen |= {kind[k * len(kind) // m]: len(kind) / m for k in range(m)}
    return {name: chosen[name] for name in buf.episodes if name in chosen}


@torch.no_grad()
def inspect(buf, rows, vlm, run_cfg, top=10, chunk=8):
    """What the loss sees of recorded replies. rows: row numbers -> {row: (V of its first state, tokens)}; a token is [id, p, Q, V, A, f, alternatives], the
    `top` likeliest alternatives are [id, p, Q], the token itself among them. Without a critic only p is known, the others are None."""
    seen, vlm = {}, vlm.eval()
    short = lambda x: float(f"{x:.5g}") if math.isfinite(x) else None                    # JSON has no nan
    for i in tqdm(range(0, len(rows), chunk), desc="critic", disable=None, leave=False):
        b = batch([(buf, [[row] for row in rows[i:i + chunk]])], vlm, envs.MARKER, run_cfg.gamma)
        a, mask = b["reply_ids"], b["mask"]
        logits, hidden = vlm(b["inputs"], b["P"], a.shape[1])
        pi = logits.softmax(-1)
        likely = pi.topk(top).indices                                                    # (B, R, top)
        likely[..., -1] = torch.where((likely == a[..., None]).any(-1), likely[..., -1], a)
        said, other = [pi.gather(-1, a[..., None])[..., 0]], [pi.gather(-1, likely)]
        if len(vlm.heads):
            q = vlm.q(hidden)
            qa, v = q.gather(-1, a.expand(len(q), *a.shape)[..., None])[..., 0], state_value(logits, q.mean(0), run_cfg.v_support)
            adv = advantages(qa, v, mask, run_cfg)
            said += [qa.mean(0), v, adv, filter_weight(adv, run_cfg.actor_loss, run_cfg.beta, run_cfg.awr_temperature)]
            other += [q.mean(0).gather(-1, likely)]
        said, other = torch.stack(said, -1).tolist(), torch.stack(other, -1).tolist()
        full = lambda x, n: [*map(short, x), *[None] * (n - len(x))]
        for k, row in enumerate(rows[i:i + chunk]):
            tokens = [[int(a[k, j]), *full(said[k][j], 5), [[int(w), *full(x, 2)] for w, x in zip(likely[k, j], other[k][j])]] for j in range(int(mask[k].sum()))]
            seen[row] = full(said[k][0], 5)[2], tokens
    return seen


def word(vlm, i):
    """One token as text. Decoded alone, SentencePiece's tokens lose the blank they begin with."""
    text, raw = vlm.tokenizer.decode([i], clean_up_tokenization_spaces=False), vlm.tokenizer.convert_ids_to_tokens(i) or ""
    return " " + text if raw[:1] in ("\u2581", "\u0120") and text[:1] != " " else text


def data_uri(image):
    """A picture as the page holds it: PNG where that is small, else WebP; at most 640 pixels wide or high."""
    image.thumbnail((640, 640)) if max(image.size) > 640 else None
    for kind, options in (("png", dict(optimize=True)), ("webp", dict(quality=80))):
        image.save(file := io.BytesIO(), kind, **options)
        if file.tell() < 12_000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_data(buf, chosen, vlm=None, run_cfg=None, limit=25e6):
    """Episodes -> (what the page's script reads, points of the calibration plot: (V, observed return, how many turns it stands for)).
    Texts and pictures stand there once, and are named by number. Episodes that would take it over `limit` bytes are left out."""
    seen = inspect(buf, [i for e in chosen for i in buf.episodes[e]], vlm, run_cfg) if vlm else {}
    weight = lambda x: len(text := json.dumps(x)) + 5 * text.count("<")                  # as it will be escaped
    texts, places, pictures, words, size, out, points = {}, {}, [], set(), 0, [], []
    for name, stands_for in chosen.items():
        if size > limit:
            break
        turns = []
        for i in buf.episodes[name]:
            row, (v, tokens) = buf.rows[i], seen.get(i, (None, None))
            asked = [(m["role"], "\n".join(p["text"] for p in m["content"] if p["text"])) for m in row["messages"][:len(row["messages"]) - (reply_text(row) is not None)]]
            prompt = asked[0][1] if len(asked) == 1 else "\n\n".join(f"{role}: {text}" for role, text in asked)
            for file in row["images_file_names"]:
                if file not in places:
                    places[file] = len(pictures)
                    pictures.append(data_uri(buf.image(file).copy()))
                    size += len(pictures[-1])
            size += weight(prompt) if prompt not in texts else 0
            words |= {w for t in tokens or [] for w in [t[0], *(x[0] for x in t[-1])]}
            turns.append(dict(pics=[places[file] for file in row["images_file_names"]], prompt=texts.setdefault(prompt, len(texts)), reply=reply_text(row), tokens=tokens, v=v,
                              go=round(buf.to_go(i, run_cfg.gamma), 4) if run_cfg else None, **{k: row.get(k) for k in ("action", "valid", "reward", "source")}))
            if v is not None and tokens:
                points.append((v, turns[-1]["go"], stands_for))
        last = buf.rows[buf.episodes[name][-1]]
        out.append(dict(name=name, env=last.get("env", ""), reached=last["success"], total=round(buf.episode_return(name), 4), turns=turns))
        size += weight(out[-1])
    scale = np.quantile([abs(t[4]) for e in out for x in e["turns"] for t in x["tokens"] or [] if t[4] is not None] or [1.0], 0.95)
    return dict(episodes=out, texts=list(texts), pictures=pictures, words={w: word(vlm, w) for w in sorted(words)}, scale=max(float(scale), 1e-3),
                critic=bool(vlm and len(vlm.heads)), kind=run_cfg.actor_loss if run_cfg else "", beta=run_cfg.beta if run_cfg else 0, turn=bool(run_cfg and run_cfg.mdp == "turn")), points


def nice(lo, hi, n=4):
    """At most n + 1 round numbers between lo and hi."""
    step = 10.0 ** math.floor(math.log10((hi - lo) / n))
    step *= next(k for k in (1, 2, 5, 10) if (hi - lo) / (step * k) <= n + 1e-9)
    return [k * step for k in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def chart(title, series, x_label, x_range=None, online=None, log=False, dots=(), square=False):
    """A small plot -> the inside of an SVG of 340 x 240. series: {label: [(x, y) or (x, y, half an interval)]}; x_range: ends of the axis; online: the x after which the
    run played itself; log: y in decades; dots: more points, [(x, y)]; square: both axes have one scale, and the line where they are equal is drawn."""
    series = {label: [(x, math.log10(y) if log else y, *e) for x, y, *e in points] for label, points in series.items()}
    every = [p for points in (*series.values(), dots) for p in points]
    xs, ys = x_range or [p[0] for p in every], [p[1] for p in every]
    limits = lambda v: (min(v), max(v)) if min(v) < max(v) else (min(v) - 1, max(v) + 1)
    (x0, x1), (y0, y1) = (limits([*xs, *ys]),) * 2 if square else (limits(xs), limits(ys))
    y0, y1 = (math.floor(y0), math.ceil(y1)) if log else (y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0))
    legend = list(series) + ["one turn"] * bool(dots)
    left, right, top, bottom = 44, 324, 28 + 14 * -(-len(legend) // 2), 204
    X, Y = lambda x: round(left + (right - left) * (x - x0) / (x1 - x0), 1), lambda y: round(bottom - (bottom - top) * (min(max(y, y0), y1) - y0) / (y1 - y0), 1)
    out = [f'<text class="t" x="6" y="15">{escape(title)}</text>']
    if online is not None:
        out.append(f'<rect class="on" x="{X(online)}" y="{top}" width="{right - X(online)}" height="{bottom - top}"/>')
    for y in nice(y0, y1):
        if not log or y == round(y):
            out.append(f'<path class="g" d="M{left} {Y(y)}H{right}"/><text x="{left - 5}" y="{Y(y) + 3.5}" text-anchor="end">{10 ** y if log else y:.6g}</text>')
    out += [f'<text x="{X(x)}" y="{bottom + 14}" text-anchor="middle">{x:.6g}</text>' for x in nice(x0, x1, 5)] + [f'<text x="{(left + right) / 2}" y="{bottom + 29}" text-anchor="middle">{escape(x_label)}</text>']
    if square:
        out.append(f'<path class="g eq" d="M{X(x0)} {Y(x0)}L{X(x1)} {Y(x1)}"/>')
    if dots:
        out.append('<path class="dots" d="' + "".join(f"M{X(x)} {Y(y)}h0" for x, y in dots) + '"/>')
    for k, (label, points) in enumerate(series.items()):
        out.append(f'<path class="s s{k % 4}" d="M' + "L".join(f"{X(p[0])} {Y(p[1])}" for p in points) + '"/>')
        out += [f'<path class="s s{k % 4} w" d="M{X(x)} {Y(y - e[0])}V{Y(y + e[0])}"/>' for x, y, *e in points if e]
        out += [f'<circle class="d{k % 4}" cx="{X(p[0])}" cy="{Y(p[1])}" r="2.2"/>' for p in points] if len(points) <= 40 else []
    for k, label in enumerate(legend):
        x, y = 8 + 166 * (k % 2), 30 + 14 * (k // 2)
        out.append((f'<path class="s s{k % 4}" d="M{x} {y - 3}h18"/>' if k < len(series) else f'<path class="dots" d="M{x + 9} {y - 3}h0"/>') + f'<text x="{x + 23}" y="{y}">{escape(label)}</text>')
    return "".join(out)


# what the page and curves.svg share; the page itself is assets/report.html
LOOK = """
:root { --bg: #fff; --ink: #1a1f25; --soft: #59636e; --line: #d8dde3; --card: #f5f7f9; --good: #0072b2; --bad: #b34d00; --hot: #0072b2; --cold: #d55e00; --c2: #00805c; --c3: #b0468a; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --bg: #14181c; --ink: #e6e9ec; --soft: #9aa5b0; --line: #323a42; --card: #1c2228; --good: #56b4e9; --bad: #f09a3e; --hot: #2272a8; --cold: #b0621a; --c2: #35c79a; --c3: #e391c4 } }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft) }  .chart .t { font-weight: 600; font-size: 13px; fill: var(--ink) }
.chart .g { stroke: var(--line) }  .chart .eq { stroke: var(--soft); stroke-dasharray: 3 3 }  .chart .on { fill: var(--good); opacity: .09 }
.chart .s { fill: none; stroke-width: 1.8; stroke-linejoin: round }  .chart .w { stroke-width: 1; stroke-dasharray: none }
.chart .dots { stroke: var(--soft); stroke-width: 4; stroke-linecap: round; opacity: .45 }
.s0 { stroke: var(--good) }  .s1 { stroke: var(--bad); stroke-dasharray: 6 2 }  .s2 { stroke: var(--c2); stroke-dasharray: 2 2 }  .s3 { stroke: var(--c3); stroke-dasharray: 8 2 2 2 }
.d0 { fill: var(--good) }  .d1 { fill: var(--bad) }  .d2 { fill: var(--c2) }  .d3 { fill: var(--c3) }
"""

CURVES = (("Return of an episode", 1, r"(rollout|eval)/(.*/)?episode_return"), ("Success, %", 100, r"(rollout|eval)/(.*/)?success(_return)?"), ("Valid actions, %", 100, r"(rollout|eval)/(.*/)?valid"),
          ("Tokens that pass the filter, %", 100, "pass_.*"), ("Losses, in decades", 1, "nll|td_error|pess"), ("Values and returns, discounted", 1, "[qv]_mean|return_.*"))


def learning_curves(run):
    """The charts of a run's metrics.jsonl, those that it has numbers for; the online phase is shaded."""
    with open(os.path.join(run, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f if line.endswith("\n")]
    online = max([0, *(r["step"] for r in rows if r["phase"] == "offline")]) if any(r["phase"] == "online" for r in rows) else None
    charts, x_label = [], "update, offline" if online is None else "update (shaded: online)"
    for title, scale, keys in CURVES:
        log, series = "decades" in title, {}
        for r in rows:
            for k, y in r.items():
                if re.fullmatch(keys, k) and math.isfinite(y) and (y > 0 or not log):
                    series.setdefault(k, []).append((r["step"], scale * y))
        charts += [chart(title, series, x_label, (0, rows[-1]["step"]), online, log)] if series else []
    return charts


def calibration(points):
    """The chart of predicted against observed returns, and the mean of each tenth of the predictions with a 95 % interval, weighted by what a turn stands for."""
    v, go, w = np.array(sorted(points)).T
    parts = np.array_split(np.arange(len(v)), min(10, -(-len(v) // 8)))
    mean = lambda x, i: float((w[i] * x[i]).sum() / w[i].sum())
    means = [(mean(v, i), m := mean(go, i), 1.96 * float(np.sqrt((w[i] ** 2 * (go[i] - m) ** 2).sum()) / w[i].sum())) for i in parts]
    return chart("Return, observed (up) against predicted", {"mean, 95 % interval": means}, "V at a reply's first token", dots=list(zip(v, go))[::-(-len(v) // 1500)], square=True)


def html_table(results):
    """{name: summary} -> the rows of the page's table; under a rate a line from 0 to 100 % with its interval."""
    out = []
    for name, s, cls in ((n, x, c) for name, of in results.items() for n, x, c in ((name, of, ""), *((env, x, ' class="tag"') for env, x in of.get("by_env", {}).items()))):
        cells = []
        for key, of in (("success", "goal reached"), ("success_return", "summed reward &gt; 0")):
            lo, hi = (100 * x for x in s.get(key + "_95", (s[key], s[key])))
            cells.append(f'<td class="rate" data-of="{of}, %">{100 * s[key]:.1f} <small>[{lo:.1f}, {hi:.1f}]</small><svg class="bar" viewBox="0 0 100 3" preserveAspectRatio="none">'
                         f'<rect width="100" height="3"/><rect class="in" x="{min(lo, 99):.1f}" width="{max(1, hi - lo):.1f}" height="3"/></svg></td>')
        out.append(f'<tr{cls}><th scope="row">{escape(name)}</th>{"".join(cells)}<td data-of="return">{s["episode_return"]:.3f}</td><td data-of="turns">{s["turns"]:.2f}</td>'
                   f'<td data-of="valid, %">{100 * s["valid"]:.1f}</td><td data-of="episodes">{s["episodes"]}</td></tr>')
        out += [f'<tr class="tag"><th scope="row">{escape(tag)}</th><td class="rate" data-of="goal reached, %">{100 * g["success"]:.1f} <small></small></td>'
                f'<td colspan="4"></td><td data-of="episodes">{g["episodes"]}</td></tr>' for tag, g in s.get("by_tag", {}).items()]
    return "".join(out)


def gif(buf, episodes, file, side=240):
    """Episodes as one moving picture: each turn's picture with what was done under it, 0.8 s a turn, an episode's last one 2 s."""
    frames, fonts, soft = [], [ImageFont.load_default(size=x) for x in (15, 13)], (165, 175, 185)
    w, h = buf.image(buf.rows[buf.episodes[episodes[0]][0]]["images_file_names"][-1]).size
    scale = min(max(1, -(-side // min(w, h))), 480 / max(w, h))
    w, h = round(w * scale), round(h * scale)
    wide = max(w, side)
    for n, name in enumerate(episodes, 1):
        for t, i in enumerate(buf.episodes[name], 1):
            row, end = buf.rows[i], i == buf.episodes[name][-1]
            frame, said = Image.new("RGB", (wide, h + 44), (24, 28, 33)), reply_text(row)
            frame.paste(buf.image(row["images_file_names"][-1]).resize((w, h), Image.LANCZOS), ((wide - w) // 2, 0))
            did = " ".join(("cut off here" if said is None else row["action"] if row["valid"] else f"invalid: {said}").split())
            while len(did) > 1 and fonts[0].getlength(did) > wide - 110:
                did = did[:-2] + "\u2026"
            outcome = f"{'reached' if row['success'] else 'missed'} the goal, return {buf.episode_return(name):g}" if end else f"turn {t}"
            for x, y, text, font, fill in ((8, 4, did, 0, "white" if row["valid"] else "orange"), (wide - 8, 4, f"reward {row['reward']:+g}" if said is not None else "", 0, "orange" if row["reward"] < 0 else "skyblue"),
                                           (8, 24, outcome, 1, soft), (wide - 8, 24, f"{n}/{len(episodes)}", 1, soft)):
                ImageDraw.Draw(frame).text((x, h + y), text, fill=fill, font=fonts[font], anchor="la" if x == 8 else "ra")
            frames.append((frame.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE), 2000 if end else 800))
    frames[0][0].save(file, save_all=True, append_images=[f for f, _ in frames[1:]], duration=[ms for _, ms in frames], loop=0, optimize=True)


def write_report(folder, buf, results, vlm=None, run=None, run_cfg=None, n=100, start=0):
    """Write folder/report.html about n of the episodes from row `start` on, judged by the VLM of a run if there is one. A run's own folder also gets
    curves.svg and <game>.gif; a folder of data does not, a picture in there would be data."""
    if run_cfg:
        buf.shape = lambda reward: shaped(reward, run_cfg)
    chosen, total = choose(buf, n, start), sum(turns[0] >= start for turns in buf.episodes.values())
    data, points = page_data(buf, chosen, vlm, run_cfg)
    own, games, written = run == folder, list(dict.fromkeys(e["env"] for e in data["episodes"])), []
    charts = learning_curves(run) if own and os.path.exists(os.path.join(run, "metrics.jsonl")) else []
    if charts:
        written.append(os.path.join(folder, "curves.svg"))
        with open(written[-1], "w") as f:
            f.write(f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="1020" viewBox="0 0 1020 {240 * -(-len(charts) // 3)}"><style>{LOOK}</style><rect width="100%" height="100%" fill="var(--bg)"/>'
                    + "".join(f'<g transform="translate({340 * (k % 3)} {240 * (k // 3)})">{c}</g>' for k, c in enumerate(charts)) + "</svg>\n")
    for game in games if own else ():
        names = sorted((e for e in chosen if buf.rows[buf.episodes[e][0]].get("env", "") == game), key=lambda e: -len(buf.episodes[e]))   # from long to short
        written.append(os.path.join(folder, re.sub(r"\W+", "_", game or "episodes") + ".gif"))
        gif(buf, names[::-(-len(names) // 6)], written[-1])
    judge = "There is no trained run behind these episodes, so their tokens are not coloured: --critic=out/x names one." if not vlm else \
        f"Tokens are judged by the critic of {run}." if data["critic"] else f"{run} trained no critic (actor_loss = {run_cfg.actor_loss!r}), so a token shows its probability alone."
    count = f"All {total} episodes are shown." if len(data["episodes"]) == total else f"{len(data['episodes'])} of {total} episodes are shown, evenly of those that reached the goal and those that did not"
    count += ("; more would make the page too large to open fast." if len(data["episodes"]) < len(chosen) else "." if len(chosen) < total else "")
    head = "How it learned" if charts else "What the critic predicts"
    line = "A point on the dashed line was predicted exactly. The critic predicts what the policy gets from here on; what others played may well have got less." if len(points) > 1 else ""
    parts = dict(LOOK=LOOK, HEAD=head, LINE=line, TITLE=escape(", ".join(games) or "Episodes"), FOLDER=escape(folder), NOTE=escape(f"{judge} {count}"), ROWS=html_table(results),
                 CHARTS="".join(f'<svg class="chart" viewBox="0 0 340 240">{c}</svg>' for c in charts + ([calibration(points)] if len(points) > 1 else [])),
                 DATA=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))     # pure ASCII, and no reply can end the script
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "report.html"), encoding="utf-8") as f:
        page = re.sub(r"@([A-Z]+)@", lambda m: parts[m[1]], f.read())                    # in one pass: what is put in is not searched again
    written.insert(0, os.path.join(folder, "report.html"))
    with open(written[0], "w") as f:
        f.write(page)
    print(f"report   {', '.join(written)}: {len(page) / 1e6:.1f} MB, {len(data['episodes'])} of {total} episodes")


def read_config(run):
    """A run's settings, as it was trained."""
    file = os.path.join(run, "config.json")
    if not os.path.exists(file):
        raise ConfigError(f"{run!r} is no run folder: it has no config.json; train one with python train.py config/numberline.py --out_dir={run}")
    with open(file) as f:
        defaults = {name: key.default for name, key in parse_block(TRAIN).items()}
        return SimpleNamespace(**defaults | json.load(f))      # a run from before a key existed has that key's default


def trained(run, run_cfg):
    """A run's VLM as its last checkpoint has it -> (vlm, folder of the checkpoint)."""
    folder = latest_checkpoint(run)
    if run_cfg.model == "scratch":  # its tokenizer was trained by the run: take the whole model from there
        run_cfg.model = folder
    vlm = build(run_cfg)
    vlm.load(folder)
    return vlm, folder


def report_data(folder, cfg):
    """The report on a folder of episodes that somebody recorded."""
    if not cfg.report or cfg.agent or cfg.save or cfg.episodes:
        raise ConfigError(f"{folder!r} is a folder of recorded episodes, nobody plays here: look at it with python evaluate.py {folder} --report, its other keys are --report_episodes and --critic.")
    buf, around, vlm, run_cfg = Buffer(folder), os.path.normpath(os.path.join(folder, "..")), None, None
    run = cfg.critic or (around if os.path.exists(os.path.join(around, "config.json")) and latest_checkpoint(around, must=False) else None)
    if run:
        run_cfg = read_config(run)
        vlm, _ = trained(run, run_cfg)
    results = {"the recorded episodes": recorded(buf.stats())}
    print(table(results))
    write_report(folder, buf, results, vlm, run, run_cfg, cfg.report_episodes)


def play_agent(cfg, make_env, n, buffer, aside):
    """Another player than the model plays, recorded if there is a buffer -> {name: summary}."""
    human, server, counts, played = cfg.agent == "human", cfg.agent == "openai", Counter(), []
    who = f"openai:{cfg.model}" if server else cfg.agent
    prefix = f"{who}/{cfg.seed}-"
    if buffer is not None and any(name.startswith(prefix) for name in buffer.episodes):         # said before the work, not after
        raise ConfigError(f"{buffer.folder!r} holds episodes of {who} with seed {cfg.seed} already: record into another folder, or with another --seed.")
    act = human_agent(aside) if human else openai_agent(cfg, counts) if server else scripted_agent({cfg.agent: 1.0}, np.random.default_rng(cfg.seed))
    if cfg.save:                    # data to train on: no held-out starts
        seeds, split = np.random.default_rng([cfg.seed, 4]).integers(2 ** 31, size=n).tolist(), "train"
    else:
        seeds, split = starts(make_env, n), "test"
    episodes = (played.append(e) or e for e in play(make_env, act, seeds, 1 if human else cfg.num_envs, split, prefix, None if human else who))
    try:
        list(episodes) if buffer is None else record(episodes, buffer, 1 if human or server else 200)
    except (EOFError, KeyboardInterrupt):
        print(f"\nStopped by you: {len(played)} of {n} episodes were finished.")
        if not played:
            raise SystemExit(1)
    finally:
        if counts:
            print(f"{cfg.base_url}: {', '.join(f'{k:,.0f} {what}' for what, k in counts.most_common())}; {len(played)} of {n} episodes")
    return {who: summary(played)}


def main(argv):
    run, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    cfg = configure(__file__, flags, files=False)
    game, no_run = [f"--{k}={v}" for k, v in (("env", cfg.env), ("size", cfg.size)) if v], run is None or run.endswith(".py")
    if no_run and not (cfg.agent and (run or cfg.env)):
        raise ConfigError("Name the run folder first: python evaluate.py out/numberline; another player than its model can do without: --env=NumberLine --agent=expert")
    if no_run and cfg.report:
        raise ConfigError("--report is about a run or a folder of episodes: record with --save=data/x, then python evaluate.py data/x --report")
    if cfg.report_episodes < 1:
        raise ConfigError("--report_episodes must be at least 1.")
    if not no_run and os.path.exists(os.path.join(run, "metadata.jsonl")):
        return report_data(run, cfg)
    if cfg.critic:
        raise ConfigError(f"--critic={cfg.critic!r} is for a folder of episodes; a run is judged by its own critic, leave it out.")
    if cfg.agent not in ("", "openai", "human", *PLAYERS):
        raise ConfigError(f"--agent={cfg.agent!r} is not known: leave it empty for the run's model, or choose one of openai, human, {', '.join(PLAYERS)}.")
    if cfg.agent != "openai" and (cfg.base_url or cfg.model):
        raise ConfigError("--base_url and --model are a server's and its model's: they need --agent=openai.")
    if game and not no_run:
        raise ConfigError(f"{run!r} is played as it was trained: leave {' and '.join(game)} out, or name no run.")
    run_cfg = check_config(configure(TRAIN, [run] * bool(run) + game, quiet=True)) if no_run else read_config(run)
    n = run_cfg.eval_episodes if cfg.episodes is None else cfg.episodes
    if n < 1 or cfg.temperature < 0:
        raise ConfigError("--episodes must be at least 1 and --temperature at least 0.")
    if min(cfg.num_envs, cfg.max_tokens) < 1 or cfg.timeout <= 0 or cfg.retries < 0:
        raise ConfigError("--num_envs and --max_tokens must be at least 1, --timeout above 0, and --retries at least 0.")
    make_env = environment(run_cfg)
    try:
        split = make_env().split
    except ValueError as e:
        raise ConfigError(str(e))
    aside, vlm = tempfile.TemporaryDirectory(), None
    buffer = Buffer(cfg.save or aside.name, create=True) if cfg.save or cfg.report else None
    start = len(buffer or ())
    if cfg.agent:
        results = play_agent(cfg, make_env, n, buffer, aside.name)
    else:
        vlm, folder = trained(run, run_cfg)
        if cfg.q_weight and not len(vlm.heads):
            raise ConfigError(f"--q_weight={cfg.q_weight} needs a critic, and actor_loss={run_cfg.actor_loss!r} trains none: leave it at 0.")
        results = offline_results(run) | full_evaluation(vlm, make_env, n, run_cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.q_weight, buffer)
        with open(os.path.join(run, "eval.json"), "w") as f:
            json.dump(dict(checkpoint=folder, argv=argv, seed=cfg.seed, q_weight=cfg.q_weight, results=results), f, indent=1)
    where = "training starts" if cfg.agent and cfg.save else "held-out starts" if split else "starts that training also draws"
    print(f"{run_cfg.env}, {run or cfg.agent}: {list(results.values())[-1]['episodes']} episodes on {where}, Wilson 95 % intervals\n{table(results)}")
    if cfg.report:
        vlm = vlm or (trained(run, run_cfg)[0] if latest_checkpoint(run, must=False) else None)
        write_report(run, buffer, results, vlm, run, run_cfg, cfg.report_episodes, start)
    aside.cleanup()


if __name__ == "__main__":
    main(sys.argv[1:])
