"""
What is learned: VLM Q-Learning's loss on the token MDP, as pure functions.

After "VLM Q-Learning: Aligning Vision-Language Models for Interactive Decision-Making" (Grigsby, Zhu, Ryoo, Niebles, arXiv 2505.03181).
Every reply token is an action; the state is the prompt and the reply so far; the end-of-turn token carries the turn's reward.

    V(s)   = sum_v pi(v|s) Q(s,v)                                    A(s,a) = Q(s,a) - V(s)
    inside a turn:         y_j = gamma_token v_{j+1}           v_j = V'(s_j) + lam pi(a_j|s_j) (y_j - Q'(s_j,a_j))           Q', V' by the target head
    last token of turn t:  y   = r_t + gamma (1 - terminated_t) v_0 of turn t+1         where no reply follows, v is V' and y is Q'
    L = bc_coef L_SFT + af_coef L_AF + critic_coef L_Q
    L_SFT = - mean log pi(a|s)      L_AF = - mean f(A(s,a)) log pi(a|s)      L_Q = mean (Q(s,a) - y)^2 + pess_coef mean_v (Q(s,v) - q_init)^2

Where it departs from the paper, or fills in what is not public of it:
 1. Q is as wide as the vocabulary and V its exact expectation under the policy; no sampled actions, no value network.
 2. The tree backup (Precup, Sutton, Singh 2000) over the tokens of a window, across its turns: syntax, of which the policy is certain, carries an
    outcome back in one update; where the player said what the policy would not, the trace is cut and V' stands in. Plain TD(lambda) inside a turn
    (trace = 'plain') learns the players' value instead: the first token of every good and bad reply is the same, so its Q, which is the next
    turn's bootstrap, was the mean of what they all got. (NumberLine's TD error after 450 updates: 0.34 plain, 0.001 tree; EZPoints: 0 % plain.)
    Across turns, because a turn is valued best where it decides: behind its syntax, where the policy has learned to look at the picture.
 3. Pessimism. Tokens that no data shows keep the head's first value. If that is above the true return, V is too high and a *correct* syntax
    token, for which A = (1 - pi)(Q - Q_unseen), fails the filter for as long as pi is not certain: the filter unlearns the syntax. So the head
    starts at the lowest discounted return in the data (q_init), and a term (pess_coef) pulls the whole vocabulary to it: what data shows is held
    up by data, the rest goes down, also where it looks good by extrapolation: `+`, good as an action, looked good behind a wrong `+` too, where
    data shows the end of the turn only, and replies became "+ + + +". Too much of it buries what is merely rare: EZPoints' `*`, right in a fifth of
    the hands, at pess_coef 2 and a q_init of -3.2 (many slips in a row) stood 1.2 too low and was never played; at 0.3 and -1.5 it is learned
    (81 -> 99.7 %). The minimum over several critics is such a pessimism too. Alternatives: CQL's logsumexp Q - Q(a) (cql_coef, arXiv 2006.04779),
    which has no floor: while the policy is diffuse V sinks with it without end (seen: -17 where returns end at -2); V over the likely tokens
    only (v_support).
 4. The filter waits: f = 1 for filter_warmup updates, and beta is slightly negative, because a young critic's A is noise around 0.
 5. mdp = 'turn': one advantage a reply, A = Q(s, last token) - V(first state); every token of a reply has the turn's target,
    hence V(first state) is the players' value here.

Letters: B turns, R reply tokens, N = B R, V vocabulary, H hidden size, C critics.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

AWR_TEMPERATURE = 0.3   # awr weighs a token by exp(A / AWR_TEMPERATURE)
FBC_QUANTILE = 0.7      # fbc clones episodes with a return at or above this quantile
LOGITS = 2 ** 22        # at most so many logits are alive at once (16 MiB in fp32), and as many Qs of each critic


def state_value(logits, q):
    """V(s) = sum_v pi(v|s) Q(s,v). logits, q (..., V) -> (...)."""
    return (logits.softmax(-1) * q).sum(-1)


def clip_reward(reward, cfg):
    """What the critic sees of a reward: cut to +-reward_clip."""
    cut = cfg.reward_clip or math.inf
    return max(-cut, min(cut, reward))


def token_values(vlm, hidden, a, cfg):
    """All that the loss wants to know of N states and the tokens a said there: hidden (N, H), a (N,) -> dict of (N,), qa (C, N). What is as wide as the vocabulary ends here."""
    logits = vlm.logits(hidden)                                                               # (N, V)
    out = dict(logp=-F.cross_entropy(logits, a, reduction="none"))                            # log pi(a|s)
    if len(vlm.heads):
        q = vlm.q(hidden)                           # (C, N, V)
        said = lambda q: q.gather(-1, a.expand(*q.shape[:-1])[..., None])[..., 0]
        out |= dict(qa=said(q), pess=((q - vlm.q_init) ** 2).mean(-1).mean(0))
        with torch.no_grad():
            q_target = vlm.q(hidden, target=True).amin(0)                                     # the most pessimistic critic
            out |= dict(v=state_value(logits, q.mean(0)), v_target=state_value(logits, q_target), qa_target=said(q_target))
    return out


def all_token_values(vlm, hidden, a, cfg):
    """token_values of a batch, some states at a time where the vocabulary is large: their logits and Qs are computed once more on the way back
    instead of being kept. hidden (B, R, H), a (B, R) -> dict of (B, R), qa (C, B, R)."""
    flat, a_flat, size = hidden.flatten(0, 1), a.flatten(), max(1, LOGITS // vlm.vocab_size)
    again = (lambda *args: checkpoint(token_values, *args, use_reentrant=False)) if len(flat) > size else token_values
    parts = [again(vlm, h, x, cfg) for h, x in zip(flat.split(size), a_flat.split(size))]
    return {k: torch.cat([part[k] for part in parts], -1).unflatten(-1, a.shape) for k in parts[0]}


def advantages(qa, v, mask, cfg):
    """A(s,a) = Q(s,a) - V(s) of every reply token, without a gradient. qa (C, B, R), v, mask (B, R) -> (B, R)."""
    q = qa.detach().mean(0)
    if cfg.mdp == "turn":
        return (q.gather(1, (mask.sum(1).long() - 1).clamp(min=0)[:, None]) - v[:, :1]).expand_as(v)
    return q - v


def td_targets(v, mask, reward, terminated, nexts, gamma, lam=1.0, q=None, pi=None):
    """Targets of every reply token. v (B, R): V' of the state before each token; mask (B, R); reward, terminated (B,); nexts (B,): the row
    of the turn that follows, -1 if it is not here; q, pi (B, R): Q'(s,a) and pi(a|s) of the tokens for the tree backup, without them plain
    TD(lambda). -> y (B, R), known (B,) false where the bootstrap is missing.
    `terminated` ends the return; a truncated turn has the row of its last observation as next and bootstraps from it."""
    after, last, tree = nexts.clamp(min=0), mask.sum(1).long() - 1, q is not None
    known = (terminated > 0) | (nexts >= 0)
    bootstrap, turns, hop = v[after, 0], 1, nexts                         # V'(s_{t+1})
    while tree and turns < len(nexts) and (hop >= 0).any():               # turns in a row: each pass carries what is known one turn further back
        hop, turns = torch.where(hop >= 0, nexts[hop.clamp(min=0)], -1), turns + 1
    for _ in range(turns):
        y_turn = reward + gamma * (1 - terminated) * torch.where(nexts >= 0, bootstrap, 0.0)        # y = r_t + gamma (1 - terminated) v_0
        if tree:                                                          # a window's last reply: its end is not here, and stands for itself
            y_turn = torch.where(known, y_turn, q.gather(1, last.clamp(min=0)[:, None])[:, 0])
        y, out = torch.zeros_like(y_turn), []
        for j in reversed(range(mask.shape[1])):
            if j + 1 < mask.shape[1] and tree:                            # y_j = gamma_token v_{j+1}
                y = v[:, j + 1] + lam * pi[:, j + 1] * (y - q[:, j + 1])
            elif j + 1 < mask.shape[1]:                                   # y_j = gamma_token (lam y_{j+1} + (1 - lam) V'(s_{j+1}))
                y = lam * y + (1 - lam) * v[:, j + 1]
            y = torch.where(last == j, y_turn, y)
            out.append(y)
        y = torch.stack(out[::-1], 1) * mask
        if tree:                                                          # v_0 = V'(s_0) + lam pi(a_0|s_0) (y_0 - Q'(s_0,a_0))
            bootstrap = v[after, 0] + lam * (mask * pi * (y - q))[after, 0]
    return y, known & (last >= 0)


def filter_weight(adv, kind, beta=0.0, temperature=1.0, max_weight=20.0, good_episode=None):
    """f of the actor's loss (B, R). 'sft' 1; 'afsft' 1{A > beta}; 'awr' clipped exp(A / temperature) (Peng et al., arXiv 1910.00177);
    'fbc' 1 in the episodes of `good_episode` (B,)."""
    if kind == "sft":
        return torch.ones_like(adv)
    if kind == "afsft":
        return (adv > beta).float()
    if kind == "awr":
        return (adv / temperature).exp().clamp(max=max_weight)
    if kind == "fbc":
        return good_episode.float()[:, None].expand_as(adv)
    raise ValueError(f"unknown actor_loss {kind!r}")


def compute_loss(vlm, batch, cfg, warm=False, quantile=0.0, tokens=None, critic_tokens=None):
    """The whole loss of a micro-batch -> (loss, info). tokens, critic_tokens: counts over the *whole update*, so that gradients do not depend on how
    it is split. warm: the filter lets everything pass. quantile: the episode return above which 'fbc' clones. info: sums over tokens, see `summarise`."""
    mask, a = batch["mask"], batch["reply_ids"]
    hidden = vlm.states(batch["inputs"], batch["P"], mask.shape[1])                           # (B, R, H)
    s = SimpleNamespace(**all_token_values(vlm, hidden, a, cfg))                              # (B, R) each
    n = tokens if tokens is not None else mask.sum()
    info = dict(tokens=mask.sum(), nll=-(s.logp * mask).sum())
    if not len(vlm.heads):                                                                    # no critic: 'sft', 'fbc'
        f = filter_weight(torch.zeros_like(s.logp), cfg.actor_loss, good_episode=batch["ep_return"] >= quantile)
        return -((cfg.bc_coef + f) * s.logp * mask).sum() / n, {k: t.detach() for k, t in info.items()}

    with torch.no_grad():
        turn = cfg.mdp == "turn"
        lam = 1.0 if turn else cfg.lam
        tree = () if turn or cfg.trace == "plain" else (s.qa_target, s.logp.exp())
        y, known = td_targets(s.v_target, mask, batch["reward"], batch["terminated"], batch["next"], cfg.gamma, lam, *tree)
        adv = advantages(s.qa, s.v, mask, cfg)
        f = filter_weight(adv, cfg.actor_loss, cfg.beta, AWR_TEMPERATURE, good_episode=batch["ep_return"] >= quantile)
        f = torch.ones_like(f) if warm else f
    m = mask * known[:, None]
    td = ((s.qa - y) ** 2).mean(0)
    actor = -((cfg.bc_coef + f) * s.logp * mask).sum() / n                      # bc_coef L_SFT + af_coef L_AF
    critic = ((td + cfg.pess_coef * s.pess) * m).sum() / (critic_tokens if critic_tokens is not None else m.sum()).clamp(min=1)
    span, first = batch["span"] * mask, mask[:, 0]
    info |= dict(critic_tokens=m.sum(), td_error=(td * m).sum(), pess=(s.pess * m).sum(), q=(s.qa.mean(0) * mask).sum(), v=(s.v * mask).sum(), adv_span=(adv * span).sum(),
                 span=span.sum(), pass_span=(f.clamp(max=1) * span).sum(), pass_rest=(f.clamp(max=1) * (mask - span)).sum(), first=first.sum(),
                 predicted=(s.v[:, 0] * first).sum(), observed=(batch["to_go"] * first).sum())
    return actor + cfg.critic_coef * critic, {k: t.detach() for k, t in info.items()}


def summarise(infos):
    """Sums of several micro-batches -> the metrics that are logged, each a mean over what it counts."""
    s = {k: float(sum(i[k] for i in infos)) for k in infos[0]}
    per = lambda key, count: s[key] / max(s[count], 1.0)
    out = dict(tokens=s["tokens"], nll=per("nll", "tokens"))
    if "q" in s:
        rest = max(s["tokens"] - s["span"], 1.0)
        out |= dict(td_error=per("td_error", "critic_tokens"), pess=per("pess", "critic_tokens"), q_mean=per("q", "tokens"), v_mean=per("v", "tokens"),
                    adv_action=per("adv_span", "span"), pass_action=per("pass_span", "span"), pass_syntax=s["pass_rest"] / rest,
                    return_predicted=per("predicted", "first"), return_observed=per("observed", "first"))
    return out
