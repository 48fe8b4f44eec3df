"""
A tiny VLM that reads BabyAI's rooms, pre-trained as the first one was (config/pretrain_tiny.py): plain cloning of right answers about
rooms of 8 x 8 cells at 128 pixels, a cell as large as a patch, from above and as the agent sees them; all weights, no action syntax.

    pip install -r requirements-envs.txt
    mkdir -p out && git archive 8c939f5 tiny-vlm-grids | tar x -C out && python train.py config/pretrain_grids.py && cp -r out/pretrain_grids/model/. tiny-vlm-grids

16 minutes on one core beside another run, bfloat16. It starts from an earlier base that had learned to read in six stages (`git show 8c939f5:config/pretrain_grids.py`, 100 minutes). From scratch all these questions at once are not learned:
after 2,050 updates where a thing is 27 % (LOG.md). What there is, is learned from captions alone, then where a named thing is when asked alone, then the rest.
"""
out_dir = 'out/pretrain_grids2'
model = 'tiny-vlm-grids'
env = ['Leading:BabyAI-GoToLocal-v0:view', 'Leading:BabyAI-GoToLocal-v0:view', 'Leading:BabyAI-GoToLocal-v0:view', 'Leading:BabyAI-GoToLocal-v0:view', 'Leading:BabyAI-GoToLocal-v0:view',
       'Leading:BabyAI-GoToRedBallGrey-v0:view', 'Leading:BabyAI-GoToRedBallGrey-v0:view', 'Leading:BabyAI-PickupLoc-v0:view', 'Leading:BabyAI-PickupLoc-v0:view', 'Leading:BabyAI-OpenDoor-v0:view',
       'Leading:BabyAI-PutNextLocal-v0:view', 'Finding:BabyAI-GoToLocal-v0:view', 'Finding:BabyAI-GoToLocal-v0', 'Facing:BabyAI-GoToLocal-v0:view', 'Facing:BabyAI-OpenDoor-v0:view']
size = 128
data_mix = {'expert': 1.0}
data_episodes = 12000
cache_mb = 4000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'    # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 350
online_updates = 0
batch_size = 64
window = 1
micro_batch = 16
lr = 1e-3
min_lr = 0.05
warmup_updates = 20
weight_decay = 0.01
max_new_tokens = 80
log_interval = 50
eval_interval = 0
ckpt_interval = 350
eval_quick = 170
eval_episodes = 300
