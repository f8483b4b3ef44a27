"""Hidden states and heads of two models, and both ways to their divergence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.kernels import Divergence, Head, SparseTargets, divergence, linear_divergence

N, D, WIDE, V, K = 50, 6, 10, 33, 5


def head_of(width: int, classes: int, bias: bool, softcap: float | None, dtype: torch.dtype) -> Head:
    weight, offset = torch.randn(classes, width), torch.randn(classes)
    return Head(weight.to(dtype), offset.to(dtype) if bias else None, softcap)


@dataclass
class Case:
    """Both models' hidden states and heads, with rows of padding in the weights that would win if they were read."""

    rows: int = N
    dtype: torch.dtype = torch.float64
    bias: bool = True
    softcap: float | None = None
    width: int = D
    classes: int = V
    student: Tensor = field(init=False)
    teacher: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.student = torch.randn(self.rows, self.width).to(self.dtype)
        self.teacher = torch.randn(self.rows, WIDE).to(self.dtype)
        self.head = head_of(self.width, self.classes + 4, self.bias, self.softcap, self.dtype)
        self.teacher_head = head_of(WIDE, self.classes + 2, True, self.softcap, self.dtype)
        for head in (self.head, self.teacher_head):
            head.weight_VD[self.classes :] = 50.0
        self.labels = torch.randint(0, self.classes, (self.rows,))
        self.labels[1::3] = -100
        self.weights = torch.rand(self.rows)
        self.weights[2::5] = 0.0
        self.require_grad()

    def require_grad(self) -> None:
        for tensor in self.inputs():
            tensor.requires_grad_()

    def inputs(self) -> list[Tensor]:
        found = [self.student, self.head.weight_VD, self.head.bias_V]
        return [tensor for tensor in found if tensor is not None]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        other = replace(self, dtype=dtype)
        for name in ("student", "teacher"):
            setattr(other, name, getattr(self, name).detach().to(dtype))
        for name in ("head", "teacher_head"):
            weight, bias, softcap = getattr(self, name)
            moved = Head(
                weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), softcap
            )
            setattr(other, name, moved)
        other.labels, other.weights = self.labels, self.weights
        other.require_grad()
        return other

    def fused(self, **keywords: Any) -> Divergence:
        return linear_divergence(
            self.student, self.head, self.teacher, self.teacher_head, self.labels, self.weights,
            vocab_size=self.classes, **keywords,
        )  # fmt: skip

    def one_after_the_other(self, **keywords: Any) -> Divergence:
        logits, teacher_logits = self.head(self.student), self.teacher_head(self.teacher)
        return divergence(
            logits, teacher_logits, self.labels, self.weights,
            vocab_size=self.classes, impl="reference", **keywords,
        )  # fmt: skip

    def targets(self, gold: bool) -> SparseTargets:
        logits = self.teacher_head(self.teacher)[:, : self.classes].float()
        probs, ids = torch.softmax(logits, -1).topk(K)
        gold_N = torch.softmax(logits, -1).gather(1, self.labels.clamp(min=0)[:, None])[:, 0]
        return SparseTargets(ids, probs, 1 - probs.sum(-1), gold_N if gold else None)


def all_of(case: Case, result: Divergence) -> tuple[Tensor, ...]:
    """Sums and gradients, with an upstream gradient."""
    return *(part.detach() for part in result), *torch.autograd.grad(result.loss * 1.7, case.inputs())
