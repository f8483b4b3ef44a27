"""Which kernel with which tile serves a call: a pure function, so that a machine without a GPU can test the choice.

The register bounds come from ahead-of-time compilation: tests/test_kernels_aot.py holds all of these plans to them
without spills. The more columns a multiprocessor holds in flight, the better memory, exp2 and waiting overlap.
None of it has been measured on a GPU yet; `candidates` is what a sweep should try.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

REGISTERS, THREADS, MAX_PROGRAMS = 65536, 2048, 32  # of a multiprocessor of compute capability 8.0 or 9.0
# Times the programs of a row must fit the device, so that other streams can run the same kernel, or a part of the
# device be taken away.
ROOM = 4

Backend = Literal["cuda", "hip", "interpreter"]
Target = Literal["dense", "argmax", "sparse", "sparse with tail", "labels"]


@dataclass(frozen=True)
class Device:
    """Where a call runs."""

    backend: Backend
    num_processors: int = 1


@dataclass(frozen=True)
class Shape:
    """What of a call the choice depends on."""

    target: Target
    kind: str
    itemsize: int  # bytes of the widest logits
    rows: int
    columns: int  # of the student
    align: int = 8  # columns that can be loaded at once
    padded: bool = False  # there are columns beyond the vocabulary
    two_temperatures: bool = False  # the student's and that of its labels

    @property
    def is_plain(self) -> bool:
        return self.align == 8 and not self.padded and not self.two_temperatures


@dataclass(frozen=True)
class Plan:
    """A kernel and its tile."""

    kernel: Literal["split", "phases", "loop", "points"]  # phases: the split kernel, launched once a phase
    block: int  # columns of a tile
    warps: int
    registers: int | None = None  # bound for each thread; None leaves it to the compiler
    splits: int = 1  # programs that share a row
    ptx: bool = True  # NVIDIA's assembly

    @property
    def programs_at_once(self) -> int:
        """How many programs a multiprocessor holds."""
        threads = 32 * self.warps
        return min(REGISTERS // (threads * (self.registers or 128)), THREADS // threads, MAX_PROGRAMS)


def plan(shape: Shape, device: Device) -> Plan:
    if shape.target != "dense":
        return _portable(_points_plan(shape), device)
    held = held_plan(shape)
    if held.splits == 1:
        return _portable(dataclasses.replace(held, kernel="loop"), device)
    if device.backend != "cuda":
        # Waiting for other programs is not safe everywhere. With few rows a program a row leaves the device idle.
        phases = dataclasses.replace(held, kernel="phases")
        return _portable(phases if shape.rows < device.num_processors else loop_plan(shape), device)
    at_once = held.programs_at_once * device.num_processors
    return held if at_once >= ROOM * held.splits else loop_plan(shape)


def held_plan(shape: Shape) -> Plan:
    """Rows split into tiles of 128 threads that hold 64 bytes of each side; up to twice that is one tile."""
    block = 8192 // shape.itemsize
    if shape.columns <= 2 * block:
        tile = _power_of_2(shape.columns)
        return Plan("split", tile, 8 if tile > block else 4, _registers(shape))
    return Plan("split", block, 4, _registers(shape), -(-shape.columns // block))


def loop_plan(shape: Shape) -> Plan:
    return Plan("loop", 8192 // shape.itemsize, 8, _registers(shape))


def _registers(shape: Shape) -> int:
    """The least of 80, 96 and 128 at which nothing spills: 6, 5 and 4 programs of 128 threads at once."""
    aligned = shape.align == 8 and not shape.padded
    if shape.kind == "forward_kl":
        return 128 if shape.align == 1 else 80 if aligned else 96
    fits_one_tile = shape.columns * shape.itemsize <= 16384
    if not aligned or shape.two_temperatures or fits_one_tile:
        return 128
    return 80 if shape.kind == "reverse_kl" else 96


def _points_plan(shape: Shape) -> Plan:
    more = 0 if shape.is_plain else 48 if shape.align == 1 else 16
    if shape.target == "sparse with tail":  # the points are marked in shared memory, 4 bytes a column
        return Plan("points", 2048, 4, 80 + more)
    widest = {"labels": 65536, "sparse": 32768, "argmax": 16384}[shape.target] if shape.is_plain else 16384
    if shape.columns * shape.itemsize <= widest:
        tile = _power_of_2(shape.columns)
        warps = max(4, min(16, tile * shape.itemsize // 2048))
        return Plan("points", tile, warps, (64 if warps == 16 else 80) + more)
    return Plan("points", 16384 // shape.itemsize, 8, 80 + more)


def candidates(shape: Shape) -> list[Plan]:
    """Plans for whole teachers that a sweep on a GPU should try; the first is the one chosen."""

    def split(size: int, warps: int, registers: int) -> Plan:
        block = size // shape.itemsize
        return Plan("split", block, warps, registers, -(-shape.columns // block))

    registers = _registers(shape)
    splits = [
        split(8192, 4, registers),
        split(16384, 8, registers),
        split(16384, 8, registers + 16),
        split(16384, 4, 168),
        split(4096, 4, 64),
    ]
    sizes = ((8192, 8), (16384, 8), (16384, 16))
    loops = [Plan("loop", size // shape.itemsize, warps, registers) for size, warps in sizes]
    phases = dataclasses.replace(splits[0], kernel="phases")
    return [each for each in (*splits, *loops, phases) if each.kernel == "loop" or each.splits > 1]


def _portable(chosen: Plan, device: Device) -> Plan:
    if device.backend == "cuda":
        return chosen
    return dataclasses.replace(chosen, registers=None, ptx=False)


def _power_of_2(columns: int) -> int:
    return max(128, 1 << (columns - 1).bit_length())
