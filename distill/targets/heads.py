"""The final layer of each teacher whose hidden states are stored: one file a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_prep.files import whole_file
from distill.head import Head
from distill.targets.header import BadTargets, Header, Scorer

AGAIN = "delete it and run the same `distill score` command again"
META = "head"  # in the file's metadata: JSON with step and weights of the scorer, the softcap and the sha256 of the tensors


def head_name(step: int) -> str:
    return f"head-{step:08d}.safetensors"


def save_head(folder: Path, step: int, scorer: Scorer, head: Head) -> None:
    """Write the head of teacher step `step`, whole or not at all."""
    tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
    tensors = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    told = {"step": step, "weights": scorer.weights, "softcap": head.softcap, "sha256": _digest(tensors)}
    with whole_file(folder / head_name(step)) as file:
        file.write(save(tensors, {META: json.dumps(told)}))


def check_head(header: Header, step: int) -> None:
    """Raises BadTargets unless the head of teacher step `step` is there, in its size and of the one that scored.

    Its numbers are not read.
    """
    _read(header, step, ())


def load_head(header: Header, step: int, device: torch.device) -> Head:
    """The head of teacher step `step`. Raises BadTargets if it is not there, of another teacher or damaged."""
    told, tensors = _read(header, step, ("weight", "bias"))
    if (found := _digest(tensors)) != told["sha256"]:
        path = Path(header.url) / head_name(step)
        raise BadTargets(
            f"{path} holds tensors of sha256 {found[:12]}, it says {told['sha256'][:12]}: {AGAIN}"
        )
    bias = tensors.get("bias")
    return Head(tensors["weight"].to(device), None if bias is None else bias.to(device), told["softcap"])


def _read(header: Header, step: int, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the file says of itself, those of its tensors that have these names)."""
    path = Path(header.url) / head_name(step)
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()[META])
            owner = told["step"], tuple(told["weights"])
            tensors = {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadTargets(f"{path} can't be read ({error}): {AGAIN}") from error
    if owner != (step, header.checkpoints[step].weights):
        raise BadTargets(
            f"{path} is the head of teacher step {owner[0]} with {_short(owner[1])}, the targets were scored by step {step} "
            f"with {_short(header.checkpoints[step].weights)}: {AGAIN}"
        )
    return told, tensors


def _short(weights: Sequence[str]) -> str:
    return "weights of sha256 " + ", ".join(each[:12] for each in weights)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()
