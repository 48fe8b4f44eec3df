"""
A tiny VLM that can read the games, BabyAI's grids and web pages: the second base, pre-trained as the first one was (config/pretrain_tiny.py), on questions
without any action syntax, at 160 pixels. Which worlds are asked about is said by `env`; leave out the names whose packages are not there.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    python train.py config/pretrain_worlds.py --model=scratch

Not run yet beyond a smoke test of a few updates. Recording takes a while: a page and its picture are 0.1 s, with four browsers about 0.03 s.
"""
out_dir = 'out/pretrain_worlds'
model = 'scratch'
env = ['Reading', 'Reading:BabyAI-GoToLocal-v0', 'Reading:BabyAI-GoToLocal-v0:view', 'Reading:miniwob/click-test-2-v1', 'Reading:miniwob/click-button-v1',
       'Reading:miniwob/click-dialog-2-v1', 'Reading:miniwob/click-link-v1', 'Reading:miniwob/click-option-v1', 'Reading:miniwob/enter-text-v1']
size = 160
data_mix = {'expert': 1.0}
data_episodes = 90000
cache_mb = 9000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'    # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 8000
online_updates = 0
batch_size = 64
window = 1
micro_batch = 64
lr = 2e-3
min_lr = 0.02
warmup_updates = 100
weight_decay = 0.01
max_new_tokens = 100
log_interval = 50
eval_interval = 500
ckpt_interval = 500
eval_quick = 200
eval_episodes = 1800
