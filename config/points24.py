"""
Points24 (make 24 from four cards) from play that is mostly right: 73.1 % of the deals can be solved at all.

    python train.py config/points24.py
"""
out_dir = 'out/points24'
env = 'Points24'
data_mix = {'expert': 0.9, 'random': 0.08, 'malformed': 0.02}
data_episodes = 3000
offline_updates = 800
online_updates = 200
gamma = 0.95
reward_scale = 0.1
beta = -0.005
eval_episodes = 500
reference = {'SFT of a 7B (RL4VLM)': (None, 0.026), 'PPO of a 7B (RL4VLM)': (None, 0.023), 'solvable deals': (0.731, 0.731)}
