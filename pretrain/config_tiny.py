"""
The tiny LLaVA of bases/tiny-vlm reads the games' pictures: it clones right answers to questions about them.

    python train.py pretrain/config_tiny.py --model=scratch --env=Captions --out_dir=out/captions \
        --offline_updates=600 --data_episodes=40000
    python train.py pretrain/config_tiny.py && cp -r out/pretrain_tiny/model/. bases/tiny-vlm

33 minutes on two CPU cores with bfloat16. Right answers: 94.5 %. It trains all weights and never shows the
action syntax. More: docs/bases.md
"""
out_dir = 'out/pretrain_tiny'
model = 'out/captions/model'
env = 'Reading'
data_mix = {'expert': 1.0}
data_episodes = 60000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'  # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
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
