"""
A tiny VLM that reads web pages, pre-trained as the first one was (config/pretrain_tiny.py): plain cloning of right answers about
MiniWoB++'s pages at 160 pixels, where text is shown pixel for pixel, and about their elements as text; all weights, no action syntax.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    mkdir -p out && git archive f2f715b tiny-vlm-pages | tar x -C out
    python extras/sight.py out/tiny-vlm-pages out/sight                               # a new tower, which learns to read, before the language model of an earlier base
    python train.py config/pretrain_pages.py && cp -r out/pretrain_pages/model/. tiny-vlm-pages

The shipped tiny-vlm-pages: sight.py 718 s; 600 of these 1,100 updates, then 380 with --model=(what they gave) --offline_updates=380 --lr=1.2e-3 --warmup_updates=10 --seed=1 (16 and 10 minutes, one core beside another run).
A page takes 0.1 s of a core to deal, 8,100 of them 15 minutes; these were dealt once and kept for both. From scratch, language model and all at once, nothing was read after 500 updates.
"""
out_dir = 'out/pretrain_pages'
model = 'out/sight'
env = ['Captions:miniwob/click-test-2-v1', 'Captions:miniwob/click-button-v1', 'Captions:miniwob/click-dialog-2-v1', 'Captions:miniwob/click-link-v1', 'Captions:miniwob/click-tab-v1',
       'Captions:miniwob/focus-text-2-v1', 'Captions:miniwob/enter-text-v1', 'Captions:miniwob/click-collapsible-v1', 'Captions:miniwob/click-dialog-v1',
       'Finding:miniwob/click-test-2-v1', 'Finding:miniwob/click-button-v1', 'Finding:miniwob/click-dialog-2-v1', 'Finding:miniwob/click-link-v1', 'Finding:miniwob/click-tab-v1',
       'Finding:miniwob/focus-text-2-v1', 'Finding:miniwob/enter-text-v1', 'Finding:miniwob/click-collapsible-v1', 'Finding:miniwob/click-dialog-v1']
size = 160
data_mix = {'expert': 1.0}
data_episodes = 40000
cache_mb = 8000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'    # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 1100
online_updates = 0
batch_size = 64
window = 1
micro_batch = 16
lr = 2e-3
min_lr = 0.05
warmup_updates = 200
weight_decay = 0.01
max_new_tokens = 100
log_interval = 50
eval_interval = 500
ckpt_interval = 100
eval_quick = 200
eval_episodes = 900
