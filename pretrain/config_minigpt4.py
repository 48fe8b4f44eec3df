"""
The tiny MiniGPT-4 reads the games' pictures: it clones right answers to questions about them.

    python -m pretrain.make_minigpt4 out/minigpt4
    python train.py pretrain/config_minigpt4.py --env=Captions --model=out/minigpt4 \
        --out_dir=out/minigpt4_captions --offline_updates=600
    python train.py pretrain/config_minigpt4.py
    python train.py config/numberline.py --model=out/minigpt4_tiny/model --out_dir=out/minigpt4_numberline

All weights are trained, the vision tower's and the Q-Former's, too. More: docs/bases.md
"""
out_dir = 'out/minigpt4_tiny'
model = 'out/minigpt4_captions/model'
env = 'Reading'
data_mix = {'expert': 1.0}
data_episodes = 16000
actor_loss = 'sft'
lora_r = 0
offline_updates = 1000
online_updates = 0
batch_size = 64
window = 1
micro_batch = 64
lr = 2e-3
min_lr = 0.02
warmup_updates = 100
max_new_tokens = 40
log_interval = 50
eval_interval = 300
eval_episodes = 500
