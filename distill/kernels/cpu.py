"""The C++ operator of csrc: loads the library and gives it shapes for tracing and a backward.

The gradient with respect to the student's logits is made together with the loss, while a row is in the cache;
neither pair of logits is kept for backward. Backward only scales the gradient, in place: a fresh tensor would
cost more in page faults than all the maths. So backward runs once: with retain_graph=True, a second one gets
PyTorch's error about a tensor modified in place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.kernels.terms import Divergence, Terms

LIBRARY = Path(__file__).with_name("libdistill.so")
SWITCH = "DISTILL_CSRC"  # set to 0, the library is not loaded
DTYPES = (torch.float32, torch.bfloat16)


def _load() -> str:
    """Loads the library. Returns why it could not, or an empty string."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not there; with a C++ compiler: python setup.py build_ext --inplace"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load ({error}): build it again with the torch in use"
    return ""


load_problem = _load()  # on import, so that torch.compile never meets it; takes a few ms


def problem_with(student_NV: Tensor, teacher_NV: Tensor | None) -> str:
    """Why the operator can not serve these logits, or an empty string."""
    if load_problem:
        return load_problem
    for logits in (student_NV, teacher_NV):
        if logits is None:
            continue
        if logits.device.type != "cpu":
            return f"logits are on {logits.device.type}"
        if logits.dtype not in DTYPES:
            return f"logits are {logits.dtype}, the operator takes float32 and bfloat16"
    return ""


def cpu_divergence(
    student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor | None, terms: Terms
) -> Divergence:
    """Same arguments and result as `distill.kernels.divergence`, already checked."""
    loss, sums, counts = _Differentiable.apply(
        student_NV,
        None if teacher_NV is None else teacher_NV.detach(),
        labels_N,
        terms,
        student_NV.requires_grad and torch.is_grad_enabled(),
    )
    kl, soft_ce, hard = sums.unbind()
    num_correct, num_rows = counts.unbind()
    return Divergence(loss, kl, soft_ce, hard, num_correct, num_rows)


class _Differentiable(torch.autograd.Function):
    """The operator as a function of the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        terms: Terms,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, sums, counts, grad_NV = torch.ops.distill.divergence(
            student,
            teacher,
            labels,
            terms.kl_weight * terms.kl_scale,
            terms.hard_weight,
            terms.teacher_temperature,
            terms.student_temperature,
            terms.vocab_size,
            want_grad,
        )
        ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(sums, counts)
        return loss, sums, counts

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        # A compiled graph may not change what it saved; it plans its memory itself.
        is_compiling = torch.compiler.is_compiling()
        return (grad_NV * loss_grad if is_compiling else grad_NV.mul_(loss_grad)), None, None, None, None


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, want_grad = arguments
    num_rows, width = student.shape
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(3, dtype=torch.float32),
        student.new_empty(2, dtype=torch.int64),
        student.new_empty((num_rows if want_grad else 0, width)),
    )


if not load_problem:
    torch.library.register_fake("distill::divergence", _fake)
