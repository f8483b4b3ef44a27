"""The part of `kernels.py` that needs a GPU: correctness first, then every candidate configuration."""

from __future__ import annotations

import torch
from kernel_steps import TEMPERATURE
from kernel_truth import SETTINGS, assert_true_to_float64, make_case, top_k_targets
from measure import Step, medians

from distill.kernels.gpu.launch import Call, run_plan, shape_of
from distill.kernels.gpu.plan import candidates
from distill.kernels.terms import resolve_terms

CHECKED = (17, 1000, 32000, 50257, 128256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_against_float64() -> None:
    """Every kind, dtype and vocabulary class. Raises AssertionError with what is off."""
    torch.manual_seed(0)
    for V in CHECKED:
        for dtype in DTYPES:
            case = make_case(33 if V < 50000 else 9, V, dtype, weighted=True, device="cuda")
            for kind, settings in SETTINGS.items():
                for each in settings:
                    assert_true_to_float64(case, {"kind": kind, **each}, "triton")
            assert_true_to_float64(case, {}, "triton", top_k_targets(case, min(64, V), tail=True))


def copy_speed() -> float:
    """Bytes a second, read and written, of a large copy: what this memory can do."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (medians({"copy": Step(lambda: target.copy_(source))}, "cuda", 20)["copy"] / 1e3)


def sweep(vocabularies: tuple[int, ...], rows: int = 8192, repeats: int = 5) -> None:
    """Times of every candidate for each kind, best first, with the share of the memory's speed."""
    speed = copy_speed()
    for V in vocabularies:
        logits, teacher = (torch.randn(rows, V, device="cuda").to(torch.bfloat16) for _ in range(2))
        grad = torch.empty_like(logits)
        for kind in SETTINGS:
            terms = resolve_terms(
                kind=kind, beta=0.5, soft_weight=1.0, hard_weight=0.0, temperature=TEMPERATURE,
                temperature_on="teacher", temperature_squared=False, vocab_size=V,
            )  # fmt: skip
            call = Call(logits, teacher, None, None, terms, grad)
            steps = {
                str(p): Step(lambda p=p, call=call: run_plan(call, p)) for p in candidates(shape_of(call))
            }
            times = medians(steps, "cuda", repeats)
            print(f"sweep {kind} [{rows}, {V}] bf16: ms, share of copy speed at 6 bytes an element")
            for name, ms in sorted(times.items(), key=lambda item: item[1])[:6]:
                print(f"  {ms:8.3f}  {6 * rows * V / (ms / 1e3) / speed:5.2f}  {name}", flush=True)
