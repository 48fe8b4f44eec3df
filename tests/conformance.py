"""
Print which families keep which promise: a table on the CPU, in minutes, without a download.

    python tests/conformance.py [-k gemma3]        (the arguments go to pytest)

The checks are the family tests of test_model.py, and PEFT's of extra_formats.py where peft is installed. Here
is only the table. A cell says: ok; FAIL; no (a known limit, refused in one sentence); - (did not run).
"""
import importlib.util
import os, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
# Before anything imports the Hugging Face libraries.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

# {test: column}
PROPERTIES = {
    "test_logits_are_the_librarys": "logits",
    "test_greedy_replies_are_the_librarys": "greedy",
    "test_rollout_agrees_with_training": "rollout",
    "test_left_padding_changes_nothing": "padding",
    "test_prompt_is_the_librarys": "prompt",
    "test_two_pictures_in_one_prompt": "pictures",
    "test_cached_features_give_the_same_logits": "cached",
    "test_lora_is_on_the_language_model_only": "LoRA",
    "test_one_step_moves_adapters_and_heads": "update",
    "test_save_and_load": "reload",
    "test_peft_opens_our_adapter": "PEFT",
}
LEGEND = """\
"the same" allows for rounding: 1e-4 of the largest value
logits    at the reply's positions the same as in the library's own full forward pass
greedy    generate() says the same as the library's greedy generate()
rollout   log-probabilities while playing are the same as in the training path
padding   a row is the same alone and beside longer ones
prompt    is what the library's chat template makes, or the documented plain prompt
pictures  two in one prompt, beside prompts with one
cached    vision features from memory: the same logits and replies, nothing is computed twice
LoRA      on the language model's linear layers only
update    changes adapters and heads, nothing else
reload    what was saved comes back bit for bit
PEFT      opens our folder without a warning: the same logits
"""

class Table:
    """A pytest plugin: selects the family tests of PROPERTIES, and collects the worst outcome of each."""

    def __init__(self):
        # {test id: (family, column)} and {(family, column): text}
        self.places = {}
        self.cells = {}

    def pytest_collection_modifyitems(self, items):
        selected = []
        for item in items:
            name = getattr(item, "originalname", "")
            if name in PROPERTIES and "family" in item.callspec.params:
                selected.append(item)
                self.places[item.nodeid] = (item.callspec.params["family"], PROPERTIES[name])
        items[:] = selected

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and not report.failed:
            return
        place = self.places[report.nodeid]
        if self.cells.get(place) == "FAIL":
            return
        if report.failed:
            self.cells[place] = "FAIL"
        elif report.skipped:
            self.cells[place] = "-"
        else:
            self.cells[place] = dict(report.user_properties).get("known", "ok")

def main(argv):
    """Run the tests and print the table; return pytest's exit status."""
    table = Table()
    start = time.time()
    files = ["test_model.py"]
    has_peft = importlib.util.find_spec("peft") is not None
    if has_peft:
        files.append("extra_formats.py")
    paths = [os.path.join(HERE, name) for name in files]
    code = pytest.main([*paths, "-q", "--tb=short", "--no-header", *argv], plugins=[table])

    # Imported now, so that pytest sees every module first.
    import families

    columns = PROPERTIES.values()
    print("\n" + " " * 18 + "".join(f"{column:>9}" for column in columns))
    for family in families.FAMILIES:
        cells = [table.cells.get((family, column), "-") for column in columns]
        print(f"{family:18}" + "".join(f"{cell:>9}" for cell in cells))
    print("\n" + LEGEND)
    print(f"no: {' and '.join(families.ONE_PICTURE)} take one picture per prompt.")
    if not has_peft:
        print("PEFT is not installed: pip install peft.")
    failures = list(table.cells.values()).count("FAIL")
    print(f"{len(table.cells)} cells, {failures} FAIL, in {time.time() - start:.0f} s")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
