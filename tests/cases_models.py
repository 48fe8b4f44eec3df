"""
What is wrong with a model folder, or with the code that it brings: a part of docs/failures.md.

Every folder is a copy of one tiny model, with one file changed. Code that a folder brings leaves a file
behind when it is run.
"""
import functools, json, os, shutil, tempfile

import torch
from safetensors.torch import load_file, save_file

import evaluate, train
from failure_cases import Case
from model import VLM, load_model
from small_runs import FEW, content, flags, make_tiny, read_json, run

# every case trains only if nothing is wrong: then it would end quickly
QUICK = dict(
    data_episodes=2,
    offline_updates=1,
    online_updates=0,
    batch_size=2,
    lora_r=2,
    max_new_tokens=2,
    log_interval=1,
    eval_interval=0,
    eval_episodes=1,
    device="cpu",
)

@functools.cache
def tiny():
    """Make the tiny model once for all cases -> its folder."""
    return make_tiny(tempfile.mkdtemp())

@functools.cache
def trained(**changes):
    """Train a tiny run once for all cases -> its folder."""
    out = os.path.join(tempfile.mkdtemp(), "run")
    return run(out, tiny(), **QUICK | changes)

def write_json(content, *path):
    """Write a JSON file."""
    with open(os.path.join(*path), "w") as f:
        json.dump(content, f)

def write_text(text, *path):
    """Write a text file."""
    with open(os.path.join(*path), "w") as f:
        f.write(text)


# ---- damaged folders ----

def try_model(change, **keys):
    """Make a case: train on a changed copy of the tiny model; nothing may be written."""

    def make(folder):
        model = shutil.copytree(tiny(), os.path.join(folder, "model"))
        change(model)
        out = os.path.join(folder, "out")

        def call():
            try:
                train.main(flags(**QUICK | dict(model="model", out_dir="out") | keys))
            finally:
                assert not os.path.exists(out), "something was written"

        return call

    return make

def with_text(name, text):
    """Change a model: a file gets another text."""
    return lambda model: write_text(text, model, name)

def without(*names):
    """Change a model: files are gone."""

    def change(model):
        for name in names:
            os.remove(os.path.join(model, name))

    return change

def with_keys(name, **keys):
    """Change a model: a JSON file has other values."""
    return lambda model: write_json(read_json(model, name) | keys, model, name)

def with_part(name, part, **keys):
    """Change a model: a dict inside a JSON file has other values."""

    def change(model):
        saved = read_json(model, name)
        saved[part] |= keys
        write_json(saved, model, name)

    return change

def with_tensors(edit):
    """Change a model: edit(tensors) changes its weights."""

    def change(model):
        file = os.path.join(model, "model.safetensors")
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return change

def drop_tensor(tensors):
    del tensors[sorted(tensors)[0]]

def widen_tensor(tensors):
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name], tensors[name]])

def spoil_tensor(tensors):
    tensors[sorted(tensors)[0]].fill_(float("nan"))

def cut_weights(model):
    file = os.path.join(model, "model.safetensors")
    os.truncate(file, os.path.getsize(file) // 2)

def lose_shard(model):
    os.rename(os.path.join(model, "model.safetensors"), os.path.join(model, "other.safetensors"))
    index = dict(metadata={}, weight_map={"a": "model-00001-of-00002.safetensors"})
    write_json(index, model, "model.safetensors.index.json")

def pickle_weights(model):
    file = os.path.join(model, "model.safetensors")
    torch.save(load_file(file), os.path.join(model, "pytorch_model.bin"))
    os.remove(file)

def add_tokens(model):
    saved = read_json(model, "tokenizer.json")
    vocabulary = saved["model"]["vocab"]
    for i in range(500):
        vocabulary[f"extra{i}"] = len(vocabulary)
    write_json(saved, model, "tokenizer.json")

def move_template(text=None):
    """Change a model: its chat template stands in tokenizer_config.json only."""

    def change(model):
        file = os.path.join(model, "chat_template.jinja")
        with open(file) as f:
            template = f.read()
        os.remove(file)
        with_keys("tokenizer_config.json", chat_template=text or template)(model)

    return change

TEXT_ONLY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

def same_prompts(folder):
    """Make a case: a template in tokenizer_config.json gives the same prompts as one of its own."""
    model = shutil.copytree(tiny(), os.path.join(folder, "model"))
    move_template()(model)

    def call():
        prompts = []
        ends = []
        for path in (tiny(), model):
            vlm = VLM(*load_model(path))
            parts = [{"type": "image"}, {"type": "text", "text": "a"}]
            prompts.append(vlm.render([{"role": "user", "content": parts}]))
            ends.append(vlm.eos)
        assert prompts[0] == prompts[1]
        assert ends[0] == ends[1]
        return "the prompts are the same"

    return call


def raise_eos(model):
    """Change a model: its tokenizer ends a turn with a token that it has to add."""
    with_keys("tokenizer_config.json", eos_token="<nonesuch>")(model)

def bytes_config(model):
    with open(os.path.join(model, "config.json"), "wb") as f:
        f.write(bytes(range(256)))

def adapters_only(model):
    write_json(dict(peft_type="LORA", base_model_name_or_path="other"), model, "adapter_config.json")

def text_part(**keys):
    """Change a model: settings of its language model."""
    return with_part("config.json", "text_config", **keys)

def picture_part(**keys):
    """Change a model: settings of its image processor."""
    return with_part("processor_config.json", "image_processor", **keys)

NO_PICTURE = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
LOADS = "model='model' does not load: "
CONFIG = "model='model' has a config.json that does not load: ..."
ANSWER = "model='model' cannot answer a prompt with one picture: "
READ = "model='model' cannot read a prompt with 1 pictures: ..."
TEMPLATE = "The model's chat template does not work: ..."
OTHER_TOKENIZER = "model='model' has a tokenizer of another model: token ... is beyond the 320 rows of ..."
OTHER_SHAPES = f"{LOADS}its weights have other shapes than its config.json says."

QUANTISED = dict(quant_method="bitsandbytes", load_in_8bit=True)

# (what is wrong, how the folder is changed, the sentence)
DAMAGED = [
    ("a model folder without config.json", without("config.json"),
     "model='model' cannot be opened: there is no such folder with a config.json here, and the hub did not "
     "give it (...)."),
    ("a model's config.json is cut off", with_text("config.json", '{"model_type": "lla'), CONFIG),
    ("a model's config.json is a list", with_text("config.json", "[]"), CONFIG),
    ("a model's config.json is empty", with_text("config.json", ""), CONFIG),
    ("a model's config.json is nested 100,000 deep", with_text("config.json", "[" * 100_000), CONFIG),
    ("a model's config.json is no text", bytes_config, CONFIG),
    ("a language model without pictures", with_keys("config.json", model_type="gpt2"),
     "model='model' is a 'gpt2' model, which takes no image and text: choose an image-text-to-text model "
     "such as LLaVA or Qwen2-VL."),
    ("a kind of model that nobody knows", with_keys("config.json", model_type="nonesuch"), CONFIG),
    ("model_type is a list", with_keys("config.json", model_type=[1]), CONFIG),
    ("text_config is a number", with_keys("config.json", text_config=3), "model='model' ... load..."),
    ("a hidden size that is text", text_part(hidden_size="wide"), "model='model' ... load..."),
    ("a hidden size below 0", text_part(hidden_size=-1), f"{LOADS}..."),
    ("a hidden size of 10^12", text_part(hidden_size=10**12), f"{LOADS}..."),
    ("another hidden size than the weights have", text_part(hidden_size=48), f"{LOADS}..."),
    ("config.json names another image token", with_keys("config.json", image_token_index=5),
     f"{ANSWER}its chat template shows no picture."),
    ("config.json asks for a package that is not here",
     with_keys("config.json", quantization_config=QUANTISED),
     "model='model' ... load..."),
    ("a model without a tokenizer", without("tokenizer.json", "tokenizer_config.json"), f"{LOADS}..."),
    ("tokenizer.json is cut off", with_text("tokenizer.json", "{"), f"{LOADS}..."),
    ("tokenizer.json is empty JSON", with_text("tokenizer.json", "{}"), f"{LOADS}..."),
    ("tokenizer_config.json is a list", with_text("tokenizer_config.json", "[1]"), f"{LOADS}..."),
    ("a tokenizer with more tokens than the embedding has rows", add_tokens, OTHER_TOKENIZER),
    ("an end-of-turn token that the embedding lacks", raise_eos, OTHER_TOKENIZER),
    ("a model without a processor", without("processor_config.json"), f"{LOADS}..."),
    ("processor_config.json is cut off", with_text("processor_config.json", "{"), f"{LOADS}..."),
    ("a processor for text only", with_keys("processor_config.json", processor_class="NoneSuch"),
     "model='model' has a processor without an image token, so no picture can be shown to it: its folder "
     "needs the model's own processor files."),
    ("a processor that cuts pictures into other patches", with_keys("processor_config.json", patch_size=8),
     f"{ANSWER}..."),
    ("patches of 0 pixels", with_keys("processor_config.json", patch_size=0), f"{ANSWER}..."),
    ("a processor that enlarges pictures to 10^9 pixels", picture_part(size=dict(shortest_edge=10**9)),
     f"{ANSWER}..."),
    ("a processor that divides by 0", picture_part(image_std=[0.0, 0.0, 0.0]),
     f"{ANSWER}its logits are not finite."),
    ("a chat template with a typing error", with_text("chat_template.jinja", "{% for m in %}"), TEMPLATE),
    ("a chat template that refuses", with_text("chat_template.jinja", "{{ raise_exception('no') }}"),
     "The model's chat template does not work: no."),
    ("a chat template that breaks out", with_text("chat_template.jinja", ESCAPE), TEMPLATE),
    ("a chat template without pictures", with_text("chat_template.jinja", NO_PICTURE),
     "model='model' cannot ..."),
    ("a tokenizer's chat template for text only", move_template(TEXT_ONLY), "model='model' cannot ..."),
    ("a model without weights", without("model.safetensors"),
     f"{LOADS}it has no model.safetensors; a pickle such as pytorch_model.bin can run code, so it is read "
     "with trust_remote_code=True only."),
    ("weights that are cut off", cut_weights, f"{LOADS}..."),
    ("weights that are no safetensors", with_text("model.safetensors", "garbage"), f"{LOADS}..."),
    ("a part of the weights is missing", lose_shard, f"{LOADS}..."),
    ("one of the weights is missing", with_tensors(drop_tensor),
     "model='model' lacks ... weights, for example ...: the folder is incomplete."),
    ("one of the weights has another shape", with_tensors(widen_tensor), OTHER_SHAPES),
    ("one of the weights is not finite", with_tensors(spoil_tensor), f"{ANSWER}its logits are not finite."),
    ("adapters instead of a model", adapters_only,
     "model='model' holds adapters and no model: name the model that they were trained on, or evaluate their "
     "run."),
]


# ---- damaged checkpoints ----

def try_checkpoint(change):
    """Make a case: evaluate a copy of a tiny run whose checkpoint is changed."""

    def make(folder):
        copy = shutil.copytree(trained(), os.path.join(folder, "run"))
        change(os.path.join(copy, "ckpt"))
        sign(os.path.join(copy, "ckpt"))
        before = content(copy)

        def call():
            try:
                evaluate.main(["run", "--episodes=1"])
            finally:
                assert content(copy) == before, "the run was changed"

        return call

    return make

def sign(ckpt):
    """Let a changed checkpoint pass as it is: a stranger's digests fit the stranger's files."""
    state = read_json(ckpt, "state.json")
    state.pop("files", None)
    write_json(state, ckpt, "state.json")

def spoil_adapters(ckpt):
    file = os.path.join(ckpt, "adapter_model.safetensors")
    tensors = load_file(file)
    spoil_tensor(tensors)
    save_file(tensors, file)

ADAPTERS = "run/ckpt/adapter_model.safetensors "
CHECKPOINTS = [
    ("adapters that are not finite", spoil_adapters, f"{ADAPTERS}holds weights that are not finite..."),
    ("adapters that are no safetensors", with_text("adapter_model.safetensors", "x"),
     f"{ADAPTERS}does not load..."),
    ("adapters without their file", without("adapter_model.safetensors"), f"{ADAPTERS}does not load..."),
    ("adapter_config.json is a list", with_text("adapter_config.json", "[]"),
     "run/ckpt/adapter_config.json does not load..."),
    ("critics without their file", without("q_head.safetensors"),
     "run/ckpt/q_head.safetensors does not load..."),
]


# ---- code of strangers ----

# the auto classes by which a file of a model folder can name Python beside it
AUTO_MAPS = {
    "config.json": ("AutoConfig", "AutoModelForImageTextToText", "AutoModel"),
    "processor_config.json": ("AutoProcessor", "AutoImageProcessor"),
    "tokenizer_config.json": ("AutoTokenizer",),
}

def plant(model, spy):
    """Let every file of a model folder name Python that leaves the file `spy` behind when it runs."""
    code = f"open({spy!r}, 'w').close()\n"
    os.makedirs(os.path.join(model, "custom_generate"), exist_ok=True)
    for name in ("spy.py", "custom_generate/generate.py"):
        write_text(code, model, name)
    for name, classes in AUTO_MAPS.items():
        auto_map = {cls: "spy.Spy" for cls in classes}
        if name == "tokenizer_config.json":
            auto_map["AutoTokenizer"] = ["spy.Spy", "spy.Spy"]
        with_keys(name, auto_map=auto_map)(model)
    picture_part(auto_map={"AutoImageProcessor": "spy.Spy"})(model)

class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")

def leave(model, spy):
    """Change nothing: the model can be opened without the planted code."""

def need_model_code(model, spy):
    with_keys("config.json", model_type="spy")(model)

def need_processor_code(model, spy):
    with_keys("processor_config.json", processor_class="Spy")(model)

def need_picture_code(model, spy):
    picture_part(image_processor_type="Spy")(model)

def need_pickle(model, spy):
    without("model.safetensors")(model)
    torch.save(dict(weight=Touch(spy)), os.path.join(model, "pytorch_model.bin"))

def evaluate_it(run, keys):
    evaluate.main([run, "--episodes=1"])

def report_it(run, keys):
    evaluate.main([os.path.join(run, "data"), "--report"])

def judge_by_it(run, keys):
    evaluate.main(["played", "--report", f"--critic={run}"])

def resume_it(run, keys):
    train.main(flags(**keys | dict(out_dir=run, resume=True)))

def foreign(command, need, lora_r):
    """Make a case: a run that asks for permission in its config.json, with planted Python in its folders."""

    def make(folder):
        run_folder = shutil.copytree(trained(lora_r=lora_r), os.path.join(folder, "run"))
        model = shutil.copytree(tiny(), os.path.join(folder, "model"))
        shutil.copytree(os.path.join(run_folder, "data"), os.path.join(folder, "played"))
        spy = os.path.join(folder, "code_ran")
        planted = [model]
        if not lora_r:
            planted.append(os.path.join(run_folder, "ckpt"))
        for place in planted:
            plant(place, spy)
            need(place, spy)
        sign(os.path.join(run_folder, "ckpt"))
        with_keys("config.json", model="model", trust_remote_code=True)(run_folder)
        settings = FEW | QUICK | dict(model="model", lora_r=lora_r)

        def call():
            try:
                command("run", settings)
            finally:
                assert not os.path.exists(spy), "a stranger's code ran"
            return "nothing of it runs"

        return call

    return make

COMMANDS = {
    "evaluate RUN": evaluate_it,
    "evaluate RUN/data --report": report_it,
    "evaluate DATA --report --critic=RUN": judge_by_it,
    "train --resume": resume_it,
}
ASKS = ("model='model' brings Python files of its own, which would be run on this machine with all your "
        "rights: read them, then set trust_remote_code=True.")
NOTHING = "nothing of it runs"
# (what is planted, how much the folder needs it, lora_r of the run, what happens)
PLANTED = [
    ("left-over Python", leave, 2, NOTHING),
    ("left-over Python, also in its checkpoint", leave, 0, NOTHING),
    ("Python for its model", need_model_code, 2, ASKS),
    ("Python for its processor", need_processor_code, 2, ASKS),
    ("Python for its pictures", need_picture_code, 2, ASKS),
    ("weights in a pickle", need_pickle, 2,
     f"{LOADS}it has no model.safetensors; a pickle ... can run code..."),
]

def foreign_cases():
    """List the cases with code of strangers."""
    cases = []
    for words, command in COMMANDS.items():
        for planted, need, lora_r, then in PLANTED:
            cases.append(Case(f"`{words}`: {planted}", then, foreign(command, need, lora_r)))
    return cases


CASES = [Case(what, then, try_model(change)) for what, change, then in DAMAGED]
CASES.append(
    Case("a chat template in tokenizer_config.json only", "the prompts are the same", same_prompts)
)
CASES += [Case(what, then, try_checkpoint(change)) for what, change, then in CHECKPOINTS]
CASES += foreign_cases()
