"""
How a frozen language model is taught to read pictures: pretrain/train_smollm2.py, on tiny parts.

    python -m pytest tests/test_train_smollm2.py
"""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import load_model
from pretrain import train_smollm2
from pretrain.train_smollm2 import Reader, draw_sequences, main, teach_to_read
from small_runs import make_tiny, one_sentence
from test_compose import save_language, save_tower, write_llava

@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """The folder of a tiny language model with a template, joined with a tiny tower."""
    folder = tmp_path_factory.mktemp("composed")
    lm = save_language(folder / "lm")
    write_llava(lm, save_tower(folder / "tower", "clip"), folder / "out")
    return str(folder / "out")

@pytest.fixture
def quick(monkeypatch):
    """No questions at the end, and a checkpoint after every second update."""
    monkeypatch.setattr(train_smollm2, "ask_afresh", lambda *args: [("NumberLine", True)])
    monkeypatch.setattr(train_smollm2, "SAVE_EVERY", 2)

def separate_loss(reader, batch):
    """Compute the loss of a batch with a sequence of its own for each question."""
    begin = torch.tensor(reader.prompt.begin)
    config = reader.net.config
    total = 0.0
    n_answers = 0
    for b in range(len(batch.games)):
        pixels = batch.pixels[b : b + 1]
        features = reader.net.model.get_image_features(pixel_values=pixels).pooler_output
        n_image = features[0].shape[-2]
        picture = torch.full((n_image,), config.image_token_id)
        for segment in range(int(batch.segments[b].max()) + 1):
            here = batch.segments[b] == segment
            ids = torch.cat([begin, picture, batch.ids[b][here]])
            out = reader.net(input_ids=ids[None], pixel_values=pixels)
            logits = out.logits[0, len(begin) + n_image :]
            labels = batch.labels[b][here]
            # padding has weight 0, and so have labels of -100
            nll = F.cross_entropy(logits, labels, reduction="none")
            total += (nll * batch.weights[b][here]).sum()
            n_answers += 1
    return total / n_answers

def test_questions_about_a_picture_do_not_see_each_other(composed):
    """The loss of all questions in one sequence is that of separate prompts, and so is its gradient."""
    net, processor = load_model(composed)
    reader = Reader(net, processor)
    rng = np.random.default_rng(0)
    batch = draw_sequences(processor, reader.prompt, ["NumberLine", "EZPoints"], rng)
    loss, right = reader.loss(batch)
    # about each picture the same number
    assert len(right) == 2 * train_smollm2.QUESTIONS
    expected = separate_loss(reader, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    weight = next(reader.projector.parameters())
    [ours] = torch.autograd.grad(loss, weight)
    [theirs] = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert ours.abs().max() > 0

def tensors_in(folder):
    """Read what a training wrote -> {name: tensor}."""
    tower = load_file(os.path.join(folder, "model.safetensors"))
    return tower | load_file(os.path.join(folder, train_smollm2.PROJECTOR_FILE))

def test_a_stopped_training_ends_with_the_same_weights(composed, quick, tmp_path, monkeypatch, capsys):
    teach_to_read(composed, str(tmp_path / "whole"), updates=4, pictures=2)
    draw_for = train_smollm2.draw_for

    def draw_and_stop(update, *args):
        if update == 3:
            raise KeyboardInterrupt
        return draw_for(update, *args)

    out = str(tmp_path / "out")
    monkeypatch.setattr(train_smollm2, "draw_for", draw_and_stop)
    with pytest.raises(KeyboardInterrupt):
        teach_to_read(composed, out, updates=4, pictures=2)
    monkeypatch.setattr(train_smollm2, "draw_for", draw_for)
    teach_to_read(composed, out, updates=4, pictures=2)
    whole = tensors_in(str(tmp_path / "whole"))
    assert whole
    for name, tensor in tensors_in(out).items():
        assert torch.equal(tensor, whole[name])
    # another schedule does not go on from there in silence
    one_sentence(lambda: teach_to_read(composed, out, updates=6, pictures=2), "'updates': 4", "'updates': 6")

def test_a_folder_that_is_there_is_left_alone(composed, quick, tmp_path):
    """The story: the folder for the weights was replaced as a whole, with all that lay in it."""
    (tmp_path / "run.txt").write_text("hours of work")
    one_sentence(lambda: main([composed, str(tmp_path)]), "exists already", "new folder")
    assert (tmp_path / "run.txt").read_text() == "hours of work"
    assert not os.path.exists(f"{tmp_path}.training")

def test_other_models_are_refused(quick, tmp_path):
    """A tiny base's prompt begins with the picture, and other models have no projector to train."""
    make_tiny(tmp_path / "tiny")
    one_sentence(lambda: main([str(tmp_path / "tiny"), str(tmp_path / "out")]), "extras.compose")
    assert os.listdir(tmp_path) == ["tiny"]
