"""
Teachers: a model behind a server that misbehaves on purpose, over real HTTP, and a person at the terminal.
    python -m pytest tests/test_teacher.py
"""
import base64, builtins, email.utils, io, json, os, re, threading, time, urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from PIL import Image
from test_train import content, one_sentence, run, tiny  # noqa: F401 (tiny is a fixture)
import envs, evaluate
from extras import teachers
from worlds.registry import make
from buffer import Buffer, image_name, reply_text

KEY = "sk-test/0123456789+abcdefghijklmnopqrstuvwxyz="


def answer(text):
    return json.dumps(dict(id="x", object="chat.completion", choices=[dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))]))


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server. `behave(number of the request, its body, its headers)` gives what it answers: a text (the reply), (status, headers, body), or a function of the handler."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, behave):
        self.behave, self.requests, self.alive, self.most, self.lock = behave, [], 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address): pass       # a client that hung up is no news


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.requests.append((self.path, dict(self.headers), body))
            n, s.alive = len(s.requests), s.alive + 1
            s.most = max(s.most, s.alive)
        try:
            said = s.behave(n, body, self.headers)
            if callable(said):
                said(self)
                self.close_connection = True
            else:
                self.send(*(said if isinstance(said, tuple) else (200, {}, answer(said))))
        finally:
            with s.lock:
                s.alive -= 1

    def send(self, status, headers, body):
        body = body.encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> a running server; back-off is short, and the key is set."""
    monkeypatch.setattr(teachers, "BACKOFF", 0.001)
    monkeypatch.setattr(teachers, "LONGEST", 0.02)
    for game in (envs.NumberLine, envs.Points24):
        monkeypatch.setattr(game, "max_turns", 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = []
    def start(behave):
        running.append(Server(behave))
        threading.Thread(target=running[-1].serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return running[-1]
    yield start
    for s in running:
        s.shutdown(), s.server_close()


def teach(server, *flags, env="NumberLine", episodes=4):
    evaluate.main(["--agent=openai", f"--base_url={server if isinstance(server, str) else server.url}", "--model=some/vlm", f"--env={env}", f"--episodes={episodes}", *flags])


def everything_but_the_key(folder, capsys, *texts):
    """Nor is half of it anywhere: in no file, nothing printed."""
    out = capsys.readouterr()
    for part in (KEY, KEY[:len(KEY) // 2], KEY[12:30], base64.b64encode(KEY.encode()).decode()):
        assert not any(part.encode() in data for data in content(folder).values())
        assert part not in out.out + out.err + "".join(texts)
    return out.out

# ---------------------------------------------------------------------------------------------------------- what is asked

def test_a_teacher_plays_and_its_play_trains(serve, tiny, tmp_path, capsys):  # noqa: F811
    """It sees what our model sees, plays several episodes at once, and all that it did, invalid replies too, is a folder that train.py learns from."""
    replies = ["I am below it. [action] +", "no marker", "", "[action] -", "half of a letter \ud83d [action] +"]
    def behave(n, body, headers):
        time.sleep(0.02)
        return replies[n % 5]
    s, folder = serve(behave), str(tmp_path / "x")
    teach(s, f"--save={folder}", "--num_envs=6", "--temperature=0.3", "--max_tokens=77", episodes=12)
    out, buf = everything_but_the_key(folder, capsys), Buffer(folder)
    assert 1 < s.most <= 6 and len(buf.episodes) == 12 and {row["source"] for row in buf.rows} == {"openai:some/vlm", "end"} and all(name.startswith("openai:some/vlm/0-") for name in buf.episodes)
    stats, played = buf.stats(), [row for row in buf.rows if reply_text(row) is not None]
    assert len(played) == len(s.requests) == stats["turns"] and 0 < stats["valid"] < 1 and {row["valid"] for row in played} == {True, False} and {reply_text(row) for row in played} <= {*replies[:4], "half of a letter ? [action] +"}
    assert "12 episodes on training starts" in out and f"{100 * stats['success']:.1f} %" in out and f"{len(s.requests)} requests, {len(s.requests)} replies; 12 of 12 episodes" in out
    path, headers, body = s.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert {k: body[k] for k in body if k != "messages"} == dict(model="some/vlm", temperature=0.3, max_tokens=77)
    asked = set()
    for _, _, body in s.requests:
        [message] = body["messages"]
        picture, text = message["content"]
        prefix, data = picture["image_url"]["url"].split(",")
        asked.add((message["role"], picture["type"], prefix, image_name(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")), text["type"], text["text"]))
    assert asked == {("user", "image_url", "data:image/png;base64", row["images_file_names"][0], "text", row["messages"][0]["content"][1]["text"]) for row in played}
    out = run(tmp_path / "run", tiny, data=folder, offline_updates=2, online_updates=0)
    assert os.path.exists(os.path.join(out, "eval.json"))


def test_data_comes_from_training_starts_tables_from_held_out_ones(serve, tmp_path, capsys):
    """The story: --agent=expert --save had recorded the held-out starts, and who trained on them was tested on what they had learned by heart."""
    env = make("EZPoints")
    def held(folder):
        rows = [row for row in Buffer(str(folder)).rows if row["turn"] == 0]
        found = set()
        for row in rows:
            for split in ("train", "test"):
                if image_name(env.reset(seed=row["seed"], options=dict(split=split))[0]["image"]) == row["images_file_names"][0]:
                    found.add(split)
        return found
    evaluate.main(["--env=EZPoints", "--agent=expert", "--episodes=5", f"--save={tmp_path}/a"])
    assert held(tmp_path / "a") == {"train"} and "training starts" in capsys.readouterr().out
    os.makedirs(tmp_path / "run")
    with open(tmp_path / "run" / "config.json", "w") as f:
        json.dump(dict(env="EZPoints", size=64, max_turns=2), f)
    s = serve(lambda n, body, headers: "[action] 7")
    evaluate.main([str(tmp_path / "run"), "--agent=openai", f"--base_url={s.url}/", "--model=m", "--episodes=3"])        # a run's game, size and limit
    shown = {Image.open(io.BytesIO(base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]))).size for _, _, body in s.requests}
    assert shown == {(64, 64)} and len(s.requests) == 6 and "held-out starts" in capsys.readouterr().out
    evaluate.main([os.path.join(evaluate.envs.__file__.rpartition(os.sep)[0], "config", "ezpoints.py"), "--agent=random", "--episodes=2"])     # or a config file's
    assert "EZPoints, " in capsys.readouterr().out

# ------------------------------------------------------------------------------------------------------- what goes wrong

def drop(handler):
    handler.connection.close()

def half(handler):
    handler.send_response(200), handler.send_header("Content-Length", "1000"), handler.end_headers()
    handler.wfile.write(b'{"choices": [')

def hang(handler):
    time.sleep(0.8)

def dribble(handler):
    handler.send_response(200), handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" "), handler.wfile.flush()
        time.sleep(0.02)

def endless(handler):
    handler.send_response(200), handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 2 ** 20)

LATER = email.utils.formatdate(time.time() + 3600, usegmt=True)
FAULTS = {"HTTP 429": [(429, {"Retry-After": "7"}, "slow down"), (429, {"Retry-After": LATER}, ""), (429, {"Retry-After": "soon"}, ""), (429, {}, "")],
          "HTTP 500": [(500, {}, "out of memory"), (500, {}, "<html>")], "HTTP 503": [(503, {"Retry-After": "1e99"}, "loading the model")], "HTTP 408": [(408, {}, "")],
          "connection lost": [drop, drop], "time-out": [hang, dribble], "longer than 4 MB": [endless],
          "no JSON": [(200, {}, "I am no JSON"), (200, {}, ""), (200, {}, "[" * 100_000), half],
          "no choices": [(200, {}, '{"choices": []}'), (200, {}, "[]"), (200, {}, '{"error": {"message": "upstream"}}'), (200, {}, '{"choices": {"0": 1}}'), (200, {}, '{"choices": [{"message": null}]}'), (200, {}, "null")],
          "no text": [(200, {}, answer(None)), (200, {}, answer(3)), (200, {}, answer([{"type": "text", "text": "[action] +"}]))],
          "longer than asked for": [(200, {}, answer("x" * 100_000))]}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again_and_counted(serve, fault, tmp_path, capsys):
    """Each kind of fault, also in the very first request, then fine: no episode is lost."""
    faults = FAULTS[fault]
    s = serve(lambda n, body, headers: faults[n // 2] if n % 2 and n // 2 < len(faults) else "[action] +")
    teach(s, f"--save={tmp_path}/x", f"--timeout={0.4 if fault == 'time-out' else 60}", "--num_envs=2", "--retries=9", episodes=6)
    out = everything_but_the_key(tmp_path, capsys)
    count = int(re.search(rf", (\d+) {fault}", out)[1])
    assert (count == len(faults) or fault == "time-out" and count > 2) and "6 of 6 episodes" in out and "given up" not in out and len(Buffer(f"{tmp_path}/x").episodes) == 6


def test_waits_grow_are_jittered_and_bounded(serve, monkeypatch, tmp_path, capsys):
    """1, 2, 4, ... seconds less a random half, a server's own wish on top, never more than LONGEST."""
    waits = []
    monkeypatch.setattr(teachers, "BACKOFF", 1.0), monkeypatch.setattr(teachers, "LONGEST", 60.0), monkeypatch.setattr(teachers.time, "sleep", waits.append)
    s = serve(lambda n, body, headers: (500, {}, "") if n <= 8 else (429, {"Retry-After": ("30", "86400")[n % 2]}, "") if n <= 10 else "[action] +")
    teach(s, "--retries=20", episodes=1)
    assert all(0.5 * min(60, 2 ** k) <= w <= min(60, 2 ** k) for k, w in enumerate(waits[:8])) and len({round(w / 2 ** k, 6) for k, w in enumerate(waits[:6])}) > 1 and max(waits) <= 60 and len(waits) == 10
    assert f"{sum(waits):.0f} seconds waited" in capsys.readouterr().out
    wait = teachers.asked_to_wait
    assert [wait(x) for x in ("5", "0.5", "", "soon", "-3", "nan", "inf", "1e9", "Mon, 01 Jan 0001 00:00:00 -0000", "Fri, 31 Dec 1999 23:59:59 GMT")] == [5, 0.5] + [0] * 8
    assert 3500 < wait(email.utils.formatdate(time.time() + 3600, usegmt=True)) <= 3600


@pytest.mark.parametrize("status,words", [(401, ("401", "OPENAI_API_KEY")), (403, ("403", "some/vlm", "OPENAI_API_KEY")), (404, ("404", "/v1", "--model", "/models")), (400, ("400", "no pictures", "settings")), (307, ("307", "elsewhere", "address")),
                                          (501, ("501", "no pictures")), (429, ("429", "insufficient_quota"))])
def test_what_stays_wrong_is_one_sentence_at_once(serve, status, words, tmp_path, capsys):
    """One request, no second try, the remedy; the server's own words in it, without the key that it echoes."""
    s = serve(lambda n, body, headers: (status, {"Location": "http://elsewhere/"} if status == 307 else {}, json.dumps(dict(error=f"no pictures; insufficient_quota; you sent {headers['Authorization']} and {headers['Authorization'][:40]}..."))))
    with pytest.raises(SystemExit) as e:
        teach(s, f"--save={tmp_path}/x")
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and all(word in e.value.code for word in words) and len(s.requests) == 1
    everything_but_the_key(tmp_path, capsys, e.value.code)
    assert "abcdefgh" not in e.value.code


def test_no_server_is_one_sentence(serve, tmp_path, capsys):
    one_sentence(lambda: teach("http://127.0.0.1:9/v1", f"--save={tmp_path}/x"), "http://127.0.0.1:9/v1", "no connection", "--base_url")
    one_sentence(lambda: teach("http://127.0.0.1:99999/v1"), "no connection", "--base_url")


def test_an_echoed_key_is_written_nowhere(serve, tmp_path, capsys):
    """A server that puts the Authorization header into its errors, whole, cut off, and into a reply."""
    def behave(n, body, headers):
        echo = headers["Authorization"]
        if 2 <= n <= 13:
            return 500, {}, [f"bad: {echo}", json.dumps(dict(error=echo[:30] + "...")), json.dumps(dict(error=dict(message=f"'{echo}'")))][n % 3] if n % 2 else json.dumps(f"{echo} and {urllib.parse.quote(echo, safe='')}").replace("/", "\\/").replace("+", "\\u002B")
        return f"You said {echo}, so [action] +"
    teach(serve(behave), f"--save={tmp_path}/x", "--num_envs=3", "--retries=1", "--max_tokens=50", episodes=5)
    out = everything_but_the_key(tmp_path, capsys)
    assert "You said Bearer [key], so [action] +" in {reply_text(row) for row in Buffer(f"{tmp_path}/x").rows} and "12 HTTP 500" in out and "turns given up" in out


def test_a_local_server_needs_no_key_and_gets_none(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    s = serve(lambda n, body, headers: "[action] +")
    teach(s, episodes=1)
    assert "Authorization" not in s.requests[0][1]
    monkeypatch.setenv("OTHER", " 12345678\n")                                     # pasted with blanks around it
    teach(s, "--api_key_env=OTHER", episodes=1)
    assert s.requests[-1][1]["Authorization"] == "Bearer 12345678"


def test_newer_models_take_another_name_of_the_limit(serve):
    """OpenAI's reasoning models refuse `max_tokens`; the others, and most servers, know nothing else."""
    s = serve(lambda n, body, headers: (400, {}, json.dumps(dict(error=dict(message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")))) if "max_tokens" in body else "[action] +")
    teach(s, "--max_tokens=99", "--retries=0")
    assert sum("max_tokens" in body for _, _, body in s.requests) == 1 and s.requests[-1][2]["max_completion_tokens"] == 99


def test_a_turn_that_cannot_be_had_drops_its_episode(serve, tmp_path, capsys):
    """A vendor's content filter refuses one picture (no second try of that request), another fails all its tries: both episodes are played once more, dropped, counted; the others stay."""
    pictures = {}
    def behave(n, body, headers):
        nth = pictures.setdefault(body["messages"][0]["content"][0]["image_url"]["url"], len(pictures))
        return (400, {}, "filtered") if nth == 1 else (500, {}, "cursed") if nth == 2 else "[action] +"
    s = serve(behave)
    teach(s, f"--save={tmp_path}/x", "--retries=2", "--num_envs=4", env="Points24", episodes=8)
    out, buf = capsys.readouterr().out, Buffer(f"{tmp_path}/x")
    assert "dropped, HTTP 400: filtered; 1 of 8 episodes" in out or "dropped, HTTP 400: filtered; 2 of 8 episodes" in out
    assert "dropped, HTTP 500: cursed" in out and "2 HTTP 400" in out and "6 HTTP 500" in out and "4 turns given up" in out and "6 of 8 episodes" in out and len(buf.episodes) == 6


def test_a_server_that_goes_away_ends_it_and_what_was_played_is_kept(serve, tmp_path, capsys):
    s, folder = serve(lambda n, body, headers: "[action] +" if n <= 9 else (503, {}, "gone")), f"{tmp_path}/x"
    one_sentence(lambda: teach(s, f"--save={folder}", "--num_envs=2", "--retries=1", episodes=50), "no answer to the last 8 turns", "HTTP 503: gone", "--seed")
    n = len(Buffer(folder).episodes)
    assert 2 <= n <= 8 and f"{n} of 50 episodes" in capsys.readouterr().out
    before = len(s.requests)
    one_sentence(lambda: teach(s, f"--save={folder}"), folder, "another --seed")    # said before a single request
    assert len(s.requests) == before
    s.behave = lambda n, body, headers: "[action] -"
    teach(s, f"--save={folder}", "--seed=1", episodes=3)
    assert len(Buffer(folder).episodes) == n + 3


def test_bad_input(serve, tmp_path, monkeypatch, capsys):
    s = serve(lambda n, body, headers: "[action] +")
    for flags, words in ((["--agent=openai", "--env=NumberLine"], ("--base_url", "--model")), (["--agent=openai", "--env=NumberLine", "--model=x", "--base_url=localhost:8000"], ("--base_url=http://",)),
                         (["--agent=openai", "--env=NumberLine", "--model=x", "--base_url=file:///etc/passwd"], ("--base_url=http://",)), (["--agent=openai", "--env=NumberLine", "--model=x", "--base_url=http://me:secret@host/v1"], ("OPENAI_API_KEY",)),
                         (["--agent=expert", "--env=NumberLin"], ("NumberLin", "NumberLine")), (["--agent=expert"], ("--env",)), (["--env=NumberLine"], ("--agent",)), (["--agent=expert", "--env=NumberLine", "--report"], ("--report", "--save")),
                         (["--agent=expert", "--env=NumberLine", "--model=x"], ("--model", "--agent=openai")), (["--agent=expert", "--env=NumberLine", "--size=3"], ("size=3",)), (["nowhere.py", "--agent=expert"], ("nowhere.py",)),
                         *((["--agent=openai", "--env=NumberLine", "--model=x", f"--base_url={s.url}", flag], (flag.partition("=")[0],)) for flag in ("--num_envs=0", "--timeout=0", "--retries=-1", "--max_tokens=0", "--api_key_env=NOT_SET"))):
        one_sentence(lambda: evaluate.main(flags), *words)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    one_sentence(lambda: teach(s), "no key")
    assert not s.requests and "two words" not in capsys.readouterr().out

# --------------------------------------------------------------------------------------------------------------- a person

def typing(monkeypatch, *lines):
    """What a person types, then Ctrl-D; an exception is raised as it is."""
    lines = iter(lines)
    def typed(prompt=""):
        line = next(lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line
    monkeypatch.setattr(builtins, "input", typed)


@pytest.mark.parametrize("end", ["quit", EOFError, KeyboardInterrupt])
def test_a_person_plays_and_quits(monkeypatch, tmp_path, capsys, end):
    """The marker is added where it lacks; what was finished is kept, the begun episode is not."""
    monkeypatch.setattr(envs.NumberLine, "max_turns", 3)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    typing(monkeypatch, "+", "", "what?", "I think [action] -", "+", end)
    evaluate.main(["--env=NumberLine", "--agent=human", "--episodes=5", f"--save={tmp_path}/x"])
    out, rows = capsys.readouterr().out, Buffer(f"{tmp_path}/x").rows
    played = [row for row in rows if reply_text(row) is not None]
    assert [reply_text(row) for row in played] == ["[action] +", "[action] what?", "I think [action] -"][:len(played)] and len({row["episode"] for row in rows}) == 1 and {row["source"] for row in rows} == {"human", "end"}
    assert [row["valid"] for row in played] == [True, False, True] and "Stopped by you: 1 of 5 episodes" in out and "human" in out
    assert "picture.png" in out and "Actions: " in out and "\u2580" in out and "\033[38;2;" in out and "Turn 3 of at most 3, return so far -" in out
    assert max(len(line.split("\u2580")) - 1 for line in out.splitlines()) == 40


def test_a_person_who_leaves_at_once(monkeypatch, tmp_path, capsys):
    """And where nobody looks at a terminal, no rendering is printed."""
    typing(monkeypatch)
    with pytest.raises(SystemExit) as e:
        evaluate.main(["--env=NumberLine", "--agent=human", f"--save={tmp_path}/x"])
    assert e.value.code == 1 and "0 of 300 episodes" in (out := capsys.readouterr().out) and "\033[" not in out and not Buffer(f"{tmp_path}/x", create=True).rows
