"""The kernels as one PyTorch operator, which torch.compile does not look into."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from distill.kernels.gpu.launch import Call, run
from distill.kernels.gpu.plan import Device
from distill.kernels.gpu.sums import sums_kernel
from distill.kernels.terms import Divergence, SparseTargets, Terms

is_interpreted = isinstance(sums_kernel, InterpretedFunction)

SCHEMA = (
    "(Tensor student_NV, Tensor? teacher_NV, Tensor? ids_NK, Tensor? probs_NK, Tensor? tail_N, Tensor? labels_N, "
    "Tensor? weights_N, str kind, float beta, float soft_weight, float hard_weight, float teacher_temperature, "
    "float student_temperature, float soft_scale, SymInt vocab_size, Tensor(a!)? grad_NV) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def divergence(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    grad_NV: Tensor | None,
) -> Divergence:
    """See `value_and_grad` of the package."""
    sparse = teacher[:3] if isinstance(teacher, SparseTargets) else (None, None, None)
    teacher_NV = teacher if isinstance(teacher, Tensor) else None
    settings = [getattr(terms, field.name) for field in dataclasses.fields(terms)]
    return Divergence(*_divergence(student_NV, teacher_NV, *sparse, labels_N, weights_N, *settings, grad_NV))


@torch.library.custom_op("distill::triton_divergence", mutates_args=("grad_NV",), schema=SCHEMA)
def _divergence(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    ids_NK: Tensor | None,
    probs_NK: Tensor | None,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    kind: str,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    teacher_temperature: float,
    student_temperature: float,
    soft_scale: float,
    vocab_size: int,
    grad_NV: Tensor | None,
) -> tuple[Tensor, ...]:
    terms = Terms(
        kind,  # type: ignore[arg-type]  # it was one
        beta,
        soft_weight,
        hard_weight,
        teacher_temperature,
        student_temperature,
        soft_scale,
        vocab_size,
    )
    teacher: Tensor | SparseTargets | None = teacher_NV
    if ids_NK is not None and probs_NK is not None:
        teacher = SparseTargets(ids_NK, probs_NK, tail_N)
    with current(student_NV.device):
        call = Call(student_NV, teacher, labels_N, weights_N, terms, grad_NV)
        return tuple(run(call, _properties(student_NV.device)))


@_divergence.register_fake
def _empty_sums(student_NV: Tensor, *unused: object) -> tuple[Tensor, ...]:
    dtypes = (torch.float32,) * 4 + (torch.int64,) * 2
    return tuple(student_NV.new_empty((), dtype=dtype) for dtype in dtypes)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _properties(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("interpreter")
    return Device(
        "cuda" if torch.version.hip is None else "hip",
        torch.cuda.get_device_properties(device).multi_processor_count,
    )
