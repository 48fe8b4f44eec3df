"""
BabyAI, go to the named one of eight objects in a room: the real environment, from play of minigrid's bot, at random, and malformed.

    pip install -r requirements-envs.txt
    python train.py config/babyai_gotolocal.py                                                                     # or another level:
    python train.py config/babyai_gotolocal.py --env=BabyAI-GoToRedBallGrey-v0:view --out_dir=out/babyai_gotoredball

300 held-out rooms, sampled, one core beside another run (AMD EPYC), seed 0 if no other is named:
GoToLocal: data 49.6 %, after 600 offline updates 59.3 % [53.7, 64.7], after 500 online ones 81.7 % [76.9, 85.6] (2,063 s and three minutes of recording), after 950, resumed, 84.7 % [80.2, 88.3] (862 s more; greedy 75.3). Goal 90: an obstacle before the thing is what it fails at.
Seed 1: data 50.5 %, offline 65.0 % [59.4, 70.2], online 84.0 % [79.4, 87.7] (2,832 s; greedy 76.7). Plain cloning, seed 0 (--actor_loss=sft --q_weight=0 --explore=0 --online_updates=0): 20.7 % [16.5, 25.6], greedy 26.3.
GoToRedBallGrey: data 45.8 %, offline 69.0 % [63.5, 74.0], online 94.7 % [91.5, 96.7], greedy 92.7 % (2,839 s). Goal 90.
q_weight corrects the policy in rollouts and in these numbers. Seed 2, and seed 1 and plain cloning of GoToRedBallGrey, have not been run.
"""
out_dir = 'out/babyai_gotolocal'
model = 'tiny-vlm-grids' # has read such rooms; the cards' tiny-vlm has not
env = 'BabyAI-GoToLocal-v0:view'   # what the agent sees; without :view the whole map
size = 128             # a cell has 16 pixels: a patch
max_turns = 24         # a level's own limit of 64 turns is long enough for chance
expert_episodes = 0.4 # the bot's from the first turn to the last: what it did last, which the prompt says, then makes sense
data_mix = {'random': 0.75, 'malformed': 0.25}
data_episodes = 2000
cache_mb = 4000
dtype = 'bfloat16'     # fast where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 300
online_updates = 300
offline_ratio = 0.25
replay_episodes = 512
q_weight = 10.0        # the critic knows what is in the way long before the policy does
batch_size = 16
micro_batch = 8        # what it needs stays in the CPU's cache
max_new_tokens = 12
gamma = 0.9
won_share = 0.8
penalty = -0.3
q_init = -0.6          # the data's lowest return, many slips in a row, would bury what is rare
target_tau = 0.1
pess_coef = 0.3
explore = 0.1          # else who stands before an obstacle, sure of "go forward", never sees what a turn would bring
filter_warmup = 150
beta = 0.0             # a turn that leads nowhere costs a tenth of what is to come: less than the default's 0.05
lr = 2e-3
min_lr = 0.2
