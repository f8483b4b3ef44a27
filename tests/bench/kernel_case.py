"""A case of `kernels.py`: steps that are timed together, and the figures made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Budget, Step, append_row, attempt, extra_on_cpu, extra_on_gpu, medians, provenance, say

VOCABULARIES = (32000, 30522, 50304, 128256)  # the first is the headline
FP32, BF16 = torch.float32, torch.bfloat16


class Figure(NamedTuple):
    """A number that may have a target: at least or at most so much."""

    name: str
    value: float
    target: str


class Bench(NamedTuple):
    """How to measure."""

    device: str
    repeats: int
    csv: Path
    budget: Budget
    vocabularies: tuple[int, ...]
    logits_only: bool


def case(
    bench: Bench,
    make: Callable[..., dict[str, Step]],
    *shape: Any,
    only: tuple[str, ...] | None = None,
    peaks_of: tuple[str, ...] = (),
) -> tuple[dict[str, float], dict[str, int]]:
    """(milliseconds, bytes at the peak beyond the inputs) of the steps of `make(device, *shape)`, told and recorded.

    only: the steps that are timed. peaks_of: those of them whose memory is measured too.
    """
    torch._dynamo.reset()  # it compiles a function for 8 shapes, then silently runs it eagerly
    label = " ".join([make.__name__, *(str(x).removeprefix("torch.") for x in shape)])
    say(f"[{bench.budget.spent:.0f} s] {label}")
    steps = {k: step for k, step in make(bench.device, *shape).items() if only is None or k in only}
    times = medians(steps, bench.device, bench.repeats, bench.budget)
    peaks = {}
    for name in peaks_of:
        of_step = partial(_extra_bytes, bench, make, name, shape)
        if name in times and (peak := attempt(f"memory of {name}", steps[name], of_step)) is not None:
            peaks[name] = peak
    _record(bench, label, times, peaks)
    return times, peaks


def _extra_bytes(bench: Bench, make: Any, name: str, shape: tuple[Any, ...], step: Step) -> int:
    return extra_on_gpu(step) if bench.device == "cuda" else extra_on_cpu(make, name, bench.device, *shape)


def _record(bench: Bench, label: str, times: dict[str, float], peaks: dict[str, int]) -> None:
    malloc = "" if bench.device == "cuda" else "tuned" if is_tuned() else "default"
    ms = {name: round(value, 3) for name, value in times.items()}
    mib = {name: round(value / 2**20, 1) for name, value in peaks.items()}
    found = {"case": label, "malloc": malloc, "ms": json.dumps(ms), "peak_MiB": json.dumps(mib)}
    append_row(bench.csv, provenance(bench.device) | found)
    for unit, values in (("ms", ms), ("extra MiB", mib)):
        if values:
            print(f"{label} [{unit}]: {', '.join(f'{k} {v}' for k, v in values.items())}", flush=True)


def is_tuned() -> bool:
    return "MALLOC_MMAP_MAX_" in os.environ


def suffix(V: int, dtype: torch.dtype = FP32, more: str = "") -> str:
    """Nothing for the headline case."""
    return ("" if V == VOCABULARIES[0] else f"_{V}") + ("" if dtype == FP32 else "_bf16") + more


def ratios(times: Mapping[str, float], what: str, name: str, targets: dict[str, str]) -> Iterator[Figure]:
    """How many times faster ours is than each peer that was measured."""
    for peer, target in targets.items():
        if peer in times:
            yield Figure(f"{what}_vs_{peer.replace(' ', '_')}{name}", times[peer] / times["ours"], target)


def peak_figures(peaks: dict[str, int], name: str, targets: dict[str, str]) -> Iterator[Figure]:
    """Our share of the memory of each peer that was measured."""
    yield Figure(f"linear_peak_MiB{name}", peaks["ours"] / 2**20, "")
    for peer, target in targets.items():
        if peer in peaks:
            yield Figure(
                f"linear_peak_vs_{peer.replace(' ', '_')}{name}", peaks["ours"] / peaks[peer], target
            )
