"""
FrozenLake, gymnasium's own with its own pictures, on random 4 x 4 maps: the README's example of an environment of one's own.

    pip install -r requirements-envs.txt
    python train.py config/frozenlake.py

Held-out maps, 200 a seed, sampled, one core beside other runs (AMD EPYC), 13 to 16 minutes a seed. Seeds 0 / 1 / 2: data 40.3 / 40.6 / 42.3 %, offline 70.5 / 63.0 / 49.5 (61.0 [57.0, 64.8]) %, greedy 73.0 / 76.5 / 70.0 (73.2 [69.5, 76.6]) %, then online 81.5 / 84.5 / 78.5 (81.5 [78.2, 84.4]) %, greedy 82.5 / 83.0 / 80.0 (81.8 [78.5, 84.7]) %, picture hidden 0.0 / 0.0 / 0.0 (0.0 [0.0, 0.6]) %. Down to the bottom, then right, which needs no look at the holes, wins 43.5 % of 400.
Cloning of won episodes alone, seed 0 (--actor_loss=sft --won_share=0.95 --q_weight=0 --explore=0 --online_updates=0): 80.5 % [74.5, 85.4], greedy 86.5 %.
400 more online updates on seed 0 (--resume=True --online_updates=800) bring nothing: 80.5 % [74.5, 85.4].
"""
out_dir = 'out/frozenlake'
model = 'bases/tiny-vlm-lake' # reads such tiles (config/pretrain_grids.py)
env = 'FrozenLake'
size = 128             # a tile has 32 pixels: 2 x 2 patches
expert_episodes = 0.4
data_mix = {'random': 0.75, 'malformed': 0.25}
data_episodes = 1500
dtype = 'bfloat16'
offline_updates = 300
online_updates = 400
offline_ratio = 0.25
replay_episodes = 512
q_weight = 1.0         # offline the critic sees few falls: less is known to it than to the policy
batch_size = 16
micro_batch = 8
max_new_tokens = 12
gamma = 0.9
won_share = 0.9
critic_coef = 1.0      # with 10 its gradient takes the trunk from the actor: 38 %, not 70, after 100 updates of cloning
penalty = -0.3
q_init = -0.6
target_tau = 0.1
pess_coef = 0.3
explore = 0.1
filter_warmup = 300    # the whole offline phase: what a critic that has seen few falls lets pass is going straight on
beta = 0.0
lr = 2e-3
min_lr = 0.2
eval_episodes = 200
eval_interval = 100
