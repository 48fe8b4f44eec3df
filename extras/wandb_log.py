"""
Log to Weights & Biases, if its own environment variable WANDB_PROJECT names a project.
"""
import os

def import_wandb(rank):
    """Import the package if this rank is to log, or return None; SystemExit if it is missing."""
    if rank > 0 or not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        import wandb
    except ImportError:
        raise SystemExit("WANDB_PROJECT is set, which needs the package wandb: pip install wandb, or unset "
                         "the variable.")
    return wandb

def start_wandb(cfg, rank):
    """Start a run with these settings -> the package, or None where nothing is logged."""
    wandb = import_wandb(rank)
    if wandb:
        wandb.init(config=vars(cfg), dir=cfg.out_dir)
    return wandb
