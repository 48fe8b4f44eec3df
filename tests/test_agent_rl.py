"""
Check the method: targets, values, filters and the whole loss.

They are compared with exact solutions, with hand calculations, and with a second, slow version in NumPy.

    python -m pytest tests/test_agent_rl.py
"""
import copy, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import agent_rl
from agent_rl import AWR_MAX_WEIGHT, AWR_TEMPERATURE
from agent_rl import clip_reward, compute_loss, filter_weight
from agent_rl import state_value, summarise, td_targets

VOCAB = 7
HIDDEN = 5
COLUMNS = 6

def settings(**changes):
    """Make the settings that the loss reads, none of them at a value that hides a term."""
    cfg = dict(
        actor_loss="afsft",
        trace="tree",
        lam=0.6,
        gamma=0.9,
        beta=-0.02,
        bc_coef=0.3,
        critic_coef=0.7,
        pess_coef=0.2,
    )
    return SimpleNamespace(**cfg | changes)

class Stub(nn.Module):
    """What compute_loss needs of a VLM: the hidden states are given, policy and critics are linear layers."""

    def __init__(self, critics=2, seed=0):
        super().__init__()
        self.q_init = -0.8
        self.vocab_size = VOCAB
        torch.manual_seed(seed)
        self.trunk = nn.Linear(HIDDEN, HIDDEN)
        self.policy = nn.Linear(HIDDEN, VOCAB)
        self.heads = nn.ModuleList()
        for _ in range(critics):
            self.heads.append(nn.Linear(HIDDEN, VOCAB))
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)
        for p in self.targets.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def states(self, inputs, P, R):
        return self.trunk(inputs["x"][:, :R])

    def logits(self, hidden):
        return self.policy(hidden)

    def q(self, hidden, target=False):
        heads = self.targets if target else self.heads
        return torch.stack([head(hidden) for head in heads])

class Tabular(nn.Module):
    """Two token positions, the same in every turn: a table of logits and a table of Q."""

    def __init__(self, q_init):
        super().__init__()
        self.q_init = q_init
        self.vocab_size = VOCAB
        logits = torch.zeros(2, VOCAB)
        self.policy = nn.Parameter(logits)
        self.table = nn.Parameter(logits + q_init)
        self.heads = [self.table]

    def states(self, inputs, P, R):
        rows = len(inputs["x"])
        return torch.eye(2).expand(rows, 2, 2)

    def logits(self, hidden):
        return hidden @ self.policy

    def q(self, hidden, target=False):
        table = self.table.detach() if target else self.table
        return (hidden @ table)[None]

def floats(x):
    """Make a float32 tensor."""
    return torch.tensor(x, dtype=torch.float32)

def random_turns(rng, windows):
    """Draw windows of 1 to 3 turns -> lists of lengths, rewards, terminated, next; an entry per row.

    In turn, a window ends with a terminated turn, without a successor, or with a truncated turn. A truncated
    turn is followed by its last observation, a row without a reply.
    """
    length = []
    reward = []
    terminated = []
    nexts = []
    for window in range(windows):
        turns = int(rng.integers(1, 4))
        is_terminated = window % 3 == 0
        is_truncated = window % 3 == 2
        for turn in range(turns):
            is_last = turn == turns - 1
            length.append(int(rng.integers(1, COLUMNS + 1)))
            reward.append(float(rng.normal()))
            terminated.append(float(is_last and is_terminated))
            has_next = is_truncated or not is_last
            nexts.append(len(nexts) + 1 if has_next else -1)
        if is_truncated:
            length.append(0)
            reward.append(0.0)
            terminated.append(0.0)
            nexts.append(-1)
    return length, reward, terminated, nexts

def random_batch(seed=0, windows=5):
    """Draw a batch of windows of every shape, with replies of different lengths."""
    rng = np.random.default_rng(seed)
    length, reward, terminated, nexts = random_turns(rng, windows)
    rows = len(length)
    shape = (rows, COLUMNS)
    lengths = np.array(length)
    mask = np.arange(COLUMNS) < lengths[:, None]
    coin = rng.random(shape) < 0.5
    x = rng.normal(size=(*shape, HIDDEN))
    actions = rng.integers(0, VOCAB, shape)
    return dict(
        inputs=dict(x=floats(x)),
        P=3,
        mask=floats(mask),
        span=floats(mask & coin),
        reply_ids=torch.tensor(actions),
        reward=floats(reward),
        terminated=floats(terminated),
        next=torch.tensor(nexts),
        chain=rows,
        return_to_go=floats(rng.normal(size=rows)),
        ep_return=floats(rng.normal(size=rows)),
    )

def two_token_batch(replies, reward):
    """Make a batch of terminated turns of two tokens each; the first is syntax, the second an action."""
    turns = len(replies)
    ones = torch.ones(turns, 2)
    return dict(
        inputs=dict(x=torch.zeros(turns, 2)),
        P=3,
        mask=ones,
        span=ones * torch.tensor([0.0, 1.0]),
        reply_ids=replies,
        reward=reward,
        terminated=torch.ones(turns),
        next=torch.full((turns,), -1),
        chain=1,
        return_to_go=reward,
        ep_return=reward,
    )

def cut_rows(batch, begin, end):
    """Cut the rows of whole windows out of a batch."""
    cut = dict(batch)
    for key, value in batch.items():
        if torch.is_tensor(value):
            cut[key] = value[begin:end]
    x = batch["inputs"]["x"]
    cut["inputs"] = dict(x=x[begin:end])
    has_next = cut["next"] >= 0
    cut["next"] = torch.where(has_next, cut["next"] - begin, -1)
    return cut

def reply_lengths(batch):
    """List the number of reply tokens of each row."""
    return batch["mask"].sum(1).int().tolist()

def known_turns(batch):
    """Tell for each row whether its target is known."""
    return (batch["terminated"] > 0) | (batch["next"] >= 0)

def gradients(vlm, loss):
    """Return the gradients of a loss by parameter."""
    vlm.zero_grad()
    loss.backward()
    found = {}
    for name, p in vlm.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found

def loss_of(vlm, batch, warm=False, quantile=0.0, **changes):
    """Compute the loss with some settings changed -> (loss, info)."""
    cfg = settings(**changes)
    return compute_loss(vlm, batch, cfg, warm, quantile)

def assert_close(one, two, tolerance=1e-4):
    """Assert that two tensors, or two dicts of tensors, are equal up to rounding."""
    torch.testing.assert_close(
        one,
        two,
        rtol=tolerance,
        atol=tolerance / 10,
    )

def assert_equal_to_exact(tensor, exact):
    """Assert that a tensor in double precision has the exact values."""
    np.testing.assert_allclose(
        tensor.numpy(),
        exact,
        rtol=1e-8,
        atol=1e-9,
    )

def near(expected):
    """Compare numbers up to the rounding of float32."""
    return pytest.approx(expected, rel=1e-4, abs=1e-5)

def is_zero(gradient):
    """Tell whether a gradient is absent or zero everywhere."""
    return gradient is None or not gradient.abs().sum() > 0


# ---- the same loss in NumPy ----

def np_softmax(x):
    """Compute the softmax of a vector."""
    e = np.exp(x - x.max())
    return e / e.sum()

def np_targets(v, batch, gamma, lam, q=None, pi=None):
    """Compute td_targets one token at a time, from the last turn of a window to its first."""
    length = reply_lengths(batch)
    reward = batch["reward"].tolist()
    terminated = batch["terminated"].tolist()
    nexts = batch["next"].tolist()
    y = np.zeros(v.shape)
    known = np.zeros(len(v), bool)

    def after(b, j):
        """Compute the value of what follows the token before (b, j)."""
        if q is None:
            return lam * y[b, j] + (1 - lam) * v[b, j]
        correction = pi[b, j] * (y[b, j] - q[b, j])
        return v[b, j] + lam * correction

    for b in reversed(range(len(length))):
        last = length[b] - 1
        following = nexts[b]
        if last < 0:
            continue
        known[b] = terminated[b] == 1 or following >= 0
        y[b, last] = reward[b]
        if q is not None and not known[b]:
            y[b, last] = q[b, last]
        if following >= 0 and not terminated[b]:
            v_next = v[following, 0]
            if q is not None and length[following]:
                v_next = after(following, 0)
            y[b, last] += gamma * v_next
        for j in reversed(range(last)):
            y[b, j] = after(b, j + 1)
    return y, known

def np_pick(table, actions):
    """Pick the entries of the actions (B, R) out of a table (..., B, R, V)."""
    index = np.broadcast_to(actions, table.shape[:-1])
    return np.take_along_axis(table, index[..., None], -1)[..., 0]

def np_values(vlm, batch):
    """Compute what np_loss needs, in double precision -> dict."""
    actions = batch["reply_ids"].numpy()
    with torch.no_grad():
        hidden = vlm.states(batch["inputs"], 3, COLUMNS)
        logits = vlm.logits(hidden).double().numpy()
        q = vlm.q(hidden).double().numpy()
        q_target = vlm.q(hidden, target=True).double().numpy()
    pi = np.apply_along_axis(np_softmax, -1, logits)
    mean = q.mean(0)
    lowest = q_target.min(0)
    return dict(
        q=q,
        qa=np_pick(q, actions),
        pi=np_pick(pi, actions),
        v=(pi * mean).sum(-1),
        v_target=(pi * lowest).sum(-1),
        qa_target=np_pick(lowest, actions),
    )

def np_filter(adv, episode_return, cfg, quantile):
    """Compute filter_weight of one token."""
    weights = dict(
        sft=1.0,
        afsft=float(adv > cfg.beta),
        awr=min(np.exp(adv / AWR_TEMPERATURE), AWR_MAX_WEIGHT),
        fbc=float(episode_return >= quantile),
    )
    return weights[cfg.actor_loss]

def np_loss(vlm, batch, cfg, warm=False, quantile=0.0):
    """Compute the whole loss with loops over rows and tokens."""
    values = np_values(vlm, batch)
    length = reply_lengths(batch)
    episode_return = batch["ep_return"].tolist()
    turn_level = cfg.trace == "turn"
    lam = cfg.lam
    tree = {}
    if turn_level:
        lam = 1.0
    elif cfg.trace == "tree":
        tree = dict(q=values["qa_target"], pi=values["pi"])
    y, known = np_targets(values["v_target"], batch, cfg.gamma, lam, **tree)

    logp = np.log(values["pi"])
    q_mean = values["qa"].mean(0)
    v = values["v"]
    td_error = ((values["qa"] - y) ** 2).mean(0)
    pessimism = ((values["q"] - vlm.q_init) ** 2).mean(-1).mean(0)
    actor = 0.0
    critic = 0.0
    critic_tokens = 0
    for b, n in enumerate(length):
        for j in range(n):
            adv = q_mean[b, j] - v[b, j]
            if turn_level:
                adv = q_mean[b, n - 1] - v[b, 0]
            f = np_filter(adv, episode_return[b], cfg, quantile)
            if warm:
                f = 1.0
            actor -= (cfg.bc_coef + f) * logp[b, j]
            if known[b]:
                critic_tokens += 1
                critic += td_error[b, j]
                critic += cfg.pess_coef * pessimism[b, j]
    actor /= sum(length)
    critic /= max(critic_tokens, 1)
    return actor + cfg.critic_coef * critic

@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(lam=0.0),
        dict(lam=1.0),
        dict(trace="plain"),
        dict(trace="plain", lam=1.0),
        dict(actor_loss="awr"),
        dict(actor_loss="sft"),
        dict(actor_loss="fbc"),
        dict(trace="turn"),
        dict(trace="turn", actor_loss="awr"),
        dict(bc_coef=0.0),
        dict(pess_coef=0.0),
    ],
)
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_loss_equals_numpy(changes, critics, warm):
    """The whole loss, on random windows of every shape, equals plain loops in double precision."""
    cfg = settings(**changes)
    vlm = Stub(critics)
    for seed in range(4):
        batch = random_batch(seed)
        loss, info = compute_loss(vlm, batch, cfg, warm, quantile=0.2)
        expected = np_loss(vlm, batch, cfg, warm, quantile=0.2)
        assert loss.item() == near(expected)
        assert info["tokens"] == batch["mask"].sum()
        metrics = summarise([info])
        assert all(map(np.isfinite, metrics.values()))

def np_mean(values, mask):
    """Compute the mean of the values where the mask is 1."""
    return (values * mask).sum() / mask.sum()

def test_metrics_equal_numpy():
    """Each logged metric is a mean over the tokens that its name tells."""
    vlm = Stub()
    batch = random_batch(windows=8)
    cfg = settings()
    _, info = compute_loss(vlm, batch, cfg)
    values = np_values(vlm, batch)
    mask = batch["mask"].numpy()
    span = batch["span"].numpy()
    first = mask[:, 0]
    tree = dict(q=values["qa_target"], pi=values["pi"])
    y, known = np_targets(values["v_target"], batch, cfg.gamma, cfg.lam, **tree)
    has_target = mask * known[:, None]
    adv = values["qa"].mean(0) - values["v"]
    passed = adv > cfg.beta
    td_error = ((values["qa"] - y) ** 2).mean(0)
    pessimism = ((values["q"] - vlm.q_init) ** 2).mean(-1).mean(0)
    expected = dict(
        tokens=mask.sum(),
        nll=np_mean(-np.log(values["pi"]), mask),
        td_error=np_mean(td_error, has_target),
        pess=np_mean(pessimism, has_target),
        q_mean=np_mean(values["qa"].mean(0), mask),
        v_mean=np_mean(values["v"], mask),
        adv_action=np_mean(adv, span),
        pass_action=np_mean(passed, span),
        pass_syntax=np_mean(passed, mask - span),
        return_predicted=np_mean(values["v"][:, 0], first),
        return_observed=np_mean(batch["return_to_go"].numpy(), first),
    )
    assert summarise([info]) == near(expected)


# ---- targets ----

def test_targets_equal_numpy():
    """Both traces, on replies of different lengths: terminated, truncated, without a successor, empty."""
    rng = np.random.default_rng(1)
    for seed in range(20):
        batch = random_batch(seed, windows=7)
        shape = batch["mask"].shape
        v = rng.normal(size=shape)
        gamma, lam = rng.random(2)
        tree = {}
        tensors = {}
        if seed % 2:
            tree["q"] = rng.normal(size=shape)
            tree["pi"] = rng.random(shape)
            tensors = {name: torch.tensor(value) for name, value in tree.items()}
        y, known = td_targets(torch.tensor(v), batch, gamma, lam, **tensors)
        expected_y, expected_known = np_targets(v, batch, gamma, lam, **tree)
        np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5)
        assert known.tolist() == expected_known.tolist()

def turns_by_hand(nexts, terminated=(0, 0, 0)):
    """Make turn 0 (two tokens), turn 1 (one token) and an observation without a reply."""
    mask = [[1, 1], [1, 0], [0, 0]]
    return dict(
        mask=floats(mask),
        reward=floats([-1, 1, 0]),
        terminated=floats(terminated),
        next=torch.tensor(nexts),
        chain=3,
    )


V_BY_HAND = floats([[1, 2], [3, 4], [5, 6]])

def test_targets_by_hand():
    """A terminated turn has no bootstrap, a truncated one has its last observation's value."""
    truncated = turns_by_hand([1, 2, -1])
    y, known = td_targets(V_BY_HAND, truncated, gamma=0.5, lam=0.25)
    # last tokens: -1 + 0.5 * 3 and 1 + 0.5 * 5
    first = 0.25 * 0.5 + 0.75 * 2.0
    assert y[0].tolist() == near([first, 0.5])
    assert y[1].tolist() == [3.5, 0]
    assert y[2].tolist() == [0, 0]
    assert known.tolist() == [True, True, False]

    terminated = turns_by_hand([1, 2, -1], terminated=(0, 1, 0))
    y, known = td_targets(V_BY_HAND, terminated, gamma=0.5)
    assert y[1, 0] == 1
    assert known.tolist() == [True, True, False]

    cut_off = turns_by_hand([1, -1, -1])
    _, known = td_targets(V_BY_HAND, cut_off, gamma=0.5)
    assert known.tolist() == [True, False, False]

def test_tree_backup_by_hand():
    """The backup runs through the next turn's reply, but not where that turn's outcome is unknown."""
    tree = dict(
        q=floats([[9, 7]] * 3),
        pi=floats([[0.9, 0.5]] * 3),
    )
    batch = turns_by_hand([1, 2, -1])
    y, _ = td_targets(V_BY_HAND, batch, 0.5, 0.25, **tree)
    next_turn = 3.0 + 0.25 * 0.9 * (3.5 - 9.0)
    end = -1 + 0.5 * next_turn
    first = 2.0 + 0.25 * 0.5 * (end - 7.0)
    assert y[0].tolist() == near([first, end])

    batch = turns_by_hand([1, -1, -1])
    y, known = td_targets(V_BY_HAND, batch, 0.5, 0.25, **tree)
    assert known.tolist() == [True, False, False]
    assert y[0, 1] == -1 + 0.5 * 3.0

def test_more_passes_than_turns_change_nothing():
    """A batch may say that its windows are longer than they are."""
    batch = random_batch(3)
    shape = batch["mask"].shape
    q = floats(np.random.default_rng(3).normal(size=shape))
    tree = dict(q=q, pi=torch.full(shape, 0.5))
    longest = td_targets(q, batch, 0.9, 0.8, **tree)
    windows = td_targets(q, batch | dict(chain=4), 0.9, 0.8, **tree)
    assert torch.equal(longest[0], windows[0])

def test_clip_reward():
    """A reward is cut on both sides, or left alone."""
    cfg = settings(reward_clip=1.0)
    assert clip_reward(10.0, cfg) == 1.0
    assert clip_reward(0.5, cfg) == 0.5
    assert clip_reward(-3.0, cfg) == -1.0
    cfg.reward_clip = 0.0
    assert clip_reward(10.0, cfg) == 10.0

def test_certain_syntax_passes_the_value_back():
    """The bootstrap is the value where the next turn *decides*.

    The story: it had been V' of the turn's first token, which need not look at the picture. The critic knew
    at the card that 3 + 4 loses, and still +0.5 was passed to the turn that had chosen the `+`: hands that
    need a product stayed at 0 %.
    """
    # the second turn: two tokens of syntax, then the decision
    v = floats([[0, 0, 0], [0.5, 0.5, -0.8]])
    q = floats([[0, 0, 0], [0.5, 0.5, -0.2]])
    pi = floats([[1, 1, 1], [1, 1, 0.3]])
    batch = dict(
        mask=torch.ones(2, 3),
        reward=torch.zeros(2),
        terminated=torch.zeros(2),
        next=torch.tensor([1, -1]),
        chain=2,
    )
    y, known = td_targets(v, batch, 0.5, q=q, pi=pi)
    assert known.tolist() == [True, False]
    assert y[0].tolist() == near([-0.4] * 3)

    # the policy would not have produced that reply: V' where the turn begins
    pi[1] = 0
    y, _ = td_targets(v, batch, 0.5, q=q, pi=pi)
    assert y[0].tolist() == near([0.25] * 3)

class TokenMDP:
    """An MDP of 3 states and replies of 2 tokens out of 3.

    Some turns terminate, some lead to the next turn, some are truncated. The batch has a row per state and
    reply, then a row per state for the last observations.
    """

    states = 3
    tokens = 3
    gamma = 0.8

    def __init__(self):
        rng = np.random.default_rng(3)
        S = self.states
        ones = np.ones(self.tokens)
        shape = (S, self.tokens, self.tokens)
        self.turns = list(np.ndindex(shape))
        # pi(a|s) and pi(b|s,a)
        self.first = rng.dirichlet(ones, S)
        self.second = rng.dirichlet(ones, shape[:2])
        # what another player does in place of pi(b|s,a)
        other_rng = np.random.default_rng(4)
        self.other = other_rng.dirichlet(ones, shape[:2])
        self.reward = rng.normal(size=shape)
        self.successor = rng.integers(0, S, shape)
        # 0 terminated, 1 neither, 2 truncated
        self.end = rng.integers(0, 3, shape)

    def exact_q(self):
        """Solve the Bellman equations -> Q of the first token (S, K), of the second (S, K, K).

        V(s) = sum_a pi(a|s) sum_b pi(b|s,a) (r + gamma [not terminated] V(s')) is linear in V.
        """
        matrix = np.eye(self.states)
        constant = np.zeros(self.states)
        bootstrap = np.where(self.end > 0, self.gamma, 0.0)
        for turn in self.turns:
            s, a, _ = turn
            weight = self.first[s, a] * self.second[turn]
            constant[s] += weight * self.reward[turn]
            following = self.successor[turn]
            matrix[s, following] -= weight * bootstrap[turn]
        value = np.linalg.solve(matrix, constant)
        second = self.reward + bootstrap * value[self.successor]
        first = (self.second * second).sum(2)
        return first, second

    def next_row(self, turn):
        """Return the row that follows a turn, -1 for none."""
        state = int(self.successor[turn])
        if self.end[turn] == 2:
            return len(self.turns) + state
        if self.end[turn] == 1:
            return self.turns.index((state, 0, 0))
        return -1

    def batch(self):
        """Make the batch of all turns, then the last observations."""
        turns = len(self.turns)
        rows = turns + self.states
        batch = dict(
            mask=torch.zeros(rows, 2, dtype=torch.float64),
            reward=torch.zeros(rows, dtype=torch.float64),
            terminated=torch.zeros(rows, dtype=torch.float64),
            next=torch.full((rows,), -1),
            chain=rows,
        )
        batch["mask"][:turns] = 1
        for row, turn in enumerate(self.turns):
            batch["reward"][row] = self.reward[turn]
            batch["terminated"][row] = float(self.end[turn] == 0)
            batch["next"][row] = self.next_row(turn)
        return batch

    def token_table(self, first, second, last):
        """Arrange numbers of both tokens as rows of the batch (B, 2), last (S,) for the last observations."""
        shape = self.reward.shape
        columns = [first.expand(shape), second.expand(shape)]
        turns = torch.stack(columns, -1).flatten(0, 2)
        observations = torch.stack([last, last], -1)
        return torch.cat([turns, observations])

    def q_table(self, first, second):
        """Arrange numbers of the tokens taken; the last observations have none."""
        zeros = torch.zeros(self.states)
        return self.token_table(first[..., None], second, zeros)

    def values(self, q_first, q_second):
        """Compute V before each token (B, 2) under the policy."""
        log_first = torch.tensor(self.first).log()
        log_second = torch.tensor(self.second).log()
        v_first = state_value(log_first, q_first)  # V(s)
        v_second = state_value(log_second, q_second)  # V(s, a)
        return self.token_table(
            v_first[:, None, None],
            v_second[..., None],
            v_first,
        )

@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trace", ["tree", "plain"])
def test_fixed_point_is_the_exact_value(trace, lam):
    """Iterated targets reach the solution of the Bellman equations, whatever lam is.

    The tree backup does so from any player's data, plain TD(lambda) from the policy's own only. The story:
    on recorded play it had learned the value of the players. EZPoints stayed at 0 %, because after a right
    first card these players nearly always lose.
    """
    mdp = TokenMDP()
    turns = len(mdp.turns)
    batch = mdp.batch()
    first = torch.tensor(mdp.first)
    second = torch.tensor(mdp.second)
    pi = mdp.q_table(first, second)
    player = second
    if trace == "tree":
        player = torch.tensor(mdp.other)
    q_first = torch.zeros_like(first)
    q_second = torch.zeros_like(second)
    for _ in range(200):
        tree = {}
        if trace == "tree":
            tree = dict(q=mdp.q_table(q_first, q_second), pi=pi)
        v = mdp.values(q_first, q_second)
        y, known = td_targets(v, batch, mdp.gamma, lam, **tree)
        assert known[:turns].all()
        assert not known[turns:].any()
        # the mean square averages the first token's targets as often as the player chose the second token
        q_second = y[:turns, 1].view_as(second)
        y_first = y[:turns, 0].view_as(second)
        q_first = (y_first * player).sum(2)
    exact_first, exact_second = mdp.exact_q()
    assert_equal_to_exact(q_first, exact_first)
    assert_equal_to_exact(q_second, exact_second)


# ---- values and filters ----

def test_state_value():
    """V is the exact expectation over the vocabulary."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(12, VOCAB))
    q = rng.normal(size=(12, VOCAB))
    v = state_value(torch.tensor(logits), torch.tensor(q))
    expected = []
    for row, row_q in zip(logits, q):
        expected.append(np_softmax(row) @ row_q)
    assert_equal_to_exact(v, expected)

def test_constant_q_has_no_advantage():
    """V is an expectation: where Q is constant, A is 0 for every policy."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, VOCAB, generator=generator)
    q = torch.full_like(logits, -1.7)
    assert_close(state_value(logits, q), q[:, 0])

def test_filter_weight():
    """Each kind by hand; awr is bounded, however large A is; an unknown kind is an error."""
    adv = floats([[-1, 0, 0.5, 1000]])

    def weights(kind, **options):
        return filter_weight(adv, kind, **options)[0].tolist()

    assert weights("sft") == [1, 1, 1, 1]
    # strictly above beta
    assert weights("afsft", beta=0.0) == [0, 0, 1, 1]
    assert weights("afsft", beta=-0.02) == [0, 1, 1, 1]
    low = math.exp(-1 / AWR_TEMPERATURE)
    high = math.exp(0.5 / AWR_TEMPERATURE)
    assert weights("awr") == near([low, 1, high, AWR_MAX_WEIGHT])
    assert weights("fbc", good_episode=torch.tensor([True])) == [1] * 4
    assert weights("fbc", good_episode=torch.tensor([False])) == [0] * 4
    with pytest.raises(ValueError, match="ppo"):
        weights("ppo")

def test_cloning_without_critics():
    """sft and fbc need no heads: the mean of -log pi over all tokens, where fbc drops the worse episodes."""
    batch = random_batch()
    vlm = Stub(critics=0)
    mask = batch["mask"]
    hidden = vlm.states(batch["inputs"], 3, COLUMNS)
    logp = vlm.logits(hidden).log_softmax(-1)
    index = batch["reply_ids"][..., None]
    nll = -logp.gather(2, index)[..., 0] * mask
    good = batch["ep_return"] >= 0.1
    assert 0 < good.sum() < len(good)

    loss, info = loss_of(vlm, batch, actor_loss="fbc", bc_coef=0.0, quantile=0.1)
    assert_close(loss, nll[good].sum() / mask.sum())
    assert set(summarise([info])) == {"tokens", "nll"}

    loss, info = loss_of(vlm, batch, actor_loss="sft", bc_coef=0.0)
    assert_close(loss, nll.sum() / mask.sum())
    assert summarise([info])["nll"] == near(loss.item())

@pytest.mark.parametrize("kind", ["afsft", "awr"])
def test_warm_clones_all(kind):
    """During the warm-up the actor's gradient is that of plain cloning; afterwards it is not."""
    batch = random_batch()
    vlm = Stub()

    def policy_gradient(name, warm):
        loss, _ = loss_of(vlm, batch, warm, actor_loss=name, critic_coef=0.0)
        return gradients(vlm, loss)["policy.weight"]

    plain = policy_gradient("sft", warm=False)
    assert_close(policy_gradient(kind, warm=True), plain)
    filtered = policy_gradient(kind, warm=False)
    assert not torch.allclose(filtered, plain, rtol=0.01)


# ---- properties of the whole loss ----

def test_reward_reaches_the_critic_only_where_it_is_known():
    """Change the reward of a turn: the critic's loss changes, unless the turn's successor is missing."""
    vlm = Stub()
    batch = random_batch()
    known = known_turns(batch)
    played = batch["mask"].sum(1) > 0
    counts = known & played
    assert counts.any()
    assert (played & ~known).any()
    before, _ = loss_of(vlm, batch)
    for b in range(len(known)):
        other = dict(batch)
        other["reward"] = batch["reward"].clone()
        other["reward"][b] += 3
        after, _ = loss_of(vlm, other)
        assert (after != before) == counts[b]

@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(actor_loss="awr"),
        dict(trace="turn"),
        dict(trace="plain"),
    ],
)
def test_outside_of_the_mask_nothing_counts(changes):
    """Other token ids, hidden states and spans in the padding change no loss, no info and no gradient.

    The first column of a last observation is a state, not padding.
    """
    vlm = Stub()
    batch = random_batch()
    padding = batch["mask"] == 0
    unused_state = padding.clone()
    unused_state[:, 0] = False
    x = batch["inputs"]["x"].clone()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=generator)
    x[unused_state] = noise[unused_state]
    actions = batch["reply_ids"].clone()
    actions[padding] = (actions[padding] + 3) % VOCAB
    span = batch["span"].clone()
    span[padding] = 1
    other = dict(batch, reply_ids=actions, span=span)
    other["inputs"] = dict(x=x)
    loss, info = loss_of(vlm, batch, **changes)
    other_loss, other_info = loss_of(vlm, other, **changes)
    assert_close(other_loss, loss)
    assert_close(other_info, info)
    assert_close(gradients(vlm, other_loss), gradients(vlm, loss))

def window_starts(batch):
    """List the rows where a window begins."""
    starts = [0]
    for row, following in enumerate(batch["next"].tolist()):
        if following < 0:
            starts.append(row + 1)
    return starts[:-1]

@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(actor_loss="awr"),
        dict(actor_loss="fbc"),
        dict(trace="turn"),
    ],
)
def test_any_split_gives_the_same_gradients(changes):
    """Micro-batches of any size add up to the same gradients and metrics.

    The tokens of the whole update are counted first.
    """
    cfg = settings(**changes)
    vlm = Stub()
    batch = random_batch(windows=6)
    mask = batch["mask"]
    known = known_turns(batch)
    critic_tokens = mask[known].sum()
    loss, info = compute_loss(vlm, batch, cfg, quantile=0.2)
    whole = gradients(vlm, loss)
    metrics = summarise([info])
    for step in (1, 2, 3):
        starts = window_starts(batch)[::step]
        ends = [*starts[1:], len(mask)]
        infos = []
        total = {}
        for begin, end in zip(starts, ends):
            loss, info = compute_loss(
                vlm,
                cut_rows(batch, begin, end),
                cfg,
                quantile=0.2,
                tokens=mask.sum(),
                critic_tokens=critic_tokens,
            )
            infos.append(info)
            for name, gradient in gradients(vlm, loss).items():
                total[name] = total.get(name, 0) + gradient
        assert_close(total, whole)
        assert summarise(infos) == near(metrics)

def test_each_loss_trains_its_own_part():
    """The actor's loss does not train the critic, the critic's not the policy; both train the trunk."""
    vlm = Stub()
    batch = random_batch()
    heads = ("heads.0.weight", "heads.1.weight")
    for kind in ("awr", "afsft"):
        loss, _ = loss_of(vlm, batch, actor_loss=kind, critic_coef=0.0)
        found = gradients(vlm, loss)
        assert all(is_zero(found.get(name)) for name in heads)
        assert not is_zero(found["policy.weight"])
        assert not is_zero(found["trunk.weight"])

    # nothing passes this filter, so only the critic's loss is left
    loss, info = loss_of(vlm, batch, bc_coef=0.0, beta=math.inf)
    found = gradients(vlm, loss)
    metrics = summarise([info])
    assert metrics["pass_action"] == 0
    assert metrics["pass_syntax"] == 0
    assert is_zero(found.get("policy.weight"))
    assert not any(is_zero(found[name]) for name in heads)
    assert not is_zero(found["trunk.weight"])

@pytest.mark.parametrize("actor_loss", ["afsft", "sft"])
def test_a_large_vocabulary_is_computed_in_chunks(monkeypatch, actor_loss):
    """With room for the logits of 4 states instead of all: the same loss, gradients and metrics."""
    critics = dict(afsft=2, sft=0)
    vlm = Stub(critics[actor_loss])
    batch = random_batch(windows=4)
    cfg = settings(actor_loss=actor_loss)
    whole, info = compute_loss(vlm, batch, cfg)
    expected = gradients(vlm, whole)

    logits = vlm.logits
    chunks = []

    def count_states(hidden):
        chunks.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(agent_rl, "MAX_LOGITS", 4 * VOCAB + 1)
    monkeypatch.setattr(vlm, "logits", count_states)
    loss, chunk_info = compute_loss(vlm, batch, cfg)
    assert_close(gradients(vlm, loss), expected)
    assert_close(loss, whole)
    assert_close(chunk_info, info)
    # each chunk is computed in the forward pass and again in the backward pass
    assert max(chunks) == 4
    assert sum(chunks) == 2 * batch["mask"].numel()

def test_turn_level_has_one_advantage_per_reply(monkeypatch):
    """trace='turn': all tokens of a reply pass or none, by Q of the last token and V of the first state."""
    vlm = Stub()
    batch = random_batch(windows=8)
    hidden = vlm.states(batch["inputs"], 3, COLUMNS)
    logits = vlm.logits(hidden)
    logits.retain_grad()
    flat = logits.flatten(0, 1)
    q = vlm.q(hidden).mean(0)
    qa = agent_rl.pick_token(q.flatten(0, 1), batch["reply_ids"].flatten())
    qa = qa.view_as(batch["mask"])
    v = state_value(logits, q)

    # the gradient on the logits shows which tokens are cloned
    monkeypatch.setattr(vlm, "states", lambda *_: hidden)
    monkeypatch.setattr(vlm, "logits", lambda _: flat)
    only_actor = dict(bc_coef=0.0, critic_coef=0.0)
    loss, _ = loss_of(vlm, batch, trace="turn", beta=0.0, **only_actor)
    loss.backward()
    passed = logits.grad.abs().sum(-1) > 0

    replies = []
    for b, n in enumerate(reply_lengths(batch)):
        if n == 0:
            continue
        adv = qa[b, n - 1] - v[b, 0]
        is_good = bool(adv > 0)
        assert passed[b, :n].tolist() == [is_good] * n
        assert not passed[b, n:].any()
        replies.append(is_good)
    assert set(replies) == {True, False}

@pytest.mark.parametrize("lam", [0.2, 1.0])
def test_the_decay_does_not_matter_at_turn_level(lam):
    """trace='turn' gives all tokens of a reply the turn's own target."""
    vlm = Stub()
    batch = random_batch(windows=8)
    loss, _ = loss_of(vlm, batch, trace="turn")
    other, _ = loss_of(vlm, batch, trace="turn", lam=lam)
    assert loss == other


# ---- why pessimism ----

@pytest.mark.parametrize("learns", [False, True])
def test_the_story_of_pessimism(learns):
    """A head that starts at the lowest return in the data keeps the filter from unlearning the syntax.

    Every reply in the data is `[action]` (token 0) and then one of two moves, and all of it went badly, with
    returns of -1 and -0.5. Tokens that no data shows keep the head's first value. At 0 they look good, V is
    too high, and the one correct syntax token fails the filter: the policy never learns it. From the lowest
    return in the data it passes.
    """
    q_init = -1.0 if learns else 0.0
    vlm = Tabular(q_init)
    replies = torch.tensor([[0, 1], [0, 2]] * 4)
    reward = floats([-1, -0.5] * 4)
    batch = two_token_batch(replies, reward)
    cfg = settings(
        trace="plain",
        lam=1.0,
        bc_coef=0.0,
        pess_coef=0.0,
    )
    optimizer = torch.optim.SGD(vlm.parameters(), lr=0.5)
    pass_syntax = []
    for step in range(60):
        # all is cloned at first, as in filter_warmup; then the filter decides
        loss, info = compute_loss(vlm, batch, cfg, warm=step < 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pass_syntax.append(summarise([info])["pass_syntax"])

    shown = vlm.table[0, 0].item()
    assert shown == pytest.approx(-0.75, abs=0.01)
    assert vlm.table[0, 3] == q_init
    syntax, action = vlm.policy.softmax(-1)
    if learns:
        assert pass_syntax[15:] == [1.0] * 45
        assert syntax[0] > 0.9
        # the better of the two moves is preferred
        assert action[2] > 1.7 * action[1]
    else:
        assert pass_syntax[15:] == [0.0] * 45
        assert syntax[0] < 0.6

def test_pessimism_has_a_floor():
    """Tokens that no data shows, raised by chance, return to q_init; what the data shows is near its return.

    The term of CQL alone has no floor.
    """
    vlm = Tabular(-1.0)
    vlm.table.data[:, 3:] = 2.0
    replies = torch.tensor([[0, 1]] * 4)
    batch = two_token_batch(replies, floats([0.5] * 4))
    cfg = settings(trace="plain", lam=1.0, critic_coef=1.0)
    optimizer = torch.optim.SGD([vlm.table], lr=1.0)
    for _ in range(500):
        loss, _ = compute_loss(vlm, batch, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # the minimum of (Q - y)^2 + share (Q - q_init)^2 where there is data, q_init where there is none
    share = cfg.pess_coef / VOCAB
    expected = torch.full_like(vlm.table, vlm.q_init)
    expected[0, 0] = (0.5 + share * vlm.q_init) / (1 + share)
    expected[1, 1] = expected[0, 0]
    assert_close(vlm.table.detach(), expected, tolerance=1e-3)
