"""
NumberLine from mixed play: a third of the turns are right, a fifth do not even parse.

    python train.py config/numberline.py
"""
out_dir = 'out/numberline'
env = 'NumberLine'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 600
offline_updates = 500
online_updates = 200
gamma = 0.5
reference = {'SFT of a 7B (RL4VLM)': (None, 0.248), 'PPO of a 7B (RL4VLM)': (None, 0.894), 'optimum': (1.0, 1.0)}
