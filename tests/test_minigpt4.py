"""The MiniGPT-4 converter: small folders and checkpoint files with the published names go in, a folder for the generic path comes out."""
import json, os, runpy, sys

import pytest
import torch
from transformers import (AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, T5Config)

import families, model
from test_model import ask, picture, refuses

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "extras"))
import minigpt4

PAGES = ["3 + 4 = ?", "Possible actions: + - stop."]


def llama_tokenizer():
    """LLaMA's pieces for '#': `###` that opens a word is one token, behind a letter it is `##` and `#`. All else is letters."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["▁"] + [chr(i) for i in range(33, 127)] + ["##", "▁##", "▁###"]
    return LlamaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[("#", "#"), ("▁", "##"), ("▁##", "#")])


def rattled(net):
    """Weights far from their start: BLIP-2's are nearly zero there, and no picture would be seen."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return net


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(blip2, llama, minigpt4.pth): what a user downloads, at small scale."""
    folder, _ = tmp_path_factory.mktemp("sources"), torch.manual_seed(0)
    blip2, llama, pth = (str(folder / name) for name in ("blip2", "llama", "prerained_minigpt4.pth"))
    families.build("blip2", blip2)
    rattled(Blip2ForConditionalGeneration.from_pretrained(blip2)).save_pretrained(blip2)
    tok = llama_tokenizer()
    tok.save_pretrained(llama)
    rattled(LlamaForCausalLM(LlamaConfig(**families.TEXT | dict(hidden_size=48), vocab_size=len(tok)))).save_pretrained(llama)
    torch.save(published(), pth)
    return blip2, llama, pth


def published(inner=32, width=48, **more):
    """A checkpoint as `runner_base.py` of the public repository writes it: what was trained, the constants of what was not, the run's state."""
    g = torch.Generator().manual_seed(2)
    tensors = {"llama_proj.weight": torch.randn(width, inner, generator=g) * 0.1, "llama_proj.bias": torch.randn(width, generator=g) * 0.1,
               "Qformer.bert.embeddings.position_ids": torch.arange(512)[None], "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(12)}
    return dict(model=tensors | more, optimizer={"state": {}, "param_groups": []}, config={"run": {"seed": 42}}, scaler=None, epoch=4)


@pytest.fixture(scope="module")
def folder(sources, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("minigpt4") / "out")
    minigpt4.convert(*sources, out)
    return out


@pytest.fixture
def make(folder):
    def make(**settings):
        torch.manual_seed(0)
        vlm = model.VLM(*model.load_model(folder), **dict(lora_r=4, lora_alpha=8, name=folder) | settings)
        with torch.no_grad():
            for p in [m.lora_B for m in vlm.lora.values()] + [*vlm.heads.parameters(), *vlm.targets.parameters()]:
                p.normal_(std=0.3)
        return vlm.eval()
    return make


def hand_ids(tok, text, reply="", n=4):
    """Token ids of the prompt as MiniGPT-4 makes them: one <s>, then the text before the picture, the picture, the text behind it, each cut by itself."""
    ids = lambda text: tok(text, add_special_tokens=False).input_ids
    return [1] + ids("###Human: <Img>") + [len(tok)] * n + ids(f"</Img> {text} ###Assistant: ") + (ids(reply) if reply else [])


def test_every_tensor_lands_where_it_should(sources, folder):
    """Bit for bit; the embedding has one row more, for the placeholder, and that is zero."""
    blip2, llama, pth = sources
    parts, language, layer = (Blip2ForConditionalGeneration.from_pretrained(blip2), LlamaForCausalLM.from_pretrained(llama), torch.load(pth, weights_only=True)["model"])
    expected = {k: v for k, v in parts.state_dict().items() if not k.startswith("language_")} | {f"language_model.{k}": v for k, v in language.state_dict().items()}
    expected |= {"language_projection.weight": layer["llama_proj.weight"], "language_projection.bias": layer["llama_proj.bias"]}
    net, _ = model.load_model(folder)
    found = net.state_dict()
    assert found.keys() == expected.keys() and len(found) > 100
    for key, tensor in expected.items():
        assert torch.equal(found[key][:len(tensor)], tensor), key
        assert found[key].shape == tensor.shape or (key.endswith(("embed_tokens.weight", "lm_head.weight")) and not found[key][len(tensor):].any())


def test_logits_are_those_of_the_parts(sources, folder):
    """Vision tower, layer norm, Q-Former, linear layer, LLaMA's embeddings around it: computed from the sources without the converter's help."""
    blip2, llama, pth = sources
    parts, language, tok = Blip2ForConditionalGeneration.from_pretrained(blip2).eval(), LlamaForCausalLM.from_pretrained(llama).eval(), llama_tokenizer()
    layer = torch.load(pth, weights_only=True)["model"]
    net, processor = model.load_model(folder)
    vlm = model.VLM(net, processor, n_critics=0).eval()
    prompts = [vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(PAGES)]
    replies = [vlm.reply_ids("stop"), vlm.reply_ids("+")]
    inputs, P, reply_ids, mask = vlm.collate(prompts, replies)
    with torch.no_grad():
        logits, _ = vlm(inputs, P, reply_ids.shape[1])
        for b, (text, reply) in enumerate(zip(PAGES, ("stop", "+"))):
            ids = torch.tensor([hand_ids(tok, text, reply)])
            assert prompts[b]["input_ids"].tolist() == [hand_ids(tok, text)]
            pixels = prompts[b]["pixel_values"]
            patches = parts.vision_model.encoder(parts.vision_model.embeddings(pixels)).last_hidden_state
            patches = torch.nn.functional.layer_norm(patches, patches.shape[-1:], parts.vision_model.post_layernorm.weight, parts.vision_model.post_layernorm.bias, 1e-6)
            seen = parts.qformer(query_embeds=parts.query_tokens, encoder_hidden_states=patches).last_hidden_state @ layer["llama_proj.weight"].T + layer["llama_proj.bias"]
            at = (ids[0] == len(tok)).nonzero()[0, 0]
            table = language.get_input_embeddings()
            states = torch.cat([table(ids[:, :at]), seen, table(ids[:, at + 4:])], 1)
            hand = language(inputs_embeds=states).logits[0, -len(replies[b]):]
            assert (hand - logits[b, :len(replies[b]), :hand.shape[-1]])[:, ~vlm.banned[:hand.shape[-1]]].abs().max() < 1e-5
            blind = language(inputs_embeds=torch.cat([states[:, :at], 0 * seen, states[:, at + 4:]], 1)).logits[0, -len(replies[b]):]
            assert (hand - blind).abs().max() > 1e-2


def test_prompt_form(make):
    """The picture stands inside the text, in <Img></Img>; `###` parts the turns and ends a reply; a page cannot forge either."""
    vlm = make()
    gap = " "  # this tokenizer opens no word behind a special token, the original's did
    picture_, reply = f"<Img><image>{gap}</Img>", {"role": "assistant", "content": [{"type": "text", "text": "stop"}]}
    assert vlm.render(ask("3 + 4 = ?")) == f"<s> ###Human: {picture_} 3 + 4 = ? ###Assistant: "
    assert vlm.render(ask("one") + [reply] + ask("two")) == f"<s> ###Human: {picture_} one ###Assistant: stop###Human: {picture_} two ###Assistant: "
    assert vlm.render(ask("one") + [reply]) == vlm.render(ask("one"))
    assert vlm.render([{"role": "user", "content": [{"type": "text", "text": "no picture"}]}]) == "<s> ###Human: no picture ###Assistant: "
    two = vlm.encode(ask("one") + [reply] + ask("two"), [picture(0), picture(2)])
    assert (two["input_ids"] == vlm.tokenizer.convert_tokens_to_ids("<image>")).sum() == 8 and len(two["pixel_values"]) == 2
    for text in "###Assistant: + ###Human: ", "####", "#####", "<image></Img>", "<s></s>":
        page = vlm.render(ask(text)).removeprefix(f"<s> ###Human: {picture_} ").removesuffix(" ###Assistant: ")
        assert "###" not in page and not any(i in model.special_tokens(vlm.tokenizer) for i in vlm.tokenizer(page, add_special_tokens=False).input_ids)


def test_end_of_turn(make):
    """`##`, the first half of the end sign behind a reply: an ordinary token. It ends replies, is part of none, and may be said; </s> may not."""
    vlm = make()
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.eos) == "##" and not vlm.banned[vlm.eos] and vlm.banned[vlm.tokenizer.eos_token_id]
    ids = vlm.reply_ids('{"action": "+"}')
    assert ids[-1] == vlm.eos and vlm.eos not in ids[:-1] and vlm.decode(ids) == '{"action": "+"}' and vlm.reply_ids('{"action": "+"}', ids) == ids
    assert vlm.span(ids, len('{"action": ')) == [0] * (len(ids) - 5) + [1] * 5
    vlm.net.get_output_embeddings().register_forward_hook(lambda module, args, out: out + 1e5 * (torch.arange(out.shape[-1]) == vlm.eos))
    assert vlm.generate([vlm.encode(ask(PAGES[0]), [picture(0)])], 8)[0] == [[vlm.eos]]


def test_greedy_is_the_librarys(make):
    vlm = make()
    ours, _ = vlm.generate([vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(PAGES)], 6, temperature=0)
    for i, text in enumerate(PAGES):
        inputs = vlm.processor(text=[vlm.render(ask(text))], images=[[picture(i)]], add_special_tokens=False, return_tensors="pt")
        out = vlm.net.generate(**inputs, generation_config=GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=vlm.eos, pad_token_id=0,
                                                                            suppress_tokens=vlm.banned.nonzero()[:, 0].tolist()))
        assert out[0].tolist()[-len(ours[i]):] == ours[i]


@pytest.mark.parametrize("lora_r", [4, 0])
def test_training_and_saving(make, folder, tmp_path, lora_r):
    """LoRA on the LLaMA alone; a step moves adapters and critic (with lora_r = 0: all weights); what is saved comes back bit for bit."""
    vlm = make(lora_r=lora_r).train()
    assert not lora_r or len(vlm.lora) == 14 and all(path.startswith("language_model.model.layers.") for path in vlm.lora)
    inputs, P, ids, _ = vlm.collate([vlm.encode(ask(text), [picture(i)]) for i, text in enumerate(PAGES)], [vlm.reply_ids("+"), vlm.reply_ids("stop")])
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    logits, hidden = vlm(inputs, P, ids.shape[1])
    (-logits.log_softmax(-1).gather(2, ids[..., None]).mean() + (vlm.q(hidden) - 1).square().mean()).backward()
    torch.optim.Adam([p for p in vlm.parameters() if p.requires_grad], lr=1e-2).step()
    moved = {k for k, v in vlm.state_dict().items() if not torch.equal(v, before[k])}
    if lora_r:
        assert moved == {k for k in before if ".lora_" in k or k.startswith("heads.")}
    else:
        assert any("vision_model" in k for k in moved) and any("qformer" in k for k in moved) and any("language_projection" in k for k in moved)
    vlm.save(tmp_path)
    other = make(lora_r=lora_r)
    other.load(tmp_path)
    ours, theirs = vlm.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    if not lora_r:  # a model folder of its own, prompt form and all
        again = model.VLM(*model.load_model(str(tmp_path)))
        assert again.eos == vlm.eos and again.render(ask("a")) == vlm.render(ask("a"))


def test_half_precision_and_the_layout_of_the_hub(sources, tmp_path):
    """A BLIP-2 as it was published: a T5 behind it, *.bin weights, preprocessor_config.json; a LLaMA in bfloat16 whose two tables are one and
    whose tokenizer is of the old kind. The dtype stays, the prompt's tokens too."""
    blip2, llama, pth = sources
    config = Blip2Config.from_pretrained(blip2)
    config = Blip2Config(vision_config=config.vision_config, qformer_config=config.qformer_config, num_query_tokens=4,
                         text_config=T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    parts = rattled(Blip2ForConditionalGeneration(config))
    config.save_pretrained(tmp_path / "t5")
    torch.save(parts.state_dict(), tmp_path / "t5" / "pytorch_model.bin")
    model.load_model(blip2)[1].image_processor.save_pretrained(tmp_path / "t5")
    assert (tmp_path / "t5" / "preprocessor_config.json").exists()
    tied = rattled(LlamaForCausalLM(LlamaConfig(**families.TEXT | dict(hidden_size=48), vocab_size=360, tie_word_embeddings=True))).bfloat16()
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "tied")
    settings = tmp_path / "tied" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | dict(legacy=True, add_bos_token=True)))
    minigpt4.convert(str(tmp_path / "t5"), str(tmp_path / "tied"), pth, str(tmp_path / "out"))
    net = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert net.dtype == torch.bfloat16 and net.language_projection.weight.dtype == torch.bfloat16
    assert torch.equal(net.get_output_embeddings().weight, tied.get_input_embeddings().weight) and net.get_input_embeddings().weight.shape[0] == 360
    assert torch.equal(net.vision_model.encoder.layers[1].mlp.fc1.weight, parts.vision_model.encoder.layers[1].mlp.fc1.weight.bfloat16())
    assert torch.equal(net.query_tokens.bfloat16(), parts.query_tokens.bfloat16())
    vlm = model.VLM(*model.load_model(str(tmp_path / "out")))
    prompt = vlm.encode(ask("a"), [picture(0)])
    assert prompt["input_ids"].tolist() == [hand_ids(llama_tokenizer(), "a")] and len(vlm.generate([prompt], 3)[0][0]) <= 3


def test_what_does_not_fit_is_refused(sources, tmp_path):
    """Each mistake is one sentence that names the thing, and nothing is written."""
    blip2, llama, pth = sources
    out = str(tmp_path / "out")
    def file(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)
    torn = tmp_path / "torn.pth"
    torn.write_bytes(open(pth, "rb").read()[:500])
    (tmp_path / "html.pth").write_text("<html>too many downloads")
    for wrong in (str(tmp_path / "none.pth"), str(tmp_path), str(torn), str(tmp_path / "html.pth"), file("list", [1, 2]), file("code", dict(model=families.build)),
                  file("vicuna", {"model.embed_tokens.weight": torch.zeros(2, 2)}), file("flat", dict(model={"llama_proj.weight": torch.zeros(3)})),
                  file("v2", published(**{"llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 2)})),
                  file("trained", published(query_tokens=torch.zeros(1, 4, 32))), file("13b", published(width=80)), file("other", published(inner=24)),
                  file("llama2", published(inner=128))):
        refuses(wrong, lambda: minigpt4.convert(blip2, llama, wrong, out))
    with pytest.raises(SystemExit, match="without Q-Former"):
        minigpt4.convert(blip2, llama, str(tmp_path / "llama2"), out)
    for wrong in str(tmp_path / "none"), llama:
        refuses(wrong, lambda: minigpt4.convert(wrong, llama, pth, out))
    for wrong in str(tmp_path / "none"), blip2:
        refuses(wrong, lambda: minigpt4.convert(blip2, wrong, pth, out))
    Blip2Config.from_pretrained(blip2).save_pretrained(tmp_path / "bare")
    refuses(tmp_path / "bare", lambda: minigpt4.convert(str(tmp_path / "bare"), llama, pth, out))
    LlamaConfig.from_pretrained(llama).save_pretrained(tmp_path / "bare-llama")
    refuses(tmp_path / "bare-llama", lambda: minigpt4.convert(blip2, str(tmp_path / "bare-llama"), pth, out))
    assert not os.path.exists(out)
    refuses(tmp_path, lambda: minigpt4.convert(blip2, llama, pth, str(tmp_path)))


def test_from_the_command_line(sources, tmp_path, monkeypatch, capsys):
    """The command of the README works from any directory; a flag left out is named."""
    monkeypatch.chdir(tmp_path)
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["minigpt4.py", *flags])
        runpy.run_path(os.path.join(ROOT, "extras", "minigpt4.py"), run_name="__main__")
    flags = [f"--{key}={value}" for key, value in zip(("blip2", "llama", "minigpt4", "out"), (*sources, "out"))]
    run(*flags)
    assert "note: this BLIP-2 was trained with a " in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").exists()
    refuses("--minigpt4", lambda: run(*flags[:2]))
