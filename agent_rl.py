"""
The loss of VLM Q-Learning on the token MDP, as pure functions.

After "VLM Q-Learning: Aligning Vision-Language Models for Interactive Decision-Making"
(Grigsby, Zhu, Ryoo, Niebles, arXiv 2505.03181). Every reply token is an action. The state is the prompt
and the reply so far. The last token of a turn ends the reply and carries the turn's reward.

    V(s)   = sum_v pi(v|s) Q(s,v)                          the value of a state, exact over the vocabulary
    A(s,a) = Q(s,a) - V(s)                                 the advantage of a token

    last token of turn t:  y_R = r_t + gamma (1 - terminated_t) v_0 of turn t+1
    inside the turn:       y_j = v_{j+1}                   tree backup, with Q' and V' of the target head:
                           v_j = V'(s_j) + lam pi(a_j|s_j) (y_j - Q'(s_j,a_j))

    L       = L_actor + critic_coef L_critic
    L_actor  = - mean (bc_coef + f(A)) log pi(a|s)         f: the filter, see filter_weight
    L_critic = mean (Q(s,a) - y)^2 + pess_coef mean_v (Q(s,v) - q_init)^2

The functions below follow this order. Where the method departs from the paper, and why: docs/method.md.
The fields of a batch are listed in buffer.make_batch.
Letters: B turns, R reply tokens, N = B R, V vocabulary, H hidden size, C critics.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

AWR_TEMPERATURE = 0.3
AWR_MAX_WEIGHT = 20.0
FBC_QUANTILE = 0.7
# At most this many logits are alive at once (16 MiB in float32), and as many Q values of each critic.
MAX_LOGITS = 2**22


# ---- values and advantages ----

def state_value(logits, q):
    """Compute V(s) = sum_v pi(v|s) Q(s,v). logits, q (..., V) -> (...)."""
    return (logits.softmax(-1) * q).sum(-1)

def pick_token(q, a):
    """Pick Q(s,a) out of Q(s,.). q (..., N, V), a (N,) -> (..., N)."""
    index = a.expand(*q.shape[:-1])[..., None]
    return q.gather(-1, index)[..., 0]

def token_values(vlm, hidden, a):
    """Compute all that the loss needs to know about N states and the tokens taken there.

    hidden (N, H), a (N,) -> dict of (N,); qa is (C, N). Without critics the dict holds logp alone.
    Tensors as wide as the vocabulary do not leave this function.
    """
    logits = vlm.logits(hidden)  # (N, V)
    out = dict(logp=-F.cross_entropy(logits, a, reduction="none"))
    if not len(vlm.heads):
        return out

    q = vlm.q(hidden)  # (C, N, V)
    out["qa"] = pick_token(q, a)
    out["pessimism"] = ((q - vlm.q_init) ** 2).mean(-1).mean(0)
    with torch.no_grad():
        # several critics: the targets take the lowest estimate
        q_target = vlm.q(hidden, target=True).amin(0)
        out["v"] = state_value(logits, q.mean(0))
        out["v_target"] = state_value(logits, q_target)
        out["qa_target"] = pick_token(q_target, a)
    return out

def all_token_values(vlm, hidden, a):
    """Compute token_values of a batch, a chunk of states at a time where the vocabulary is large.

    The logits and Q values of a chunk are computed again in the backward pass instead of being stored.
    hidden (B, R, H), a (B, R) -> dict of (B, R); qa is (C, B, R).
    """
    size = max(1, MAX_LOGITS // vlm.vocab_size)
    states = hidden.flatten(0, 1)
    actions = a.flatten()
    chunks = []
    for h, x in zip(states.split(size), actions.split(size)):
        if len(states) > size:
            chunk = checkpoint(token_values, vlm, h, x, use_reentrant=False)
        else:
            chunk = token_values(vlm, h, x)
        chunks.append(chunk)

    out = {}
    for key in chunks[0]:
        whole = torch.cat([chunk[key] for chunk in chunks], -1)
        out[key] = whole.unflatten(-1, a.shape)
    return out

def advantages(qa, v, mask, cfg):
    """Compute A(s,a) = Q(s,a) - V(s) of every reply token, without a gradient.

    qa (C, B, R), v and mask (B, R) -> (B, R).
    trace='turn': one advantage a reply, Q of its last token minus V of its first state.
    """
    q = qa.detach().mean(0)
    if cfg.trace == "turn":
        last = (mask.sum(1).long() - 1).clamp(min=0)
        q_last = q.gather(1, last[:, None])
        return (q_last - v[:, :1]).expand_as(v)
    return q - v


# ---- targets ----

def clip_reward(reward, cfg):
    """Cut a reward to +-reward_clip: what the critic learns from."""
    limit = cfg.reward_clip or math.inf
    return max(-limit, min(limit, reward))

def has_target(batch):
    """Tell which turns have a target: they terminate, or their next turn is in the batch -> (B,)."""
    return (batch["terminated"] > 0) | (batch["next"] >= 0)

def end_target(batch, gamma, v_next):
    """Compute y_R = r_t + gamma (1 - terminated_t) v_0 of turn t+1 -> (B,).

    v_next (B,): the value of the next turn's first state. A terminated turn needs none. A truncated turn
    bootstraps: its last observation is the next row, and v_next is V' of that.
    """
    v_next = torch.where(batch["next"] >= 0, v_next, 0.0)
    return batch["reward"] + gamma * (1 - batch["terminated"]) * v_next

def plain_backup(y_end, last, lam, v):
    """Carry y_end (B,) from column last (B,) to the first: y_j = lam y_{j+1} + (1 - lam) V'(s_{j+1})."""
    y = torch.zeros_like(y_end)
    columns = []
    for j in reversed(range(v.shape[1])):
        y = torch.where(last == j, y_end, y)
        columns.append(y)
        y = lam * y + (1 - lam) * v[:, j]
    return torch.stack(columns[::-1], 1)

def tree_backup(y_end, last, lam, v, q, pi):
    """Carry y_end (B,) from column last (B,) to the first token (Precup, Sutton, Singh 2000) -> y (B, R).

    y_j = v_{j+1} and v_j = V'(s_j) + lam pi(a_j|s_j) (y_j - Q'(s_j,a_j)). A token that the policy would not
    have produced cuts the trace: V' stands in for what followed.
    """
    y = torch.zeros_like(y_end)
    columns = []
    for j in reversed(range(v.shape[1])):
        y = torch.where(last == j, y_end, y)
        columns.append(y)
        v_j = v[:, j] + lam * pi[:, j] * (y - q[:, j])
        y = v_j
    return torch.stack(columns[::-1], 1)

def td_targets(v, batch, gamma, lam=1.0, q=None, pi=None):
    """Compute the target y of every reply token -> y (B, R), known (B,).

    v (B, R): V' of the state before each token. q, pi (B, R): Q'(s,a) and pi(a|s) for the tree backup,
    which runs across the turns of a window; without them TD(lambda) inside each turn.
    batch: mask (B, R), reward (B,), terminated (B,), next (B,) with the row of the following turn or -1,
    chain: how many turns at most follow each other.
    known is false where the window ends before the episode does, so that the bootstrap is missing.
    """
    mask = batch["mask"]
    last = mask.sum(1).long() - 1
    after = batch["next"].clamp(min=0)
    known = has_target(batch)
    v_next = v[after, 0]
    if q is None:
        y_end = end_target(batch, gamma, v_next)
        y = plain_backup(y_end, last, lam, v) * mask
        return y, known & (last >= 0)

    # Nothing is known about what followed a window's last turn: its own Q' stands in.
    q_end = q.gather(1, last.clamp(min=0)[:, None])[:, 0]
    # Each pass carries what is known one turn further back.
    for _ in range(batch["chain"]):
        y_end = torch.where(known, end_target(batch, gamma, v_next), q_end)
        y = tree_backup(y_end, last, lam, v, q, pi) * mask
        # v_0 of the next turn, now that its targets are known
        correction = mask * pi * (y - q)
        v_next = v[after, 0] + lam * correction[after, 0]
    return y, known & (last >= 0)


# ---- losses ----

def filter_weight(adv, kind, beta=0.0, good_episode=None):
    """Compute f, the weight of each token in the actor's loss. adv (B, R) -> (B, R).

    sft: 1. afsft: 1 where A > beta, else 0. awr: exp(A / AWR_TEMPERATURE), at most
    AWR_MAX_WEIGHT (Peng et al., arXiv 1910.00177). fbc: 1 in the episodes that good_episode (B,) marks.
    Another way to weigh tokens is one more branch here, its name in configurator.CHOICES, and in WITH_CRITIC
    there if it uses A. A rank over a reply's tokens also needs the mask, because padding has an A too: add a
    parameter, here and in the calls in compute_loss and extras/report.py.
    """
    if kind == "sft":
        return torch.ones_like(adv)
    if kind == "afsft":
        return (adv > beta).float()
    if kind == "awr":
        return (adv / AWR_TEMPERATURE).exp().clamp(max=AWR_MAX_WEIGHT)
    if kind == "fbc":
        return good_episode.float()[:, None].expand_as(adv)
    raise ValueError(f"unknown actor_loss {kind!r}")

def actor_loss(logp, f, mask, tokens, cfg):
    """Compute L_actor = - sum (bc_coef + f) log pi(a|s) / tokens -> (loss, info).

    logp, f, mask (B, R). A token with f = 0 is not cloned. tokens: reply tokens of the whole update.
    """
    weight = cfg.bc_coef + f
    loss = -(weight * logp * mask).sum() / tokens
    nll = -(logp * mask).sum()
    info = dict(tokens=mask.sum(), nll=nll)
    return loss, info

def critic_loss(values, y, known, mask, critic_tokens, cfg):
    """Compute L_critic over the tokens whose target is known -> (loss, info).

    values: see all_token_values. y, mask (B, R), known (B,).
    critic_tokens: the number of such tokens in the whole update; None: in this batch.
    """
    m = mask * known[:, None]
    if critic_tokens is None:
        critic_tokens = m.sum()
    td_error = ((values["qa"] - y) ** 2).mean(0)
    # No target trains the Q of a token that the data never shows. Pessimism holds it at q_init, so that only
    # tokens with data behind them rise above it.
    pessimism = values["pessimism"]
    per_token = td_error + cfg.pess_coef * pessimism
    loss = (per_token * m).sum() / critic_tokens.clamp(min=1)
    info = dict(
        critic_tokens=m.sum(),
        td_error=(td_error * m).sum(),
        pess=(pessimism * m).sum(),
    )
    return loss, info

def filter_info(values, adv, f, batch):
    """Sum what the logs show of the values and of the filter -> dict of sums, see summarise."""
    mask = batch["mask"]
    span = batch["span"] * mask
    first = mask[:, 0]
    passed = f.clamp(max=1)
    return dict(
        q=(values["qa"].mean(0) * mask).sum(),
        v=(values["v"] * mask).sum(),
        adv_span=(adv * span).sum(),
        span=span.sum(),
        pass_span=(passed * span).sum(),
        pass_rest=(passed * (mask - span)).sum(),
        first=first.sum(),
        predicted=(values["v"][:, 0] * first).sum(),
        observed=(batch["return_to_go"] * first).sum(),
    )

def compute_loss(vlm, batch, cfg, warm=False, quantile=0.0, tokens=None, critic_tokens=None):
    """Compute the whole loss of a micro-batch -> (loss, info).

    tokens, critic_tokens: counts over the whole update, so that gradients do not depend on how it is split.
    warm: the filter passes everything. quantile: the episode return from which on 'fbc' clones.
    info: sums over tokens, without gradients, see summarise.
    """
    mask = batch["mask"]
    if tokens is None:
        tokens = mask.sum()
    good_episode = batch["ep_return"] >= quantile

    # the hidden state before each reply token; the token's log-probability, Q and V
    hidden = vlm.states(batch["inputs"], batch["P"], mask.shape[1])  # (B, R, H)
    values = all_token_values(vlm, hidden, batch["reply_ids"])
    logp = values["logp"]

    # without a critic, 'sft' and 'fbc': plain cloning of all, or of the better episodes
    if not len(vlm.heads):
        zeros = torch.zeros_like(logp)
        f = filter_weight(zeros, cfg.actor_loss, good_episode=good_episode)
        loss, info = actor_loss(logp, f, mask, tokens, cfg)
        return loss, {key: value.detach() for key, value in info.items()}

    # targets and advantages, without gradients
    with torch.no_grad():
        lam = 1.0 if cfg.trace == "turn" else cfg.lam
        tree = {}
        if cfg.trace == "tree":
            tree = dict(q=values["qa_target"], pi=logp.exp())
        y, known = td_targets(values["v_target"], batch, cfg.gamma, lam, **tree)
        adv = advantages(values["qa"], values["v"], mask, cfg)
        f = filter_weight(
            adv,
            cfg.actor_loss,
            cfg.beta,
            good_episode=good_episode,
        )
        if warm:
            f = torch.ones_like(f)

    actor, info = actor_loss(logp, f, mask, tokens, cfg)
    critic, critic_info = critic_loss(values, y, known, mask, critic_tokens, cfg)
    loss = actor + cfg.critic_coef * critic
    info = info | critic_info | filter_info(values, adv, f, batch)
    return loss, {key: value.detach() for key, value in info.items()}

# ---- what is logged ----

def summarise(infos):
    """Turn the sums of several micro-batches into the logged metrics, each a mean over what it counts."""
    total = {}
    for key in infos[0]:
        total[key] = float(sum(info[key] for info in infos))

    def mean(key, count):
        return total[key] / max(total[count], 1.0)

    out = dict(tokens=total["tokens"], nll=mean("nll", "tokens"))
    if "q" not in total:
        return out
    out["td_error"] = mean("td_error", "critic_tokens")
    out["pess"] = mean("pess", "critic_tokens")
    out["q_mean"] = mean("q", "tokens")
    out["v_mean"] = mean("v", "tokens")
    out["adv_action"] = mean("adv_span", "span")
    out["pass_action"] = mean("pass_span", "span")
    out["pass_syntax"] = total["pass_rest"] / max(total["tokens"] - total["span"], 1.0)
    out["return_predicted"] = mean("predicted", "first")
    out["return_observed"] = mean("observed", "first")
    return out
