"""What the teacher says about this batch at this step:

a frozen model whose weights are swapped between two steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data_prep.shards import TokenizerInfo
from distill.config import Config
from distill.models import DTYPES, Inputs, Rows, check_split, counted_rows, load_model
from distill.trajectory.manifest import BadTrajectory, Manifest
from distill.trajectory.stream import CheckpointStream, copy_into


class Teacher:
    """The trajectory's checkpoints, one at a time, on one device."""

    def __init__(
        self,
        manifest: Manifest,
        config: Config,
        tokenizer: TokenizerInfo,
        sequence_length: int,
        device: torch.device,
    ) -> None:
        check_vocabulary(manifest, tokenizer)
        any_checkpoint = next(iter(manifest.checkpoints.values()))
        folder = Path(manifest.root) / any_checkpoint.folder
        model = load_model(config.data.task, folder, DTYPES[config.teacher.dtype], sequence_length)
        self.model = model.to(device).requires_grad_(False).eval()
        check_split(self.model)
        self.step: int | None = None
        self._stream = CheckpointStream(manifest)

    def use(self, step: int, following: int | None) -> float:
        """Teach with the checkpoint of teacher step `step` from now on, and fetch the `following` one.

        Seconds waited.
        """
        if step == self.step:
            return 0.0
        weights, waited = self._stream.take(step)
        copy_into(self.model, weights, step)
        self.step = step
        if following is not None:
            self._stream.prefetch(following)
        return waited

    @torch.no_grad()
    def rows(self, inputs: Inputs, rows_N: torch.Tensor) -> Rows:
        """The teacher's hidden states and head at the rows that count."""
        return counted_rows(self.model, inputs, rows_N)

    def close(self) -> None:
        self._stream.close()


def check_vocabulary(manifest: Manifest, tokenizer: TokenizerInfo) -> None:
    """Refuse a teacher that speaks other token ids than the shards.

    Raises:
        BadTrajectory: another tokenizer, or fewer logits than the shards' vocabulary.
    """
    if manifest.tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise BadTrajectory(
            f"{manifest.root}: the teacher was trained with tokenizer {manifest.tokenizer_sha256[:12]}, the shards were made with "
            f"{tokenizer.sha256[:12]}: make shards with the teacher's tokenizer (python -m data_prep tokenizer --from ...)"
        )
    if manifest.vocab_size < tokenizer.vocab_size:
        raise BadTrajectory(
            f"{manifest.root}: the teacher has {manifest.vocab_size} logits, the shards' tokenizer {tokenizer.vocab_size} tokens: "
            "they don't belong together"
        )
