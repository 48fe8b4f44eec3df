"""
Blackjack from mixed play. The best player wins 43.2 % of the hands and a random one 28.1 %: comparisons need thousands of hands.

    python train.py config/blackjack.py
"""
out_dir = 'out/blackjack'
env = 'Blackjack'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 4000
offline_updates = 500
online_updates = 200
gamma = 1.0
rollout_episodes = 256
eval_episodes = 2000
eval_quick = 300
reference = {'SFT of a 7B (RL4VLM)': (None, 0.231), 'PPO of a 7B (RL4VLM)': (None, 0.402), 'optimum': (0.432, 0.432)}
