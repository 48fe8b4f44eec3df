"""
BabyAI, go to the named one of eight objects in a room: the real environment, from play of minigrid's bot, at random, and malformed.

    pip install -r requirements-envs.txt
    python train.py config/babyai_gotolocal.py                                                                     # or another level:
    python train.py config/babyai_gotolocal.py --env=BabyAI-GoToRedBallGrey-v0 --out_dir=out/babyai_gotoredball

Not run yet: settings to start from, modelled on NumberLine's and EZPoints'. The shipped tiny-vlm was pre-trained on the games' pictures
and has never seen a grid: name a model that has (config/pretrain_grids.py makes one).
"""
out_dir = 'out/babyai_gotolocal'
env = 'BabyAI-GoToLocal-v0'   # the whole map; 'BabyAI-GoToLocal-v0:view' shows what the agent sees
size = 128             # 8 x 8 cells of 16 pixels: a cell is a patch
max_turns = 32
data_mix = {'expert': 0.3, 'random': 0.5, 'malformed': 0.2}
data_episodes = 3000
cache_mb = 3000
offline_updates = 1200
online_updates = 400
dtype = 'bfloat16'
offline_ratio = 0.5
gamma = 0.9
critic_coef = 1.0
won_share = 0.5
q_init = -1.5          # the data's lowest return, many slips in a row, would bury what is rare
pess_coef = 0.3
filter_warmup = 250
lr = 2e-3
min_lr = 0.2
