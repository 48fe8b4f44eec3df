"""
Points24 (make 24 from four cards) from play that is mostly right: 73.1 % of the deals can be solved at all. Not run yet.

    python train.py config/points24.py
"""
out_dir = 'out/points24'
env = 'Points24'
data_mix = {'expert': 0.9, 'random': 0.08, 'malformed': 0.02}
data_episodes = 3000
cache_mb = 3000
dtype = 'bfloat16'
offline_updates = 1500
online_updates = 0
gamma = 0.8
reward_clip = 1.0
critic_coef = 1.0
filter_warmup = 400
lr = 2e-3
eval_episodes = 500
reference = {'SFT of a 7B (RL4VLM)': (None, 0.026), 'PPO of a 7B (RL4VLM)': (None, 0.023), 'solvable deals': (0.731, 0.731)}
