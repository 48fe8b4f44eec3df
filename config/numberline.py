"""
NumberLine from mixed play: a fifth of the turns is the expert's, the others are random or do not parse.

    python train.py config/numberline.py

Two to four minutes on two CPU cores. Sampled, clean episodes (summed reward > 0) after the online phase,
mean of seeds 0, 1, 2: 99.8 %. More: docs/results.md
"""
out_dir = 'out/numberline'
env = 'NumberLine'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 600
offline_updates = 300
online_updates = 100
gamma = 0.5
