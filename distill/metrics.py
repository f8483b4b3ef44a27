"""What a run says: one row every few steps to metrics.jsonl, TensorBoard and the terminal.

The names of all keys stand here.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from distill import hardware
from distill.files import write_text

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
SUMS = ("loss", "soft", "soft_ce", "hard", "num_correct", "num_rows")
TERM = "term_"  # and its name: a term of the objective beside the fused divergence
# Keys that depend on the clock and the machines: two equal runs differ in these alone.
CLOCK = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "mfu_with_teacher",
    "teacher_share",
    "stall_seconds",
    "swap_seconds",
    "slowest_rank",
    "slowest_over_mean",
    "storage_mb_per_node",
    "memory_peak_gib",
)


def means(sums: dict[str, float]) -> dict[str, float]:
    """Per counted token, in nats: loss (as weighted), soft (the objective's divergence from the teacher), soft_ce, hard.

    accuracy is the share of top-1 hits; term_NAME is any other term of the objective, unweighted.
    """
    rows = max(sums["num_rows"], 1.0)
    named = {key: sums[key] / rows for key in ("loss", "soft", "soft_ce", "hard")}
    terms = {key: value / rows for key, value in sums.items() if key.startswith(TERM)}
    return {**named, **terms, "accuracy": sums["num_correct"] / rows}


class Sums:
    """Sums of divergences, kept on the device: reading them each step would make the host wait for a GPU.

    terms: names of what comes as `terms_K` beside the divergence.
    """

    def __init__(
        self, device: torch.device, start: dict[str, float] | None = None, terms: Sequence[str] = ()
    ) -> None:
        self._keys = (*SUMS, *(TERM + name for name in terms))
        values = [(start or {}).get(key, 0.0) for key in self._keys]
        self._total = torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, sums: Any) -> None:
        """A Divergence, or the objective's sums that have its fields and `terms_K`."""
        values = torch.stack([getattr(sums, key).detach().double() for key in SUMS])
        self._total += torch.cat([values, sums.terms_K]) if len(self._keys) > len(SUMS) else values

    def read(self) -> dict[str, float]:
        return dict(zip(self._keys, self._total.tolist(), strict=True))


class Stopwatch:
    """Seconds spent inside its `with` blocks, on a GPU by events that nobody waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def take(self) -> float:
        """Seconds since the last `take`."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


def memory_peak(device: torch.device) -> float:
    """Most GiB that this rank has held: of the GPU's memory by its tensors, on CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Log:
    """Rows of one run, on the main rank; the other ranks' are silent."""

    def __init__(self, folder: Path, step: int, steps: int, is_main: bool) -> None:
        self._active = is_main
        if not is_main:
            return
        self._path = folder / METRICS
        keep_rows_until(self._path, step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            desc=folder.name,
            disable=not self._terminal,
            dynamic_ncols=True,
        )

    def row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row; kind is `train` or `validation`."""
        if not self._active:
            return
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)
        line = terminal_line(kind, step, values)
        if not self._terminal:
            log.info("%s", line)
        elif kind == "validation":
            self._bar.write(line)
        else:
            self._bar.set_postfix_str(line.split("  ", 1)[1])

    def advance(self) -> None:
        if self._active:
            self._bar.update()

    def flush(self) -> None:
        """Before a checkpoint is marked: rows that it makes unrepeatable must be on disk."""
        if self._active:
            self._board.flush()
            with self._path.open("a") as f:
                os.fsync(f.fileno())

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._board.close()


def terminal_line(kind: str, step: int, values: dict[str, Any]) -> str:
    """One line: `loss` is what is optimised, `labels` and `soft` its parts unweighted; shares are of the seconds."""
    shown = {
        "loss": "loss {:.3f}",
        "hard": "labels {:.3f}",
        "soft": "soft {:.3f}",
        "accuracy": "top-1 {:.3f}",
        "perplexity": "perplexity {:.1f}",
        "grad_norm": "norm {:.2f}",
        "lr": "lr {:.1e}",
        "teacher_step": "teacher {:d}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "mfu {:.1%}",
        "teacher_share": "teaching {:.0%}",
        "stall_seconds": "stall {:.1f} s",
    }
    return f"{kind} step {step}  " + "  ".join(
        text.format(values[key]) for key, text in shown.items() if key in values
    )


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will take again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, in order; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if kind in (None, row["kind"])]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second: the vendor's dense figure for known GPUs, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in {
            "H200": 989e12,
            "H100": 989e12,
            "A100": 312e12,
            "L40S": 362e12,
            "B200": 2250e12,
        }.items():
            if key in name:
                return peak
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096
    if device.type == "cpu":  # where products are emulated a second would not do for a larger one
        size = 1024 if hardware.cpu_multiplies(dtype) else 128
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for a GPU
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
