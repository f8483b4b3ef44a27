"""Which implementation serves a call, said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from distill.kernels.cpu import cpu_divergence, problem_with
from distill.kernels.reference import reference_divergence
from distill.kernels.terms import Divergence, Terms

Impl = Literal["auto", "cpu", "reference"]
Implementation = Callable[[Tensor, Tensor | None, Tensor | None, Terms], Divergence]


def pick(impl: Impl, student_NV: Tensor, teacher_NV: Tensor | None) -> Implementation:
    """The implementation named, or for "auto" the fastest that can serve these logits.

    Raises ValueError with the reason if the one named can not.
    """
    if impl not in ("auto", "cpu", "reference"):
        raise ValueError(f"impl must be 'auto', 'cpu' or 'reference', got {impl!r}")
    if impl == "reference":
        return reference_divergence
    problem = problem_with(student_NV, teacher_NV)
    if problem and impl == "cpu":
        raise ValueError(f"impl='cpu' can not serve: {problem}; impl='auto' falls back to the reference")
    if not torch.compiler.is_compiling():  # a log call would break the graph
        _say(problem)
    return reference_divergence if problem else cpu_divergence


@cache
def _say(problem: str) -> None:
    chosen = f"eager reference ({problem})" if problem else "C++ operator on CPU"
    logging.getLogger(__name__).info("divergence is computed by the %s", chosen)
