"""
A tiny VLM that reads web pages, pre-trained as the first one was (config/pretrain_tiny.py): plain cloning of right answers about
MiniWoB++'s pages at 160 pixels, where text is shown pixel for pixel, and about their elements as text; all weights, no action syntax.
In two stages: what a page shows; then where a named thing is, and which number has a text.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    python train.py config/pretrain_pages.py --model=scratch --out_dir=out/pages1 --offline_updates=1200 --data_episodes=20000 \\
        --env=Captions:miniwob/click-test-2-v1,Captions:miniwob/click-button-v1,Captions:miniwob/click-dialog-2-v1,Captions:miniwob/click-tab-v1,\\
    Captions:miniwob/focus-text-2-v1,Captions:miniwob/enter-text-v1,Captions:miniwob/click-collapsible-v1
    python train.py config/pretrain_pages.py && cp -r out/pretrain_pages/model tiny-vlm-pages

Not run in this form yet, the tiny-vlm-pages that is there was made otherwise (README): each page takes 0.1 s of a core to deal (1,500 of a task), so it wants an idle machine. The same questions in five shorter stages gave, with places at the middles of patches, 75 to 100 % of the places in
dialogs, tabs and fields, 40 % where two buttons stand anywhere (LOG.md).
"""
out_dir = 'out/pretrain_pages'
model = 'out/pages1/model'
env = ['Finding:miniwob/click-test-2-v1', 'Finding:miniwob/click-test-2-v1', 'Finding:miniwob/click-button-v1', 'Finding:miniwob/click-button-v1', 'Finding:miniwob/click-dialog-2-v1',
       'Finding:miniwob/click-tab-v1', 'Finding:miniwob/focus-text-2-v1', 'Finding:miniwob/enter-text-v1', 'Finding:miniwob/click-collapsible-v1']
size = 160
data_mix = {'expert': 1.0}
data_episodes = 36000
cache_mb = 8000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'    # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 2500
online_updates = 0
batch_size = 64
window = 1
micro_batch = 16
lr = 2e-3
min_lr = 0.05
warmup_updates = 100
weight_decay = 0.01
max_new_tokens = 100
log_interval = 50
eval_interval = 500
ckpt_interval = 100
eval_quick = 200
eval_episodes = 900
