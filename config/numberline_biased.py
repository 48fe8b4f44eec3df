"""
NumberLine from biased play: in every state the wrong action is the more frequent one, so whoever clones the crowd always fails.

    python train.py config/numberline_biased.py

Sampled, summed reward > 0: data 13.7 %, AFSFT 91.0 % [87.2, 93.7], goal reached 100 % (seed 0 only, in a run stopped at update 100 and resumed, so its time
is not known).
SFT (200 updates, seeds 0, 1, 2): 15.3, 18.0, 20.3 %.
"""
out_dir = 'out/numberline_biased'
env = 'NumberLine'
data_mix = {'biased': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
