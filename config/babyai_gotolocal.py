"""
BabyAI, go to the named one of eight objects in a room: the real environment, from play of minigrid's bot, at random, and malformed.

    pip install -r requirements-envs.txt
    python train.py config/babyai_gotolocal.py                                                                     # or another level:
    python train.py config/babyai_gotolocal.py --env=BabyAI-GoToRedBallGrey-v0:view --out_dir=out/babyai_gotoredball

Not finished. GoToRedBallGrey, seed 0, --offline_updates=700 --online_updates=500, data 38.1 % (1,500 episodes): 68.7 % [63.2, 73.6] of 300 held-out rooms after the offline updates (11 minutes, one core); the online phase
was stopped after 50 updates, others stood still at 58 to 75 % (goal 90 %, LOG.md): before an obstacle the agent is sure of "go forward" long after the critic knows better. GoToLocal has not been run to the end.
"""
out_dir = 'out/babyai_gotolocal'
model = 'tiny-vlm-grids' # has read such rooms; the cards' tiny-vlm has not
env = 'BabyAI-GoToLocal-v0:view'   # what the agent sees; without :view the whole map
size = 128             # a cell has 16 pixels: a patch
max_turns = 24         # a level's own limit of 64 turns is long enough for chance
data_mix = {'expert': 0.18, 'random': 0.62, 'malformed': 0.2}
data_episodes = 1500
cache_mb = 4000
dtype = 'bfloat16'     # fast where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 900
online_updates = 400
offline_ratio = 0.5
micro_batch = 16       # half of the time of 32 at once: what it needs stays in the CPU's cache
gamma = 0.9
won_share = 0.5
q_init = -1.5          # the data's lowest return, many slips in a row, would bury what is rare
pess_coef = 0.3
explore = 0.1          # else who stands before an obstacle, sure of "go forward", never sees what a turn would bring
filter_warmup = 150
beta = 0.0             # a turn that leads nowhere costs a tenth of what is to come: less than the default's 0.05
lr = 2e-3
min_lr = 0.2
