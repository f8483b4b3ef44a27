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
ROOM = 4  # times the programs of a row must fit the device, so that other streams can run the same kernel

Backend = Literal["cuda", "hip", "interpreter"]
Target = Literal["dense", "argmax", "sparse", "sparse with tail", "labels"]


@dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    backend: Backend
    num_processors: int = 1


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


def plan(target: Target, kind: str, itemsize: int, columns: int, rows: int, device: Device) -> Plan:
    """itemsize: bytes of the widest logits; columns: of the student's."""
    if target != "dense":
        return _portable(_points_plan(target, itemsize, columns), device)
    held = held_plan(kind, itemsize, columns)
    if held.splits == 1:
        return _portable(dataclasses.replace(held, kernel="loop"), device)
    if device.backend != "cuda":
        # Waiting for other programs is not safe everywhere. With few rows a program a row leaves the device idle.
        chosen = (
            dataclasses.replace(held, kernel="phases")
            if rows < device.num_processors
            else loop_plan(itemsize)
        )
        return _portable(chosen, device)
    at_once = held.programs_at_once * device.num_processors
    return held if at_once >= ROOM * held.splits else loop_plan(itemsize)


def held_plan(kind: str, itemsize: int, columns: int, *, bytes_a_thread: int = 64) -> Plan:
    """Rows split into tiles of 128 threads that hold `bytes_a_thread` of each side; one tile up to twice that."""
    block = 128 * bytes_a_thread // itemsize
    registers = 96 if kind in ("jsd", "tvd") else 80
    if columns <= 2 * block:
        tile = _power_of_2(columns)
        return Plan("split", tile, 8 if tile > block else 4, registers)
    return Plan("split", block, 4, registers, -(-columns // block))


def loop_plan(itemsize: int) -> Plan:
    return Plan("loop", 8192 // itemsize, 8, 80)


def _points_plan(target: Target, itemsize: int, columns: int) -> Plan:
    if target == "sparse with tail":  # the points are marked in shared memory, 4 bytes a column
        return Plan("points", 2048, 4, 72)
    held = 32768 if target == "labels" else 16384
    if columns * itemsize <= 2 * held:
        tile = _power_of_2(columns)
        return Plan("points", tile, max(4, 16 * tile * itemsize // (2 * held)), 64)
    return Plan("points", 16384 // itemsize, 8, 80 if target == "argmax" else 72)


def candidates(kind: str, itemsize: int, columns: int) -> list[Plan]:
    """Plans for whole teachers that a sweep on a GPU should try; the first is the one chosen."""
    wide = held_plan(kind, itemsize, columns, bytes_a_thread=128)
    plans = [
        held_plan(kind, itemsize, columns),
        Plan("split", 16384 // itemsize, 8, 80, -(-columns * itemsize // 16384)),
        Plan("split", 16384 // itemsize, 8, 96, -(-columns * itemsize // 16384)),
        dataclasses.replace(wide, registers=160),
        Plan("split", 4096 // itemsize, 4, 64, -(-columns * itemsize // 4096)),
        *(
            Plan("loop", width // itemsize, warps, 80)
            for width, warps in ((8192, 8), (16384, 8), (16384, 16))
        ),
        dataclasses.replace(held_plan(kind, itemsize, columns), kernel="phases"),
    ]
    return [each for each in plans if each.kernel == "loop" or each.splits > 1]


def _portable(chosen: Plan, device: Device) -> Plan:
    if device.backend == "cuda":
        return chosen
    return dataclasses.replace(chosen, registers=None, ptx=False)


def _power_of_2(columns: int) -> int:
    return max(128, 1 << (columns - 1).bit_length())
