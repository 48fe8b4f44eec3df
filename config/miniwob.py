"""
MiniWoB++, ten tasks in one run: web pages in a real Chromium, by element number and by place, from scripted, random and malformed play.

    pip install -r requirements-envs.txt && apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver
    python train.py config/miniwob.py

Not run yet: settings to start from. The shipped tiny-vlm has never seen a page: name a model that has (config/pretrain_pages.py makes one).
To tell the two ways to act apart, put :element or :coordinate behind each name; the table has a row for each name.
"""
out_dir = 'out/miniwob'
env = ['miniwob/click-test-v1', 'miniwob/click-test-2-v1', 'miniwob/click-button-v1', 'miniwob/click-dialog-v1', 'miniwob/click-dialog-2-v1',
       'miniwob/click-link-v1', 'miniwob/click-tab-v1', 'miniwob/click-option-v1', 'miniwob/focus-text-2-v1', 'miniwob/enter-text-v1']
size = 160
max_turns = 10
data_mix = {'expert': 0.3, 'random': 0.5, 'malformed': 0.2}
data_episodes = 3000
cache_mb = 3000
offline_updates = 1500
online_updates = 400
num_envs = 16          # of which four are alive at once: a browser each
dtype = 'bfloat16'
offline_ratio = 0.5
gamma = 0.8
critic_coef = 1.0
won_share = 0.5
q_init = -1.5
pess_coef = 0.3
filter_warmup = 250
lr = 2e-3
min_lr = 0.2
max_new_tokens = 24
eval_episodes = 200
eval_quick = 60
