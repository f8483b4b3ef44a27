"""The C++ operator of csrc."""

from __future__ import annotations

from torch import Tensor

from distill.kernels.reference import reference_value_and_grad as value_and_grad
from distill.kernels.terms import SparseTargets

__all__ = ["load_problem", "problem_with", "value_and_grad"]
load_problem = "to be written"


def problem_with(student_NV: Tensor, teacher: Tensor | SparseTargets | None) -> str:
    """Why the operator can not serve these logits, or an empty string."""
    return load_problem
