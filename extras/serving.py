"""
Play rollouts on a server (vLLM), which holds the adapters of the policy that learns here.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 16 \\
        --logprobs-mode processed_logprobs
    python train.py config/numberline.py --model=BASE --rollout_url=http://localhost:8000/v1

docs/serving.md says when this pays. A rollout saves the adapters, loads them into the server under a name
that was never used, plays with num_envs requests at once, and takes them out again. Replies are sampled from
the same distribution as here: temperature 1, no top_k and the like, without the tokens that are never
sampled, and with the same prompt. The server tells token ids and log-probabilities.

A server that fails costs play and not the run: what was played is kept, and the updates until the next
rollout learn from the play that there is.
"""
import json, math, os, shutil, time, uuid
from collections import Counter
from types import SimpleNamespace

import torch
from tqdm import tqdm

from configurator import ConfigError
from extras.flag_mistakes import show
from extras.teachers import OpenAIAgent, message_content
from extras.whole_files import let_read
from model import VLM, gather, ranks
from worlds.calls import close_env, make_or_refuse
from worlds.guard import each
from worlds.playing import Episode, begin_episodes

# Seconds until an answer must be complete.
TIMEOUT = 60.0
# Further tries of a failed request, after 1, 2 and 4 seconds.
RETRIES = 3
# A rollout ends early after so many lost turns: `play` would end the run after some more.
LOST_TURNS = 16
# vLLM takes no more tokens that are not to be sampled.
MOST_BANNED = 1024
BAN = -100.0
# The mean difference, in nats, at which a server's log-probabilities are those of another model.
OTHER_MODEL = 0.5
# A certain token's log-probability; one further from 0 was computed before other tokens were banned.
CERTAIN = -1e-3
RETOKENISED = "model, re-tokenised"

class ServerLost(Exception):
    """The server cannot play the rest of a rollout; the text says why."""

def endpoint(url):
    """Return the address under which the server has its routes: http://host:8000 means .../v1."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"

class ServedPolicy(OpenAIAgent):
    """A player for `play`: the policy of a VLM, on a server that holds its adapters.

    vlm encodes the prompts and knows the tokens. model: the name of the policy on the server.
    """

    def __init__(self, cfg, vlm, model):
        settings = SimpleNamespace(base_url=endpoint(cfg.rollout_url), model=model, temperature=1.0)
        settings.max_tokens = cfg.max_new_tokens
        settings.timeout = TIMEOUT
        settings.retries = RETRIES
        settings.api_key_env = "OPENAI_API_KEY"
        super().__init__(settings, Counter())
        self.vlm = vlm
        # A server that was there when the run began may come back.
        self.was_there = True
        self.other_failures = 0
        self.lost_turns = 0
        # what a folder's generation_config.json may say otherwise
        self.settings |= dict(top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)
        self.settings |= dict(presence_penalty=0.0, frequency_penalty=0.0)
        self.settings["logit_bias"] = {str(i): BAN for i in sorted(vlm.banned_ids)}
        self.settings["stop_token_ids"] = [vlm.eos]
        self.settings |= dict(logprobs=True, return_token_ids=True, return_tokens_as_token_ids=True)

    @property
    def has_worked(self):
        return self.was_there

    @property
    def failures(self):
        """Count the requests that failed, tries included."""
        return self.counts["requests"] - self.counts["replies"] + self.other_failures

    def __call__(self, envs_, rows, images):
        """Reply to observations, as `play` asks for it; ServerLost if the server cannot."""
        prompts = []
        contents = []
        for row, image in zip(rows, images):
            text = row["messages"][0]["content"][1]["text"]
            key = (text, row["images_file_names"][0])
            prompts.append(self.vlm.encode(row["messages"], [image], key=key))
            contents.append(self.content(row, image))
        try:
            answers = self.ask_together(contents)
        except ConfigError as error:
            self.give_up(envs_, str(error).rstrip("."))
        lost = [answer["lost"] for answer in answers if "lost" in answer]
        self.lost_turns += len(lost)
        if len(lost) == len(answers) or self.lost_turns >= LOST_TURNS:
            self.give_up(envs_, f"{self.name()}: {lost[-1]}")
        for answer, prompt in zip(answers, prompts):
            self.check_prompt(answer.pop("prompt_ids", None), prompt["input_ids"][0].tolist())
        return answers

    def give_up(self, envs_, reason):
        """Close the environments of the episodes that are not over, and raise ServerLost."""
        each(close_env, [(env,) for env in envs_], envs_[0].max_parallel or 1)
        raise ServerLost(reason)

    def content(self, row, image):
        """Write the content of a message that the server reads as this VLM reads the row."""
        self.settings["add_special_tokens"] = not self.template_begins(row["messages"])
        clean = []
        for message in row["messages"][:1]:
            parts = [self.vlm.neutralise(part) for part in message["content"]]
            clean.append({**message, "content": parts})
        return message_content(dict(messages=clean), image)

    def template_begins(self, messages):
        """Tell whether the chat template writes the token with which a text begins, see VLM.encode."""
        bos = self.vlm.tokenizer.bos_token
        return bool(bos) and self.vlm.render(messages).startswith(bos)

    def check_prompt(self, served, ours):
        """End the run if the server reads another prompt than the network that learns."""
        if served is None or served == ours:
            return
        first = 0
        while first < min(len(served), len(ours)) and served[first] == ours[first]:
            first += 1
        raise SystemExit(f"rollout_url={self.cfg.base_url!r} reads other prompts than the model that learns: "
                         f"{len(served)} tokens for {len(ours)}, different from token {first} on; serve the "
                         "same folder with its own chat template and picture size, or leave rollout_url out.")

    # ---- answers ----

    def answer(self, reply, **lost):
        """Make an answer for `play` of what `read_answer` returned, or of a loss."""
        if lost:
            return dict(reply="", source="model", **lost)
        return reply

    def read_answer(self, status, text):
        """Read what the server sent -> (an answer with token ids, ""), or (None, what is wrong)."""
        reply, fault = super().read_answer(status, text)
        choice = first_choice(text) if status == 200 else {}
        ids = self.token_ids(choice)
        if ids:
            reply = self.vlm.decode(ids)
            answer = dict(reply=reply, source="model", reply_ids=ids)
            answer["logprobs"] = log_probabilities(choice, len(ids))
            if self.clean(reply) != reply:
                # a server that repeats the key
                answer = dict(reply=self.clean(reply), source=RETOKENISED)
        elif reply is None:
            return None, fault
        else:
            answer = dict(reply=reply, source=RETOKENISED)
        answer["prompt_ids"] = prompt_ids(text)
        return answer, ""

    def token_ids(self, choice):
        """Return the token ids of a reply; [] where there are none that this policy can have sampled."""
        ids = choice.get("token_ids")
        if ids is None:
            ids = ids_of_tokens(choice)
        if not isinstance(ids, list) or not 0 < len(ids) <= self.cfg.max_tokens:
            return []
        if not all(type(i) is int and 0 <= i < self.vlm.vocab_size for i in ids):
            return []
        is_possible = self.vlm.banned_ids.isdisjoint(ids) and self.vlm.eos not in ids[:-1]
        return ids if is_possible else []

    # ---- adapters ----

    def insist(self, path, body=None):
        """Send a request until it is answered, with a few tries.

        Returns (body of the answer, ""), or ("", what is wrong).
        """
        reason = ""
        for attempt in range(self.cfg.retries + 1):
            status, text, headers = self.send(path, body)
            if status == 200:
                return text, ""
            self.other_failures += 1
            fault = f"HTTP {status}" if status > 0 else text.partition(":")[0]
            reason = self.describe(status, text, headers, fault)
            if attempt == self.cfg.retries or not self.may_pass(status):
                break
            time.sleep(self.pause(attempt, headers))
        return "", reason

    def load(self, folder):
        """Load the adapters in a folder into the server; return why that failed, or ""."""
        body = dict(lora_name=self.cfg.model, lora_path=os.path.abspath(folder))
        _, reason = self.insist("load_lora_adapter", body)
        return f"{self.cfg.base_url} does not load the adapters: {reason}" if reason else ""

    def unload(self):
        """Take the adapters out of the server; one that is gone has none."""
        self.send("unload_lora_adapter", dict(lora_name=self.cfg.model))


# ---- what a server sends ----

def first_choice(text):
    """Read the first choice of an answer, {} if there is none."""
    try:
        choice = json.loads(text)["choices"][0]
    except (ValueError, RecursionError, TypeError, LookupError):
        return {}
    return choice if isinstance(choice, dict) else {}

def prompt_ids(text):
    """Read the token ids of the prompt; None where the server does not tell them."""
    try:
        ids = json.loads(text).get("prompt_token_ids")
    except (ValueError, RecursionError, AttributeError):
        return None
    return ids if isinstance(ids, list) else None

def token_entries(choice):
    """List what a choice tells about each token of its reply, [] if it tells nothing."""
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []
    return entries

def ids_of_tokens(choice):
    """Read token ids that are written as texts, token_id:17, by older servers; [] if one is not."""
    ids = []
    for entry in token_entries(choice):
        name, _, number = str(entry.get("token")).partition(":")
        if name != "token_id" or not number.isdecimal() or len(number) > 9:
            return []
        ids.append(int(number))
    return ids

def log_probabilities(choice, n):
    """Read the log-probabilities of a reply of n tokens; () where they are not all there and finite."""
    values = [entry.get("logprob") for entry in token_entries(choice)]
    if len(values) != n or not set(map(type, values)) <= {int, float}:
        return ()
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):
        return ()
    return [min(0.0, float(value)) for value in values]


# ---- a run's server ----

class RolloutServer:
    """The server of a run: what it needs to be before the run begins, and one policy after the other.

    cfg: the settings of train.py.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.policy = None
        # why the server did not take the last adapters
        self.refusal = ""
        self.folder = os.path.join(cfg.out_dir, "served")

    # -- before anything is written --

    def check(self, base, make_env):
        """End with one sentence if the server cannot play this run's rollouts.

        base: (net, processor) of the model that learns.
        """
        cfg = self.cfg
        trial = VLM(*base, cfg.model)
        policy = ServedPolicy(cfg, trial, model="?")
        if len(trial.banned_ids) > MOST_BANNED:
            self.refuse(f"has to leave out {len(trial.banned_ids)} tokens of model={cfg.model!r}, and vLLM "
                        f"takes {MOST_BANNED}")
        policy.cfg.model = policy.settings["model"] = self.served_base(policy)
        # a request without a name is refused by a server that can load adapters, and unknown to others
        status, text, _ = policy.send("load_lora_adapter", dict(lora_name="", lora_path=""))
        if status not in (400, 422):
            self.refuse("loads no adapters while it runs: start it with --enable-lora and "
                        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True (docs/serving.md)")
        self.try_turn(policy, trial, make_env)
        trial.hook.remove()

    def refuse(self, reason):
        """End the program with one sentence about the server."""
        raise ConfigError(f"rollout_url={self.cfg.rollout_url!r} {reason}, or leave rollout_url out.")

    def served_base(self, policy):
        """Ask the server for the name of its base model."""
        # a run does not wait for a server that has not been started
        policy.was_there = False
        text, reason = policy.insist("models")
        policy.was_there = True
        if reason:
            self.refuse(f"does not answer ({show(reason)}): start the server first (docs/serving.md)")
        try:
            cards = json.loads(text)["data"]
            names = [card["id"] for card in cards if not card.get("parent")]
            name = names[0]
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
            name = None
        if not isinstance(name, str):
            self.refuse("lists no model: it must be a server of OpenAI's protocol such as vLLM")
        return name

    def try_turn(self, policy, trial, make_env):
        """Let the server's base model play one turn, and compare it with the model that learns."""
        env = make_or_refuse(make_env)
        episode = Episode(env, 0, 0, "trial")
        begin_episodes([episode], make_env, "train", 1)
        if episode.failure:
            raise SystemExit(f"{env.name}: {episode.failure.cause}: correct the environment first.")
        row = episode.next_row()
        image = episode.obs["image"]
        try:
            [answer] = policy([env], [row], [image])
        except ServerLost as error:
            self.refuse(f"does not play a turn ({error}): see to the server")
        each(close_env, [(env,)], 1)
        prompt = trial.encode(row["messages"], [image])
        self.compare(policy, trial, answer, prompt)
        self.check_bans(policy, row, image)

    def compare(self, policy, trial, answer, prompt):
        """Compare the log-probabilities of a server's reply with those of the model that learns."""
        if "reply_ids" not in answer:
            tqdm.write(f"rollout_url={self.cfg.rollout_url!r} tells no token ids: its replies are tokenised "
                       "again, and marked so.")
            return
        # a base that is to be sharded may be too slow where it lies now
        if not answer["logprobs"] or self.cfg.shard:
            return
        ids = answer["reply_ids"]
        ours = reply_logprobs(trial, prompt, ids)
        difference = sum(abs(a - b) for a, b in zip(ours, answer["logprobs"])) / len(ids)
        if difference > OTHER_MODEL:
            self.refuse(f"gives its own reply other probabilities than model={self.cfg.model!r} does (mean "
                        f"difference {difference:.2f} nats): serve the same folder")

    def check_bans(self, policy, row, image):
        """Tell the user if the server's log-probabilities are those before tokens are left out."""
        content = policy.content(row, image)
        body = policy.settings | dict(messages=[dict(role="user", content=content)], max_tokens=1)
        body["allowed_token_ids"] = [policy.vlm.eos]
        status, text, _ = policy.send("chat/completions", body)
        logprobs = log_probabilities(first_choice(text), 1) if status == 200 else ()
        if not logprobs or logprobs[0] < CERTAIN:
            tqdm.write(f"rollout_url={self.cfg.rollout_url!r} gives log-probabilities from before it leaves "
                       "tokens out; they are stored as they are. For those of the policy, start it with "
                       "--logprobs-mode processed_logprobs.")

    # -- a rollout --

    def take_policy(self, vlm, step):
        """Give the server the adapters of a VLM -> the player of a rollout.

        Rank 0 does it for all. Where it fails, the player raises ServerLost when it is asked.
        """
        # The server keeps what it has computed for a name, so a name is used once.
        name = gather(f"rollout-{step}-{uuid.uuid4().hex[:12]}")[0]
        self.policy = ServedPolicy(self.cfg, vlm, name)
        reason = ""
        if ranks()[0] == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            folder = os.path.join(self.folder, name)
            vlm.save_adapters(folder)
            # the server may be another user's
            let_read(folder)
            reason = self.policy.load(folder)
        self.refusal = gather(reason)[0]
        if not self.refusal:
            return self.policy

        def lost(envs_, rows, images):
            self.policy.give_up(envs_, self.refusal)

        return lost

    def try_adapters(self, vlm):
        """End with one sentence if the server refuses adapters such as those of a VLM."""
        self.take_policy(vlm, "trial")
        self.release()
        if self.refusal:
            raise ConfigError(f"{self.refusal}; see docs/serving.md, or leave rollout_url out.")

    def release(self):
        """Take the adapters of the last rollout out of the server; all ranks have played."""
        if ranks()[0] == 0:
            if not self.refusal:
                self.policy.unload()
            shutil.rmtree(self.folder, ignore_errors=True)

    def numbers(self):
        """Count the failed requests of the last rollout, over all ranks, for metrics.jsonl."""
        return {"rollout/server_failures": sum(gather(self.policy.failures))}

def collect(episodes):
    """Play episodes until they are over or a server is lost -> list of those that have ended."""
    played = []
    try:
        for episode in episodes:
            played.append(episode)
    except ServerLost as error:
        tqdm.write(f"The rollout ends after {len(played)} episodes, {show(str(error), 400)}; the next "
                   "updates learn from recorded play, and the next rollout asks the server again.")
    return played

@torch.no_grad()
def reply_logprobs(vlm, prompt, ids):
    """Compute the log-probability of each token of a reply, under the policy."""
    inputs, P, reply_ids, _ = vlm.collate([prompt], [ids])
    logits, _ = vlm(inputs, P, reply_ids.shape[1])
    return logits.log_softmax(-1).gather(-1, reply_ids[..., None])[0, : len(ids), 0].tolist()

def open_server(cfg, base, make_env):
    """Return the run's server, checked; None for a run that plays its rollouts itself."""
    if not cfg.rollout_url or not cfg.online_updates:
        return None
    server = RolloutServer(cfg)
    if ranks()[0] == 0:
        server.check(base, make_env)
    return server
