"""Times, memory and provenance, as every bench script here measures and records them."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

HERE = Path(__file__).parent
RUNS_TO_WARM_UP = 2  # compile, first touch of the memory, clocks
CYCLES_OF_SLEEP = 3_000_000  # 1.5 to 2 ms of a GPU at 2.0 to 1.5 GHz
T = TypeVar("T")


def nothing() -> None:
    pass


def say(line: str) -> None:
    """Progress, apart from the figures on stdout."""
    print(line, file=sys.stderr, flush=True)


class Step(NamedTuple):
    """What is timed, and what sets it up again before each repeat, untimed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = nothing
    may_fail: bool = False  # a peer: where it fails it is left out


class Budget:
    """Seconds of a run, counted from here. What would begin after them is left out, by name."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def allows(self, what: str) -> bool:
        if self.spent < self.seconds:
            return True
        say(f"left out after {self.seconds:.0f} s: {what}")
        return False


UNLIMITED = Budget(math.inf)


def attempt(name: str, step: Step, measure: Callable[[Step], T]) -> T | None:
    """`measure(step)`; where a peer fails, None and the reason on stderr. Ours may not fail."""
    try:
        return measure(step)
    except (
        Exception
    ) as error:  # no memory, a compiler's, an API that changed: whatever it is, it is the peer's
        if not step.may_fail:
            raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        say(f"{name} failed: {type(error).__name__}: {reason}")
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # of a peer that ran out of memory
    return None


def medians(
    steps: Mapping[str, Step], device: str, repeats: int, budget: Budget = UNLIMITED
) -> dict[str, float]:
    """Milliseconds, the median of `repeats`, interleaved so that a busy machine strikes all alike.

    A peer has none where it fails, or where its first run, which may compile, would begin after the budget.
    """
    once = _on_gpu if device == "cuda" else _on_cpu
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        if (not step.may_fail or budget.allows(name)) and attempt(name, step, _warm_up):
            times[name] = []
    for _ in range(repeats):
        for name in list(times):
            took = attempt(name, steps[name], once)
            if took is None:
                del times[name]
            else:
                times[name].append(took)
    return {name: statistics.median(took) for name, took in times.items()}


def _warm_up(step: Step) -> bool:
    for _ in range(RUNS_TO_WARM_UP):
        step.prepare()
        step.run()
    step.prepare()  # what a run left, as gradients, is not in the next step's way
    return True


def _on_cpu(step: Step) -> float:
    step.prepare()
    start = time.perf_counter()
    step.run()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(step: Step) -> float:
    """The device sleeps while the host fills its queue: else the gaps between launches, which are this host's and
    vanish in a training step, would be timed with the kernels. Where a run makes the host wait, that still counts.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step.prepare()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES_OF_SLEEP)
    begin.record()
    step.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def extra_on_gpu(step: Step) -> int:
    """Peak memory of one run over what is there before it. `prepare` must drop the gradients of the run before."""
    _warm_up(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    step.prepare()
    return extra


def extra_on_cpu(make: Callable[..., Mapping[str, Step]], name: str, *arguments: Any) -> int:
    """The same of step `name` of `make(*arguments)`, as resident memory of a fresh process: caches of the allocator
    and other steps' leavings do not count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_here, make, name, arguments).result()


def _extra_here(make: Callable[..., Mapping[str, Step]], name: str, arguments: tuple[Any, ...]) -> int:
    step = make(*arguments)[name]
    _warm_up(step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    before = status_bytes("VmRSS")
    step.run()
    return max(status_bytes("VmHWM") - before, 0)


def status_bytes(key: str) -> int:
    """What the kernel says of this process under `key`, e.g. VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def provenance(device: str) -> dict[str, str]:
    """Device, versions, commit and date, as the first columns of a CSV row."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """With "-dirty" where a tracked file differs, but for the CSVs that benches write; "unknown" without git."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True).stdout.strip()

    ours = (":/", ":(top,exclude)tests/bench/*.csv")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *ours)
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor()} x{torch.get_num_threads()} threads"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row. A column that the file has not is added to it, empty in the rows before."""
    before = []
    if path.exists():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    columns = list(dict.fromkeys([*(before[0] if before else ()), *row]))
    as_before = bool(before) and columns == list(before[0])
    with path.open("a" if as_before else "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        if not as_before:
            writer.writeheader()
            writer.writerows(before)
        writer.writerow(row)
