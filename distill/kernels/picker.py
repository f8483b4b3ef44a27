"""Which implementation serves a call, said once."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from distill.kernels import cpu
from distill.kernels.autograd import ValueAndGrad
from distill.kernels.reference import reference_value_and_grad
from distill.kernels.terms import SparseTargets

Impl = Literal["auto", "triton", "cpu", "reference"]
IMPLS = ("auto", "triton", "cpu", "reference")
NAMES = {"cpu": "C++ operator on CPU", "triton": "Triton kernels"}


def pick(impl: Impl, student_NV: Tensor, teacher: Tensor | SparseTargets | None) -> ValueAndGrad:
    """The implementation named, or for "auto" the fastest that can serve these logits.

    Raises ValueError with the reason if the one named can not.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return reference_value_and_grad
    name = impl if impl != "auto" else ("cpu" if student_NV.device.type == "cpu" else "triton")
    room = cpu if name == "cpu" else _gpu()
    problem = room.problem_with(student_NV, teacher)
    if problem and impl != "auto":
        raise ValueError(f"impl={impl!r} can not serve: {problem}; impl='auto' falls back to the reference")
    if not torch.compiler.is_compiling():  # a log call would break the graph
        _say(name, problem)
    return reference_value_and_grad if problem else room.value_and_grad


def _gpu() -> ModuleType:
    from distill.kernels import gpu  # takes a second to import, which a run on CPU need not wait for

    return gpu


@cache
def _say(name: str, problem: str) -> None:
    chosen = f"eager reference ({problem})" if problem else NAMES[name]
    logging.getLogger(__name__).info("divergences are computed by the %s", chosen)
