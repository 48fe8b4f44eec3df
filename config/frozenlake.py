"""
FrozenLake, gymnasium's own with its own pictures, on random 4 x 4 maps: the README's example of an environment of one's own.

    pip install -r requirements-envs.txt
    python train.py config/frozenlake.py

Not finished: settings to start from. Seed 0, --critic_coef=10 --filter_warmup=150 --beta=0: 20 to 27 % of 60 held-out maps after 400 to 600 offline updates on an earlier base, then stopped: it had not seen such tiles. There are questions about them now (Reading:FrozenLake),
an eighth of one stage of the rooms' base (f245810): what is at a tile 60 %, the way 68 %, where the agent is 0 of 9. The stage after it did not ask them, and the agent has not been trained on either.
"""
out_dir = 'out/frozenlake'
model = 'tiny-vlm-grids' # has seen rooms of cells, these tiles but briefly
env = 'FrozenLake'
size = 128             # a tile has 32 pixels: 2 x 2 patches
data_mix = {'expert': 0.4, 'random': 0.4, 'malformed': 0.2}
data_episodes = 3000
cache_mb = 2000
offline_updates = 1200
online_updates = 300
dtype = 'bfloat16'
offline_ratio = 0.5
micro_batch = 16
gamma = 0.9
critic_coef = 1.0
won_share = 0.5
q_init = -1.5
pess_coef = 0.3
filter_warmup = 250
lr = 2e-3
min_lr = 0.2
reference = {'optimum': (1.0, 1.0)}
