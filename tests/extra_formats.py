"""
Check that others can open what we write: PEFT our adapters, `datasets` our buffers.

Plain pytest does not collect this file, because neither library is a dependency:

    pip install peft datasets && python -m pytest tests/extra_formats.py
"""
import os, warnings

# Before anything imports the Hugging Face libraries.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import PeftModel
from PIL import Image

import model
from buffer import Buffer, image_name, make_row, reply_text
from test_saved_modules import outside_language
from test_model import TOLERANCE, encoded, every_family, logit_gap
from test_model import folder, make, opened  # noqa: F401  (fixtures)

def open_with_peft(base, adapter):
    """Open an adapter with PEFT, which may warn of no missing and no unexpected keys."""
    net, _ = model.load_model(base, device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(net, adapter).eval()
    for warning in caught:
        assert warning.category is FutureWarning, str(warning.message)
    return peft

@every_family
@pytest.mark.parametrize("targets", [".*", r".*\.(q|v)_proj"])
def test_peft_opens_our_adapter(make, folder, tmp_path, family, targets):
    """PeftModel.from_pretrained(base, our folder) gives the same logits.

    It warns of no missing and no unexpected keys.
    """
    vlm = make(family, lora_targets=targets)
    vlm.save(tmp_path)
    peft = open_with_peft(folder(family), tmp_path)
    adapted = [module for module in peft.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(vlm.lora)

    inputs, P, _, _ = vlm.collate(encoded(vlm), [[vlm.eos] * 4] * 3)
    with torch.no_grad():
        ours, _ = vlm(inputs, P, 4)
        theirs = peft(**inputs).logits[:, P - 1 : P + 3]
        with vlm.reference():
            reference, _ = vlm(inputs, P, 4)
    assert logit_gap(vlm, ours, theirs) < TOLERANCE
    assert logit_gap(vlm, reference, ours) > 100 * TOLERANCE

@every_family
def test_peft_opens_trained_modules(make, folder, opened, tmp_path, family):
    """A projector that is trained in full: PEFT gives the same logits, and the base's without the adapter."""
    pattern = outside_language(opened(family)[0])
    vlm = make(family, modules_to_save=pattern)
    vlm.save(tmp_path)
    peft = open_with_peft(folder(family), tmp_path)
    inputs, P, _, _ = vlm.collate(encoded(vlm), [[vlm.eos] * 4] * 3)
    with torch.no_grad():
        ours, _ = vlm(inputs, P, 4)
        theirs = peft(**inputs).logits[:, P - 1 : P + 3]
        with vlm.reference(), peft.disable_adapter():
            our_base, _ = vlm(inputs, P, 4)
            their_base = peft(**inputs).logits[:, P - 1 : P + 3]
    assert logit_gap(vlm, ours, theirs) < TOLERANCE
    assert logit_gap(vlm, our_base, their_base) < TOLERANCE
    assert logit_gap(vlm, our_base, ours) > 100 * TOLERANCE

def record_episode(buffer, number):
    """Append an episode of two turns; number 2 is cut off by a limit, so its last row has no reply."""
    obs = []
    for turn in range(2):
        image = Image.new("RGB", (40, 30), (number, turn, 9))
        obs.append(dict(image=image, text=f"turn {turn}"))
    name = f"e{number}"
    reply = dict(
        reply='{"action": "+"}',
        reply_ids=[5, 6],
        logprobs=[-0.5, -0.25],
        source="test",
        action="+",
        reward=1.0,
    )
    rows = []
    for turn in range(2):
        row = make_row(name, turn, "toy", 0, obs[turn], **reply)
        row["terminated"] = bool(turn)
        rows.append(row)
    if number == 2:
        rows[0]["truncated"] = True
        rows[1] = make_row(name, 1, "toy", 0, obs[1])
    images = {image_name(o["image"]): o["image"] for o in obs}
    buffer.append(rows, images)

def test_datasets_opens_our_folder(tmp_path):
    """load_dataset(folder) has a row for every row of the buffer, with pictures and messages as they were."""
    # Imported here, so that PEFT's test runs without it.
    from datasets import load_dataset

    buffer = Buffer(str(tmp_path / "episodes"), create=True)
    for number in range(3):
        record_episode(buffer, number)
    table = load_dataset(str(tmp_path / "episodes"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(table) == len(buffer) == 6
    for found, row in zip(table, buffer.rows):
        [image] = found["images"]
        original = buffer.image(row["images_file_names"][0])
        assert image.size == (40, 30)
        assert image.convert("RGB").getpixel((0, 0)) == original.getpixel((0, 0))
        question = found["messages"][0]["content"][1]
        assert question["text"] == row["messages"][0]["content"][1]["text"]
        reply = found["messages"][-1]["content"][0]
        assert reply["text"] == reply_text(row)
        for key in ("episode", "turn", "reply_ids", "reward"):
            assert found[key] == row[key]
