"""Run by test_memory: one rank trains two steps of a small model; rank 0 prints what memory its process held.

usage: memory_peak.py STAGE DTYPE [BUCKET], with RANK and the like in the environment. Bytes beyond those of a process that has
trained a tiny model first, so that libraries and thread pools do not count.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path

import torch

from distill import engine as engine_module
from distill.config import Config
from distill.distributed import World, start
from distill.engine import Engine
from distill.models import build_model

# As large as keeps DeepSpeed's buckets unfilled: 13 M parameters.
WIDTH, LAYERS, VOCABULARY = 512, 4, 512


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (at most since `forget_peak`) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def engine(world: World, stage: int, dtype: str, width: int, layers: int) -> Engine:
    config = Config(run_dir="-", batch_size=world.size, micro_batch_size=1)
    config.engine.zero_stage, config.engine.dtype = stage, dtype
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 4 * width,
    }
    model = build_model(
        "clm", "gpt_neox", sizes, vocab_size=VOCABULARY, sequence_length=16, special_ids={}, seed=0
    )
    return Engine(model, config, world, accumulation=1)


def train_step(trained: Engine) -> None:
    logits_BLV = trained.model(input_ids=torch.arange(16)[None]).logits
    trained.backward(logits_BLV.float().logsumexp(-1).sum(), 16.0)
    trained.step(1e-4)


def main(stage: int, dtype: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = start()
    tiny = engine(world, stage, dtype, 32, 1)
    train_step(tiny)
    del tiny
    gc.collect()
    before = resident("VmRSS")
    trained = engine(world, stage, dtype, WIDTH, LAYERS)
    train_step(trained)  # AdamW makes its moments
    gc.collect()
    held = resident("VmRSS")
    forget_peak()
    train_step(trained)
    if world.is_main:
        print(json.dumps({"held": held - before, "peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        engine_module.BUCKET = int(sys.argv[3])
    main(int(sys.argv[1]), sys.argv[2])
