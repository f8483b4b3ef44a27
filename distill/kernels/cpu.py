"""The C++ operator of csrc: loads the library, gives it shapes for tracing, and hands it tensors.

The operator runs on AVX-512, AVX2 or in plain C++, whichever is the best this processor has; the environment variable
DISTILL_ISA=avx512|avx2|portable names one, read at every call. DISTILL_CSRC=0 keeps the library from being loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.kernels.terms import Divergence, SparseTargets, Terms

LIBRARY = Path(__file__).with_name("libdistill.so")
SWITCH = "DISTILL_CSRC"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def problem_with(student_NV: Tensor, teacher: Tensor | SparseTargets | None) -> str:
    """Why the operator can not serve these logits, or an empty string."""
    if load_problem:
        return load_problem
    for logits in (student_NV, teacher):
        if not isinstance(logits, Tensor):
            continue
        if logits.device.type != "cpu":
            return f"logits are on {logits.device.type}"
        if logits.dtype not in DTYPES:
            return f"logits are {logits.dtype}, the operator takes float32, bfloat16 and float16"
    return ""


def value_and_grad(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    grad_NV: Tensor | None,
) -> Divergence:
    """The sums, and the gradient of the loss written into `grad_NV` [N, V], which may be the logits themselves.

    Arguments as in `distill.kernels`, already checked; labels and target ids are checked again, since under
    torch.compile nobody else does. Raises RuntimeError for one that is no class.
    """
    dense_NV, ids_NK, probs_NK, tail_N = None, None, None, None
    if isinstance(teacher, SparseTargets):
        ids_NK, probs_NK, tail_N, _ = teacher
    elif teacher is not None:
        dense_NV = _with_contiguous_columns(teacher)
    written_NV = None if grad_NV is None else _with_contiguous_columns(grad_NV)
    sums = torch.ops.distill.divergence(
        _with_contiguous_columns(student_NV),
        dense_NV,
        ids_NK,
        probs_NK,
        tail_N,
        labels_N,
        weights_N,
        written_NV,
        terms.kind,
        terms.beta,
        terms.soft_factor,
        terms.hard_weight,
        terms.teacher_temperature,
        terms.student_temperature,
        terms.vocab_size,
    )
    if grad_NV is not None and written_NV is not None and written_NV is not grad_NV:
        grad_NV.copy_(written_NV)
    return Divergence(*sums)


def _with_contiguous_columns(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sums = [student.new_empty((), dtype=torch.float32) for _ in range(4)]
    return *sums, *(student.new_empty((), dtype=torch.int64) for _ in range(2))


def _refuse_gradient(*arguments: Any) -> Any:
    """The Autograd kernel. The operator makes the gradient itself; by itself it would be differentiated to nothing."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        raise RuntimeError(
            "torch.ops.distill.divergence writes the gradient into grad_NV and can't be differentiated: "
            "call distill.kernels.divergence"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.distill.divergence(*arguments)


if not load_problem:
    torch.library.register_fake("distill::divergence", _fake)
    torch.library.impl("distill::divergence", "Autograd", _refuse_gradient)
