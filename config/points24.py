"""
Points24 (make 24 from four cards) from play that is mostly right: 73.1 % of the deals can be solved at all.

    python train.py config/points24.py

500 held-out deals, sampled, seeds 0, 1, 2: 0.0, 0.0, 0.2 % (greedy 0.8, 0.6, 0.6), valid 99.1, 99.6, 99.0 %; data 55.3, 53.8, 53.9 %; SFT and PPO of a 7B 2 to 3 %.
Nine minutes on one of two cores. Its own play adds nothing here (100 online updates: 0 %, valid 98.2), so there is no online phase.
"""
out_dir = 'out/points24'
env = 'Points24'
data_mix = {'expert': 0.9, 'random': 0.08, 'malformed': 0.02}
data_episodes = 3000
dtype = 'bfloat16'
offline_updates = 900
online_updates = 0
won_share = 0.5
gamma = 0.9            # a formula takes eight turns and more
reward_clip = 1.0
q_init = -1.5
pess_coef = 0.3
critic_coef = 1.0
filter_warmup = 250
lr = 2e-3
min_lr = 0.1
eval_episodes = 500
