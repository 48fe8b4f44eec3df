"""
NumberLine from biased play: in every state the wrong action is the more frequent one.

    python train.py config/numberline_biased.py

Three minutes on one CPU core. Sampled, clean episodes (summed reward > 0), mean of seeds 0, 1, 2: 99.0 %.
More: docs/results.md
"""
out_dir = 'out/numberline_biased'
env = 'NumberLine'
data_mix = {'biased': 1.0}
data_episodes = 600
offline_updates = 300
online_updates = 0
gamma = 0.5
