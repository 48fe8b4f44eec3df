"""
Test other players: a model behind a server that misbehaves on purpose, over real HTTP, and a person.

    python -m pytest tests/test_teacher.py
"""
import base64, builtins
import email.utils
import io, json, os, re, threading, time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

import envs
import evaluate
from buffer import Buffer, image_name, reply_text
from extras import teachers
from small_runs import content, one_sentence, run
from small_runs import tiny  # noqa: F401  (fixture)
from worlds import cards
from worlds.registry import make

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEY = "sk-test/0123456789+abcdefghijklmnopqrstuvwxyz="
PLUS = "[action] +"


# ---- a server ----

def answer(text):
    """Write the body of an answer, as OpenAI's API does."""
    message = dict(role="assistant", content=text)
    choice = dict(index=0, finish_reason="stop", message=message)
    return json.dumps(dict(id="x", object="chat.completion", choices=[choice]))

class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server.

    behave(number of the request, its body, its headers) gives what it answers: a text (the reply), (status,
    headers, body), or a function of the handler.
    requests: (path, headers, body) of each; most: the largest number of requests at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave):
        self.behave = behave
        self.requests = []
        self.n_open = 0
        self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Ignore a client that hung up."""

class Handler(BaseHTTPRequestHandler):
    """One request to the server."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            n = len(server.requests)
            server.n_open += 1
            server.most = max(server.most, server.n_open)
        try:
            self.respond(server.behave(n, body, self.headers))
        finally:
            with server.lock:
                server.n_open -= 1

    def respond(self, behaviour):
        if callable(behaviour):
            behaviour(self)
            self.close_connection = True
        elif isinstance(behaviour, tuple):
            self.send(*behaviour)
        else:
            self.send(200, {}, answer(behaviour))

    def send(self, status, headers, text):
        body = text.encode()
        self.send_response(status)
        headers = {"Content-Length": len(body), "Content-Type": "application/json", **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Print nothing."""

@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> a running server; back-off is short, and the key is set."""
    monkeypatch.setattr(teachers, "BACKOFF", 0.001)
    monkeypatch.setattr(teachers, "LONGEST", 0.02)
    monkeypatch.setattr(envs.NumberLine, "max_turns", 2)
    monkeypatch.setattr(cards.Points24, "max_turns", 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = []

    def start(behave):
        server = Server(behave)
        running.append(server)
        loop = dict(poll_interval=0.01)
        threading.Thread(target=server.serve_forever, kwargs=loop, daemon=True).start()
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()

def always(reply):
    """Make a behaviour: the same reply to every request."""
    return lambda n, body, headers: reply

def teach(server, *flags, env="NumberLine", episodes=4):
    """Let the model behind a server, or behind an address, play."""
    url = getattr(server, "url", server)
    command = ["--agent=openai", f"--base_url={url}", "--model=some/vlm"]
    evaluate.main([*command, f"--env={env}", f"--episodes={episodes}", *flags])

def printed_without_key(folder, capsys, *texts):
    """Return what was printed; not even half of the key is in it, in a text, or in a file of the folder."""
    captured = capsys.readouterr()
    everything = captured.out + captured.err + "".join(texts)
    half = KEY[: len(KEY) // 2]
    encoded = base64.b64encode(KEY.encode()).decode()
    for part in (KEY, half, KEY[12:30], encoded):
        assert part not in everything
        for data in content(folder).values():
            assert part.encode() not in data
    return captured.out

def played_rows(buf):
    """List the rows that have a reply."""
    return [row for row in buf.rows if reply_text(row) is not None]

def decode_picture(part):
    """Open the picture of a message part -> (prefix of its data address, image)."""
    prefix, data = part["image_url"]["url"].split(",")
    return prefix, Image.open(io.BytesIO(base64.b64decode(data)))


# ---- what is asked ----

def test_a_teacher_plays_and_its_play_trains(serve, tiny, tmp_path, capsys):  # noqa: F811
    """It plays several episodes at once, and its play, invalid replies too, is data for train.py."""
    replies = ["I am below it. [action] +", "no marker", "", "[action] -"]
    broken = "half of a letter \ud83d [action] +"
    behaviours = [*replies, broken]

    def behave(n, body, headers):
        time.sleep(0.02)
        return behaviours[n % 5]

    server = serve(behave)
    folder = str(tmp_path / "x")
    flags = [f"--save={folder}", "--num_envs=6", "--temperature=0.3", "--max_tokens=77"]
    teach(server, *flags, episodes=12)
    printed = printed_without_key(folder, capsys)
    assert 1 < server.most <= 6

    buf = Buffer(folder)
    assert len(buf.episodes) == 12
    assert {row["source"] for row in buf.rows} == {"openai:some/vlm", "end"}
    assert all(name.startswith("openai:some/vlm/0-") for name in buf.episodes)
    stats = buf.stats()
    rows = played_rows(buf)
    n = len(server.requests)
    assert len(rows) == stats["turns"] == n
    assert 0 < stats["valid"] < 1
    assert {row["valid"] for row in rows} == {True, False}
    assert {reply_text(row) for row in rows} <= {*replies, "half of a letter ? [action] +"}
    assert "12 episodes on training starts" in printed
    assert f"{100 * stats['success']:.1f} %" in printed
    assert f"{n} requests, {n} replies; 12 of 12 episodes" in printed

    out = run(tmp_path / "run", tiny, data=folder, offline_updates=2, online_updates=0)
    assert os.path.exists(os.path.join(out, "eval.json"))

def test_a_teacher_sees_what_our_model_sees(serve, tmp_path):
    """A request holds the settings, the key in its header, and the picture and the text of a row."""
    server = serve(always(PLUS))
    folder = str(tmp_path / "x")
    teach(server, f"--save={folder}", "--temperature=0.3", "--max_tokens=77", episodes=12)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    settings = {key: value for key, value in body.items() if key != "messages"}
    assert settings == dict(model="some/vlm", temperature=0.3, max_tokens=77)

    asked = set()
    for _, _, body in server.requests:
        [message] = body["messages"]
        picture, text = message["content"]
        assert message["role"] == "user"
        assert picture["type"] == "image_url"
        assert text["type"] == "text"
        prefix, image = decode_picture(picture)
        assert prefix == "data:image/png;base64"
        asked.add((image_name(image.convert("RGB")), text["text"]))
    expected = set()
    for row in played_rows(Buffer(folder)):
        text = row["messages"][0]["content"][1]["text"]
        expected.add((row["images_file_names"][0], text))
    assert asked == expected

def starts_of(folder, env):
    """Find the parts of the split, "train" or "test", that the recorded starts are from."""
    found = set()
    for row in Buffer(str(folder)).rows:
        for split in ("train", "test"):
            obs, _ = env.reset(seed=row["seed"], options=dict(split=split))
            if row["turn"] == 0 and image_name(obs["image"]) == row["images_file_names"][0]:
                found.add(split)
    return found

def test_data_comes_from_training_starts_tables_from_held_out_ones(serve, tmp_path, capsys):
    """The story: --agent=expert --save recorded held-out starts, so training data and tests were the same."""
    evaluate.main(["--env=EZPoints", "--agent=expert", "--episodes=5", f"--save={tmp_path}/a"])
    assert starts_of(tmp_path / "a", make("EZPoints")) == {"train"}
    assert "training starts" in capsys.readouterr().out

    # a run's game, size and limit
    os.makedirs(tmp_path / "run")
    with open(tmp_path / "run" / "config.json", "w") as f:
        json.dump(dict(env="EZPoints", size=64, max_turns=2), f)
    server = serve(always("[action] 7"))
    command = ["--agent=openai", f"--base_url={server.url}/", "--model=m", "--episodes=3"]
    evaluate.main([str(tmp_path / "run"), *command])
    sizes = set()
    for _, _, body in server.requests:
        _, image = decode_picture(body["messages"][0]["content"][0])
        sizes.add(image.size)
    assert sizes == {(64, 64)}
    assert len(server.requests) == 6
    assert "held-out starts" in capsys.readouterr().out

    # or a config file's
    config = os.path.join(ROOT, "config", "ezpoints.py")
    evaluate.main([config, "--agent=random", "--episodes=2"])
    assert "EZPoints, " in capsys.readouterr().out

def test_a_local_server_needs_no_key_and_gets_none(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(always(PLUS))
    teach(server, episodes=1)
    _, headers, _ = server.requests[0]
    assert "Authorization" not in headers
    # pasted with blanks around it
    monkeypatch.setenv("OTHER", " 12345678\n")
    teach(server, "--api_key_env=OTHER", episodes=1)
    _, headers, _ = server.requests[-1]
    assert headers["Authorization"] == "Bearer 12345678"

def test_newer_models_take_another_name_of_the_limit(serve):
    """OpenAI's reasoning models refuse `max_tokens`; the others, and most servers, know nothing else."""
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    refused = 400, {}, json.dumps(dict(error=dict(message=message)))
    server = serve(lambda n, body, headers: refused if "max_tokens" in body else PLUS)
    teach(server, "--max_tokens=99", "--retries=0")
    bodies = [body for _, _, body in server.requests]
    assert sum("max_tokens" in body for body in bodies) == 1
    assert bodies[-1]["max_completion_tokens"] == 99


# ---- faults that pass ----

def drop(handler):
    """Close the connection without an answer."""
    handler.connection.close()

def half(handler):
    """Send half of what was announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')

def hang(handler):
    """Answer nothing for longer than the client waits."""
    time.sleep(0.8)

def dribble(handler):
    """Send a byte now and then, for longer than the client waits."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)

def endless(handler):
    """Send without an end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 2**20)

def ok(body):
    """Answer with status 200 and a body."""
    return 200, {}, body

def busy(retry_after):
    """Answer that there were too many requests."""
    return 429, {"Retry-After": retry_after}, "slow down"


LATER = email.utils.formatdate(time.time() + 3600, usegmt=True)
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "[action] -"}]}
FAULTS = {
    "HTTP 429": [busy("7"), busy(LATER), busy("soon"), (429, {}, "")],
    "HTTP 500": [(500, {}, "out of memory"), (500, {}, "<html>")],
    "HTTP 503": [(503, {"Retry-After": "1e99"}, "loading the model")],
    "HTTP 408": [(408, {}, "")],
    "connection lost": [drop, drop],
    "time-out": [hang, dribble],
    "longer than 4 MB": [endless],
    "no JSON": [ok("I am no JSON"), ok(""), ok("[" * 100_000), half],
    "no choices": [
        ok('{"choices": []}'),
        ok("[]"),
        ok('{"error": {"message": "upstream"}}'),
        ok('{"choices": {"0": 1}}'),
        ok('{"choices": [{"message": null}]}'),
        ok("null"),
    ],
    "no text": [ok(answer(None)), ok(answer(3)), ok(answer([])), ok(answer([THOUGHT]))],
    "longer than asked for": [ok(answer("x" * 100_000))],
}

@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_tried_again_and_counted(serve, fault, tmp_path, capsys):
    """Each kind of fault, also in the very first request, then an answer: no episode is lost."""
    faults = FAULTS[fault]

    def behave(n, body, headers):
        if n % 2 and n // 2 < len(faults):
            return faults[n // 2]
        return PLUS

    timeout = 0.4 if fault == "time-out" else 60
    flags = [f"--save={tmp_path}/x", f"--timeout={timeout}", "--num_envs=2", "--retries=9"]
    teach(serve(behave), *flags, episodes=6)
    printed = printed_without_key(tmp_path, capsys)
    count = int(re.search(rf", (\d+) {fault}", printed)[1])
    if fault == "time-out":
        # a slow machine has more of them
        assert count >= len(faults)
    else:
        assert count == len(faults)
    assert "6 of 6 episodes" in printed
    assert "given up" not in printed
    assert len(Buffer(f"{tmp_path}/x").episodes) == 6

def test_waits_grow_are_jittered_and_bounded(serve, monkeypatch, tmp_path, capsys):
    """1, 2, 4, ... seconds less a random half, a server's own wish on top, never more than LONGEST."""
    waits = []
    monkeypatch.setattr(teachers, "BACKOFF", 1.0)
    monkeypatch.setattr(teachers, "LONGEST", 60.0)
    monkeypatch.setattr(teachers.time, "sleep", waits.append)

    def behave(n, body, headers):
        if n <= 8:
            return 500, {}, ""
        if n <= 10:
            return busy(("30", "86400")[n % 2])
        return PLUS

    teach(serve(behave), "--retries=20", episodes=1)
    for k, wait in enumerate(waits[:8]):
        longest = min(60, 2**k)
        assert 0.5 * longest <= wait <= longest
    shares = [wait / 2**k for k, wait in enumerate(waits[:6])]
    assert len({round(share, 6) for share in shares}) > 1
    assert max(waits) <= 60
    assert len(waits) == 10
    assert f"{sum(waits):.0f} seconds waited" in capsys.readouterr().out

@pytest.mark.parametrize(
    "header, seconds",
    [
        ("5", 5),
        ("0.5", 0.5),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("nan", 0),
        ("inf", 0),
        ("1e9", 0),
        ("Mon, 01 Jan 0001 00:00:00 -0000", 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
    ],
)
def test_a_retry_after_header_is_read(header, seconds):
    assert teachers.retry_after_seconds(header) == seconds

def test_a_retry_after_date_is_read():
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert 3500 < teachers.retry_after_seconds(date) <= 3600


# ---- faults that stay ----

@pytest.mark.parametrize(
    "status, words",
    [
        (401, ["401", "OPENAI_API_KEY"]),
        (403, ["403", "some/vlm", "OPENAI_API_KEY"]),
        (404, ["404", "/v1", "--model", "/models"]),
        (400, ["400", "no pictures", "settings"]),
        (307, ["307", "elsewhere", "address"]),
        (501, ["501", "no pictures"]),
        (429, ["429", "insufficient_quota"]),
    ],
)
def test_a_fault_that_stays_is_one_sentence_at_once(serve, status, words, tmp_path, capsys):
    """One request, no second try, the remedy, and the server's own words without the key that it echoes."""
    reply_headers = {}
    if status == 307:
        reply_headers = {"Location": "http://elsewhere/"}

    def behave(n, body, headers):
        key = headers["Authorization"]
        error = f"no pictures; insufficient_quota; you sent {key} and {key[:40]}..."
        return status, reply_headers, json.dumps(dict(error=error))

    server = serve(behave)
    with pytest.raises(SystemExit) as error:
        teach(server, f"--save={tmp_path}/x")
    sentence = error.value.code
    assert isinstance(sentence, str)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert len(server.requests) == 1
    printed_without_key(tmp_path, capsys, sentence)
    assert "abcdefgh" not in sentence

def test_no_server_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = "http://127.0.0.1:9/v1"
    one_sentence(lambda: teach(url, f"--save={tmp_path}/x"), url, "no connection", "--base_url")
    beyond = "http://127.0.0.1:99999/v1"
    one_sentence(lambda: teach(beyond), "no connection", "--base_url")

def test_an_echoed_key_is_written_nowhere(serve, tmp_path, capsys):
    """A server puts the Authorization header into its errors, whole, cut off, escaped, and into a reply."""

    def error_with(echo, n):
        if n % 2:
            cut_off = json.dumps(dict(error=echo[:30] + "..."))
            quoted = json.dumps(dict(error=dict(message=f"'{echo}'")))
            return [f"bad: {echo}", cut_off, quoted][n % 3]
        escaped = json.dumps(f"{echo} and {urllib.parse.quote(echo, safe='')}")
        return escaped.replace("/", "\\/").replace("+", "\\u002B")

    def behave(n, body, headers):
        echo = headers["Authorization"]
        if 2 <= n <= 13:
            return 500, {}, error_with(echo, n)
        return f"You said {echo}, so [action] +"

    flags = [f"--save={tmp_path}/x", "--num_envs=3", "--retries=1", "--max_tokens=50"]
    teach(serve(behave), *flags, episodes=5)
    printed = printed_without_key(tmp_path, capsys)
    replies = {reply_text(row) for row in Buffer(f"{tmp_path}/x").rows}
    assert "You said Bearer [key], so [action] +" in replies
    assert "12 HTTP 500" in printed
    assert "turns given up" in printed

@pytest.mark.parametrize(
    "echo",
    [
        f"Incorrect API key provided: {KEY[:8]}********{KEY[-4:]}",
        f"{KEY[:3]}...{KEY[-4:]}",
        f"{KEY[:2]}\u2022\u2022\u2022\u2022{KEY[-4:]}",
        f"the key that ends in {KEY[-4:]}",
        f"...{KEY[20:28]}...",
        f"{KEY[-12:]}",
        urllib.parse.quote(KEY[10:20], safe=""),
    ],
)
def test_a_part_of_the_key_is_cut_out(echo, monkeypatch):
    """A vendor masks the middle of a key; its beginning and its end are not printed either."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    address = dict(base_url="http://x/v1", model="m", api_key_env="OPENAI_API_KEY")
    cfg = SimpleNamespace(**address, temperature=1.0, max_tokens=9)
    agent = teachers.OpenAIAgent(cfg, Counter())
    clean = agent.hide_key(f"Sorry, {echo}. Try it with another one...")
    assert clean.startswith("Sorry, ")
    assert clean.endswith(". Try it with another one...")
    assert "[key]" in clean
    for i in range(len(KEY) - 3):
        assert KEY[i : i + 4] not in clean

def test_a_reply_in_parts_is_its_text(serve, tmp_path):
    """A thinking model answers with a list of parts; the text parts are the reply."""
    texts = [dict(type="text", text="It is red. "), dict(type="text", text=PLUS)]
    server = serve(always(ok(answer([THOUGHT, *texts]))))
    teach(server, f"--save={tmp_path}/x", "--retries=0", episodes=1)
    assert {reply_text(row) for row in played_rows(Buffer(f"{tmp_path}/x"))} == {f"It is red. {PLUS}"}

def test_a_turn_without_an_answer_drops_its_episode(serve, tmp_path, capsys):
    """A turn that fails is played once more with its episode, then dropped and counted; other episodes stay.

    A vendor's content filter refuses one picture, and such a request is not repeated. Another picture fails
    all its tries.
    """
    pictures = {}

    def behave(n, body, headers):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        number = pictures.setdefault(url, len(pictures))
        if number == 1:
            return 400, {}, "filtered"
        if number == 2:
            return 500, {}, "cursed"
        return PLUS

    flags = [f"--save={tmp_path}/x", "--retries=2", "--num_envs=4"]
    teach(serve(behave), *flags, env="Points24", episodes=8)
    printed = capsys.readouterr().out
    # the two end in either order
    assert re.search("dropped, HTTP 400: filtered; [12] of 8 episodes", printed)
    assert "dropped, HTTP 500: cursed" in printed
    for words in ("2 HTTP 400", "6 HTTP 500", "4 turns given up", "6 of 8 episodes"):
        assert words in printed
    assert len(Buffer(f"{tmp_path}/x").episodes) == 6

def test_a_server_that_disappears_ends_the_play_and_episodes_are_kept(serve, tmp_path, capsys):
    server = serve(lambda n, body, headers: PLUS if n <= 9 else (503, {}, "gone"))
    folder = f"{tmp_path}/x"
    flags = [f"--save={folder}", "--num_envs=2", "--retries=1"]
    words = ["no answer to the last 8 turns", "HTTP 503: gone", "--seed"]
    one_sentence(lambda: teach(server, *flags, episodes=50), *words)
    n = len(Buffer(folder).episodes)
    assert 2 <= n <= 8
    assert f"{n} of 50 episodes" in capsys.readouterr().out

    # the same seed is refused before a single request
    before = len(server.requests)
    one_sentence(lambda: teach(server, f"--save={folder}"), folder, "another --seed")
    assert len(server.requests) == before

    server.behave = always("[action] -")
    teach(server, f"--save={folder}", "--seed=1", episodes=3)
    assert len(Buffer(folder).episodes) == n + 3


# ---- wrong flags ----

SERVER = ["--agent=openai", "--env=NumberLine", "--model=x", "--base_url=http://127.0.0.1:9/v1"]
WRONG_FLAGS = [
    (["--agent=openai", "--env=NumberLine"], ["--base_url", "--model"]),
    ([*SERVER[:3], "--base_url=localhost:8000"], ["--base_url=http://"]),
    ([*SERVER[:3], "--base_url=file:///etc/passwd"], ["--base_url=http://"]),
    ([*SERVER[:3], "--base_url=http://me:secret@host/v1"], ["OPENAI_API_KEY"]),
    (["--agent=expert", "--env=NumberLin"], ["NumberLin", "NumberLine"]),
    (["--agent=expert"], ["--env"]),
    (["--env=NumberLine"], ["--agent"]),
    (["--agent=expert", "--env=NumberLine", "--report"], ["--report", "--save"]),
    (["--agent=expert", "--env=NumberLine", "--model=x"], ["--model", "--agent=openai"]),
    (["--agent=expert", "--env=NumberLine", "--size=3"], ["size=3"]),
    (["nowhere.py", "--agent=expert"], ["nowhere.py"]),
    ([*SERVER, "--num_envs=0"], ["--num_envs"]),
    ([*SERVER, "--timeout=0"], ["--timeout"]),
    ([*SERVER, "--retries=-1"], ["--retries"]),
    ([*SERVER, "--max_tokens=0"], ["--max_tokens"]),
    ([*SERVER, "--api_key_env=NOT_SET"], ["--api_key_env"]),
]

@pytest.fixture
def no_requests(monkeypatch):
    """Fail if a request is sent."""

    def post(self, content):
        pytest.fail("a request was sent")

    monkeypatch.setattr(teachers.OpenAIAgent, "post", post)

@pytest.mark.parametrize("flags, words", WRONG_FLAGS)
def test_wrong_flags_of_agents_are_one_sentence(no_requests, flags, words):
    """A mistake names the flag, before a request is sent."""
    one_sentence(lambda: evaluate.main(flags), *words)

def test_a_key_that_is_none_is_not_printed(no_requests, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    one_sentence(lambda: evaluate.main(SERVER), "no key")
    assert "two words" not in capsys.readouterr().out


# ---- a person ----

def typing(monkeypatch, *lines):
    """Set what a person types, then Ctrl-D; an exception among the lines is raised."""
    remaining = iter(lines)

    def typed(prompt=""):
        line = next(remaining, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", typed)

@pytest.mark.parametrize("end", ["quit", EOFError, KeyboardInterrupt])
def test_a_person_plays_and_quits(monkeypatch, tmp_path, capsys, end):
    """The marker is added where it lacks; a finished episode is recorded, one that was begun is not."""
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    typing(monkeypatch, "+", "", "what?", "I think [action] -", "+", end)
    folder = f"{tmp_path}/x"
    evaluate.main(["--env=NumberLine", "--agent=human", "--episodes=5", f"--save={folder}"])
    printed = capsys.readouterr().out

    buf = Buffer(folder)
    rows = played_rows(buf)
    assert len(buf.episodes) == 1
    assert {row["source"] for row in buf.rows} == {"human", "end"}
    assert [reply_text(row) for row in rows] == [PLUS, "[action] what?", "I think [action] -"]
    assert [row["valid"] for row in rows] == [True, False, True]

    for words in (
        "Stopped by you: 1 of 5 episodes",
        "human",
        "picture.png",
        "Actions: ",
        "Turn 3 of at most 3, return so far -",
        "\033[38;2;",
    ):
        assert words in printed
    # a picture of 40 columns
    assert max(line.count("\u2580") for line in printed.splitlines()) == 40

def test_a_person_who_leaves_at_once(monkeypatch, tmp_path, capsys):
    """Without a terminal no picture is drawn."""
    typing(monkeypatch)
    folder = f"{tmp_path}/x"
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--env=NumberLine", "--agent=human", f"--save={folder}"])
    printed = capsys.readouterr().out
    assert error.value.code == 1
    assert "0 of 300 episodes" in printed
    assert "\033[" not in printed
    assert not Buffer(folder, create=True).rows

def test_a_terminal_shows_two_pixels_per_character():
    """The upper pixel is the colour of the block, the lower one its background."""
    image = Image.new("RGB", (40, 40), (10, 20, 30))
    image.paste((1, 2, 3), (0, 0, 40, 1))
    lines = teachers.render(image).splitlines()
    assert Counter(line.count("\u2580") for line in lines) == {40: 20}
    assert lines[0].startswith("\033[38;2;1;2;3;48;2;10;20;30m")
