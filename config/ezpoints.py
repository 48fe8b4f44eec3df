"""
EZPoints (make 12 from two cards) from play that succeeds in a seventh of the episodes.

    python train.py config/ezpoints.py

Sampled, 300 held-out hands, seeds 0, 1, 2: data 13.3, 14.6, 13.3 %, offline 90.3, 81.3, 91.7 %, online 98.0, 97.3, 100.0 %; valid 99.7 % and more.
22 to 27 minutes a run on one of two cores (AVX-512 with bf16). What comes last are products (2 6, 3 4; a fifth of the hands): the data hardly show
that `+` fails there; play of its own does. Points that decided it: won_share, the tied head, little pessimism (see LOG.md).
"""
out_dir = 'out/ezpoints'
env = 'EZPoints'
data_mix = {'expert': 0.29, 'random': 0.56, 'malformed': 0.15}
data_episodes = 5000
dtype = 'bfloat16'     # fast where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 1800
online_updates = 800
offline_ratio = 0.5
won_share = 0.5        # as they come, a seventh of the windows is won: twice the updates until it looks at the cards
gamma = 0.7            # at 0.9 the critic needs long to climb from its pessimistic start; below, the first step of four hardly counts
reward_clip = 1.0      # a win is 10, a slip -1
q_init = -1.5          # below a slip's price; the data's lowest return, -3.2, buries what is rare: `*` is right in a fifth of the hands
pess_coef = 0.3
critic_coef = 1.0      # at 4 the critic drowns the cloning that teaches the trunk to look at the cards: a third of the pace
filter_warmup = 250
lr = 2e-3
min_lr = 0.2
