"""
What we write, opened by others: PEFT and `datasets`. Not collected by plain pytest, since neither is a dependency:

    pip install peft datasets && pytest tests/extra_formats.py
"""
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import warnings

import pytest
import torch
from peft import PeftModel
from PIL import Image

import families, model
from buffer import Buffer, image_name, make_row, reply_text
from test_model import encoded, every_family, folder, make, opened  # noqa: F401  (fixtures)


@every_family
@pytest.mark.parametrize("targets", [".*", r".*\.(q|v)_proj"])
def test_peft_opens_our_adapter(make, folder, tmp_path, family, targets):
    """PeftModel.from_pretrained(base, our folder): the same logits, and no word about missing or unexpected keys."""
    vlm = make(family, lora_targets=targets)
    vlm.save(tmp_path)
    base, _ = model.load_model(folder(family))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(base, tmp_path).eval()
    assert not [w for w in said if w.category is not FutureWarning], [str(w.message) for w in said]
    assert sum(1 for m in peft.modules() if hasattr(m, "lora_A")) == len(vlm.lora)
    inputs, P, _, _ = vlm.collate(encoded(vlm), [[vlm.eos] * 4] * 3)
    with torch.no_grad():
        ours, _ = vlm(inputs, P, 4)
        theirs = peft(**inputs).logits[:, P - 1:P + 3]
        with vlm.reference():
            reference, _ = vlm(inputs, P, 4)
    assert (ours - theirs)[..., ~vlm.banned].abs().max() < 1e-5
    assert (ours - reference).abs().max() > 1e-2


def test_datasets_opens_our_folder(tmp_path):
    """load_dataset(folder): a row for every row of the buffer, pictures as pictures, messages as they were."""
    from datasets import load_dataset  # here, so that PEFT's test runs without it
    buf = Buffer(str(tmp_path / "episodes"), create=True)
    for episode in range(3):
        obs = [dict(image=Image.new("RGB", (40, 30), (episode, turn, 9)), text=f"turn {turn}") for turn in range(2)]
        rows = [make_row(f"e{episode}", turn, "toy", 0, o, '{"action": "+"}', [5, 6], [-0.5, -0.25], "test", action="+", reward=1.0, terminated=bool(turn)) for turn, o in enumerate(obs)]
        if episode == 2:  # cut off by a limit: one more row, without a reply
            rows = rows[:1] + [make_row("e2", 1, "toy", 0, obs[1], truncated=True)]
        buf.append(rows, {image_name(o["image"]): o["image"] for o in obs})
    table = load_dataset(str(tmp_path / "episodes"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(table) == len(buf) == 6
    for got, row in zip(table, buf.rows):
        assert [im.size for im in got["images"]] == [(40, 30)] and got["images"][0].convert("RGB").getpixel((0, 0)) == buf.image(row["images_file_names"][0]).getpixel((0, 0))
        assert got["messages"][0]["content"][1]["text"] == row["messages"][0]["content"][1]["text"] and got["messages"][-1]["content"][0]["text"] == reply_text(row)
        assert (got["episode"], got["turn"], got["reply_ids"], got["reward"]) == (row["episode"], row["turn"], row["reply_ids"], row["reward"])
