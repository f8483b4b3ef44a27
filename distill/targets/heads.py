"""The final layer of each teacher whose hidden states are stored: one file a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_prep.files import whole_file
from distill.head import Head
from distill.targets.header import BadTargets

AGAIN = "delete it and run the same `distill score` command again"
META = "head"  # in the file's metadata: JSON with the softcap and the sha256 of the tensors


def head_name(step: int) -> str:
    return f"head-{step:08d}.safetensors"


def save_head(folder: Path, step: int, head: Head) -> None:
    """Write the head of teacher step `step`, whole or not at all."""
    tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
    tensors = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    told = {"softcap": head.softcap, "sha256": _digest(tensors)}
    with whole_file(folder / head_name(step)) as file:
        file.write(save(tensors, {META: json.dumps(told)}))


def load_head(folder: Path, step: int, device: torch.device) -> Head:
    """The head of teacher step `step`. Raises BadTargets if it is not there or damaged."""
    path = folder / head_name(step)
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()[META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadTargets(f"{path} can't be read ({error}): {AGAIN}") from error
    if (found := _digest(tensors)) != told["sha256"]:
        raise BadTargets(
            f"{path} holds tensors of sha256 {found[:12]}, it says {told['sha256'][:12]}: {AGAIN}"
        )
    bias = tensors.get("bias")
    return Head(tensors["weight"].to(device), None if bias is None else bias.to(device), told["softcap"])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()
