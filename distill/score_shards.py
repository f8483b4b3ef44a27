"""What one rank makes of its part of the training order: micro-batches, the teacher's forward, shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.config import Config
from distill.data import Batch, Samples
from distill.distributed import World
from distill.models import Inputs, Rows
from distill.sample_order import Ints
from distill.targets.encode import Kept, keep, split, to_bytes, uniforms
from distill.targets.header import BadTargets, Entry, Header, Range
from distill.targets.writer import compress, member_name, write_shard
from distill.teacher import Teacher

MOST_SEQUENCES = 32  # a forward, where micro_batch_size leaves it open


class Shards:
    """This rank's shards: the micro-batches that it reads, and what it makes of them."""

    def __init__(
        self, config: Config, samples: Samples, header: Header, teacher: Teacher, world: World, out: Path
    ) -> None:
        self.samples, self.header, self.teacher, self.out = samples, header, teacher, out
        self.rank, self.device = world.rank, world.device
        self.micro = config.micro_batch_size or min(max(1, config.batch_size // world.size), MOST_SEQUENCES)
        self.is_collective = config.teacher.zero_stage == 3
        tokens_BL = torch.zeros(1, samples.sequence_length, dtype=torch.int64, device=world.device)
        self._nothing = Inputs(tokens_BL, None, None), torch.zeros(0, dtype=torch.int64, device=world.device)
        # Beside the next forward.
        self._packers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack")

    def _own(self, places: Sequence[Range]) -> Range:
        """This rank's shard of a round; an empty range if there is none for it."""
        return places[self.rank] if self.rank < len(places) else Range(0, 0, places[0].checkpoint)

    def positions(self, rounds: Sequence[Sequence[Range]]) -> Iterator[Ints]:
        """Of all micro-batches that this rank reads, in order."""
        for places in rounds:
            own = self._own(places)
            for first in range(own.first, own.after, self.micro):
                yield np.arange(first, min(first + self.micro, own.after))

    def make(self, places: Sequence[Range], batches: Iterator[Batch]) -> Entry | None:
        """Score this rank's shard of a round and write it; None if there is none for it.

        Under ZeRO 3 all ranks go forward as often: beyond the end of its shard, and after an error, which is raised
        at the end of the round, a rank has the teacher read nothing.
        """
        own, num_rows, held = self._own(places), 0, Held(self.is_collective)
        packing: list[Future[list[Member]]] = []
        most = max(map(len, places)) if self.is_collective else len(own)
        for first in range(own.first, own.first + most, self.micro):
            batch = None
            if first < own.after and not held.error:
                with held:
                    batch = next(batches).to(self.device)
            if batch is None:
                self.teacher.rows(*self._nothing)
                continue
            said = self.teacher.rows(batch.inputs, batch.rows_N)
            num_rows += len(batch.rows_N)
            positions_B = np.arange(first, first + len(batch.sample_ids))
            with held:
                packing.append(self._pack(positions_B, batch, said, own.checkpoint))
        if held.error:
            raise held.error
        if not len(own):
            return None
        members = [member for future in packing for member in future.result()]
        raw = sum(member.raw for member in members)
        return write_shard(
            self.out, own, [(member.name, member.content) for member in members], num_rows, raw
        )

    def _pack(self, positions_B: Ints, batch: Batch, said: Rows, step: int) -> Future[list[Member]]:
        """Have the members of a micro-batch made. Raises BadTargets if the teacher says what is no number."""
        codec, vocab_size = self.header.codec, self.header.vocab_size
        epochs, ids = (positions_B // len(self.samples)).tolist(), batch.sample_ids.tolist()
        in_sample_N = batch.rows_N // self.samples.sequence_length
        counts_B = torch.bincount(in_sample_N, minlength=len(ids)).tolist()
        uniform_NS = None
        if codec.draws:
            keys = zip(epochs, ids, counts_B, strict=True)
            uniform_NS = np.concatenate([uniforms(self.samples.seed, *key, codec.draws) for key in keys])
        try:
            kept = keep(codec, said.hidden_ND, said.head, batch.labels_N, vocab_size, uniform_NS)
        except ValueError as error:
            where = f"samples {positions_B[0]} to {positions_B[-1]} of the training order"
            raise BadTargets(f"teacher step {step}, {where}: {error}") from error
        names = [member_name(epoch, sample) for epoch, sample in zip(epochs, ids, strict=True)]
        return self._packers.submit(_members, names, split(kept, counts_B), vocab_size)

    def close(self) -> None:
        self._packers.shutdown(cancel_futures=True)


class Held:
    """Around work of a rank: holds its error back where the other ranks still wait for this one's forwards."""

    def __init__(self, holds: bool) -> None:
        self.holds = holds
        self.error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self.holds or not isinstance(error, Exception):
            return False
        self.error = error
        return True


class Member(NamedTuple):
    """A sample's file in a shard, and the bytes of it before compression."""

    name: str
    content: bytes
    raw: int


def _members(names: Sequence[str], kept_B: Sequence[Kept | Tensor], vocab_size: int) -> list[Member]:
    payloads = [to_bytes(kept, vocab_size) for kept in kept_B]
    return [Member(name, compress(each), len(each)) for name, each in zip(names, payloads, strict=True)]
