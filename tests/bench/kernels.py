"""The distillation kernels beside their peers and the floor, as ratios in one run.

    python tests/bench/kernels.py --device cpu|cuda [--json] [--quick] [--budget 450]

Medians of interleaved repeats. A row for each case is appended to kernels.csv. On CUDA the kernels are first
checked against float64, then the figures are measured, those with targets first, then every candidate configuration
is timed; what would begin after the budget is named and left out, so that the whole takes less than 8 minutes.
On CPU the logits are also measured with page faults tuned away (MALLOC_MMAP_MAX_=0): by default much of the
peers' time is page faults on fresh [N, V] tensors. Liger is measured where it is installed, on CUDA. A peer that
fails is named on stderr and has no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # measure.py; kernel_truth.py

from kernel_case import BF16, FP32, VOCABULARIES, Bench, Figure, case, is_tuned, peak_figures, ratios, suffix
from kernel_steps import kl_steps, linear_steps, masked_steps
from measure import Budget, provenance, say

CSV = Path(__file__).with_suffix(".csv")
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
MASKED_SHARE = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one line a figure; all else goes to stderr")
    parser.add_argument("--quick", action="store_true", help="the headline vocabulary alone")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of each step")
    parser.add_argument("--budget", type=float, help="seconds; default: 450 on cuda, endless on cpu")
    parser.add_argument("--csv", type=Path, default=CSV, help="where a row for each case is appended")
    parser.add_argument("--logits-only", action="store_true", help=argparse.SUPPRESS)  # the tuned child
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    seconds = chosen.budget if chosen.budget is not None else 450 if chosen.device == "cuda" else math.inf
    vocabularies = VOCABULARIES[:1] if chosen.quick or chosen.logits_only else VOCABULARIES
    bench = Bench(
        chosen.device, chosen.repeats, chosen.csv, Budget(seconds), vocabularies, chosen.logits_only
    )
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if chosen.json else out):
        print(" ".join(f"{key}={value}" for key, value in provenance(bench.device).items()), flush=True)
        say(f"budget: {seconds:.0f} s")
        for figure in on_cuda(bench) if bench.device == "cuda" else on_cpu(bench):
            line = f"  {figure.name:<44} {figure.value:>8.2f}   {figure.target}"
            print(json.dumps(figure._asdict()) if chosen.json else line, file=out, flush=True)
        say(f"{bench.budget.spent:.0f} s in all")


def on_cpu(bench: Bench) -> Iterator[Figure]:
    for V in bench.vocabularies:
        for dtype in (FP32, BF16):
            yield from logits_on_cpu(bench, V, dtype)
    if bench.logits_only:
        return
    yield from tuned(bench)
    yield from linear_on_cpu(bench, FP32)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else the peers' products are emulated: minutes a step
        yield from linear_on_cpu(bench, BF16)
    times, _ = case(bench, masked_steps, 2048, 32000, 512, 1024, FP32, MASKED_SHARE)
    yield Figure("masked_vs_all_rows", times["gathered"] / times["all rows"], "<= 0.20")


def logits_on_cpu(bench: Bench, V: int, dtype: torch.dtype) -> Iterator[Figure]:
    N = 2048 * 32000 // V
    with_memory = V == VOCABULARIES[0] and not is_tuned()
    times, peaks = case(bench, kl_steps, N, V, dtype, peaks_of=("ours",) if with_memory else ())
    name = suffix(V, dtype, "_tuned" if is_tuned() else "")
    least = {"compile": ">= 3.5", "eager": ">= 5"} if is_tuned() else {"compile": ">= 5", "eager": ">= 20"}
    yield from ratios(times, "kl", name, least)
    yield Figure(
        f"kl_vs_floor{name}", times["ours"] / times["floor"], "<= 1.7" if dtype == FP32 else "<= 2.4"
    )
    if with_memory:
        yield Figure(
            f"kl_extra_memory_share{name}", peaks["ours"] / (N * V * dtype.itemsize), "0 (of [N, V])"
        )


def tuned(bench: Bench) -> Iterator[Figure]:
    """The logits once more in a process whose allocator keeps its memory."""
    command = [sys.executable, __file__, "--json", "--logits-only", "--repeats", str(bench.repeats)]
    command += ["--csv", str(bench.csv)]
    done = subprocess.run(command, env=os.environ | TUNED, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the tuned run failed with exit status {done.returncode}")
    yield from (Figure(**json.loads(line)) for line in done.stdout.splitlines())


def linear_on_cpu(bench: Bench, dtype: torch.dtype) -> Iterator[Figure]:
    peers = {"compile": "<= 0.33", "eager": "<= 0.125", "auto_chunker": ""}
    shape, name = (2048, 32000, 512, 1024, dtype), suffix(32000, dtype)
    times, peaks = case(bench, linear_steps, *shape, peaks_of=("ours", *peers))
    yield Figure(f"linear_vs_gemm{name}", times["ours"] / times["gemm"], "<= 1.08")
    yield from ratios(times, "linear", name, {"compile": "", "auto_chunker": ""})
    yield from peak_figures(peaks, name, peers)


def on_cuda(bench: Bench) -> Iterator[Figure]:
    """Correctness, the figures that have targets, other vocabularies, the sweep; parts are left out from the end."""
    import kernel_cuda as cuda

    cuda.check(bench.vocabularies)
    speed = cuda.copy_speed()
    print(f"copy: {speed / 1e12:.2f} TB/s read and written", flush=True)
    large, headline = 128256, VOCABULARIES[0]
    parts = [
        ("KL", headline, kl_on_cuda(bench, "forward_kl", headline, speed)),
        ("KL", large, kl_on_cuda(bench, "forward_kl", large, speed)),
        ("heads and KL", headline, linear_on_cuda(bench, headline, (1024, 2048), "<= 1.15")),
        ("heads and KL", large, linear_on_cuda(bench, large, (2048, 4096), "<= 1.10")),
        ("JSD", headline, kl_on_cuda(bench, "jsd", headline, speed)),
        ("TVD", headline, kl_on_cuda(bench, "tvd", headline, speed)),
        ("few rows, masked rows", headline, rows_on_cuda(bench)),
        *(("KL", V, kl_on_cuda(bench, "forward_kl", V, speed)) for V in VOCABULARIES[1:-1]),
    ]
    for what, V, part in parts:
        if V in bench.vocabularies and bench.budget.allows(f"{what} at {V}"):
            yield from part
    for kind, V in cuda.TARGETS:
        if V in bench.vocabularies and bench.budget.allows(f"sweep of {kind} at {V}"):
            say(f"[{bench.budget.spent:.0f} s] sweep of {kind} at {V}")
            cuda.sweep(kind, V, speed)


KL_TARGETS = {"compile": ">= 2.5", "eager": ">= 10", "liger": ">= 5", "liger jsd": ">= 8"}


def kl_on_cuda(bench: Bench, kind: str, V: int, speed: float) -> Iterator[Figure]:
    """A divergence on given logits, as a share of what 6 bytes an element take at the speed of a copy."""
    what, name = kind.removeprefix("forward_"), suffix(V)
    times, peaks = case(bench, kl_steps, 8192, V, BF16, kind, peaks_of=("ours",))
    least = ">= 0.80 (stretch 0.90)" if kind == "forward_kl" else ">= 0.60"
    least = least if V in (VOCABULARIES[0], VOCABULARIES[-1]) else ""
    has_target = kind == "forward_kl" and V == VOCABULARIES[0]
    yield Figure(f"{what}_hbm_fraction{name}", 6 * 8192 * V / speed * 1e3 / times["ours"], least)
    yield Figure(f"{what}_vs_floor{name}", times["ours"] / times["floor"], "")
    yield from ratios(times, what, name, KL_TARGETS if has_target else dict.fromkeys(KL_TARGETS, ""))
    yield Figure(f"{what}_extra_memory_share{name}", peaks["ours"] / (8192 * V * 2), "0 (of [N, V])")


def linear_on_cuda(bench: Bench, V: int, widths: tuple[int, int], most: str) -> Iterator[Figure]:
    of_memory = {
        "compile": "", "eager": "", "auto_chunker": "", "liger chunked": "<= 0.33", "liger fused": "<= 0.33",
    }  # fmt: skip
    times, peaks = case(bench, linear_steps, 8192, V, *widths, BF16, peaks_of=("ours", *of_memory))
    yield Figure(f"linear_vs_gemm{suffix(V)}", times["ours"] / times["gemm"], most)
    if "liger chunked" in times:
        times["liger"] = times["liger chunked"]
    peers = {
        "compile": "", "auto_chunker": "", "eager": "", "liger": ">= 1.5", "liger fused": ">= 3",
        "liger fused kl": "",
    }  # fmt: skip
    yield from ratios(times, "linear", suffix(V), peers)
    yield from peak_figures(peaks, suffix(V), of_memory)


def rows_on_cuda(bench: Bench) -> Iterator[Figure]:
    """Few rows, and the masked rows of many."""
    times, _ = case(bench, kl_steps, 1024, 32000, BF16, only=("ours", "eager"))
    yield from ratios(times, "kl_1024_rows", "", {"eager": ">= 1"})
    times, _ = case(bench, masked_steps, 8192, 32000, 1024, 2048, BF16, MASKED_SHARE)
    yield Figure("masked_vs_all_rows", times["gathered"] / times["all rows"], "<= 0.20")


if __name__ == "__main__":
    main()
