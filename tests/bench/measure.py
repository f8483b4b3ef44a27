"""Times, memory and provenance, as every bench script here measures and records them."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
ROUNDS_TO_WARM_UP = 2  # compile, first touch of the memory, clocks


def nothing() -> None:
    pass


class Step(NamedTuple):
    """What is timed, and what sets it up again before each repeat, untimed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


def medians(steps: Mapping[str, Step], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds, the median of `repeats`, interleaved so that a busy machine strikes all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + ROUNDS_TO_WARM_UP):
        for name, step in steps.items():
            step.prepare()
            took = _on_gpu(step.run) if device == "cuda" else _on_cpu(step.run)
            if repeat >= ROUNDS_TO_WARM_UP:
                times[name].append(took)
    return {name: statistics.median(took) for name, took in times.items()}


def _on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def extra_bytes(make: Callable[..., Mapping[str, Step]], name: str, *arguments: Any, device: str) -> int:
    """Peak memory of one run of step `name` of `make(*arguments)` over what its inputs take.

    On CPU resident memory of a fresh process: caches of the allocator and other steps' leavings do not count.
    """
    if device == "cuda":
        return _extra_on_gpu(make(*arguments)[name])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_on_cpu, (make, name, arguments))


def _extra_on_cpu(make: Callable[..., Mapping[str, Step]], name: str, arguments: tuple[Any, ...]) -> int:
    step = make(*arguments)[name]
    for _ in range(ROUNDS_TO_WARM_UP):
        step.prepare()
        step.run()
    step.prepare()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    before = _status_bytes("VmRSS")
    step.run()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _extra_on_gpu(step: Step) -> int:
    for _ in range(ROUNDS_TO_WARM_UP):
        step.prepare()
        step.run()
    step.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def provenance(device: str) -> dict[str, str]:
    """Device, versions, commit and date, as the first columns of a CSV row."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": device_name(device),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor()} x{torch.get_num_threads()} threads"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
