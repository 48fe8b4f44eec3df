"""
The last stage of bases/tiny-vlm-grids asks about BabyAI's rooms, most of all about shortest paths.

    mkdir -p out && git archive f245810 tiny-vlm-grids | tar x -C out
    python train.py pretrain/config_grids.py && cp -r out/pretrain_grids/model/. bases/tiny-vlm-grids

7 minutes on one CPU core with bfloat16. Right ways, asked in the shape of play: 77 %.
How these stages and bases/tiny-vlm-lake were made: docs/bases.md
"""
out_dir = 'out/pretrain_grids'
model = 'out/tiny-vlm-grids'
env = [
    'Leading:BabyAI-GoToLocal-v0:view',
    'Leading:BabyAI-GoToLocal-v0:view',
    'Leading:BabyAI-GoToLocal-v0:view',
    'Leading:BabyAI-GoToLocal-v0:view',
    'Leading:BabyAI-GoToLocal-v0:view',
    'Leading:BabyAI-GoToRedBallGrey-v0:view',
    'Leading:BabyAI-GoToRedBallGrey-v0:view',
    'Leading:BabyAI-PickupLoc-v0:view',
    'Leading:BabyAI-PickupLoc-v0:view',
    'Leading:BabyAI-OpenDoor-v0:view',
    'Leading:BabyAI-PutNextLocal-v0:view',
    'Finding:BabyAI-GoToLocal-v0:view',
    'Finding:BabyAI-GoToLocal-v0',
    'Facing:BabyAI-GoToLocal-v0:view',
    'Facing:BabyAI-OpenDoor-v0:view',
]
size = 128
data_mix = {'expert': 1.0}
data_episodes = 12000
actor_loss = 'sft'
lora_r = 0
dtype = 'bfloat16'  # half the time where the CPU has avx512_bf16 or amx; float32 elsewhere
offline_updates = 350
online_updates = 0
batch_size = 64
window = 1
micro_batch = 16
lr = 1e-3
min_lr = 0.05
warmup_updates = 20
max_new_tokens = 80
log_interval = 50
eval_interval = 350
eval_episodes = 300
