"""
Blackjack from mixed play; the best player wins 43.2 % of the hands.

    python train.py config/blackjack.py

12 to 16 minutes on one CPU core with bfloat16. Sampled, 2,000 held-out hands won after the online phase,
mean of seeds 0, 1, 2: 41.9 %. More: docs/results.md
"""
out_dir = 'out/blackjack'
env = 'Blackjack'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 10000  # luck decides more than the player: the critic needs many hands
dtype = 'bfloat16'  # half the time on a CPU with avx512_bf16 or AMX
offline_updates = 1500
online_updates = 300
offline_ratio = 0.5
q_init = -2.0
gamma = 0.95
critic_coef = 1.0  # measured with such values and a narrower Q head, not yet with the defaults
penalty = -1.0
target_tau = 0.05
filter_warmup = 100
lr = 2e-3
beta = -0.02
rollout_episodes = 256
eval_episodes = 2000
