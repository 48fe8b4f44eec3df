"""
Settings: a run uses what the user wrote, and every mistake is one sentence.

    python -m pytest tests/test_configurator.py
"""
import os
import subprocess
import sys

import pytest

from configurator import (
    CHOICES,
    ConfigError,
    check_config,
    configure,
    parse_block,
)
from extras.flag_mistakes import REMOVED, SYNONYMS
from extras.value_checks import check_secrets

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(ROOT, "train.py")

# The script is parsed and never imported: the module that it names does not exist.
SCRIPT = '''"""
Train a thing.
python train.py config/x.py

Not for --help.
"""
import sys
import a_module_that_does_not_exist
# --- config ---
# optimiser
lr = 1e-3             # per step
steps = 100           # updates
tau: float = None     # None = off
# data,
# and where it is
name = "numberline"   # which \u00e9nvironment
run_name: str = None
resume = False        # go on
flip: bool = None
layers = [1, 2]       # a list
                      # that is continued
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
KEYS = """lr steps tau name run_name resume flip layers span opts learning_rate many""".split()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the script above, in which every test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def config(text, path="config/x.py"):
    """Write a config file and return its path."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def run(*argv, script="train.py", files=True):
    """Return the settings of a command line."""
    return configure(script, list(argv), files, quiet=True)


def sentence(*argv, **options):
    """Return what Python prints on stderr for a wrong command line: one sentence of ASCII."""
    with pytest.raises(ConfigError) as e:
        run(*argv, **options)
    text = e.value.code
    assert isinstance(text, str)
    assert "\n" not in text and text.isascii() and text.endswith("."), text
    return text


# ---- what works ----


def test_defaults_in_block_order():
    cfg = run()
    assert list(vars(cfg)) == KEYS == list(parse_block("train.py"))
    assert cfg.lr == 1e-3
    assert cfg.tau is None
    assert cfg.layers == [1, 2]
    assert cfg.opts == {"a": 1}
    # no state is shared between two calls
    run().layers.append(3)
    assert run().layers == [1, 2]


def test_block_carries_types_comments_and_headings():
    block = parse_block("train.py")
    assert block["lr"] == (1e-3, float, "per step", "optimiser")
    assert block["tau"] == (None, float, "None = off", "optimiser")
    assert block["layers"].comment == "a list that is continued"
    assert block["opts"].comment == "a dict with a comment inside and one from column 0"
    assert {block[key].heading for key in KEYS[3:]} == {"data, and where it is"}


# (key, text, value)
GOOD = [
    ("lr", "1e-2", 0.01),
    ("lr", "1/3", 1 / 3),
    ("lr", "-(2**-3)", -0.125),
    ("lr", "3", 3.0),
    ("steps", "1e6", 10**6),
    ("steps", "2*10**3", 2000),
    ("steps", "7//2 + 7%4", 6),
    ("steps", "1_000", 1000),
    ("tau", "0.5", 0.5),
    ("tau", "1", 1.0),
    ("tau", "None", None),
    ("many", "1e3", 1000),
    ("many", "None", None),
    ("resume", "True", True),
    ("resume", "False", False),
    ("flip", "True", True),
    ("flip", "None", None),
    ("run_name", "None", None),
    ("layers", "[]", []),
    ("layers", "[1, [2, -3.5], 'x', None]", [1, [2, -3.5], "x", None]),
    ("layers", "(3, 4)", [3, 4]),
    ("layers", "3, 4", [3, 4]),
    ("span", "[3, 4]", (3, 4)),
    ("opts", "{}", {}),
    ("opts", "{'b': (1, 2), 3: {'c': 2**3}}", {"b": (1, 2), 3: {"c": 8}}),
]


@pytest.mark.parametrize("key, text, value", GOOD)
def test_a_file_and_a_flag_mean_the_same(key, text, value):
    defaults = run()
    for cfg in (run(f"--{key}={text}"), run(config(f"{key} = {text}\n"))):
        assert getattr(cfg, key) == value
        assert type(getattr(cfg, key)) is type(value)
        # no other key has changed
        assert all(getattr(cfg, k) == getattr(defaults, k) for k in KEYS if k != key)


# (flag, key, value)
FLAGS = [
    ("--resume", "resume", True),
    ("--flip", "flip", True),
    ("--resume=true", "resume", True),
    ("--resume=false", "resume", False),
    ("--name=a=b=c", "name", "a=b=c"),
    ("--name=", "name", ""),
    ("--name='x y'", "name", "x y"),
    ('--name="x"', "name", "x"),
    ("--name='x", "name", "'x"),
    ("--name='", "name", "'"),
    ("--name=3", "name", "3"),
    ("--name=__import__('os')", "name", "__import__('os')"),
    ("--run_name='None'", "run_name", "None"),
    ("--run_name=a.py", "run_name", "a.py"),
    ("--lr= 2 ", "lr", 2.0),
]


@pytest.mark.parametrize("flag, key, value", FLAGS)
def test_flags(flag, key, value):
    assert getattr(run(flag), key) == value


def test_several_names_can_be_a_list():
    names = "NumberLine,EZPoints"
    assert run(config("name = ['NumberLine', 'EZPoints']\n")).name == names
    assert run(f"--name={names}").name == names
    for wrong in ("[]", "['a', 1]", "('a', 'b')"):
        with pytest.raises(ConfigError):
            run(config(f"name = {wrong}\n"))


def test_files_then_flags_later_wins():
    a = config('"""Why."""\n# a comment\nlr = 1\nsteps = 1\nname: str = "a"\n', "config/a.py")
    b = config("steps = 2\n", "config/b.py")
    cfg = run(a, b, "--name=c")
    assert (cfg.lr, cfg.steps, cfg.name) == (1.0, 2, "c")
    assert run(b, a).steps == 1
    # an = in the name of a file
    assert run(config("", "config/run=3.py")) == run()


def test_prints_what_differs_and_where_from(capsys):
    configure("train.py", [config("lr = 2e-3\nsteps = 100\n"), "--name=\u00e9\n"])
    lr = "  lr = 0.002  (default 0.001, from config/x.py)\n"
    name = "  name = '\\xe9\\n'  (default 'numberline', from the command line)\n"
    assert capsys.readouterr().out == lr + name
    configure("train.py", ["--lr=1"], quiet=True)
    configure("train.py", [])
    assert capsys.readouterr().out == ""


def test_a_real_process_prints_one_line_and_fails(folder):
    block = "# --- config ---\nlr = 1e-3\n# --- end of config ---\n"
    imports = '"""T."""\nimport sys\nfrom configurator import configure\n'
    body = "cfg = configure(__file__, sys.argv[1:])\nprint(cfg.lr)\n"
    (folder / "t.py").write_text(imports + block + body)

    def start(*flags):
        return subprocess.run(
            [sys.executable, "t.py", *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ROOT},
        )

    good = start("--lr=2")
    assert good.returncode == 0
    assert good.stdout == "  lr = 2.0  (default 0.001, from the command line)\n2.0\n"
    bad = start("--lr='\\d'")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.count("\n") == 1 and "--lr='\\d'" in bad.stderr
    asked_for_help = start("--help")
    assert asked_for_help.returncode == 0 and asked_for_help.stderr == ""


# ---- help ----


def help_lines(capsys, *argv, **options):
    """Return what --help prints."""
    with pytest.raises(SystemExit) as e:
        run(*argv, **options)
    assert not e.value.code
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["nonsense", "--lr", "-h"]])
def test_help_lists_every_key(argv, capsys):
    lines = help_lines(capsys, *argv)
    assert "\n".join(lines).isascii()
    assert lines[:2] == ["Train a thing.", "python train.py config/x.py"]
    assert not any("Not for" in line for line in lines)
    flags = [line for line in lines if line.startswith("  --")]
    assert [line.split("=")[0].strip("- ") for line in flags] == KEYS
    assert lines.index("optimiser") < lines.index("data, and where it is")
    columns = set()
    for comment in ("per step", "updates", "None = off", "go on"):
        columns |= {line.index(comment) for line in flags if comment in line}
    assert len(columns) == 1, "the comments are aligned"


def test_help_wraps_long_comments_and_defaults(folder, capsys):
    """Long comments continue in their column; a default that is too wide has its comment below."""
    words = "word " * 50
    keys = f"short = 1  # {words}\nwide = {'x' * 60!r}  # why\nwidest = {'x' * 300!r}  # why\nbare = 1\n"
    (folder / "train.py").write_text(f"# --- config ---\n{keys}# --- end of config ---\n")
    lines = help_lines(capsys, "--help")
    assert max(map(len, lines)) <= 120
    column = lines[2].index("word")
    assert lines[2].startswith("  --short=1 ")
    assert all(line.startswith(" " * column + "word") for line in lines[3:5])
    assert sum(line.count("word") for line in lines) == 50
    assert lines[5].startswith("  --wide='xxx") and lines[6] == " " * column + "why"
    assert lines[7].endswith("...") and lines[8] == " " * column + "why"
    assert lines[9] == "  --bare=1"


# ---- what is one sentence ----

# {key: texts that are no value of it}
BAD = {
    "lr": [
        *("nan", "inf", "1e999", "-1e999", "1e200*1e200", "True", "None", "'0.1'", "1j"),
        *("(-1)**0.5", "1/0", "0,1", "9**9**9**9", "9.0**9**9", "10**300 * 10**300", "1" * 400),
        *("steps", "True + 1", "[1]*9", "1 if 1 else 2", "1 << 9", "not 1", "-True", "b'1'"),
        *("__import__('os').system('touch x')", "(lambda: 1)()", "(lr := 1)", "f'{1}'", "..."),
    ],
    "steps": ["1.5", "True", "None", "'1'", "1e300", "10/3", "false"],
    "many": ["1.5"],
    "tau": ["none", "'None'"],
    "resume": ["1", "0", "None", "yes", "'True'"],
    "flip": ["0"],
    "layers": ["1", "{}", "[x]", "[*[1]]", "[i for i in [1]]", "'abc'"],
    "opts": ["[1]", "{1}", "{**{}}", "{[1]: 2}", "{'a': 1, 'a': 2}", "dict(a=1)"],
}
BAD_PAIRS = [(key, text) for key, texts in BAD.items() for text in texts]


@pytest.mark.parametrize("key, text", BAD_PAIRS)
def test_a_wrong_value_is_one_sentence_in_a_flag_and_in_a_file(key, text, folder):
    default = repr(getattr(run(), key))
    by_flag = sentence(f"--{key}={text}")
    assert by_flag.startswith(f"--{key}={text}"[:60])
    by_file = sentence(config(f"\n{key} = {text}\n"))
    assert by_file.startswith(f"config/x.py:2: {key} = {text}"[:60])
    for message in (by_flag, by_file):
        if "not Python" not in message:
            assert f"{key} takes" in message and f"(default {default})" in message
    # nothing has run
    assert sorted(os.listdir(folder)) == ["config", "train.py"]


UNREADABLE = [
    *("1e-3 # a\n2", "[" * 500, "[1", "0x", "007", "1\0", "\udcff", "1;2", "", " ", "lr=2", "1 2"),
    *("\u0661x", "a\nb", "=", "-" * 5000 + "1", "1" * 5000, "1+" * 5000 + "1", "\x1b[2J"),
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_text_that_does_not_parse(text):
    message = sentence(f"--lr={text}")
    assert message.startswith("--lr=") and message.isprintable()
    assert "lr takes" in message and "(default 0.001)" in message


# (command line, parts of the sentence about it)
WRONG_WORDS = [
    (["--lrr=1"], ["--lrr=1", "nearest: lr"]),
    (["--step=1"], ["--step=1", "nearest: steps"]),
    (["--Steps=1"], ["--Steps=1", "nearest: steps"]),
    (["--learning-rate=1"], ["--learning-rate=1", "nearest: learning_rate"]),
    (["--zzzzzz=1"], ["--zzzzzz=1", "--help"]),
    (["--=1"], ["--=1"]),
    (["--"], ["--"]),
    (["---lr=1"], ["---lr=1", "nearest: lr"]),
    (["--no-resume"], ["--no-resume", "nearest: resume"]),
    (["--lr", "0.1"], ["--lr 0.1", "write --lr=0.1"]),
    (["--lr", "-5"], ["write --lr=-5"]),
    (["--lr"], ["write --lr=0.001"]),
    (["--lr", "--steps=5"], ["write --lr=0.001"]),
    (["--lr", "=5"], ["write --lr=5"]),
    (["--name"], ["--name", "write --name='numberline'"]),
    (["--resume", "false"], ["write --resume=false"]),
    (["--resume", "=false"], ["write --resume=false"]),
    (["--name=two", "words"], ['write --name="two words"']),
    (["--name=", "x"], ["write --name=x"]),
    (["lr=1"], ["lr=1", "write --lr=1"]),
    (["-lr=1"], ["-lr=1", "write --lr=1"]),
    (["-r"], ["-r"]),
    (["-"], ["-"]),
    (["=1"], ["=1"]),
    (["\u2014lr=1"], ["write --lr=1"]),
    (["step=1"], ["write --step=1", "nearest: steps"]),
    (["run_name=a.py"], ["write --run_name=a.py"]),
    (["--lr=1", "--lr=2"], ["--lr=2", "twice"]),
    (["--resume", "--resume"], ["--resume", "twice"]),
    (["--lr=1", "config/numberline.py"], ["config/numberline.py", "before --lr=1"]),
    ([""], []),
    (["config"], ["config", "config/numberline.py"]),
    (["config/numberlin.py"], ["config/numberlin.py", "nearest: config/numberline.py"]),
    (["numberline"], ["numberline", "config/numberline.py"]),
    (["config/qqqq"], ["there are: config/numberline.py"]),
    (["nowhere/x.py"], ["nowhere/x.py"]),
]


@pytest.mark.parametrize("argv, parts", WRONG_WORDS)
def test_a_wrong_command_line_is_one_sentence(argv, parts):
    config("lr = 1\n", "config/numberline.py")
    message = sentence(*argv)
    assert all(part in message for part in parts), message


# (content of a config file, parts of the sentence about it)
WRONG_FILES = [
    ("step = 1", [":1: step = 1", "nearest: steps"]),
    ("lr = 1\nlr = 2", [":2: lr = 2", "line 1"]),
    ("import os", [":1: import os"]),
    ("lr = 1\nprint('x')", [":2: print('x')"]),
    ("lr += 1", ["lr += 1"]),
    ("lr = steps = 1", ["lr = steps = 1"]),
    ("lr, steps = 1, 2", ["lr, steps = 1, 2"]),
    ("opts['a'] = 1", ["opts['a'] = 1"]),
    ("lr: float", ["lr: float"]),
    ("if 1:\n    lr = 1", [":1: if 1: lr = 1"]),
    ("def f():\n    pass", ["def f(): pass"]),
    ("lr = 1\n'text'", [":2: 'text'"]),
    ("name = numberline", ["name = numberline", "text in quotes"]),
    ("name = None", ["name = None"]),
    ("run_name = 3", ["run_name = 3", "or None"]),
    ("lr 1", [":1:", "lr 1"]),
    ("lr = (1", [":1:"]),
    ("lr = 1\n  steps = 2", [":2:"]),
    ("lr = 1\0", []),
    ("# coding: nonsense\n", [":1:"]),
    ("for", [":1:"]),
    ("lr = " + "-" * 5000 + "1", []),
    ("lr = " + "1" * 5000, [":1:", "lr = 111"]),
    ("lr = " + "1+" * 5000 + "1", []),
    ("lr = \u00e9", ["lr = \\xe9"]),
    ("from os import *", ["from os import *"]),
    ("__import__('os').system('touch x')", [":1: __import__('os').system('touch x')"]),
]


@pytest.mark.parametrize("text, parts", WRONG_FILES)
def test_a_wrong_file_is_one_sentence_with_its_line(text, parts, folder):
    message = sentence(config(text))
    assert all(part in message for part in ["config/x.py", *parts]), message
    assert not (folder / "x").exists()


def test_files_that_are_no_text(folder):
    (folder / "config/x.py").write_bytes(b"lr = 1 # \xff\xfe")
    assert "config/x.py" in sentence("config/x.py")


def test_files_false_refuses_positionals():
    assert config("lr = 1") in sentence("config/x.py", files=False)
    assert sentence("--lr=1", "config/x.py", files=False)
    assert sentence("", files=False)
    assert run("--lr=2", files=False).lr == 2.0


# (config block, part of the sentence about it)
WRONG_BLOCKS = [
    ("a = None", "annotate a"),
    ("a: thing = 1", "annotate a"),
    ("a = b", "b is not a literal"),
    ("a = 1\na = 2", "line"),
    ("import os", "import os"),
    ("a: int = 1.5", "a takes"),
    ("# --- config ---", "one config block"),
    ("if 1: a = 1", "if 1"),
]


@pytest.mark.parametrize("block, part", WRONG_BLOCKS)
def test_a_wrong_block_is_one_sentence_too(block, part, folder):
    begin = "# --- config ---\n"
    end = "# --- end of config ---\n"
    (folder / "train.py").write_text(f"{begin}{block}\n{end}")
    assert part in sentence()
    for text in ("", end + begin, f"x = '''\n{begin}{end}'''"):
        (folder / "train.py").write_text(text)
        assert "one config block" in sentence()


# ---- train.py's keys ----


def rule(*flags):
    """Return the sentence of check_config about some values of train.py's keys."""
    with pytest.raises(ConfigError) as e:
        check_config(run(*flags, script=TRAIN))
    text = e.value.code
    assert "\n" not in text and text.endswith("."), text
    return text


def test_the_defaults_break_no_rule():
    cfg = run(script=TRAIN)
    assert check_config(cfg) is cfg


def test_a_removed_key_says_what_holds_now():
    block = parse_block(TRAIN)
    assert not set(REMOVED) & set(block)
    for name in REMOVED:
        message = sentence(f"--{name}=0", script=TRAIN)
        assert message.startswith(f"--{name}=0: {name} was removed, ")
        assert message.endswith("; see docs/method.md.")
    path = config("lr = 1\ncql_coef = 0.1\n")
    message = sentence(path, script=TRAIN)
    assert message.startswith("config/x.py:2: cql_coef = 0.1: cql_coef was removed, pess_coef ")
    # another script never had these keys
    assert "no key weights" in sentence("--weights=x")


@pytest.mark.parametrize(
    "name, keys",
    [
        ("learning_rate", "lr"),
        ("Learning-Rate", "lr"),
        ("epochs", "offline_updates, online_updates"),
        ("lora_rank", "lora_r"),
        ("max_grad_norm", "grad_clip"),
        ("lambda", "lam"),
        ("bf16", "dtype"),
    ],
)
def test_a_name_from_elsewhere_suggests_ours(name, keys):
    hint = f"nearest: {keys}"
    assert sentence(f"--{name}=1", script=TRAIN).endswith(f"there is no key {name}; {hint}.")
    assert hint in sentence(f"{name}=1", script=TRAIN)


def test_synonyms_are_no_keys():
    block = parse_block(TRAIN)
    assert set(SYNONYMS) <= set(block)
    for synonyms in SYNONYMS.values():
        assert not set(synonyms.split()) & {*block, *REMOVED}


def test_a_choice_that_does_not_exist_names_the_others():
    for name, allowed in CHOICES.items():
        message = rule(f"--{name}=nonsense")
        assert message.startswith(f"{name}='nonsense' is not known: choose {', '.join(allowed)}")
    assert rule("--actor_loss=aftsft").endswith("(nearest: afsft, sft).")


# (key, values that are out of range, part of the sentence)
OUT_OF_RANGE = [
    ("n_critics", [0, -1], "at least 1."),
    ("n_critics", [1001], "at most 1,000."),
    ("batch_size", [10**7 + 1], "at most 10,000,000."),
    ("lora_r", [2**15 + 1], "at most 32,768."),
    ("seed", [-1], "at least 0."),
    ("seed", [2**32], "below 2^32."),
    ("log_interval", [0], "at least 1."),
    ("lora_r", [-1], "at least 0."),
    ("q_weight", [-0.5], "at least 0."),
    ("lr", [0, -1], "above 0."),
    ("gamma", [-0.1, 1.1], "between 0 and 1."),
    ("max_turns", [0], "at least 1, or None."),
    ("won_share", [-0.1, 1.1], "between 0 and 1, or None."),
    ("reward_clip", [-1], "0 or more."),
    ("size", [27, 2001], "between 28 and 2000 pixels."),
    ("penalty", [0.1], "0 or below, as the reward of a reply that does not parse."),
]


@pytest.mark.parametrize("name, values, part", OUT_OF_RANGE)
def test_a_number_out_of_range_names_the_range(name, values, part):
    for value in values:
        message = rule(f"--{name}={value}")
        assert message.startswith(f"{name}={value}")
        assert message.endswith(f"is out of range: it must be {part}")


# (flags, parts of the sentence)
CONFLICTING_FLAGS = [
    ("--offline_updates=0 --online_updates=0", ["both 0", "nothing to do"]),
    ("--resume --overwrite", ["resume and overwrite are both True"]),
    ("--resume --dry_run", ["dry_run and resume are both True"]),
    ("--q_weight=1 --actor_loss=sft", ["q_weight=1.0", "actor_loss='sft'", "set q_weight=0"]),
    ("--q_weight=1 --actor_loss=fbc", ["needs a critic"]),
    ("--model=scratch --lora_r=4", ["model='scratch'", "lora_r=4", "set lora_r=0"]),
    ("--vision_cache_mb=9 --lora_r=0", ["vision_cache_mb=9", "lora_r=0"]),
    ("--shard --lora_r=0", ["shard=True", "lora_r=0"]),
    ("--shard --compile", ["compile and shard are both True"]),
    ("--stop_at=900", ["stop_at=900", "600 + 200", "stop_at=0"]),
    ("--lr=1e39", ["lr=1e+39", "+-1e+12"]),
    ("--env=NumberLine,", ["env='NumberLine,'", "without a name"]),
    ("--model=", ["model=''", "bases/tiny-vlm"]),
    ("--data_mix={'exprt':1}", ["data_mix has a player 'exprt'", "expert, random, malformed, biased"]),
    ("--data_mix={'expert':True}", ["data_mix gives expert the share True"]),
    ("--data_mix={'expert':-1}", ["data_mix gives expert the share -1"]),
    ("--data_mix={'expert':0}", ["data_mix has no share above 0", "{'expert': 0.3, 'random': 0.7}"]),
    ("--data_mix={}", ["data_mix has no share above 0"]),
]


@pytest.mark.parametrize("flags, parts", CONFLICTING_FLAGS)
def test_keys_that_contradict_each_other_are_one_sentence(flags, parts):
    message = rule(*flags.split())
    assert all(part in message for part in parts), message


def test_what_only_looks_like_a_key_passes(tmp_path, monkeypatch):
    """A folder may be called as it likes, and OPENAI_API_KEY is the name of a variable."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf_experiment1").mkdir()
    monkeypatch.setenv("MY_KEY", "x")
    for words in (
        ["--out_dir=sk-baseline-seed0"],
        ["hf_experiment1", "--data=hf_experiment1"],
        ["--model=llava-hf/llava-1.5-7b-hf", "--max_new_tokens=3"],
        ["--model=hf-internal-testing/tiny-random-Llava", "--data=sk-learn-data"],
        ["--model=hf_my_model_2024"],
        ["--api_key_env=MY_KEY", "--base_url=http://localhost:8000/v1"],
        ["--api_key_env=OPENAI_API_KEY"],
    ):
        check_secrets(words)


def test_keys_that_only_look_contradictory_pass():
    for flags in (
        "--resume",
        "--eval_interval=0 --stop_at=0",
        "--model=scratch --lora_r=0",
        "--q_weight=1 --actor_loss=awr",
        "--max_turns=None --won_share=None --reward_clip=0",
        "--data_mix={} --data=data/x",
    ):
        check_config(run(*flags.split(), script=TRAIN))
