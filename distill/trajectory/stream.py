"""The next teacher, read and verified by a thread while the current one teaches."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.trajectory.manifest import BadTrajectory, Manifest, verify

# Buffers that older checkpoints carry and newer code recomputes.
RECOMPUTED = (
    "rotary_emb.inv_freq",
    "attention.bias",
    "attention.masked_bias",
    "attn.bias",
    "attn.masked_bias",
    "embeddings.position_ids",
)


class CheckpointStream:
    """Verified weights of a trajectory's checkpoints, one ahead."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-teacher")
        self._pending: dict[int, Future[dict[str, Tensor]]] = {}

    def prefetch(self, step: int) -> None:
        """Start reading the checkpoint of teacher step `step`, unless that is under way."""
        if step not in self._pending:
            self._pending[step] = self._thread.submit(read_weights, self.manifest, step)

    def take(self, step: int) -> tuple[dict[str, Tensor], float]:
        """(weights by name, on CPU; seconds the caller waited). Raises BadTrajectory as `read_weights`."""
        self.prefetch(step)
        start = time.perf_counter()
        weights = self._pending.pop(step).result()
        return weights, time.perf_counter() - start

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def read_weights(manifest: Manifest, step: int) -> dict[str, Tensor]:
    """Weights of one checkpoint, after its files were checked against the manifest.

    Raises:
        BadTrajectory: unknown step, a file that is missing or differs, or a value that is not finite.
    """
    if step not in manifest.checkpoints:
        raise BadTrajectory(
            f"{manifest.root} has no teacher step {step}; it has {list(manifest.checkpoints)}"
        )
    checkpoint = manifest.checkpoints[step]
    verify(manifest, checkpoint)
    weights: dict[str, Tensor] = {}
    for name in checkpoint.files:
        if name.endswith(".safetensors"):
            weights |= load_file(Path(manifest.root) / checkpoint.folder / name)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise BadTrajectory(
                f"teacher step {step}: {name} holds values that are not finite; use another checkpoint"
            )
    return weights


def copy_into(model: nn.Module, weights: dict[str, Tensor], step: int) -> None:
    """Overwrite the model's weights in place, in its dtype and on its device. Tied names need one of their
    group.

    Raises:
        BadTrajectory: a name the model lacks, another shape, or weights that stayed untouched.
    """
    own = model.state_dict(keep_vars=True)
    filled = set()
    for name, tensor in weights.items():
        if name not in own:
            if name.endswith(RECOMPUTED):
                continue
            raise BadTrajectory(
                f"teacher step {step}: the model has no weight {name!r}; is it another architecture?"
            )
        if own[name].shape != tensor.shape:
            raise BadTrajectory(
                f"teacher step {step}: {name} has shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}"
            )
        own[name].data.copy_(tensor)
        filled.add(own[name].data_ptr())
    missing = [
        name
        for name, value in own.items()
        if value.data_ptr() not in filled and not name.endswith(RECOMPUTED)
    ]
    if missing:
        raise BadTrajectory(f"teacher step {step}: the checkpoint lacks {missing[:5]}")
