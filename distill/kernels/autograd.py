"""One differentiable function around every implementation that makes the gradient together with the loss.

Neither pair of logits is kept for backward, only the gradient of the student's, and backward scales it in place:
a fresh tensor would cost more in page faults than all the maths. So backward runs once; a second one with
retain_graph=True gets PyTorch's error about a tensor modified in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.kernels.terms import Divergence, SparseTargets, Terms
from distill.kernels.upstream import scale_

# (student_NV, teacher, labels_N, weights_N, terms, grad_NV) -> sums. Writes d loss / d student over grad_NV
# [N, V] if it is not None; grad_NV has the dtype of student_NV and may be the same memory.
ValueAndGrad = Callable[
    [Tensor, Tensor | SparseTargets | None, Tensor | None, Tensor | None, Terms, Tensor | None], Divergence
]


def differentiable(
    value_and_grad: ValueAndGrad,
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    in_place: bool,
) -> Divergence:
    """`value_and_grad` as a function of the student's logits. With `in_place` they become their own gradient."""
    if isinstance(teacher, SparseTargets):
        frozen: tuple[Tensor | None, ...] = teacher[:3]
    else:
        frozen = (None if teacher is None else teacher.detach(), None, None)
    want_grad = student_NV.requires_grad and torch.is_grad_enabled()
    sums = _Differentiable.apply(
        student_NV, *frozen, labels_N, weights_N, terms, value_and_grad, want_grad, in_place
    )
    return Divergence(*sums)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher_or_ids: Tensor | None,
        probs: Tensor | None,
        tail: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None,
        terms: Terms,
        value_and_grad: ValueAndGrad,
        want_grad: bool,
        in_place: bool,
    ) -> tuple[Tensor, ...]:
        teacher: Tensor | SparseTargets | None = teacher_or_ids
        if teacher_or_ids is not None and probs is not None:
            teacher = SparseTargets(teacher_or_ids, probs, tail)
        grad_NV = None
        if want_grad:
            # Writing to a view raises the version of the logits: if anything saved them for its own backward,
            # PyTorch says so instead of using the gradient for the logits.
            is_reused = in_place and not torch.compiler.is_compiling()
            grad_NV = student.detach() if is_reused else torch.empty_like(student)
        sums = value_and_grad(student.detach(), teacher, labels, weights, terms, grad_NV)
        ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        # A compiled graph may not change what it saved; it plans its memory itself.
        is_compiling = torch.compiler.is_compiling()
        return (grad_NV * loss_grad if is_compiling else scale_(grad_NV, loss_grad)), *(None,) * 9
