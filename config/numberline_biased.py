"""
NumberLine from biased play: in every state the wrong action is the more frequent one, so whoever clones the crowd always fails.

    python train.py config/numberline_biased.py

Sampled, summed reward > 0, seeds 0, 1, 2: 97.3, 99.3, 98.7 %, from data at 13.7, 13.5, 14.2 %; goal reached 100 % each.
Three minutes on one core. SFT: 17.3, 15.0, 16.7 %. With 200 updates seed 0 was at 86.7 %.
"""
out_dir = 'out/numberline_biased'
env = 'NumberLine'
data_mix = {'biased': 1.0}
data_episodes = 600
offline_updates = 300
online_updates = 0
gamma = 0.5
