"""
NumberLine from purely random play: there is no expert anywhere in the data.

    python train.py config/numberline_random.py

Three minutes on one CPU core. Sampled, clean episodes (summed reward > 0), mean of seeds 0, 1, 2: 98.3 %.
More: docs/results.md
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
