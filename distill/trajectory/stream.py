"""The next teacher, read and verified by a thread while the current one teaches."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distill.models import load_model
from distill.trajectory.manifest import BadTrajectory, Manifest, verify


class CheckpointStream:
    """Verified checkpoints of a trajectory, one ahead."""

    def __init__(self, manifest: Manifest, task: str, sequence_length: int) -> None:
        self.manifest, self.task, self.sequence_length = manifest, task, sequence_length
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-teacher")
        self._pending: dict[int, Future[PreTrainedModel]] = {}

    def prefetch(self, step: int) -> None:
        """Start reading the checkpoint of teacher step `step`, unless that is under way."""
        if step not in self._pending:
            arguments = (self.manifest, step, self.task, self.sequence_length)
            self._pending[step] = self._thread.submit(read_checkpoint, *arguments)

    def take(self, step: int) -> tuple[PreTrainedModel, float]:
        """(the model, fp32 on CPU; seconds the caller waited). Raises BadTrajectory as `read_checkpoint`."""
        self.prefetch(step)
        start = time.perf_counter()
        model = self._pending.pop(step).result()
        return model, time.perf_counter() - start

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def read_checkpoint(manifest: Manifest, step: int, task: str, sequence_length: int) -> PreTrainedModel:
    """One checkpoint, after its files were checked against the manifest.

    Raises:
        BadTrajectory: unknown step, a file that is missing or differs, weights that the architecture needs
            and the files lack, or a value that is not finite.
    """
    if step not in manifest.checkpoints:
        raise BadTrajectory(f"{manifest.url} has no teacher step {step}; it has {list(manifest.checkpoints)}")
    checkpoint = manifest.checkpoints[step]
    folder = Path(manifest.url) / checkpoint.location
    verify(manifest, checkpoint, folder)
    try:
        # transformers knows shards, ties and the names that older versions gave. In fp32, because it sets the
        # process's default dtype while it loads, and the training thread relies on that being fp32.
        model = load_model(task, folder, torch.float32, sequence_length)
    except ValueError as error:
        raise BadTrajectory(f"teacher step {step}: {error}") from error
    if model.config.vocab_size != manifest.vocab_size:
        raise BadTrajectory(
            f"teacher step {step}: {folder} has {model.config.vocab_size} logits, the manifest says "
            f"{manifest.vocab_size}: index the trajectory again"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise BadTrajectory(
                f"teacher step {step}: {name} holds values that are not finite; use another checkpoint"
            )
    return model
