"""
FrozenLake of gymnasium, with its own pictures, on random 4 x 4 maps (needs requirements-envs.txt).

    python train.py config/frozenlake.py

13 minutes on one CPU core. Sampled, held-out maps after the online phase,
mean of seeds 0, 1, 2: 94.0 %. More: docs/results.md
"""
out_dir = 'out/frozenlake'
model = 'bases/tiny-vlm-worlds'  # it reads such tiles
env = 'FrozenLake'
size = 128  # a tile is 32 pixels, 2 x 2 patches
expert_episodes = 0.4
data_mix = {'random': 0.75, 'malformed': 0.25}
data_episodes = 1500
offline_updates = 300
online_updates = 400
offline_ratio = 0.25
replay_episodes = 512
batch_size = 16
micro_batch = 8
max_new_tokens = 12
gamma = 0.9
won_share = 0.9
explore = 0.1
filter_warmup = 150  # until the critic has seen falls
lr = 2e-3
min_lr = 0.2
eval_episodes = 200
eval_interval = 100
