"""
Blackjack from mixed play. The best player wins 43.2 % of the hands, a random one 28.1 %, one who always stands 39.6 %.

    python train.py config/blackjack.py

Hands won, sampled, 2,000 held-out hands, seed 0: data 31.0 %, offline 39.4 %, online 41.4 % [39.3, 43.6]; valid 99.8 %. Six minutes on one of two
cores (AVX-512 with bf16). It begins to hit late (after some 600 updates) and hits too rarely: longer runs should do better.
10,000 hands with 800 + 300 updates: 39.0 % [36.9, 41.2]; with 800 + 200 updates and pess_coef 2 (seed 0 too): 40.2 % [38.1, 42.4].
"""
out_dir = 'out/blackjack'
env = 'Blackjack'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 4000   # the cards decide more than the player: many hands are needed to see who was right
cache_mb = 1500
dtype = 'bfloat16'
offline_updates = 1000
online_updates = 300
gamma = 0.95
critic_coef = 1.0
pess_coef = 0.1
filter_warmup = 100
lr = 2e-3
beta = -0.02
rollout_episodes = 256
eval_quick = 300
eval_episodes = 2000
reference = {'SFT of a 7B (RL4VLM)': (None, 0.231), 'PPO of a 7B (RL4VLM)': (None, 0.402), 'optimum': (0.432, 0.432)}
