"""The distillation kernels beside their peers and the floor, as ratios in one run.

    python tests/bench/kernels.py --device cpu|cuda [--json] [--quick]

Medians of interleaved repeats. A row for each case is appended to kernels.csv. On CUDA the kernels are first
checked against float64, then every candidate configuration is timed; the whole takes less than 8 minutes.
On CPU the logits are also measured with page faults tuned away (MALLOC_MMAP_MAX_=0): by default much of the
peers' time is page faults on fresh [N, V] tensors. Liger is measured where it is installed, on CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # measure.py; kernel_truth.py

from kernel_steps import kl_steps, linear_steps, masked_steps
from measure import append_row, extra_bytes, medians, provenance

CSV = Path(__file__).with_suffix(".csv")
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
VOCABULARIES = (32000, 30522, 50304, 128256)  # the first is the headline
MASKED_SHARE = 0.15
BYTES = {torch.float32: 4, torch.bfloat16: 2}


class Figure(NamedTuple):
    """A number that has a target: at least or at most so much."""

    name: str
    value: float
    target: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one line a figure instead of the table")
    parser.add_argument("--quick", action="store_true", help="the headline vocabulary alone")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of each step")
    parser.add_argument("--logits-only", action="store_true", help=argparse.SUPPRESS)  # the tuned child
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    if not arguments.json:
        print(" ".join(f"{key}={value}" for key, value in provenance(arguments.device).items()), flush=True)
    for figure in figures(arguments):
        if arguments.json:
            print(json.dumps(figure._asdict()), flush=True)
        else:
            print(f"  {figure.name:<44} {figure.value:>8.2f}   {figure.target}", flush=True)


def figures(arguments: argparse.Namespace) -> Iterator[Figure]:
    vocabularies = VOCABULARIES[:1] if arguments.quick or arguments.logits_only else VOCABULARIES
    if arguments.device == "cuda":
        from kernel_cuda import check_against_float64, sweep

        check_against_float64()
        sweep(vocabularies)
        yield from on_cuda(vocabularies, arguments)
        return
    for V in vocabularies:
        for dtype in (torch.float32, torch.bfloat16):
            yield from logits_on_cpu(V, dtype, arguments)
    if arguments.logits_only:
        return
    yield from tuned(arguments)
    yield from linear_on_cpu(torch.float32, arguments)
    if (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):  # elsewhere PyTorch emulates the peers' products: minutes a step
        yield from linear_on_cpu(torch.bfloat16, arguments)
    times = case("cpu", arguments, masked_steps, 2048, 32000, 512, 1024, torch.float32, MASKED_SHARE)
    yield Figure("masked_vs_all_rows", times["gathered"] / times["all rows"], "<= 0.20")


def case(device: str, arguments: argparse.Namespace, make: Any, *shape: Any) -> dict[str, float]:
    """Times of the steps of `make(device, *shape)`, told and recorded."""
    times = medians(make(device, *shape), device, arguments.repeats)
    label = " ".join(str(x).removeprefix("torch.") for x in shape)
    malloc = "tuned" if "MALLOC_MMAP_MAX_" in os.environ else "default"
    steps = {"case": f"{make.__name__} {label}", "malloc": malloc if device == "cpu" else ""}
    append_row(
        CSV, provenance(device) | steps | {"ms": json.dumps({k: round(v, 3) for k, v in times.items()})}
    )
    if not arguments.json:
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
        print(f"{make.__name__} {label} [ms]: {shown}", flush=True)
    return times


def logits_on_cpu(V: int, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[Figure]:
    N = 2048 * 32000 // V
    times = case("cpu", arguments, kl_steps, N, V, dtype)
    is_tuned = "MALLOC_MMAP_MAX_" in os.environ
    name = suffix(V, dtype, "_tuned" if is_tuned else "")
    floor = "<= 1.7" if dtype == torch.float32 else "<= 2.4"
    yield Figure(f"kl_vs_compile{name}", times["compile"] / times["ours"], ">= 3.5" if is_tuned else ">= 5")
    yield Figure(f"kl_vs_eager{name}", times["eager"] / times["ours"], ">= 5" if is_tuned else ">= 20")
    yield Figure(f"kl_vs_floor{name}", times["ours"] / times["floor"], floor)
    if V == VOCABULARIES[0] and not is_tuned:
        extra = extra_bytes(kl_steps, "ours", "cpu", N, V, dtype, device="cpu")
        yield Figure(f"kl_extra_memory_share{name}", extra / (N * V * BYTES[dtype]), "0 (of [N, V])")


def suffix(V: int, dtype: torch.dtype, more: str = "") -> str:
    """Nothing for the headline case."""
    return ("" if V == VOCABULARIES[0] else f"_{V}") + ("" if dtype == torch.float32 else "_bf16") + more


def tuned(arguments: argparse.Namespace) -> Iterator[Figure]:
    """The logits once more in a process whose allocator keeps its memory."""
    command = [sys.executable, __file__, "--json", "--logits-only", "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=os.environ | TUNED, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the tuned run failed:\n{done.stderr}")
    yield from (Figure(**json.loads(line)) for line in done.stdout.splitlines())


def linear_on_cpu(dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[Figure]:
    shape = (2048, 32000, 512, 1024, dtype)
    times = case("cpu", arguments, linear_steps, *shape)
    name = suffix(shape[1], dtype)
    yield Figure(f"linear_vs_gemm{name}", times["ours"] / times["gemm"], "<= 1.08")
    yield Figure(f"linear_vs_compile{name}", times["compile"] / times["ours"], "")
    yield Figure(f"linear_vs_auto_chunker{name}", times["auto_chunker"] / times["ours"], "")
    peaks = {
        step: extra_bytes(linear_steps, step, "cpu", *shape, device="cpu")
        for step in ("ours", "compile", "eager", "auto_chunker")
    }
    yield from peak_figures(peaks, name)


def peak_figures(peaks: dict[str, int], name: str) -> Iterator[Figure]:
    targets = {"compile": "<= 0.33", "eager": "<= 0.125", "auto_chunker": "", "liger chunked": "<= 0.33"}
    yield Figure(f"linear_peak_MiB{name}", peaks["ours"] / 2**20, "")
    for peer in peaks.keys() & targets.keys():
        key = peer.replace(" ", "_")
        yield Figure(f"linear_peak_vs_{key}{name}", peaks["ours"] / peaks[peer], targets[peer])


def on_cuda(vocabularies: tuple[int, ...], arguments: argparse.Namespace) -> Iterator[Figure]:
    from kernel_cuda import copy_speed

    bf16, speed = torch.bfloat16, copy_speed()
    for V in vocabularies:
        times = case("cuda", arguments, kl_steps, 8192, V, bf16)
        name = "" if V == VOCABULARIES[0] else f"_{V}"
        traffic_ms = 6 * 8192 * V / speed * 1e3
        yield Figure(f"kl_hbm_fraction{name}", traffic_ms / times["ours"], ">= 0.80 (stretch 0.90)")
        yield Figure(f"kl_vs_floor{name}", times["ours"] / times["floor"], "")
        yield from ratios(
            times, "kl", name, {"compile": ">= 2.5", "eager": ">= 10", "liger": ">= 5", "liger jsd": ">= 8"}
        )
    for kind in ("jsd", "tvd"):
        times = case("cuda", arguments, kl_steps, 8192, 32000, bf16, kind)
        yield Figure(f"{kind}_hbm_fraction", 6 * 8192 * 32000 / speed * 1e3 / times["ours"], ">= 0.60")
        yield from ratios(times, kind, "", {"compile": "", "eager": "", "liger jsd": ""})
    times = case("cuda", arguments, kl_steps, 1024, 32000, bf16)
    yield from ratios(times, "kl_1024_rows", "", {"eager": ">= 1"})
    for V, widths, most in ((32000, (1024, 2048), "<= 1.15"), (128256, (2048, 4096), "<= 1.10")):
        if V not in vocabularies:
            continue
        shape, name = (8192, V, *widths, bf16), "" if V == VOCABULARIES[0] else f"_{V}"
        times = case("cuda", arguments, linear_steps, *shape)
        yield Figure(f"linear_vs_gemm{name}", times["ours"] / times["gemm"], most)
        times = {"liger": times["liger chunked"], **times} if "liger chunked" in times else times
        peers = {"compile": "", "liger": ">= 1.5", "liger fused": ">= 3", "liger fused kl": ""}
        yield from ratios(times, "linear", name, peers)
        measured = ("ours", "compile", "eager", "liger chunked")
        peaks = {
            s: extra_bytes(linear_steps, s, "cuda", *shape, device="cuda") for s in measured if s in times
        }
        yield from peak_figures(peaks, name)
    times = case("cuda", arguments, masked_steps, 8192, 32000, 1024, 2048, bf16, MASKED_SHARE)
    yield Figure("masked_vs_all_rows", times["gathered"] / times["all rows"], "<= 0.20")


def ratios(times: dict[str, float], what: str, name: str, targets: dict[str, str]) -> Iterator[Figure]:
    """How many times faster ours is than each peer that was measured."""
    for peer, target in targets.items():
        if peer in times:
            yield Figure(f"{what}_vs_{peer.replace(' ', '_')}{name}", times[peer] / times["ours"], target)


if __name__ == "__main__":
    main()
