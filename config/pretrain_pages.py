"""
A tiny VLM that reads web pages, pre-trained as the first one was (config/pretrain_tiny.py): plain cloning of right answers about
MiniWoB++'s pages at 160 pixels, where text is shown pixel for pixel, and about their elements as text; all weights, no action syntax.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    python train.py config/pretrain_pages.py && cp -r out/pretrain_pages/model tiny-vlm-pages-more

goes on from the shipped tiny-vlm-pages (not run in this form), which was made from its predecessor (git show dd48b4c:tiny-vlm-pages): its numbers respelled, one token each, then 2,000 updates of these questions with the numbers in front of the lines and 900 with them at the end,
two thirds of the captions and of the texts to repeat left out (43 and 17 minutes beside other runs). From scratch, all at once, nothing was read yet after 500 updates. A page takes 0.1 s of a core to deal, 7,200 of them 15 minutes.
"""
out_dir = 'out/pretrain_pages'
model = 'tiny-vlm-pages'
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
offline_updates = 1500
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
