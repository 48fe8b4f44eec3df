"""
Which families keep which promise: a table of families x properties, on the CPU, in minutes, without a download.
    python tests/conformance.py [-k gemma3]        (what follows goes to pytest)
The checks are the family tests of test_model.py, and PEFT's of extra_formats.py where peft is installed; here is only the table.
ok; FAIL; no = a known limit, refused in one sentence; - = did not run.
"""
import importlib.util, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import pytest

PROPERTIES = {"test_logits_are_the_librarys": "logits", "test_greedy_is_the_librarys": "greedy", "test_rollout_agrees_with_training": "rollout",
              "test_left_padding_changes_nothing": "padding", "test_prompt_is_the_librarys": "prompt", "test_two_pictures_in_one_prompt": "pictures", "test_cached_features_give_the_same_logits": "cached",
              "test_lora_is_on_the_language_model_only": "LoRA", "test_one_step_moves_adapters_and_heads": "update", "test_save_and_load": "reload",
              "test_peft_opens_our_adapter": "PEFT"}
LEGEND = """logits    at reply positions = the library's own full forward (< 1e-5)     greedy    generate = the library's greedy generate
rollout   log-probabilities while playing = those of the training path      padding   a row alone = the row beside longer ones
prompt    = the library's chat template, or the documented plain prompt     pictures  two in one prompt, beside prompts with one
LoRA      on the language model's linear layers only                        update    changes adapters and heads, nothing else
reload    what was saved comes back bit for bit                             PEFT      opens our folder without a word: the same logits
cached    vision features from memory: the same logits and replies (< 1e-4), nothing is looked at twice"""


class Table:
    """pytest's plugin: keeps the family tests of the properties above, and the worst outcome of each."""
    def __init__(self):
        self.where, self.cells = {}, {}

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if getattr(item, "originalname", "") in PROPERTIES and "family" in item.callspec.params]
        self.where = {item.nodeid: (item.callspec.params["family"], PROPERTIES[item.originalname]) for item in items}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            word = "FAIL" if report.failed else "-" if report.skipped else dict(report.user_properties).get("known", "ok")
            cell = self.where[report.nodeid]
            self.cells[cell] = "FAIL" if self.cells.get(cell) == "FAIL" else word


def main(argv):
    table, since, peft = Table(), time.time(), importlib.util.find_spec("peft") is not None
    files = [os.path.join(HERE, name) for name in ["test_model.py"] + ["extra_formats.py"] * peft]
    code = pytest.main([*files, "-q", "--tb=short", "--no-header", *argv], plugins=[table])
    import families  # now, so that pytest has seen every module first
    print("\n" + " " * 18 + "".join(f"{name:>9}" for name in PROPERTIES.values()))
    for family in families.FAMILIES:
        print(f"{family:18}" + "".join(f"{table.cells.get((family, name), '-'):>9}" for name in PROPERTIES.values()))
    print(f"\n{LEGEND}\nno: {' and '.join(families.ONE_PICTURE)} take one picture a prompt." + ("" if peft else " PEFT is not installed: pip install peft."))
    print(f"{len(table.cells)} cells, {sum(word == 'FAIL' for word in table.cells.values())} FAIL, in {time.time() - since:.0f} s")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
