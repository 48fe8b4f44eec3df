"""
Settings: what a person means is what runs, and what cannot be meant is one sentence.
    python -m pytest tests/test_configurator.py
"""
import os, subprocess, sys
import pytest
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import ConfigError, configure, parse_block

SCRIPT = '''"""
Train a thing.
python train.py config/x.py

Not for --help.
"""
import sys
import a_module_that_does_not_exist # the script is parsed, never imported
# --- config ---
# optimiser
lr = 1e-3             # per step
steps = 100           # updates
tau: float = None     # None = off
# data,
# and where it lies
name = "numberline"   # which \u00e9nvironment
run_name: str = None
resume = False        # go on
flip: bool = None
layers = [1, 2]       # a list
                      # that goes on
span = (1, 2)
opts = {              # a dict
    "a": 1,           # with a comment inside
# and one from column 0
}
learning_rate = 0.5
many: int = None
# --- end of config ---
steps = steps + 1     # not a key
'''
KEYS = ["lr", "steps", "tau", "name", "run_name", "resume", "flip", "layers", "span", "opts", "learning_rate", "many"]

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path

def config(text, path="config/x.py"):
    with open(path, "w", encoding="utf-8") as f: f.write(text)
    return path

def run(*argv, **kw): return configure("train.py", list(argv), **{"quiet": True} | kw)

def sentence(*argv, **kw):
    with pytest.raises(ConfigError) as e: run(*argv, **kw)
    text = e.value.code # what Python prints on stderr for a SystemExit
    assert isinstance(text, str) and "\n" not in text and text.isascii() and text.endswith("."), text
    return text

# -- what works --------------------------------------------------------------------------------------------------------
def test_defaults_in_block_order():
    cfg = run()
    assert list(vars(cfg)) == KEYS == list(parse_block("train.py"))
    assert cfg.lr == 1e-3 and cfg.tau is None and cfg.layers == [1, 2] and cfg.opts == {"a": 1}
    run().layers.append(3)
    assert run().layers == [1, 2] # no state is shared between two calls

def test_block_carries_types_comments_and_headings():
    block = parse_block("train.py")
    assert block["lr"] == (1e-3, float, "per step", "optimiser")
    assert block["tau"] == (None, float, "None = off", "optimiser")
    assert block["layers"].comment == "a list that goes on"
    assert block["opts"].comment == "a dict with a comment inside and one from column 0"
    assert {block[k].heading for k in KEYS[3:]} == {"data, and where it lies"}

GOOD = [("lr", "1e-2", 0.01), ("lr", "1/3", 1 / 3), ("lr", "-(2**-3)", -0.125), ("lr", "3", 3.0), ("steps", "1e6", 10**6), ("steps", "2*10**3", 2000),
        ("steps", "7//2 + 7%4", 6), ("steps", "1_000", 1000), ("tau", "0.5", 0.5), ("tau", "1", 1.0), ("tau", "None", None), ("many", "1e3", 1000), ("many", "None", None),
        ("resume", "True", True), ("resume", "False", False), ("flip", "True", True), ("flip", "None", None), ("run_name", "None", None),
        ("layers", "[]", []), ("layers", "[1, [2, -3.5], 'x', None]", [1, [2, -3.5], "x", None]), ("layers", "(3, 4)", [3, 4]), ("layers", "3, 4", [3, 4]),
        ("span", "[3, 4]", (3, 4)), ("opts", "{}", {}), ("opts", "{'b': (1, 2), 3: {'c': 2**3}}", {"b": (1, 2), 3: {"c": 8}})]

@pytest.mark.parametrize("key, text, value", GOOD)
def test_a_file_and_a_flag_mean_the_same(key, text, value):
    for cfg in (run(f"--{key}={text}"), run(config(f"{key} = {text}\n"))):
        assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
        assert all(getattr(cfg, k) == getattr(run(), k) for k in KEYS if k != key) # and nothing else moves

@pytest.mark.parametrize("flag, key, value", [("--resume", "resume", True), ("--flip", "flip", True), ("--resume=true", "resume", True), ("--resume=false", "resume", False),
    ("--name=a=b=c", "name", "a=b=c"), ("--name=", "name", ""), ("--name='x y'", "name", "x y"), ('--name="x"', "name", "x"), ("--name='x", "name", "'x"), ("--name='", "name", "'"),
    ("--name=3", "name", "3"), ("--name=__import__('os')", "name", "__import__('os')"), ("--run_name='None'", "run_name", "None"), ("--run_name=a.py", "run_name", "a.py"), ("--lr= 2 ", "lr", 2.0)])
def test_flags(flag, key, value): assert getattr(run(flag), key) == value

def test_several_names_may_stand_in_a_list():
    assert run(config("name = ['NumberLine', 'EZPoints']\n")).name == run("--name=NumberLine,EZPoints").name == "NumberLine,EZPoints"
    for wrong in ("[]", "['a', 1]", "('a', 'b')"):
        with pytest.raises(ConfigError): run(config(f"name = {wrong}\n"))

def test_files_then_flags_later_wins():
    a, b = config('"""Why."""\n# a comment\nlr = 1\nsteps = 1\nname: str = "a"\n', "config/a.py"), config("steps = 2\n", "config/b.py")
    cfg = run(a, b, "--name=c")
    assert (cfg.lr, cfg.steps, cfg.name) == (1.0, 2, "c")
    assert run(b, a).steps == 1
    assert run(config("", "config/run=3.py")) == run() # an = in a file's name

def test_prints_what_differs_and_where_from(capsys):
    run(config("lr = 2e-3\nsteps = 100\n"), "--name=\u00e9\n", quiet=False)
    assert capsys.readouterr().out == "  lr = 0.002  (default 0.001, from config/x.py)\n  name = '\\xe9\\n'  (default 'numberline', from the command line)\n"
    run("--lr=1", quiet=True)
    run(quiet=False)
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["nonsense", "--lr", "-h"]])
def test_help_lists_every_key(argv, capsys):
    with pytest.raises(SystemExit) as e: run(*argv)
    out = capsys.readouterr().out
    assert not e.value.code and out.isascii() and out.startswith("Train a thing.\npython train.py config/x.py\n") and "Not for" not in out
    lines = out.splitlines()
    assert [line.split("=")[0].strip("- ") for line in lines if line.startswith("  --")] == KEYS
    assert lines.index("optimiser") < lines.index("data, and where it lies")
    assert len({line.index(c) for line in lines for c in ("per step", "updates", "None = off", "go on") if c in line and "--layers" not in line}) == 1 # aligned

def test_a_real_process_says_one_line_and_fails(folder):
    (folder / "t.py").write_text('"""T."""\nimport sys\nfrom configurator import configure\n# --- config ---\nlr = 1e-3\n# --- end of config ---\ncfg = configure(__file__, sys.argv[1:])\nprint(cfg.lr)\n')
    go = lambda *a: subprocess.run([sys.executable, "t.py", *a], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    good, bad, helped = go("--lr=2"), go("--lr='\\d'"), go("--help")
    assert good.returncode == 0 and good.stdout == "  lr = 2.0  (default 0.001, from the command line)\n2.0\n"
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "--lr='\\d'" in bad.stderr
    assert helped.returncode == 0 and helped.stderr == ""

# -- what is one sentence ----------------------------------------------------------------------------------------------
BAD = [("lr", "nan"), ("lr", "inf"), ("lr", "1e999"), ("lr", "-1e999"), ("lr", "1e200*1e200"), ("lr", "True"), ("lr", "None"), ("lr", "'0.1'"), ("lr", "1j"), ("lr", "(-1)**0.5"), ("lr", "1/0"), ("lr", "0,1"),
       ("lr", "9**9**9**9"), ("lr", "9.0**9**9"), ("lr", "10**300 * 10**300"), ("lr", "1" * 400), ("lr", "steps"), ("lr", "True + 1"), ("lr", "[1]*9"), ("lr", "1 if 1 else 2"), ("lr", "1 << 9"),
       ("steps", "1.5"), ("steps", "True"), ("steps", "None"), ("steps", "'1'"), ("steps", "1e300"), ("steps", "10/3"), ("steps", "false"), ("many", "1.5"), ("tau", "none"), ("tau", "'None'"),
       ("resume", "1"), ("resume", "0"), ("resume", "None"), ("resume", "yes"), ("resume", "'True'"), ("flip", "0"),
       ("layers", "1"), ("layers", "{}"), ("layers", "[x]"), ("layers", "[*[1]]"), ("layers", "[i for i in [1]]"), ("layers", "'abc'"), ("opts", "[1]"), ("opts", "{1}"), ("opts", "{**{}}"), ("opts", "{[1]: 2}"), ("opts", "{'a': 1, 'a': 2}"),
       ("opts", "dict(a=1)"), ("lr", "__import__('os').system('touch x')"), ("lr", "(lambda: 1)()"), ("lr", "(lr := 1)"), ("lr", "b'1'"), ("lr", "f'{1}'"), ("lr", "...")]

@pytest.mark.parametrize("key, text", BAD)
def test_a_wrong_value_is_one_sentence_in_a_flag_and_in_a_file(key, text, folder):
    default = repr(getattr(run(), key))
    for said, start in ((sentence(f"--{key}={text}"), f"--{key}={text}"), (sentence(config(f"\n{key} = {text}\n")), f"config/x.py:2: {key} = {text}")):
        assert said.startswith(start[:60])
        if "not Python" not in said: assert f"{key} takes" in said and f"(default {default})" in said
    assert sorted(os.listdir(folder)) == ["config", "train.py"] # nothing ran

@pytest.mark.parametrize("text", ["1e-3 # a\n2", "[" * 500, "[1", "0x", "007", "1\0", "\udcff", "1;2", "", " ", "lr=2", "1 2", "\u0661x", "a\nb", "=", "-" * 5000 + "1", "1" * 5000, "1+" * 5000 + "1", "\x1b[2J"])
def test_text_that_does_not_parse(text): 
    said = sentence(f"--lr={text}")
    assert said.startswith("--lr=") and "lr takes" in said and "(default 0.001)" in said and said.isprintable()

@pytest.mark.parametrize("argv, parts", [
    (["--lrr=1"], ["--lrr=1", "nearest: lr"]), (["--step=1"], ["--step=1", "nearest: steps"]), (["--Steps=1"], ["--Steps=1", "nearest: steps"]), (["--learning-rate=1"], ["--learning-rate=1", "nearest: learning_rate"]),
    (["--zzzzzz=1"], ["--zzzzzz=1", "--help"]), (["--=1"], ["--=1"]), (["--"], ["--"]), (["---lr=1"], ["---lr=1", "nearest: lr"]), (["--no-resume"], ["--no-resume", "nearest: resume"]),
    (["--lr", "0.1"], ["--lr 0.1", "write --lr=0.1"]), (["--lr", "-5"], ["write --lr=-5"]), (["--lr"], ["write --lr=0.001"]), (["--lr", "--steps=5"], ["write --lr=0.001"]), (["--lr", "=5"], ["write --lr=5"]), (["--name"], ["--name", "write --name='numberline'"]),
    (["--resume", "false"], ["write --resume=false"]), (["--resume", "=false"], ["write --resume=false"]), (["--name=two", "words"], ['write --name="two words"']), (["--name=", "x"], ["write --name=x"]),
    (["lr=1"], ["lr=1", "write --lr=1"]), (["-lr=1"], ["-lr=1", "write --lr=1"]), (["-r"], ["-r"]), (["-"], ["-"]), (["=1"], ["=1"]), (["\u2014lr=1"], ["write --lr=1"]), (["step=1"], ["write --step=1", "nearest: steps"]), (["run_name=a.py"], ["write --run_name=a.py"]),
    (["--lr=1", "--lr=2"], ["--lr=2", "twice"]), (["--resume", "--resume"], ["--resume", "twice"]),
    (["--lr=1", "config/numberline.py"], ["config/numberline.py", "before --lr=1"]), ([""], []), (["config"], ["config", "config/numberline.py"]),
    (["config/numberlin.py"], ["config/numberlin.py", "nearest: config/numberline.py"]), (["numberline"], ["numberline", "config/numberline.py"]), (["config/qqqq"], ["there are: config/numberline.py"]), (["nowhere/x.py"], ["nowhere/x.py"]),
])
def test_a_wrong_command_line_is_one_sentence(argv, parts):
    config("lr = 1\n", "config/numberline.py")
    said = sentence(*argv)
    assert all(part in said for part in parts), said

@pytest.mark.parametrize("text, parts", [
    ("step = 1", [":1: step = 1", "nearest: steps"]), ("lr = 1\nlr = 2", [":2: lr = 2", "line 1"]), ("import os", [":1: import os"]), ("lr = 1\nprint('x')", [":2: print('x')"]), ("lr += 1", ["lr += 1"]),
    ("lr = steps = 1", ["lr = steps = 1"]), ("lr, steps = 1, 2", ["lr, steps = 1, 2"]), ("opts['a'] = 1", ["opts['a'] = 1"]), ("lr: float", ["lr: float"]), ("if 1:\n    lr = 1", [":1: if 1: lr = 1"]), ("def f():\n    pass", ["def f(): pass"]),
    ("lr = 1\n'text'", [":2: 'text'"]), ("name = numberline", ["name = numberline", "text in quotes"]), ("name = None", ["name = None"]), ("run_name = 3", ["run_name = 3", "or None"]), ("lr 1", [":1:", "lr 1"]), ("lr = (1", [":1:"]), ("lr = 1\n  steps = 2", [":2:"]), ("lr = 1\0", []),
    ("# coding: nonsense\n", [":1:"]), ("for", [":1:"]), ("lr = " + "-" * 5000 + "1", []), ("lr = " + "1" * 5000, [":1:", "lr = 111"]), ("lr = " + "1+" * 5000 + "1", []), ("lr = \u00e9", ["lr = \\xe9"]), ("from os import *", ["from os import *"]), ("__import__('os').system('touch x')", [":1: __import__('os').system('touch x')"]),
])
def test_a_wrong_file_is_one_sentence_with_its_line(text, parts, folder):
    said = sentence(config(text))
    assert all(part in said for part in ["config/x.py", *parts]), said
    assert not (folder / "x").exists()

def test_files_that_are_no_text(folder):
    (folder / "config/x.py").write_bytes(b"lr = 1 # \xff\xfe")
    assert "config/x.py" in sentence("config/x.py")

def test_files_false_refuses_positionals():
    assert config("lr = 1") in sentence("config/x.py", files=False)
    assert sentence("--lr=1", "config/x.py", files=False) and sentence("", files=False)
    assert run("--lr=2", files=False).lr == 2.0

@pytest.mark.parametrize("block, part", [("a = None", "annotate a"), ("a: thing = 1", "annotate a"), ("a = b", "b is not a literal"), ("a = 1\na = 2", "line"), ("import os", "import os"), ("a: int = 1.5", "a takes"), ("# --- config ---", "one config block"), ("if 1: a = 1", "if 1")])
def test_a_wrong_block_is_one_sentence_too(block, part, folder):
    (folder / "train.py").write_text(f"# --- config ---\n{block}\n# --- end of config ---\n")
    assert part in sentence()
    for text in ("", "# --- end of config ---\n# --- config ---\n", "x = '''\n# --- config ---\n# --- end of config ---\n'''"):
        (folder / "train.py").write_text(text)
        assert "one config block" in sentence()
