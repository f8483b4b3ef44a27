"""What the teacher says about this batch: a frozen model whose weights are swapped between two steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from data_prep.shards import TokenizerInfo
from distill.config import Config
from distill.data import Batch
from distill.distributed import World, gather_from_ranks
from distill.engine import own_part, partitioned
from distill.models import (
    DTYPES,
    PLAIN,
    Inputs,
    Rows,
    Work,
    check_split,
    counted_rows,
    use_plain_attention,
    work_of,
)
from distill.objectives.input_gradients import with_pulls
from distill.objectives.terms import needs_of
from distill.pretrained import empty_model, hidden_width
from distill.schedule import Schedule
from distill.signals import stop_signal
from distill.trajectory.manifest import BadTrajectory, Manifest
from distill.trajectory.stream import CheckpointStream, make_fetcher

LOOK_SECONDS = 1.0  # between looks for a stop signal while weights are awaited


class Teacher:
    """The trajectory's checkpoints, one at a time, on one device or dealt over the ranks' devices (ZeRO 3)."""

    def __init__(
        self, manifest: Manifest, config: Config, tokenizer: TokenizerInfo, sequence_length: int, world: World
    ) -> None:
        """Collective, as are `use` and, under ZeRO 3, `rows`."""
        check_vocabulary(manifest, tokenizer)
        self.manifest, self.config, self.sequence_length = manifest, config, sequence_length
        self.world, self.device, self._vocab_size = world, world.device, tokenizer.vocab_size
        self.model: PreTrainedModel | None = None
        self.step: int | None = None
        self._needs = needs_of(config.objective.weights)
        self.work: Work | None = None  # of one forward
        self._fetcher = make_fetcher(manifest, config.teacher, world)
        self._stream: CheckpointStream | None = None

    def use(self, step: int, upcoming: Sequence[int] = ()) -> float:
        """Teach with the checkpoint of teacher step `step` from now on, have the first `upcoming` one fetched.

        Returns the seconds that this took. Raises BadTrajectory, OSError, Cancelled as `CheckpointStream.swap_in`.
        """
        start = time.perf_counter()
        stream = self._stream or self._build(step)
        if step != self.step:
            stream.swap_in(step)
        if self.step is None and self.model is not None:
            check_split(self.model)
        self.step = step
        if upcoming and upcoming[0] != step and upcoming[0] in self.manifest.checkpoints:
            stream.prefetch(upcoming[0], upcoming[1:])
        return time.perf_counter() - start

    @property
    def swap_seconds(self) -> float:
        """Since the start, of `use`'s seconds: for copies into the model."""
        return self._stream.swap_seconds if self._stream else 0.0

    @property
    def bytes_read(self) -> int:
        """Since the start, from storage by this node, as its first rank knows."""
        return self._fetcher.bytes_read

    def _build(self, step: int) -> CheckpointStream:
        """Make the model that this checkpoint's config describes, and the stream of weights into it."""
        with self._fetcher.at_hand(step) as folder:
            try:
                self.model = model = self._empty_model(folder)
            except ValueError as error:
                raise BadTrajectory(f"teacher step {step}: {error}") from error
            if model.config.vocab_size != self.manifest.vocab_size:
                raise BadTrajectory(
                    f"teacher step {step}: {folder} has {model.config.vocab_size} logits, the manifest says "
                    f"{self.manifest.vocab_size}: index the trajectory again"
                )
            if PLAIN & self._needs:
                use_plain_attention(model)
            with torch.device("meta"):  # whole, also where ZeRO 3 deals the model
                self.work = work_of(
                    empty_model(self.config.data.task, folder, model.dtype, self.sequence_length)
                )
            self._stream = CheckpointStream(self._fetcher, folder, model, own_part)
            return self._stream

    def width(self, step: int) -> int:
        """Of the hidden states of the checkpoint of teacher step `step`."""
        with self._fetcher.at_hand(step) as folder:
            return hidden_width(folder)

    def _empty_model(self, folder: Path) -> PreTrainedModel:
        dtype, task = DTYPES[self.config.teacher.dtype], self.config.data.task

        def build() -> PreTrainedModel:
            return empty_model(task, folder, dtype, self.sequence_length)

        if self.config.teacher.zero_stage == 3:
            return partitioned(build, dtype, self.config.teacher.offload)
        return build().requires_grad_(False).eval().to(device=self.device)

    def await_next(self, schedule: Schedule, consumed: int) -> bool:
        """Wait for the weights that `follow` will need. Whether they are at hand; not after a stop signal or a fault."""
        return self.await_weights(schedule.checkpoint_at(consumed))

    def follow(self, schedule: Schedule, consumed: int) -> float:
        """Be the teacher of the sample after `consumed` samples, and have the next one fetched. Seconds waited."""
        return self.use(schedule.checkpoint_at(consumed), schedule.upcoming(consumed))

    def await_weights(self, step: int) -> bool:
        """Wait until `use` would not have to, or until a rank has had a stop signal. Whether they are at hand."""
        if self._stream is None or step == self.step:
            return True
        ready, stop = False, False
        while not (ready or stop):
            own = [self._stream.is_ready(step, LOOK_SECONDS), bool(stop_signal())]
            told = gather_from_ranks([float(value) for value in own], self.world)
            ready, stop = all(has for has, _ in told), any(signal for _, signal in told)
        return ready and not self._stream.has_failed

    @torch.no_grad()
    def rows(self, inputs: Inputs, rows_N: torch.Tensor) -> Rows:
        """The teacher's hidden states and head at the rows that count."""
        assert self.model is not None, "use() comes first"
        return counted_rows(self.model, inputs, rows_N, self._needs)

    def signal(self, batch: Batch) -> Rows:
        """What the teacher says about this batch."""
        if batch.retold:
            rows = self.rows(batch.retold.inputs, batch.retold.rows_M)
            return rows._replace(inside=rows.inside._replace(matches_M=batch.retold.matches_M))
        if "gradients" in self._needs:
            assert self.model is not None, "use() comes first"
            with torch.enable_grad():
                rows = counted_rows(self.model, batch.inputs, batch.rows_N, self._needs)
                rows = with_pulls(rows, batch.labels_N, self._vocab_size)
        else:
            rows = self.rows(batch.inputs, batch.rows_N)
        return rows._replace(inside=rows.inside._replace(reference_N=batch.reference_N))

    def close(self) -> None:
        if self._stream:
            self._stream.close()


def check_vocabulary(manifest: Manifest, tokenizer: TokenizerInfo) -> None:
    """Refuse a teacher that speaks other token ids than the shards.

    Raises:
        BadTrajectory: another tokenizer, or fewer logits than the shards' vocabulary.
    """
    if manifest.tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise BadTrajectory(
            f"{manifest.url}: the teacher was trained with tokenizer {manifest.tokenizer_sha256[:12]}, not with "
            f"{tokenizer.sha256[:12]}, which the shards (or teacher.tokenizer) have: make shards with the teacher's tokenizer "
            "(python -m data_prep tokenizer --from ...), or name that in teacher.tokenizer, for a few objectives"
        )
    if manifest.vocab_size < tokenizer.vocab_size:
        raise BadTrajectory(
            f"{manifest.url}: the teacher has {manifest.vocab_size} logits, the tokenizer {tokenizer.vocab_size} "
            "tokens: they don't belong together"
        )
