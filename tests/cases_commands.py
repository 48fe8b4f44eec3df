"""
What is wrong with a command line: a part of docs/failures.md.

Every case is refused before anything is written, and most before a model is opened.
"""
import os, shutil

import pytest
from torch._inductor.exc import InvalidCxxCompiler

import evaluate, train
from cases_models import QUICK, tiny, trained
from failure_cases import Case
from small_runs import content, flags

SECRET = "sk-abcdefgh12345678"
TEACHER = ["--agent=openai", "--env=NumberLine", "--model=x", "--base_url=http://127.0.0.1:9/v1"]

def refused(script, argv, prepare=None):
    """Make a case: a script refuses its arguments, repeats no key, and nothing is written or changed."""

    def make(folder):
        if prepare:
            prepare(folder)
        before = content(folder)

        def call():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPENAI_API_KEY", SECRET)
                try:
                    script.main(argv)
                except SystemExit as error:
                    assert SECRET not in str(error.code), "the key was printed"
                    raise
                finally:
                    assert content(folder) == before, "something was written"
                    assert set(os.listdir(folder)) <= {"config", "file", "run", "played"}

        return call

    return make

def command(script, line, then, what="", prepare=None):
    """Make the case of a command line, its words separated by blanks."""
    name = "train.py" if script is train else "evaluate.py"
    words = what or f"`{name} {line}`"
    return Case(words, then, refused(script, line.split(" ") if line else [], prepare))

def training(line, then, what="", prepare=None):
    return command(train, line, then, what, prepare)

def evaluating(line, then, what="", prepare=None):
    return command(evaluate, line, then, what, prepare)

def with_model(key, value, then):
    """Make the case of a key that is checked against the model, before data are recorded."""

    def make(folder):
        keys = dict(model=tiny(), out_dir="out") | {key: value}
        call = refused(train, flags(**QUICK | keys))(folder)

        def without_gpu():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("torch.cuda.is_available", lambda: False)
                return call()

        return without_gpu

    return Case(f"`train.py --{key}={value}`", then, make)

def a_file(folder):
    with open(os.path.join(folder, "file"), "w") as f:
        f.write("text")

def config_file(text):
    """Prepare config/x.py with a text."""

    def prepare(folder):
        os.makedirs(os.path.join(folder, "config"))
        with open(os.path.join(folder, "config", "x.py"), "w") as f:
            f.write(text)

    return prepare

def a_run(folder):
    shutil.copytree(trained(lora_r=2), os.path.join(folder, "run"))

def some_play(folder):
    shutil.copytree(os.path.join(trained(lora_r=2), "data"), os.path.join(folder, "played"))


RANGE = "...is out of range: it must be "
TEMPERATURE = "0 for the most likely reply, or 0.001 to 1000."
TOO_LARGE = "...is out of range: no number may be beyond +-1e+12."
LOOKS_LIKE_A_KEY = ("this looks like a key or a password, and command lines are printed and stored: put it "
                    "into the environment variable OPENAI_API_KEY, or into the one that --api_key_env names.")

NAMES = [
    training("--learning_rate=1e-3", "--learning_rate=1e-3: there is no key learning_rate; nearest: lr."),
    training("--bacth_size=3", "--bacth_size=3: there is no key bacth_size; nearest: batch_size..."),
    training("--weight_decay=0.1",
             "--weight_decay=0.1: weight_decay was removed, it is 0.01 where lora_r=0..."),
    training("--seed 3", "--seed 3: seed has no value, write --seed=3."),
    training("-seed=3", "-seed=3: a flag has two dashes and one =, write --seed=3."),
    training("seed=3", "seed=3: a flag has two dashes and one =, write --seed=3."),
    training("--seed=1 --seed=2", "--seed=2: seed is given twice, delete one of the two."),
    training("--seed=1 config/x.py", "config/x.py: config files come before the flags, write it before ...",
             prepare=config_file("seed = 1")),
    training("config/none.py", "config/none.py: there is no such config file; ..."),
    training("config/x.py", "config/x.py:1: import os: write `key = value` with a literal value...",
             what="a config file with an import", prepare=config_file("import os")),
]
VALUES = [
    training("--seed=-1", f"seed=-1{RANGE}at least 0."),
    training("--seed=4294967296", f"seed=4294967296{RANGE}below 2^32."),
    training("--seed=1.5", "--seed=1.5: seed takes a whole number such as 1000 or 1e6 (default 0)."),
    training("--lr=nan", "--lr=nan: nan is not a literal; lr takes a finite number..."),
    training("--lr=1e999", "--lr=1e999: this is not a finite real number; lr takes a finite number..."),
    training("--lr=1e39", TOO_LARGE),
    training("--penalty=-1e300", TOO_LARGE),
    training("--q_init=-1e39", TOO_LARGE),
    training("--lr=1/0", "--lr=1/0: division by zero; lr takes a finite number..."),
    training("--lr=9**9**9", "--lr=9**9**9: this number is too large; lr takes a finite number..."),
    training("--lr=0", f"lr=0.0{RANGE}above 0."),
    training("--lr=", "--lr=: there is no value after the =; lr takes a finite number..."),
    training("--gamma=1.5", f"gamma=1.5{RANGE}between 0 and 1."),
    training("--batch_size=0", f"batch_size=0{RANGE}at least 1."),
    training("--data_episodes=1e15", TOO_LARGE),
    training("--data_episodes=1e9", f"data_episodes=1000000000{RANGE}at most 10,000,000."),
    training("--n_critics=5000", f"n_critics=5000{RANGE}at most 1,000."),
    training("--lora_r=1e6", f"lora_r=1000000{RANGE}at most 32,768."),
    training("--max_new_tokens=1e6", f"max_new_tokens=1000000{RANGE}at most 32,768."),
    training("--size=5", f"size=5{RANGE}between 28 and 2000 pixels."),
    training("--resume=maybe", "--resume=maybe: ...resume takes True or False (default False)."),
    training("--data_mix={'expert':-1}",
             "data_mix gives expert the share -1: it must be a number, at least 0."),
    training("--data_mix={'exprt':1}", "data_mix has a player 'exprt': known are expert, random..."),
    training("--data_mix={'expert':1e300}", "data_mix gives expert the share 1e+300: it must be a number..."),
    training("--device=gpu", "device='gpu' is not known: choose auto, cpu, cuda..."),
    training("--actor_loss=aftsft", "actor_loss='aftsft' is not known: choose sft, afsft..."),
    training("--stop_at=100000", "stop_at=100000 is behind the last update, 600 + 200..."),
    training("--offline_updates=0 --online_updates=0", "offline_updates and online_updates are both 0..."),
    training("--resume=True --overwrite=True", "resume and overwrite are both True..."),
    training("--shard=True", "shard=True spreads a model over several ranks..."),
    training("--compile=True --shard=True", "compile and shard are both True: the hooks of..."),
]
PLACES = [
    training("--out_dir=", "out_dir='' names no folder: write for instance out_dir=out/run."),
    training("--out_dir=file", "out_dir='file': '.../file' is no folder, so nothing can be written there...",
             prepare=a_file),
    training("--out_dir=file/run", "out_dir='file/run': '.../file' is no folder...", prepare=a_file),
    training("--out_dir=/dev/null", "out_dir='/dev/null': '/dev/null' is no folder..."),
    training("--out_dir=~/run", "out_dir='~/run': a shell replaces ~ only where a word begins..."),
    training("--out_dir=a\0b", "out_dir='a\\x00b' has a character that cannot be printed...",
             what="`train.py --out_dir=...` with a zero byte"),
    training("--out_dir=a\nb", "out_dir='a\\nb' has a character that cannot be printed...",
             what="`train.py --out_dir=...` with a line break"),
    training("--out_dir=\udcff", "out_dir='...' has a character that cannot be printed...",
             what="`train.py --out_dir=...` with half a character"),
    training("--out_dir=" + "x" * 300, "out_dir='xxx...' is too long for a path: write a shorter one.",
             what="`train.py --out_dir=...` of 300 letters"),
    training("--data=nowhere", "'nowhere'..."),
    training("--data=a\0b", "data='a\\x00b' has a character that cannot be printed...",
             what="`train.py --data=...` with a zero byte"),
    training("--resume=True --out_dir=nowhere", "out_dir='nowhere' has no checkpoint..."),
]
GAMES = [
    training("--env=,", "env=',' has a place without a name: write --env=NumberLine..."),
    training("--env=NumberLine,,EZPoints", "env='NumberLine,,EZPoints' has a place without a name..."),
    training("--env=" + "Reading:" * 2000, "env='Reading:...' is longer than 2000 characters...",
             what="`train.py --env=Reading:Reading:...`, 2,000 times"),
    training("--env=", "env='' has a place without a name..."),
    training("--env=NumberLin", "env='NumberLin' is unknown; nearest: NumberLine..."),
    training("--env=nowhere.py:MyEnv", "env='nowhere.py:MyEnv': there is no file 'nowhere.py' here..."),
    training("--env=Reading",
             "env='Reading' asks questions with one right answer and has no online phase..."),
]
def without_compiler():
    """Make the case of compiled layers on a machine that cannot compile."""

    def missing():
        raise InvalidCxxCompiler

    def make(folder):
        keys = QUICK | dict(model=tiny(), out_dir="out", compile=True)
        call = refused(train, flags(**keys))(folder)

        def patched():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("torch.cuda.is_available", lambda: False)
                patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
                return call()

        return patched

    return Case("`train.py --compile=True`, no C++ compiler there",
                "compile=True needs a C++ compiler, and there is none on this machine...", make)

MODELS = [
    with_model("device", "cuda",
               "device='cuda', but torch finds no CUDA device on this machine: use --device=cpu."),
    training("--model=", "model='' names no model: write --model=bases/tiny-vlm..."),
    training("--model=./nowhere", "model='./nowhere' cannot be opened: there is no such folder..."),
    training("--model=bases/smollm2", "model='.../bases/smollm2' holds a vision tower and a projector, "
             "without a language model: put them together with python -m extras.compose (docs/bases.md)."),
    training("--model=out/smollm2", "model='out/smollm2' is not there yet: make it with python -m "
             "extras.compose --lm=smollm2 ..."),
    training("--model=scratch",
             "model='scratch' has random weights, adapters on them (lora_r=16) learn nothing..."),
    with_model("lora_targets", "*_proj",
               "lora_targets='*_proj' is no regular expression that can be used (...)..."),
    with_model("lora_targets", "vision.*",
               "lora_targets='vision.*' matches no linear layer of the language model..."),
    with_model("lora_targets", "", "lora_targets='' matches no linear layer of the language model..."),
    with_model("modules_to_save", "projector", "modules_to_save='projector' matches no module..."),
    with_model("modules_to_save", ".*", "modules_to_save='.*' matches ..., which holds the embeddings..."),
    without_compiler(),
    training("config/x.py", "config/x.py:1: trust_remote_code = True: a file cannot give this permission, "
             "only the flag --trust_remote_code=True can; delete the line.",
             what="a config file with `trust_remote_code = True`",
             prepare=config_file("trust_remote_code = True")),
]
def without_server():
    """Make the case of a run whose server has not been started."""

    def make(folder):
        keys = QUICK | dict(model=tiny(), online_updates=1, rollout_url="http://127.0.0.1:9/v1")
        return refused(train, flags(**keys))(folder)

    return Case("`train.py --rollout_url=...`, no server there",
                "rollout_url='http://127.0.0.1:9/v1' does not answer (...): start the server first...", make)

SERVERS = [
    training("--rollout_url=localhost:8000",
             "rollout_url='localhost:8000' is no address of a server: write for instance..."),
    training("--rollout_url=http://me:secret@host/v1", f"--rollout_url: {LOOKS_LIKE_A_KEY}",
             what="`train.py --rollout_url=`, a password in it"),
    training("config/x.py", "rollout_url: a user and a password in an address would be printed and stored...",
             what="a config with a password in its `rollout_url`",
             prepare=config_file("rollout_url = 'http://me:secret@host/v1'\n")),
    training("--rollout_url=http://host/v1 --lora_r=0",
             "rollout_url='http://host/v1' gives a server the adapters of every rollout, and lora_r=0..."),
    training("--rollout_url=http://host/v1 --q_weight=5",
             "q_weight=5.0 lets the critic correct each token, which a server cannot: set q_weight=0..."),
    training("--rollout_url=http://host/v1 --modules_to_save=.*projector.*",
             "modules_to_save='.*projector.*' trains layers that a server's adapters do not have: leave..."),
    without_server(),
]
SECRETS = [
    evaluating(" ".join([*TEACHER, f"--api_key_env={SECRET}"]), f"--api_key_env: {LOOKS_LIKE_A_KEY}",
               what="`evaluate.py --api_key_env=`, the key itself"),
    evaluating(" ".join([*TEACHER, "--api_key_env=NOT_SET_ANYWHERE"]),
               "--api_key_env: the environment variable that it names is not set; the value is not ...",
               what="`evaluate.py --api_key_env=`, a variable that is not set"),
    evaluating(f"--env=NumberLine --agent=openai --model={SECRET}", f"--model: {LOOKS_LIKE_A_KEY}",
               what="`evaluate.py --model=`, a key"),
    evaluating("--env=NumberLine --agent=openai --model=x --base_url=http://me:secret@host/v1",
               f"--base_url: {LOOKS_LIKE_A_KEY}", what="`evaluate.py --base_url=`, a password in it"),
    evaluating(f"--openai_api_key={SECRET}", f"--openai_api_key: {LOOKS_LIKE_A_KEY}",
               what="`evaluate.py --openai_api_key=`, a flag of another program"),
    evaluating(f"--api_key {SECRET}", f"--api_key: {LOOKS_LIKE_A_KEY}",
               what="`evaluate.py --api_key`, the key behind a blank"),
    evaluating(SECRET,
               f"A word of the command line: {LOOKS_LIKE_A_KEY}", what="`evaluate.py`, a key as the run"),
    training(f"--model={SECRET}", f"--model: {LOOKS_LIKE_A_KEY}", what="`train.py --model=`, a key"),
]
PLAYING = [
    evaluating("", "Name the run folder first: python evaluate.py out/numberline..."),
    evaluating("nowhere", "'nowhere' is no run folder: it has no config.json..."),
    evaluating("--env=NumberLine", "Name the run folder first..."),
    evaluating("--env=NumberLine --agent=exprt", "--agent='exprt' is not known..."),
    evaluating("--env=NumberLine --agent=openai",
               "--agent=openai needs a server's address and a model's name..."),
    evaluating("--env=NumberLine --agent=openai --model=x --base_url=localhost:8000",
               "--agent=openai needs a server's address..."),
    evaluating("--env=NumberLine --agent=random --model=x", "--base_url and --model need --agent=openai."),
    evaluating("--env=NumberLine --agent=random --episodes=0", f"--episodes=0{RANGE}at least 1."),
    evaluating("--env=NumberLine --agent=random --seed=-1", f"--seed=-1{RANGE}at least 0, and below 2^32."),
    evaluating("run --temperature=1e-40", f"--temperature=1e-40{RANGE}{TEMPERATURE}",
               prepare=a_run),
    evaluating("run --temperature=-1", f"--temperature=-1.0{RANGE}{TEMPERATURE}",
               prepare=a_run),
    evaluating("run --q_weight=1e39", TOO_LARGE, prepare=a_run),
    evaluating("run --size=0",
               "'run' is played as it was trained: leave --size=0 out, or name no run.", prepare=a_run),
    evaluating("run --critic=run", "--critic='run' is for a folder of episodes; a run has its own critic.",
               prepare=a_run),
    evaluating("run --device=tpu", f"--device='tpu'{RANGE}auto, cpu, cuda or None.", prepare=a_run),
    evaluating(" ".join([*TEACHER, "--timeout=0"]), f"--timeout=0.0{RANGE}above 0...",
               what="`evaluate.py --agent=openai --timeout=0`"),
    evaluating(" ".join([*TEACHER, "--retries=1e6"]), f"--retries=1000000{RANGE}at least 0, and at most 100.",
               what="`evaluate.py --agent=openai --retries=1e6`"),
    evaluating("--env=NumberLine --agent=random --save=file",
               "--save='file': '.../file' is no folder, so nothing can be written there...", prepare=a_file),
    evaluating("--env=NumberLine --agent=random --report",
               "--report is about a run or a folder of episodes..."),
    evaluating("played",
               "'played' is a folder of recorded episodes, nobody plays here...", prepare=some_play),
    evaluating("played --report --env=NumberLine",
               "'played' is a folder of recorded episodes...", prepare=some_play),
    evaluating("played --report --critic=nowhere", "'nowhere' is no run folder...", prepare=some_play),
    evaluating("played --report --report_episodes=0",
               f"--report_episodes=0{RANGE}at least 1.", prepare=some_play),
]

CASES = NAMES + VALUES + PLACES + GAMES + MODELS + SERVERS + SECRETS + PLAYING
