"""Ranks that share a node's disk, and channels of their own on which a background thread may talk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from distill.distributed import World
from distill.signals import Cancelled
from distill.trajectory.manifest import Manifest, load_manifest

TIMEOUT = timedelta(hours=12)  # of one fetch, for which the other ranks wait
BROADCAST_BYTES = 64 << 20  # at once, for the buffers that a broadcast may need
T = TypeVar("T")


class ElsewhereError(ValueError):
    """What went wrong on another rank."""


class Channel:
    """Some ranks that talk among themselves, apart from the training's own collectives. Made by all ranks at once."""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks = list(ranks)
        self.index = self.ranks.index(rank) if rank in self.ranks else -1
        several = len(self.ranks) > 1
        self._group: Any = dist.new_group(self.ranks, TIMEOUT, "gloo") if several else None

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank of the channel, in its order. Collective."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, self._group)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank of the channel; none goes on if it fails on one. Collective.

        Raises:
            Exception: what came up, on its rank; on the others ElsewhereError, or Cancelled.
        """
        fault: Exception | None = None
        try:
            result = work()
        except Exception as error:  # whatever it is: the others would wait for hours
            fault = error
        told = None if fault is None else (isinstance(fault, Cancelled), str(fault) or repr(fault))
        faults = {rank: f for rank, f in zip(self.ranks, self.gather(told), strict=True) if f}
        if fault is not None:
            raise fault
        for rank, (is_cancelled, text) in faults.items():
            raise Cancelled if is_cancelled else ElsewhereError(f"rank {rank}: {text}")
        return result

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill a flat uint8 CPU tensor with that of the channel's rank number `source`. Collective."""
        if self._group is not None:
            for part in tensor.split(BROADCAST_BYTES):
                dist.broadcast(part, self.ranks[source], self._group)


def load_alike(where: str, world: World) -> Manifest:
    """The manifest as rank 0 reads it, on every rank: a teacher that is still training may add to it meanwhile.

    Collective. Raises as `load_manifest`.
    """
    channel = Channel(range(world.size), world.rank)
    manifest = channel.together(lambda: load_manifest(where))
    manifest.checkpoints, manifest.complete = channel.gather((manifest.checkpoints, manifest.complete))[0]
    return manifest


class Nodes:
    """All ranks by node. The first of each node, its leader, fetches and verifies for the others."""

    def __init__(self, world: World, disk: str) -> None:
        """disk: what the ranks of one node have in common, e.g. host and cache folder. Collective."""
        self.all = Channel(range(world.size), world.rank)
        disks = self.all.gather(disk)
        leaders = sorted({disks.index(each) for each in disks})
        self.is_leader = world.rank in leaders
        self.leaders = Channel(leaders, world.rank)
