"""
Blackjack from mixed play. The best player wins 43.2 % of the hands, a random one 28.1 %, one who always stands 39.6 %.

    python train.py config/blackjack.py

Hands won, sampled, 2,000 held-out hands, seeds 0, 1, 2: data 32 %, offline 41.3, 41.1, 42.3 %, online 41.8, 41.6, 42.3 % (intervals +- 2.2);
valid 99.8 %. The best player wins 44.5 % of these very hands. 12 to 16 minutes on one of two cores (AVX-512 with bf16).
"""
out_dir = 'out/blackjack'
env = 'Blackjack'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 10000  # the cards decide more than the player: many hands are needed to see who was right
dtype = 'bfloat16'
offline_updates = 1500
online_updates = 300
offline_ratio = 0.5
q_init = -2.0          # a lost hand is -1; the data's lowest return, -6.7 by many malformed replies, would bury what is rare
gamma = 0.95
critic_coef = 1.0
filter_warmup = 100
lr = 2e-3
beta = -0.02
rollout_episodes = 256
eval_episodes = 2000
