"""The part of `kernels.py` that needs a GPU: correctness first, and at the end every candidate configuration.

Triton's kernels are compiled ahead, many at once: one after another on a fresh machine they would take minutes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from kernel_steps import terms_of
from kernel_truth import SETTINGS, Case, assert_true_to_float64, make_case, top_k_targets
from measure import Step, medians, say
from triton import AsyncCompileMode

from distill.kernels import SparseTargets, divergence, sparse_divergence
from distill.kernels.gpu.launch import Call, Launch, run_plan, shape_of
from distill.kernels.gpu.plan import Device, candidates, plan

DEVICE = "cuda"
ROWS = 8192
BF16, FP32 = torch.bfloat16, torch.float32
CHECKED = ((1000, BF16), (50257, BF16), (128256, BF16), (32000, FP32))
TARGETS = (
    ("forward_kl", 32000),
    ("forward_kl", 128256),
    ("jsd", 32000),
    ("tvd", 32000),
)  # kinds with a target
LINEAR = ((4096, 32000), (2048, 128256))  # chunks of the fused heads


class Check(NamedTuple):
    case: Case
    settings: dict[str, Any]
    targets: SparseTargets | None = None


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Launches inside only compile, all at once, and what they would compute is garbage. A kernel that can not be
    compiled raises where it is launched in earnest."""

    def compile_only(launch: Launch) -> None:
        launch.kernel.warmup(**launch.arguments, grid=(launch.programs,), **launch.options())

    threads = ThreadPoolExecutor(os.cpu_count())
    with (
        threads,
        AsyncCompileMode(threads, ignore_errors=True),
        mock.patch.object(Launch, "run", compile_only),
    ):
        yield


def check(vocabularies: tuple[int, ...]) -> None:
    """All that is timed and more against float64; programs that wait for one another against separate launches.
    Raises AssertionError with what is off."""
    checks = list(all_checks())
    timed = [(kind, V) for kind, V in TARGETS if V in vocabularies]
    with compiled_ahead():
        for each in checks:
            launch_once(each)
        compile_timed(timed, vocabularies)
    say(f"compiled; {len(checks)} checks against float64")
    for case, settings, targets in checks:
        assert_true_to_float64(case, settings, "triton", targets)
    for kind, V in timed:
        check_split_against_phases(kind, V)


def all_checks() -> Iterator[Check]:
    """Every kind and setting in bf16 at a vocabulary of one tile, an odd one and a large one, and a sparse teacher
    with a tail; the first setting of each kind in float32."""
    torch.manual_seed(0)
    for V, dtype in CHECKED:
        case = make_case(33 if V < 50000 else 9, V, dtype, weighted=True, device=DEVICE)
        for kind, settings in SETTINGS.items():
            for each in settings if dtype == BF16 else settings[:1]:
                yield Check(case, {"kind": kind, **each})
        if V % 2:
            yield Check(case, {}, top_k_targets(case, 64, tail=True))


def launch_once(check: Check) -> None:
    """The launch that `assert_true_to_float64` will judge."""
    case, settings, targets = check
    student = case.student.detach().requires_grad_()
    common: dict[str, Any] = {"vocab_size": case.vocab_size, "impl": "triton", **settings}
    if targets is None:
        divergence(student, case.teacher, case.labels, case.weights, **common)
    else:
        sparse_divergence(student, targets, case.labels, case.weights, **common)


def compile_timed(timed: list[tuple[str, int]], vocabularies: tuple[int, ...]) -> None:
    """Inside `compiled_ahead`: what the figures launch, and the separate phases it is compared with."""
    others = [("forward_kl", V) for V in vocabularies if ("forward_kl", V) not in timed]
    for kind, V in (*timed, *others):
        call = empty_call(kind, ROWS, V)
        chosen = plan(shape_of(call), device())
        run_plan(call, chosen)
        if chosen.kernel == "split" and (kind, V) in timed:
            run_plan(call, dataclasses.replace(chosen, kernel="phases"))
    for rows, V in LINEAR:
        if V in vocabularies:
            call = empty_call("forward_kl", rows, V, labels=True)
            run_plan(call, plan(shape_of(call), device()))


def empty_call(kind: str, rows: int, V: int, *, labels: bool = False) -> Call:
    """A call as it is timed, in place, on tensors without memory."""
    student, teacher = (torch.empty(rows, V, dtype=BF16, device="meta") for _ in range(2))
    labels_N = torch.empty(rows, dtype=torch.int64, device="meta") if labels else None
    return Call(student, teacher, labels_N, None, terms_of(V, kind), student)


def device() -> Device:
    return Device("cuda", torch.cuda.get_device_properties(0).multi_processor_count)


def check_split_against_phases(kind: str, V: int) -> None:
    """The same sums in the same order, so the same bits, with the rows that are timed, in place as they are."""
    source, teacher = (torch.randn(ROWS, V, device=DEVICE).to(BF16) for _ in range(2))
    results = []
    for kernel in ("split", "phases"):
        student = source.clone()
        call = Call(student, teacher, None, None, terms_of(V, kind), student)
        chosen = plan(shape_of(call), device())
        if chosen.kernel != "split":
            say(f"{kind} at {V}: {chosen} waits for nothing")
            return
        sums = run_plan(call, dataclasses.replace(chosen, kernel=kernel))
        results.append([*sums, student])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two), f"{kind} [{ROWS}, {V}]: {chosen} is not what separate launches give"


def copy_speed() -> float:
    """Bytes a second, read and written, of a large copy: what this memory can do."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / (medians({"copy": Step(lambda: target.copy_(source))}, DEVICE, 20)["copy"] / 1e3)


def sweep(kind: str, V: int, speed: float, repeats: int = 5) -> None:
    """Prints the times of all candidates, best first, and their share of the memory's speed."""
    logits, teacher = (torch.randn(ROWS, V, device=DEVICE).to(BF16) for _ in range(2))
    call = Call(logits, teacher, None, None, terms_of(V, kind), torch.empty_like(logits))
    plans = candidates(shape_of(call))
    with compiled_ahead():
        for each in plans:
            run_plan(call, each)
    steps = {str(p): Step(lambda p=p: run_plan(call, p), may_fail=True) for p in plans}
    times = medians(steps, DEVICE, repeats)
    print(f"sweep {kind} [{ROWS}, {V}] bf16: ms, share of copy speed at 6 bytes an element")
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {ms:8.3f}  {6 * ROWS * V / (ms / 1e3) / speed:5.2f}  {name}", flush=True)
