"""
NumberLine from purely random play: no expert anywhere in the data.

    python train.py config/numberline_random.py

Not measured yet with AFSFT; SFT (200 updates, seeds 0, 1, 2, sampled, summed reward > 0): 25.3, 30.3, 27.0 %.
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 400
online_updates = 0
gamma = 0.5
