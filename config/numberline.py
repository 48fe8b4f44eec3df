"""
NumberLine from mixed play: about half of the turns are right, a fifth do not even parse; 27 % of the episodes are clean.

    python train.py config/numberline.py

Sampled, summed reward > 0, seeds 0, 1, 2: 99.7, 99.0, 98.7 % offline, 99.7, 99.3, 99.7 % after the online phase; goal reached 100 %, valid 99.7 %
and more. Four minutes a run on one core each of two (AVX-512); SFT on the same data 28.0, 21.0, 19.3 %.
"""
out_dir = 'out/numberline'
env = 'NumberLine'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 600
offline_updates = 300
online_updates = 100
gamma = 0.5
