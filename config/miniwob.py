"""
MiniWoB++, ten tasks in one run, each by element number and by place: web pages in a real Chromium, from scripted, random and malformed play.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    python train.py config/miniwob.py

Not finished. Seed 0, 400 held-out pages, sampled, one core beside other runs (AMD EPYC), 600 + 250 updates in 2,305 s and 12 minutes for 3,600 recorded episodes: data 45.9 %, offline 49.5 % [44.6, 54.4], online 53.5 % [48.6, 58.3]; by element 61.5 %, by coordinate 45.5 %
(goals 90 % on tasks of clicks, 70 % over all). Asked for it, the base gives the number in click-dialog-2 in 100 % and the place in 98 %, the agent in 30 and 50: the knowledge does not yet come forth in play (LOG.md, with every task).
"""
out_dir = 'out/miniwob'
model = 'tiny-vlm-pages' # see README for what it reads and does not
env = ['miniwob/click-test-v1:element', 'miniwob/click-test-2-v1:element', 'miniwob/click-button-v1:element', 'miniwob/click-dialog-v1:element', 'miniwob/click-dialog-2-v1:element',
       'miniwob/click-tab-v1:element', 'miniwob/click-link-v1:element', 'miniwob/click-collapsible-v1:element', 'miniwob/focus-text-2-v1:element', 'miniwob/enter-text-v1:element',
       'miniwob/click-test-v1:coordinate', 'miniwob/click-test-2-v1:coordinate', 'miniwob/click-button-v1:coordinate', 'miniwob/click-dialog-v1:coordinate', 'miniwob/click-dialog-2-v1:coordinate',
       'miniwob/click-tab-v1:coordinate', 'miniwob/click-link-v1:coordinate', 'miniwob/click-collapsible-v1:coordinate', 'miniwob/focus-text-2-v1:coordinate', 'miniwob/enter-text-v1:coordinate']
size = 160
max_turns = 3          # entering a text by place needs three; many more, and chance hits nearly everything
expert_episodes = 0.32
data_mix = {'random': 0.8, 'malformed': 0.2}
data_episodes = 1400
cache_mb = 4000
vision_cache_mb = 1000
offline_updates = 400
online_updates = 120
batch_size = 24
num_envs = 16          # of which four are alive at once: a browser each
dtype = 'bfloat16'
offline_ratio = 0.5
micro_batch = 8         # sorted by length: less padding, and what one needs stays in the CPU's cache
gamma = 0.8
won_share = 0.8         # or else three of four actions that are cloned at first are chance, and what the base knew is gone
q_init = -1.5
pess_coef = 0.3
filter_warmup = 60
beta = 0.0
lr = 2e-3
min_lr = 0.2
max_new_tokens = 24
eval_episodes = 200
eval_interval = 0
eval_quick = 60
