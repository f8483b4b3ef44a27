"""What the teacher says about this batch: a frozen model whose weights are swapped between two steps."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from data_prep.shards import TokenizerInfo
from distill.config import Config
from distill.models import DTYPES, Inputs, Rows, cast_parameters, check_split, counted_rows
from distill.schedule import Schedule
from distill.trajectory.manifest import BadTrajectory, Manifest
from distill.trajectory.stream import CheckpointStream


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
        self.device, self.dtype = device, DTYPES[config.teacher.dtype]
        self.model: PreTrainedModel | None = None
        self.step: int | None = None
        self._stream = CheckpointStream(manifest, config.data.task, sequence_length)

    def use(self, step: int, following: int | None) -> float:
        """Teach with the checkpoint of teacher step `step` from now on, fetch the `following` one. Seconds waited."""
        if step == self.step:
            return 0.0
        checkpoint, waited = self._stream.take(step)
        if self.model is None:
            check_split(checkpoint)
            cast_parameters(checkpoint, self.dtype)
            self.model = checkpoint.requires_grad_(False).eval().to(device=self.device)
        else:
            self.model.load_state_dict(checkpoint.state_dict())  # in place, cast to the teacher's dtype
        self.step = step
        if following is not None:
            self._stream.prefetch(following)
        return waited

    def follow(self, schedule: Schedule, consumed: int) -> float:
        """Be the teacher of the sample after `consumed` samples, and have the next one fetched. Seconds waited."""
        return self.use(schedule.checkpoint_at(consumed), schedule.checkpoint_after(consumed))

    @torch.no_grad()
    def rows(self, inputs: Inputs, rows_N: torch.Tensor) -> Rows:
        """The teacher's hidden states and head at the rows that count."""
        assert self.model is not None, "use() comes first"
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
            f"{manifest.url}: the teacher was trained with tokenizer {manifest.tokenizer_sha256[:12]}, the shards were "
            f"made with {tokenizer.sha256[:12]}: make shards with the teacher's tokenizer "
            "(python -m data_prep tokenizer --from ...)"
        )
    if manifest.vocab_size < tokenizer.vocab_size:
        raise BadTrajectory(
            f"{manifest.url}: the teacher has {manifest.vocab_size} logits, the tokenizer {tokenizer.vocab_size} "
            "tokens: they don't belong together"
        )
