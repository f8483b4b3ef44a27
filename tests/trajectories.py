"""Trajectories of small real models, trained for real, in any family's naming, sharded or not, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, VOCABULARY, text, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from distill.models import quiet_transformers
from distill.trajectory.tensors import INDEX

STEPS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
SHARD_BYTES = 40_000
NAMES: dict[str, Callable[[int], str]] = {
    "distill": lambda n: f"step_{n:08d}",
    "pythia": lambda n: f"step{n}",
    "olmo": lambda n: f"stage1-step{n}-tokens{n}B",
    "llm360": lambda n: f"ckpt_{n:03d}",
    "fineweb": lambda n: f"step-{n:06d}-{n}BT",
    "smollm2": lambda n: f"step-{n}",
    "smollm3": lambda n: f"stage1-step-{n}",
    "multiberts": lambda n: f"multiberts-seed_0-step_{n}k",
    "transformers": lambda n: f"checkpoint-{n}",
    "deepspeed": lambda n: f"global_step{n}",
}
ARCHITECTURES = {
    "multiberts": "bert",
    "pythia": "gpt_neox",
    "distill": "gpt2",
}  # the others: llama


def make_model(architecture: str, seed: int, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **SIZES[architecture], vocab_size=vocab_size)
    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    return auto.from_config(config)  # type: ignore[no-any-return]


def train_checkpoints(root: Path, architecture: str, seed: int = 0) -> Path:
    """STEPS of a run of Adam on text with something to learn, under root/whole and, in shards, root/sharded."""
    quiet_transformers()
    model = make_model(architecture, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tokens_BL = torch.from_numpy(text(256, seed + 1)).long()
    for step in range(1, STEPS[-1] + 1):
        chosen = torch.randint(len(tokens_BL), (8,), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens_BL[chosen], labels=tokens_BL[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            for kind, shard_bytes in (("whole", "1GB"), ("sharded", SHARD_BYTES)):
                folder = root / kind / str(step)
                model.save_pretrained(folder, max_shard_size=shard_bytes)
                write_tokenizer(folder)
    return root


def copy_as(source: Path, target: Path, family: str) -> Path:
    """Checkpoints of `train_checkpoints` in a family's naming."""
    for step in STEPS:
        shutil.copytree(source / str(step), target / NAMES[family](step))
    return target


def folder_of(root: Path, family: str, step: int) -> Path:
    return root / NAMES[family](step)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of one file."""
    tensors = load_file(path)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path, {"format": "pt"})


def replace_weights(target: Path, source: Path) -> None:
    for path in [*shards_of(target), target / INDEX]:
        path.unlink(missing_ok=True)
    for path in [*shards_of(source), source / INDEX]:
        if path.exists():
            shutil.copy(path, target)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def pickle_weights(folder: Path) -> None:
    """What the folder holds as safetensors as pytorch_model.bin instead, which is how older checkpoints came."""
    weights: dict[str, torch.Tensor] = {}
    for path in shards_of(folder):
        weights |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
