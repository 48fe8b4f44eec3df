"""
BabyAI: go to the named one of eight objects in a room, seen by the agent (needs requirements-envs.txt).

    python train.py config/babyai_gotolocal.py
    python train.py config/babyai_gotolocal.py --resume=True --online_updates=900

34 to 37 minutes on one CPU core. Sampled, held-out rooms after both commands, mean of seeds 0, 1, 2: 92.3 %.
Another level: --env=BabyAI-GoToRedBallGrey-v0:view. More: docs/results.md
"""
out_dir = 'out/babyai_gotolocal'
model = 'bases/tiny-vlm-grids'  # it reads such rooms; bases/tiny-vlm does not
env = 'BabyAI-GoToLocal-v0:view'  # what the agent sees; without :view the whole map
size = 128  # a cell is 16 pixels, one patch
max_turns = 24  # the level's own limit of 64 lets chance win
expert_episodes = 0.4  # whole episodes, so that the last actions in the prompt make sense
data_mix = {'random': 0.75, 'malformed': 0.25}
data_episodes = 2000
dtype = 'bfloat16'  # half the time on a CPU with avx512_bf16 or AMX
offline_updates = 300
online_updates = 500
offline_ratio = 0.25
replay_episodes = 512
q_weight = 10.0  # the critic knows obstacles long before the policy does
batch_size = 16
micro_batch = 8
max_new_tokens = 12  # a reply has eight
gamma = 0.9
won_share = 0.8  # the critic sees more of what good play brings
critic_coef = 10.0  # measured with such values and a narrower Q head, not yet with the defaults
q_init = -0.6
pess_coef = 0.3
explore = 0.1  # an agent in front of an obstacle has to see what a turn brings
filter_warmup = 150
lr = 2e-3
min_lr = 0.2
