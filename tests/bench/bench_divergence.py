"""Forward and backward of the divergence on CPU next to eager PyTorch and torch.compile: ratios in one run.

    python tests/bench/bench_divergence.py [--repeats 7] [--quick]

Every figure is the best of interleaved repeats, so that a busy machine strikes all alike. `floor` is a pass
that reads two tensors and writes a third (torch.add with `out`): the memory traffic that can not be avoided.
Rows are appended to bench_divergence.csv. With MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 in the
environment all are faster, the peers most: much of their time is page faults on fresh [N, V] tensors.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.kernels import cpu, divergence

CSV = Path(__file__).with_suffix(".csv")
SHAPES = [(1024, 4096), (2048, 32000)]
TEMPERATURE, HARD_WEIGHT = 2.0, 0.1
Step = Callable[[], None]


def written_out(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> Tensor:
    """The same loss as anyone would write it, in float32."""
    student = student_NV.float()
    log_p, q = student.log_softmax(-1), (teacher_NV.float() / TEMPERATURE).softmax(-1)
    hard = F.cross_entropy(student, labels_N, reduction="sum")
    return F.kl_div(log_p, q, reduction="sum") + HARD_WEIGHT * hard


def steps(N: int, V: int, dtype: torch.dtype) -> dict[str, Step]:
    """What is timed, by name: each a forward and backward on the same tensors."""
    student = torch.randn(N, V).to(dtype).requires_grad_()
    teacher, labels = torch.randn(N, V).to(dtype), torch.randint(0, V, (N,))
    total, out = float(N), torch.empty(N, V, dtype=dtype)

    def step(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        def run() -> None:
            student.grad = None
            (loss_of(student, teacher, labels) / total).backward()

        return run

    def ours(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        keywords = {"hard_weight": HARD_WEIGHT, "temperature": TEMPERATURE, "impl": impl}
        return lambda s, t, y: divergence(s, t, y, **keywords).loss  # type: ignore[arg-type]

    def stream() -> None:
        torch.add(student.detach(), teacher, out=out)

    named = {
        "eager": step(written_out),
        "compile": step(torch.compile(written_out, dynamic=False)),
        "reference": step(ours("reference")),
        "floor": stream,
    }
    return named if cpu.load_problem else {"cpu": step(ours("cpu")), **named}


def best_times(named: dict[str, Step], repeats: int) -> dict[str, float]:
    """Milliseconds, best of `repeats`, interleaved; the first round warms up and compiles."""
    best = dict.fromkeys(named, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in named.items():
            start = time.perf_counter()
            run()
            if repeat:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def machine() -> dict[str, str]:
    """Device, versions, commit and date of a CSV row."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=CSV.parent
    )
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"{models[0] if models else platform.processor()} x{torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append(row: dict[str, str]) -> None:
    is_new = not CSV.exists()
    with CSV.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the small shape only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for N, V in SHAPES[:1] if arguments.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            times = best_times(steps(N, V, dtype), arguments.repeats)
            ours = times.get("cpu", times["reference"])
            ratios = {f"{name}_ratio": f"{ms / ours:.2f}" for name, ms in times.items() if name != "cpu"}
            case = {"rows": str(N), "vocabulary": str(V), "dtype": str(dtype).removeprefix("torch.")}
            append(machine() | case | {"cpu_ms": f"{times.get('cpu', float('nan')):.2f}"} | ratios)
            shown = "  ".join(f"{name} {ms:.1f} ms ({ms / ours:.2f}x)" for name, ms in times.items())
            print(f"[{N}, {V}] {case['dtype']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
