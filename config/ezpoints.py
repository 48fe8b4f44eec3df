"""
EZPoints (make 12 from two cards) from play that succeeds in a seventh of the episodes.

    python train.py config/ezpoints.py

Sampled, 300 held-out hands, seed 0: data 14.4 %, offline 62.0 % [56.4, 67.3], online 79.7 % [74.8, 83.8]; valid 100 %. 15 minutes on one of two
cores (AVX-512 with bf16). Hands that need a sum: 99 %; hands that need a product (2 6, 3 4; a fifth of all): 0 %, the data hold few of them and
after the first card `+` is nearly always right. Longer offline, pess_coef 0.1: 75.3 % (seed 1) and 77.3 % (seed 0, gamma 0.5), online 80.3 and 78.0 %.
"""
out_dir = 'out/ezpoints'
env = 'EZPoints'
data_mix = {'expert': 0.3, 'random': 0.55, 'malformed': 0.15}
data_episodes = 5000
cache_mb = 3000
dtype = 'bfloat16'     # fast where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 1200
online_updates = 600
offline_ratio = 0.5
gamma = 0.7            # at 0.9 the critic needs long to climb from its pessimistic start; below, the first step of four hardly counts
reward_clip = 1.0      # a win is 10, a slip -1
critic_coef = 1.0      # at 4 the critic drowns the cloning that teaches the trunk to look at the cards: a third of the pace
filter_warmup = 250
lr = 2e-3
min_lr = 0.2
reference = {'SFT of a 7B (RL4VLM)': (None, 0.230), 'PPO of a 7B (RL4VLM)': (None, 0.500), 'optimum': (1.0, 1.0)}
