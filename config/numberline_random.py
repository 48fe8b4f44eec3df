"""
NumberLine from purely random play: no expert anywhere in the data.

    python train.py config/numberline_random.py

Sampled, summed reward > 0: data 25.0 %, AFSFT 92.7 % [89.1, 95.1], goal reached 100 % (seed 0 only; just over two minutes on two cores).
SFT (200 updates, seeds 0, 1, 2): 25.3, 30.3, 27.0 %.
"""
out_dir = 'out/numberline_random'
env = 'NumberLine'
data_mix = {'random': 1.0}
data_episodes = 600
offline_updates = 200
online_updates = 0
gamma = 0.5
