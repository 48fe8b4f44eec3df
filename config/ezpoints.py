"""
EZPoints (make 12 from two cards) from play that succeeds in an eighth of the episodes. Not learned yet, see LOG.md: 0 to 5 % after
200 to 400 updates, because the values depend on the formula's length and not yet on the cards.

    python train.py config/ezpoints.py
"""
out_dir = 'out/ezpoints'
env = 'EZPoints'
think = True           # replies name the cards, then act
data_mix = {'expert': 0.3, 'random': 0.55, 'malformed': 0.15}
data_episodes = 1500
offline_updates = 600
online_updates = 300
gamma = 0.9
reward_scale = 0.1     # a win is 10, a slip -1: the critic sees 1 and -0.1
beta = -0.01
reference = {'SFT of a 7B (RL4VLM)': (None, 0.230), 'PPO of a 7B (RL4VLM)': (None, 0.500), 'optimum': (1.0, 1.0)}
