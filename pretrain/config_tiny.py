"""
The tiny VLM, pre-trained to read in two stages, first captions, then questions: plain cloning of right answers about the games'
pictures, all weights, no action syntax.

    python train.py pretrain/config_tiny.py --env=Captions --model=scratch --out_dir=out/captions --offline_updates=600 --data_episodes=40000
    python train.py pretrain/config_tiny.py && cp -r out/pretrain_tiny/model tiny-vlm
"""
out_dir = 'out/pretrain_tiny'
model = 'out/captions/model'
env = 'Reading'
data_mix = {'expert': 1.0}
data_episodes = 60000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'    # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 5000
online_updates = 0
batch_size = 64
window = 1
micro_batch = 64
lr = 2e-3
min_lr = 0.02
warmup_updates = 100
max_new_tokens = 40
log_interval = 50
eval_interval = 500
eval_episodes = 2000
