"""Which kernel with which tile serves a call: a pure function, so that a machine without a GPU can test the choice.

The register bounds come from ahead-of-time compilation (tests/test_kernels_aot.py holds them without spills): the more
columns a multiprocessor holds in flight, the better waiting, exp2 and memory overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

REGISTERS, THREADS, MAX_PROGRAMS = 65536, 2048, 32  # of a multiprocessor, compute capability 8.0 and 9.0
LARGEST_TILE = 32768  # columns of 2 bytes that 16 warps hold of one row without spills


@dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    backend: Literal["cuda", "hip", "interpreter"]
    num_processors: int = 1


@dataclass(frozen=True)
class Plan:
    """A kernel and its tile."""

    kernel: Literal["split", "phases", "loop", "points"]  # phases: the split kernel launched once a phase
    block: int  # columns of a tile
    warps: int
    registers: int | None = None  # bound for each thread; None leaves it to the compiler
    splits: int = 1  # programs that share a row

    @property
    def programs_at_once(self) -> int:
        """How many a multiprocessor holds; they are kept by registers and threads, hardly by shared memory."""
        threads = 32 * self.warps
        return min(REGISTERS // (threads * (self.registers or 128)), THREADS // threads, MAX_PROGRAMS)


def plan(target: str, kind: str, itemsize: int, columns: int, rows: int, device: Device) -> Plan:
    """target: "dense", "argmax", "sparse" or "labels"; itemsize: bytes of the wider dtype; columns: of the student."""
    if target != "dense":
        return _points_plan(itemsize, columns)
    tile = _power_of_2(columns)
    if tile * itemsize <= 2 * 8192:
        return Plan("loop", tile, max(4, tile * itemsize // 2048), 96)
    split = split_plan(kind, itemsize, columns)
    if device.backend != "cuda":
        few = rows < device.num_processors
        return Plan("phases", split.block, split.warps, None, split.splits) if few else Plan("loop", 4096, 8)
    at_once = split.programs_at_once * device.num_processors
    return split if at_once >= 4 * split.splits else Plan("loop", 4096, 8, 80)


def split_plan(kind: str, itemsize: int, columns: int, block: int = 4096, warps: int = 4) -> Plan:
    block = block * 2 // itemsize
    registers = 96 if kind in ("jsd", "tvd") else 80
    return Plan("split", block, warps, registers, -(-columns // block))


def _points_plan(itemsize: int, columns: int) -> Plan:
    tile = _power_of_2(columns)
    if tile * itemsize <= 2 * LARGEST_TILE:
        return Plan("points", tile, max(4, tile * itemsize // 4096), 80)
    return Plan("points", 8192, 8, 80)


def _power_of_2(columns: int) -> int:
    return max(128, 1 << (columns - 1).bit_length())
