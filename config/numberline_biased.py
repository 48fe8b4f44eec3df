"""
NumberLine from biased play: in every state the wrong action is the more frequent one, so whoever clones the crowd always fails.

    python train.py config/numberline_biased.py

Sampled, summed reward > 0, seeds 0, 1, 2: 97.7, 98.3, 99.0 %, from data at 13.7, 13.5, 14.2 %; goal reached 100 % each.
Two minutes on one core. SFT (with an earlier base): 15.3, 18.0, 20.3 %.
"""
out_dir = 'out/numberline_biased'
env = 'NumberLine'
data_mix = {'biased': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
