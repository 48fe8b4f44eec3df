"""
The method: targets, values, filters and the whole loss against exact solutions and a second, slow version in NumPy.
    python -m pytest tests/test_agent_rl.py
"""
import copy, os, sys
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import agent_rl
from agent_rl import compute_loss, filter_weight, state_value, summarise, td_targets

V, D = 7, 5


def settings(**changes):
    return SimpleNamespace(**dict(actor_loss="afsft", mdp="token", bc_coef=0.3, af_coef=0.9, critic_coef=0.7, cql_coef=0.05, pess_coef=0.2, v_support=0.0, beta=-0.02,
                                  awr_temperature=0.5, gamma=0.9, gamma_token=0.95, trace="tree", lam=0.6, critic_detach=False) | changes)


class Stub(nn.Module):
    """What compute_loss needs of a VLM: hidden states are given, a linear policy and linear critics are on top of them."""
    def __init__(self, critics=2, seed=0):
        super().__init__()
        self.q_init, self.vocab_size = -0.8, V
        torch.manual_seed(seed)
        self.trunk, self.policy = nn.Linear(D, D), nn.Linear(D, V)
        self.heads = nn.ModuleList(nn.Linear(D, V) for _ in range(critics))
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)
        for p in self.targets.parameters():
            p.add_(0.3 * torch.randn_like(p))
    def states(self, inputs, P, R): return self.trunk(inputs["x"][:, :R])
    def logits(self, hidden): return self.policy(hidden)
    def forward(self, inputs, P, R):
        hidden = self.states(inputs, P, R)
        return self.logits(hidden), hidden
    def q(self, hidden, target=False): return torch.stack([head(hidden) for head in (self.targets if target else self.heads)])


def random_batch(seed=0, windows=5, R=6):
    """Windows of 1 to 3 turns: replies of different lengths, terminated turns, truncated ones with their last observation, missing successors."""
    rng = np.random.default_rng(seed)
    length, reward, terminated, nexts = [], [], [], []
    for w in range(windows):
        n, end = int(rng.integers(1, 4)), w % 3                           # end: 0 terminated, 1 the window just stops, 2 truncated
        for k in range(n):
            length.append(int(rng.integers(1, R + 1)))
            reward.append(float(rng.normal()))
            terminated.append(float(end == 0 and k == n - 1))
            nexts.append(len(nexts) + 1 if k < n - 1 or end == 2 else -1)
        if end == 2:
            length, reward, terminated, nexts = length + [0], reward + [0.0], terminated + [0.0], nexts + [-1]
    B, t = len(length), lambda x: torch.tensor(x, dtype=torch.float32)
    mask = t([[float(j < n) for j in range(R)] for n in length])
    span = mask * t((rng.random((B, R)) < 0.5).astype(float))
    return dict(inputs=dict(x=t(rng.normal(size=(B, R, D)))), P=3, mask=mask, span=span, reply_ids=torch.tensor(rng.integers(0, V, (B, R))), reward=t(reward),
                terminated=t(terminated), next=torch.tensor(nexts), return_to_go=t(rng.normal(size=B)), ep_return=t(rng.normal(size=B)))


def rows(batch, a, b):
    """Rows a..b of a batch (whole windows) as a batch of its own."""
    cut = {k: x[a:b] for k, x in batch.items() if torch.is_tensor(x)}
    return cut | dict(inputs=dict(x=batch["inputs"]["x"][a:b]), P=3, next=torch.where(cut["next"] >= 0, cut["next"] - a, -1))


def gradients(vlm, loss):
    vlm.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in vlm.named_parameters() if p.grad is not None}

# ---------------------------------------------------------------------------------------------------------- the same in NumPy

def np_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def np_value(logits, q, support):
    pi = np_softmax(logits)
    keep = [i for i in range(len(pi)) if pi[i] >= support * pi.max()] if support else range(len(pi))
    return sum(pi[i] * q[i] for i in keep) / sum(pi[i] for i in keep)


def np_targets(v, length, reward, terminated, nexts, gamma, gamma_token, lam, q=None, pi=None):
    y, known = np.zeros(v.shape), np.zeros(len(v), bool)
    for b in reversed(range(len(length))):                                # a turn stands before the one that follows it
        n, to = length[b], nexts[b]
        if n == 0:
            continue
        known[b] = bool(terminated[b]) or to >= 0
        y[b, n - 1] = reward[b] if known[b] or q is None else q[b, n - 1]
        if to >= 0 and not terminated[b]:
            y[b, n - 1] += gamma * (v[to, 0] + (lam * pi[to, 0] * (y[to, 0] - q[to, 0]) if q is not None and length[to] else 0))
        for j in range(n - 2, -1, -1):
            y[b, j] = gamma_token * (lam * y[b, j + 1] + (1 - lam) * v[b, j + 1] if q is None else v[b, j + 1] + lam * pi[b, j + 1] * (y[b, j + 1] - q[b, j + 1]))
    return y, known


def np_loss(vlm, batch, cfg, warm=False, quantile=0.0):
    logits, hidden = vlm(batch["inputs"], 3, batch["mask"].shape[1])
    q, qt = vlm.q(hidden).detach().double().numpy(), vlm.q(hidden, target=True).detach().double().numpy()
    logits, a, mask = logits.detach().double().numpy(), batch["reply_ids"].numpy(), batch["mask"].numpy()
    B, R = mask.shape
    length, turn = mask.sum(1).astype(int), cfg.mdp == "turn"
    v = np.array([[np_value(logits[b, j], q.mean(0)[b, j], cfg.v_support) for j in range(R)] for b in range(B)])
    vt = np.array([[np_value(logits[b, j], qt.min(0)[b, j], cfg.v_support) for j in range(R)] for b in range(B)])
    said = [[(qt.min(0)[b, j, a[b, j]], np_softmax(logits[b, j])[a[b, j]]) for j in range(R)] for b in range(B)]
    tree = np.moveaxis(np.array(said), 2, 0) if cfg.trace == "tree" and not turn else ()
    y, known = np_targets(vt, length, batch["reward"].numpy(), batch["terminated"].numpy(), batch["next"].numpy(), cfg.gamma, 1.0 if turn else cfg.gamma_token, 1.0 if turn else cfg.lam, *tree)
    actor = critic = n_critic = 0.0
    for b in range(B):
        for j in range(length[b]):
            qa = [q[c, b, j, a[b, j]] for c in range(len(q))]
            adv = np.mean(qa) - v[b, j]
            if turn:
                adv = q.mean(0)[b, length[b] - 1, a[b, length[b] - 1]] - v[b, 0]
            f = dict(sft=1.0, afsft=float(adv > cfg.beta), awr=min(np.exp(adv / cfg.awr_temperature), 20.0), fbc=float(batch["ep_return"][b] >= quantile))[cfg.actor_loss]
            actor -= (cfg.bc_coef + cfg.af_coef * (1.0 if warm else f)) * np.log(np_softmax(logits[b, j])[a[b, j]])
            if known[b]:
                n_critic += 1
                critic += np.mean([(x - y[b, j]) ** 2 for x in qa]) + cfg.cql_coef * np.mean([np.log(np.exp(q[c, b, j]).sum()) - qa[c] for c in range(len(q))])
                critic += cfg.pess_coef * np.mean([(q[c, b, j, i] - vlm.q_init) ** 2 for c in range(len(q)) for i in range(V)])
    return actor / mask.sum() + cfg.critic_coef * critic / max(n_critic, 1)


@pytest.mark.parametrize("changes", [dict(), dict(lam=0.0), dict(trace="plain"), dict(lam=1.0, gamma_token=1.0), dict(trace="plain", lam=1.0), dict(v_support=0.3), dict(actor_loss="awr"), dict(actor_loss="sft"),
                                     dict(actor_loss="fbc"), dict(mdp="turn"), dict(mdp="turn", actor_loss="awr"), dict(cql_coef=0.0, bc_coef=0.0), dict(pess_coef=0.0)])
@pytest.mark.parametrize("critics, warm", [(1, False), (2, False), (2, True)])
def test_loss_equals_numpy(changes, critics, warm):
    """The whole loss, on random windows of every shape, is what ten lines of loops say."""
    cfg, vlm = settings(**changes), Stub(critics)
    for seed in range(4):
        batch = random_batch(seed)
        loss, info = compute_loss(vlm, batch, cfg, warm, quantile=0.2)
        assert loss.item() == pytest.approx(np_loss(vlm, batch, cfg, warm, quantile=0.2), abs=2e-5)
        assert info["tokens"] == batch["mask"].sum() and all(np.isfinite(x) for x in summarise([info]).values())


def test_targets_equal_numpy():
    """TD(lambda): different lengths, missing successors, terminated, truncated, an empty reply."""
    rng = np.random.default_rng(1)
    for seed in range(20):
        b = random_batch(seed, windows=7)
        (v, q), pi, (gamma, gt, lam) = rng.normal(size=(2, *b["mask"].shape)), rng.random(b["mask"].shape), rng.random(3)
        tree = (q, pi) if seed % 2 else ()
        y, known = td_targets(torch.tensor(v), b["mask"], b["reward"], b["terminated"], b["next"], gamma, gt, lam, *map(torch.tensor, tree))
        want, want_known = np_targets(v, b["mask"].sum(1).int().numpy(), b["reward"].numpy(), b["terminated"].numpy(), b["next"].numpy(), gamma, gt, lam, *tree)
        np.testing.assert_allclose(y.numpy(), want, atol=1e-6)
        assert known.tolist() == want_known.tolist()


def test_targets_by_hand():
    """Two turns, then a time limit: terminated kills the bootstrap, truncated has its last observation's value, no successor is unknown."""
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])                 # rows: turn 0 (2 tokens), turn 1 (1 token), last observation (none)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    reward, zero, nexts = torch.tensor([-1.0, 1.0, 0.0]), torch.zeros(3), torch.tensor([1, 2, -1])
    y, known = td_targets(v, mask, reward, zero, nexts, gamma=0.5, gamma_token=0.8, lam=0.25)
    assert y.tolist() == [[pytest.approx(0.8 * (0.25 * 0.5 + 0.75 * 2.0)), 0.5], [3.5, 0.0], [0.0, 0.0]]    # -1 + .5 * 3;  1 + .5 * 5
    assert known.tolist() == [True, True, False]
    y, known = td_targets(v, mask, reward, torch.tensor([0.0, 1.0, 0.0]), nexts, gamma=0.5)
    assert y[1, 0] == 1.0 and known.tolist() == [True, True, False]
    y, known = td_targets(v, mask, reward, zero, torch.tensor([1, -1, -1]), gamma=0.5)
    assert known.tolist() == [True, False, False]
    q, pi = torch.tensor([[9.0, 7.0]] * 3), torch.tensor([[0.9, 0.5]] * 3)
    y, _ = td_targets(v, mask, reward, zero, nexts, gamma=0.5, gamma_token=0.8, lam=0.25, q=q, pi=pi)
    end = -1 + 0.5 * (3.0 + 0.25 * 0.9 * (3.5 - 9.0))                       # the backup goes on through the next turn's reply
    assert y[0].tolist() == [pytest.approx(0.8 * (2.0 + 0.25 * 0.5 * (end - 7.0))), pytest.approx(end)]
    y, known = td_targets(v, mask, reward, zero, torch.tensor([1, -1, -1]), gamma=0.5, gamma_token=0.8, lam=0.25, q=q, pi=pi)
    assert known.tolist() == [True, False, False] and y[0, 1] == -1 + 0.5 * 3.0     # that turn's outcome is unknown: nothing to correct V' by


def test_certain_syntax_hands_the_value_on():
    """The bootstrap is the value where the next turn *decides*. (It had been V' of its first token, which has no cause to look at the picture: the
    critic knew at the card that 3 + 4 loses, and still +0.5 was handed to the turn that chose the `+`: hands that need a product stayed at 0 %.)"""
    v = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, -0.8]])                  # the second turn: two tokens of syntax, then the decision
    mask, pi = torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.3]])
    q = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, -0.2]])
    y, known = td_targets(v, mask, torch.zeros(2), torch.zeros(2), torch.tensor([1, -1]), gamma=0.5, q=q, pi=pi)
    assert known.tolist() == [True, False] and y[0].tolist() == pytest.approx([-0.4] * 3)
    y, _ = td_targets(v, mask, torch.zeros(2), torch.zeros(2), torch.tensor([1, -1]), gamma=0.5, q=q, pi=pi * torch.tensor([[1.0], [0.0]]))
    assert y[0].tolist() == pytest.approx([0.25] * 3)                      # the policy would not have said it: V' of the turn's beginning


@pytest.mark.parametrize("gamma_token", [1.0, 0.9])
@pytest.mark.parametrize("trace", ["tree", "plain"])
def test_fixed_point_is_the_exact_value(trace, gamma_token):
    """A token MDP of 3 states and replies of 2 tokens, some ended, some cut off: iterated targets reach the solution of the Bellman
    equations, whatever lam is: the tree backup from anybody's play, plain TD(lambda) from the policy's own only. (On recorded play it had learned
    the value of the players: EZPoints stayed at 0 %, because after a first right card these players nearly always lose.)"""
    rng, K, S, gamma = np.random.default_rng(3), 3, 3, 0.8
    first, second = rng.dirichlet(np.ones(K), S), rng.dirichlet(np.ones(K), (S, K))                         # pi(a|s), pi(b|s,a)
    other = np.random.default_rng(4).dirichlet(np.ones(K), (S, K))                                          # what some player does instead of pi(b|s,a)
    reward, to, kind = rng.normal(size=(S, K, K)), rng.integers(0, S, (S, K, K)), rng.integers(0, 3, (S, K, K))  # kind 0 ends, 1 goes on, 2 is cut off

    # V(s) = sum_a pi(a|s) gamma_token sum_b pi(b|s,a) (r + gamma [not ended] V(s'))  is linear in V
    A, c = np.eye(S), np.zeros(S)
    for s, a, b in np.ndindex(S, K, K):
        w = first[s, a] * second[s, a, b] * gamma_token
        c[s] += w * reward[s, a, b]
        A[s, to[s, a, b]] -= w * gamma * (kind[s, a, b] > 0)
    value = np.linalg.solve(A, c)
    exact2 = reward + gamma * (kind > 0) * value[to]
    exact1 = gamma_token * (second * exact2).sum(2)

    log = lambda p: torch.tensor(np.log(p))
    turns = list(np.ndindex(S, K, K))
    index = {turn: i for i, turn in enumerate(turns)}
    nexts = torch.tensor([len(turns) + to[t] if kind[t] == 2 else index[int(to[t]), 0, 0] if kind[t] == 1 else -1 for t in turns] + [-1] * S)
    mask = torch.tensor([[1.0, 1.0]] * len(turns) + [[0.0, 0.0]] * S, dtype=torch.float64)             # the last S rows: last observations
    rewards = torch.tensor([reward[t] for t in turns] + [0.0] * S, dtype=torch.float64)
    ended = torch.tensor([float(kind[t] == 0) for t in turns] + [0.0] * S, dtype=torch.float64)
    for lam in (0.0, 0.5, 1.0):
        q1, q2 = torch.zeros(S, K, dtype=torch.float64), torch.zeros(S, K, K, dtype=torch.float64)
        for _ in range(200):
            v1, v2 = state_value(log(first), q1), state_value(log(second), q2)                              # V(s), V(s, a)
            v = torch.stack([torch.stack([v1[s], v2[s, a]]) for s, a, _ in turns] + [torch.stack([v1[s], v1[s]]) for s in range(S)])
            said = [torch.stack([torch.stack([x1[s, a], x2[s, a, b]]) for s, a, b in turns] + [torch.zeros(2)] * S) for x1, x2 in ((q1, q2), (torch.tensor(first), torch.tensor(second)))]
            y, known = td_targets(v, mask, rewards, ended, nexts, gamma, gamma_token, lam, *(said if trace == "tree" else ()))
            assert known[:len(turns)].all() and not known[len(turns):].any()
            q2 = y[:len(turns), 1].reshape(S, K, K)
            q1 = (y[:len(turns), 0].reshape(S, K, K) * torch.tensor(other if trace == "tree" else second)).sum(2)   # what the mean square does with these data
        np.testing.assert_allclose(q1.numpy(), exact1, atol=1e-9)
        np.testing.assert_allclose(q2.numpy(), exact2, atol=1e-9)


@pytest.mark.parametrize("support", [0.0, 0.1, 0.5, 1.0])
def test_state_value(support):
    """The exact expectation; with a threshold over the likely tokens, renormalised; at 1 the value of the likeliest."""
    rng = np.random.default_rng(0)
    logits, q = 2 * rng.normal(size=(4, 3, V)), rng.normal(size=(4, 3, V))
    v = state_value(torch.tensor(logits), torch.tensor(q), support).numpy()
    np.testing.assert_allclose(v, [[np_value(logits[i, j], q[i, j], support) for j in range(3)] for i in range(4)], atol=1e-9)
    if support == 1.0:
        np.testing.assert_allclose(v, np.take_along_axis(q, logits.argmax(-1)[..., None], -1)[..., 0], atol=1e-9)


def test_constant_q_has_no_advantage():
    """V is an expectation: where Q is constant A is 0, for every policy and threshold."""
    logits = 3 * torch.randn(5, 4, V, generator=torch.Generator().manual_seed(0))
    for support in (0.0, 0.2, 1.0):
        assert torch.allclose(state_value(logits, torch.full((5, 4, V), -1.7), support), torch.tensor(-1.7), atol=1e-5)


def test_filter_weight():
    """Each kind by hand; awr is clipped, however large A is; an unknown kind is an error."""
    adv = torch.tensor([[-1.0, 0.0, 0.5, 1000.0]])
    assert filter_weight(adv, "sft").tolist() == [[1, 1, 1, 1]]
    assert filter_weight(adv, "afsft", beta=0.0).tolist() == [[0, 0, 1, 1]]                                 # strictly above
    assert filter_weight(adv, "afsft", beta=-0.02).tolist() == [[0, 1, 1, 1]]
    assert filter_weight(adv, "awr", temperature=0.5, max_weight=20.0)[0].tolist() == pytest.approx([np.exp(-2), 1, np.e, 20])
    assert filter_weight(adv.expand(2, 4), "fbc", good_episode=torch.tensor([True, False])).tolist() == [[1] * 4, [0] * 4]
    with pytest.raises(ValueError, match="ppo"):
        filter_weight(adv, "ppo")


def test_fbc_without_critics():
    """fbc and sft need no heads: the mean over all tokens of the clones' -log pi, 0 for the worse episodes."""
    batch, vlm = random_batch(), Stub(critics=0)
    logits, _ = vlm(batch["inputs"], 3, 6)
    logp = logits.log_softmax(-1).gather(2, batch["reply_ids"][..., None])[..., 0] * batch["mask"]
    good = batch["ep_return"] >= 0.1
    assert 0 < good.sum() < len(good)
    loss, info = compute_loss(vlm, batch, settings(actor_loss="fbc", bc_coef=0.0, af_coef=1.0), quantile=0.1)
    assert torch.allclose(loss, -logp[good].sum() / batch["mask"].sum()) and set(summarise([info])) == {"tokens", "nll"}
    loss, _ = compute_loss(vlm, batch, settings(actor_loss="sft", bc_coef=0.0, af_coef=1.0))
    assert torch.allclose(loss, -logp.sum() / batch["mask"].sum())


@pytest.mark.parametrize("kind", ["afsft", "awr"])
def test_warm_clones_all(kind):
    """While the filter waits the actor's gradient is plain cloning's; afterwards it is not."""
    batch, vlm, g = random_batch(), Stub(), {}
    for name, warm in ((kind, True), (kind, False), ("sft", False)):
        loss, _ = compute_loss(vlm, batch, settings(actor_loss=name, critic_coef=0.0), warm)
        g[name, warm] = gradients(vlm, loss)["policy.weight"]
    assert torch.allclose(g[kind, True], g["sft", False]) and not torch.allclose(g[kind, False], g["sft", False])


def test_reward_reaches_the_critic_only_where_it_is_known():
    """Change the reward of a turn: the critic's loss changes, unless the turn's successor is missing."""
    vlm, cfg = Stub(), settings()
    batch = random_batch()
    known = (batch["terminated"] > 0) | (batch["next"] >= 0)
    played = batch["mask"].sum(1) > 0
    assert (known & played).any() and (~known & played).any()
    before = compute_loss(vlm, batch, cfg)[0]
    for b in range(len(known)):
        changed = batch | dict(reward=batch["reward"].index_add(0, torch.tensor([b]), torch.tensor([3.0])))
        assert (compute_loss(vlm, changed, cfg)[0] != before) == (known[b] & played[b])


def test_outside_of_the_mask_nothing_counts():
    """Flip token ids, hidden states and spans in the padding columns: loss, info and gradients stay. A last observation's first
    column is a state, not padding."""
    vlm, batch = Stub(), random_batch()
    pad = batch["mask"] == 0
    state = pad.clone()
    state[:, 0] = False
    noise = torch.randn(batch["inputs"]["x"].shape, generator=torch.Generator().manual_seed(1))
    other = batch | dict(reply_ids=torch.where(pad, (batch["reply_ids"] + 3) % V, batch["reply_ids"]), span=torch.where(pad, 1.0, batch["span"]),
                         inputs=dict(x=torch.where(state[..., None], noise, batch["inputs"]["x"])))
    for changes in (dict(), dict(actor_loss="awr"), dict(mdp="turn"), dict(v_support=0.2)):
        (one, info1), (two, info2) = (compute_loss(vlm, b, settings(**changes)) for b in (batch, other))
        g1, g2 = gradients(vlm, one), gradients(vlm, two)
        assert torch.allclose(one, two, atol=1e-6) and all(torch.allclose(g1[k], g2[k], atol=1e-6) for k in g1)
        assert all(torch.allclose(info1[k], info2[k], atol=1e-5) for k in info1)


@pytest.mark.parametrize("changes", [dict(), dict(actor_loss="awr"), dict(actor_loss="fbc"), dict(mdp="turn")])
def test_any_split_gives_the_same_gradients(changes):
    """The tokens of the whole update are counted first, so micro-batches of any size add up to the same gradients and metrics."""
    cfg, batch, vlm = settings(**changes), random_batch(windows=6), Stub()
    starts = [0] + [b + 1 for b in range(len(batch["next"]) - 1) if batch["next"][b] < 0]                    # where a window begins
    known = (batch["terminated"] > 0) | (batch["next"] >= 0)
    tokens, critic_tokens = batch["mask"].sum(), (batch["mask"] * known[:, None]).sum()
    loss, info = compute_loss(vlm, batch, cfg, quantile=0.2)
    whole, metrics = gradients(vlm, loss), summarise([info])
    for cuts in (starts, starts[::2], starts[::3]):
        ends, vlm_infos, parts = cuts[1:] + [len(known)], [], {}
        for a, b in zip(cuts, ends):
            loss, info = compute_loss(vlm, rows(batch, a, b), cfg, quantile=0.2, tokens=tokens, critic_tokens=critic_tokens)
            vlm_infos.append(info)
            for k, g in gradients(vlm, loss).items():
                parts[k] = parts.get(k, 0) + g
        assert all(torch.allclose(parts[k], whole[k], atol=1e-6) for k in whole)
        assert summarise(vlm_infos) == pytest.approx(metrics, abs=1e-5)


def test_weights_carry_no_gradient():
    """The actor's loss does not pull on the critic, the critic's not on the policy; with critic_detach not on the trunk either."""
    vlm, batch = Stub(), random_batch()
    heads = lambda g: {k: x for k, x in g.items() if k.startswith("heads") and x.abs().sum() > 0}
    for kind in ("awr", "afsft"):
        g = gradients(vlm, compute_loss(vlm, batch, settings(actor_loss=kind, critic_coef=0.0))[0])
        assert not heads(g) and g["policy.weight"].abs().sum() > 0
    cfg = settings(bc_coef=0.0, af_coef=0.0)
    g = gradients(vlm, compute_loss(vlm, batch, cfg)[0])
    assert g["policy.weight"].abs().sum() == 0 and heads(g) and g["trunk.weight"].abs().sum() > 0
    cfg.critic_detach = True
    g = gradients(vlm, compute_loss(vlm, batch, cfg)[0])
    assert g.get("trunk.weight", torch.zeros(1)).abs().sum() == 0 and heads(g)


@pytest.mark.parametrize("actor_loss, critics", [("afsft", 2), ("sft", 0)])
def test_a_large_vocabulary_is_taken_some_states_at_a_time(monkeypatch, actor_loss, critics):
    """With room for the logits of 4 states at once instead of all: the same loss, gradients and metrics, and never more than 4 at once."""
    vlm, batch, cfg, seen = Stub(critics), random_batch(windows=4), settings(actor_loss=actor_loss), []
    whole, info = compute_loss(vlm, batch, cfg)
    expected = gradients(vlm, whole)
    monkeypatch.setattr(agent_rl, "LOGITS", 4 * V + 1)
    logits = vlm.logits
    vlm.logits = lambda h: (seen.append(len(h)), logits(h))[1]
    loss, parts = compute_loss(vlm, batch, cfg)
    for k, g in gradients(vlm, loss).items():
        assert torch.allclose(g, expected[k], atol=1e-6), k
    assert torch.allclose(loss, whole, atol=1e-6) and all(torch.allclose(info[k], parts[k], atol=1e-5) for k in info)
    assert max(seen) == 4 and sum(seen) == 2 * batch["mask"].numel()            # on the way and once more on the way back


def test_turn_has_one_advantage_a_reply():
    """mdp='turn': all tokens of a reply pass or none, by Q of the last token and V of the first state; gamma_token has no say."""
    vlm, batch = Stub(), random_batch(windows=8)
    cfg = settings(mdp="turn", bc_coef=0.0, critic_coef=0.0, actor_loss="afsft", beta=0.0)
    logits, hidden = vlm(batch["inputs"], 3, 6)
    logits.retain_grad()
    vlm.states, vlm.logits = lambda *_: hidden, lambda h: logits.flatten(0, 1)
    compute_loss(vlm, batch, cfg)[0].backward()
    passed = logits.grad.abs().sum(-1) > 0                                                                   # (B, R)
    q, length = vlm.q(hidden).mean(0), batch["mask"].sum(1).int()
    v, share = state_value(logits, q), []
    for b, n in enumerate(length):
        if n:
            adv = q[b, n - 1, batch["reply_ids"][b, n - 1]] - v[b, 0]
            assert passed[b, :n].tolist() == [bool(adv > 0)] * n and not passed[b, n:].any()
            share.append(bool(adv > 0))
    assert 0 < sum(share) < len(share)
    losses = [compute_loss(vlm, batch, settings(mdp="turn", gamma_token=g))[0] for g in (1.0, 0.5)]
    assert losses[0] == losses[1]

# ------------------------------------------------------------------------------------------------------------ the story

class Tabular(nn.Module):
    """One state a token place: a table of logits and a table of Q."""
    def __init__(self, q_init):
        super().__init__()
        self.q_init, self.vocab_size = q_init, V
        self.policy, self.table = nn.Parameter(torch.zeros(2, V)), nn.Parameter(torch.full((2, V), q_init))
        self.heads = [self.table]
    def states(self, inputs, P, R): return torch.eye(2).expand(len(inputs["x"]), 2, 2)
    def logits(self, hidden): return hidden @ self.policy
    def q(self, hidden, target=False): return (hidden @ (self.table.detach() if target else self.table))[None]


@pytest.mark.parametrize("q_init, support, learns", [(0.0, 0.0, False), (-1.0, 0.0, True), (0.0, 0.9, True)])
def test_the_story_of_pessimism(q_init, support, learns):
    """Every reply in the data is `[action]` (token 0) and then one of two moves, and all of it went badly: returns of -1 and -0.5. Tokens
    that no data shows keep the head's first value. At 0 they look good, V is too high, and the one correct syntax token fails the filter:
    the policy never learns to say it. From the lowest return in the data it passes. So it does if V asks likely tokens only, once
    cloning in the warm-up has made it the likeliest."""
    vlm, n = Tabular(q_init), 8
    replies, reward = torch.tensor([[0, 1], [0, 2]]).repeat(n // 2, 1), torch.tensor([-1.0, -0.5]).repeat(n // 2)
    ones = torch.ones(n, 2)
    batch = dict(inputs=dict(x=torch.zeros(n, 2)), P=3, mask=ones, span=ones * torch.tensor([0.0, 1.0]), reply_ids=replies, reward=reward,
                 terminated=torch.ones(n), next=torch.full((n,), -1), return_to_go=reward, ep_return=reward)
    cfg = settings(trace="plain", bc_coef=0.0, af_coef=1.0, cql_coef=0.0, pess_coef=0.0, lam=1.0, gamma_token=1.0, beta=-0.02, v_support=support)
    optimizer, syntax = torch.optim.SGD(vlm.parameters(), lr=0.5), []
    for step in range(60):                                                # at first cloned as in filter_warmup; then it is up to the filter
        loss, info = compute_loss(vlm, batch, cfg, warm=step < 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        syntax.append((summarise([info])["pass_syntax"], vlm.policy.softmax(-1)[0, 0].item()))
    assert vlm.table[0, 0].item() == pytest.approx(-0.75, abs=0.01) and vlm.table[0, 3].item() == q_init
    assert [passed for passed, _ in syntax[15:]] == [1.0 if learns else 0.0] * 45
    assert (syntax[-1][1] > 0.9) if learns else (syntax[-1][1] < 0.6), "pi of the only token that the data has here"
    if learns:
        assert vlm.policy[1, 2] > vlm.policy[1, 1] + 0.5, "the better of the two moves is preferred"


def test_pessimism_has_a_floor():
    """Raised by chance, tokens that no data shows come back to q_init and no lower (CQL alone would sink without end); what data shows
    stays close to its return."""
    vlm, n = Tabular(-1.0), 4
    ones = torch.ones(n, 2)
    vlm.table.data[:, 3:] = 2.0
    batch = dict(inputs=dict(x=torch.zeros(n, 2)), P=3, mask=ones, span=ones, reply_ids=torch.tensor([[0, 1]] * n), reward=torch.full((n,), 0.5), terminated=torch.ones(n),
                 next=torch.full((n,), -1), return_to_go=torch.zeros(n), ep_return=torch.zeros(n))
    cfg = settings(trace="plain", cql_coef=0.0, pess_coef=0.2, lam=1.0, gamma_token=1.0, critic_coef=1.0)
    optimizer = torch.optim.SGD([vlm.table], lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        compute_loss(vlm, batch, cfg)[0].backward()
        optimizer.step()
    unseen = torch.cat([vlm.table[0, 1:], vlm.table[1, :1], vlm.table[1, 2:]])
    assert torch.allclose(unseen, torch.tensor(-1.0), atol=1e-3)
    share = cfg.pess_coef / V                                              # seen: the minimum of (Q - y)^2 + share (Q - q_init)^2
    assert torch.allclose(vlm.table[[0, 1], [0, 1]], torch.tensor((0.5 - share) / (1 + share)), atol=1e-3)
