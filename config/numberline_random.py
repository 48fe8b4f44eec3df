"""
NumberLine from purely random play: no expert anywhere in the data.

    python train.py config/numberline_random.py
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 400
online_updates = 0
gamma = 0.5
