"""
NumberLine from purely random play: no expert anywhere in the data.

    python train.py config/numberline_random.py

Sampled, summed reward > 0, seeds 0, 1, 2: 98.7, 99.3, 99.0 %, from data at 25.0, 27.8, 29.5 %; goal reached 100 % each. Three minutes on one core.
SFT: 26.0, 26.0, 25.7 %.
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
