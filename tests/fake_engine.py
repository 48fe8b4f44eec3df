"""
A server that answers as vLLM does, over real HTTP, with a tiny VLM behind it; it misbehaves on purpose.

    from fake_engine import engine  # noqa: F401  (fixture)
"""
import base64, io, json, os, threading

import pytest
from PIL import Image

from extras import serving, teachers
from model import VLM, load_model, read_tensors
from test_teacher import Handler, Server

NOT_FOUND = (404, {}, json.dumps(dict(detail="Not Found")))

def json_answer(status=200, **content):
    """Write an answer as a handler sends it."""
    return status, {}, json.dumps(content)

def read_messages(messages):
    """Turn messages of the protocol into those of a row -> (messages, picture)."""
    parts = []
    for part in messages[0]["content"]:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition(",")[2]
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            part = dict(type="image", text=None)
        parts.append(part)
    return [dict(role="user", content=parts)], image

class EngineHandler(Handler):
    """One request to the engine."""

    def do_GET(self):
        self.respond(self.server.behave(self.path, None))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
        self.respond(self.server.behave(self.path, body))

class Engine(Server):
    """A vLLM with one base model, and the adapters that it was given.

    trouble(path, body): what goes wrong with a request, as Handler sends it; None: nothing.
    requests: (path, body) of each POST; adapters: {name: tensors} that are loaded now.
    """

    def __init__(self, folder, lora_r=2):
        super().__init__(self.engine_behave)
        self.RequestHandlerClass = EngineHandler
        self.vlm = VLM(*load_model(folder))
        self.vlm.add_adapters(lora_r)
        self.adapters = {}
        self.trouble = lambda path, body: None
        self.one_at_a_time = threading.Lock()

    def engine_behave(self, path, body):
        trouble = self.trouble(path, body)
        if trouble is not None:
            return trouble
        routes = {"/v1/models": self.models, "/v1/load_lora_adapter": self.load}
        routes |= {"/v1/unload_lora_adapter": self.unload, "/v1/chat/completions": self.chat}
        if path not in routes:
            return NOT_FOUND
        return routes[path](body)

    def models(self, body):
        cards = [dict(id="base", parent=None)]
        cards += [dict(id=name, parent="base") for name in self.adapters]
        return json_answer(data=cards)

    def load(self, body):
        if not body["lora_name"]:
            return json_answer(400, error=dict(message="both must be provided"))
        tensors = read_tensors(os.path.join(body["lora_path"], "adapter_model.safetensors"))
        assert body["lora_name"] not in self.adapters
        self.adapters[body["lora_name"]] = tensors
        return 200, {}, "Success"

    def unload(self, body):
        self.adapters.pop(body["lora_name"], None)
        return 200, {}, "Success"

    def chat(self, body):
        if body["model"] != "base" and body["model"] not in self.adapters:
            return json_answer(404, error=dict(message="no such model"))
        with self.one_at_a_time:
            return self.generate(body)

    def generate(self, body):
        """Answer with the adapters that a request names, or without."""
        vlm = self.vlm
        tensors = self.adapters.get(body["model"], {})
        for name, parameter in vlm.adapter_tensors().items():
            parameter.data.zero_()
            if name in tensors:
                parameter.data.copy_(tensors[name])
        messages, image = read_messages(body["messages"])
        prompt = vlm.encode(messages, [image])
        [ids], [logprobs] = vlm.generate([prompt], body["max_tokens"], body["temperature"])
        if "allowed_token_ids" in body:
            ids = body["allowed_token_ids"][:1]
            logprobs = [0.0]
        entries = [dict(token=f"token_id:{i}", logprob=p) for i, p in zip(ids, logprobs)]
        choice = dict(message=dict(content=vlm.decode(ids)), token_ids=ids, logprobs=dict(content=entries))
        return json_answer(choices=[choice], prompt_token_ids=prompt["input_ids"][0].tolist())

def change(answer, edit):
    """Change the content of an answer -> the changed answer. edit(content) works in place."""
    status, headers, text = answer
    content = json.loads(text)
    edit(content)
    return status, headers, json.dumps(content)

@pytest.fixture
def engine(tiny, monkeypatch):  # noqa: F811
    """A running engine that serves the tiny VLM; back-off and time-outs are short."""
    monkeypatch.setattr(teachers, "BACKOFF", 0.001)
    monkeypatch.setattr(teachers, "LONGEST", 0.02)
    monkeypatch.setattr(serving, "TIMEOUT", 5.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Engine(tiny)
    loop = dict(poll_interval=0.01)
    threading.Thread(target=server.serve_forever, kwargs=loop, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
