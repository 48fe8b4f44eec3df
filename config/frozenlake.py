"""
FrozenLake of gymnasium, with its own pictures, on random 4 x 4 maps (needs requirements-envs.txt).

    python train.py config/frozenlake.py

13 to 16 minutes on one CPU core. Sampled, held-out maps after the online phase,
mean of seeds 0, 1, 2: 81.5 %. More: docs/results.md
"""
out_dir = 'out/frozenlake'
model = 'bases/tiny-vlm-lake'  # it reads such tiles
env = 'FrozenLake'
size = 128  # a tile is 32 pixels, 2 x 2 patches
expert_episodes = 0.4
data_mix = {'random': 0.75, 'malformed': 0.25}
data_episodes = 1500
dtype = 'bfloat16'  # half the time on a CPU with avx512_bf16 or AMX
offline_updates = 300
online_updates = 400
offline_ratio = 0.25
replay_episodes = 512
q_weight = 1.0  # the critic has seen few falls and knows less than the policy
batch_size = 16
micro_batch = 8
max_new_tokens = 12
gamma = 0.9
won_share = 0.9
critic_coef = 1.0  # a larger one takes the trunk from the actor
q_init = -0.6
pess_coef = 0.3
explore = 0.1
filter_warmup = 300  # the whole offline phase: the critic has seen too few falls to filter
lr = 2e-3
min_lr = 0.2
eval_episodes = 200
eval_interval = 100
