"""
NumberLine from purely random play: no expert anywhere in the data.

    python train.py config/numberline_random.py

Sampled, summed reward > 0, seeds 0, 1, 2: 100, 97.7, 98.7 %, from data at 25.0, 27.8, 29.5 %; goal reached 100 % each. Two minutes on one core.
SFT (with an earlier base): 25.3, 30.3, 27.0 %.
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
