"""The divergences as Triton kernels, for NVIDIA GPUs and, portably, whatever else Triton compiles for.

`dense` is the mathematics of two whole rows; `loop` and `split` are the kernels around it. `points` serves teachers that
are a few points. `plan` chooses, `launch` prepares the launches, `op` is the operator PyTorch sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.kernels.terms import Divergence, SparseTargets, Terms

try:
    from distill.kernels.gpu import op, scale

    load_problem = ""
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    load_problem = "triton is not installed: pip install triton, in the version requirements.txt names"

__all__ = ["load_problem", "problem_with", "scale_", "value_and_grad"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)


def problem_with(student_NV: Tensor, teacher: Tensor | SparseTargets | None) -> str:
    """Why the kernels can not serve these logits, or an empty string."""
    if load_problem:
        return load_problem
    for name, logits in (("student", student_NV), ("teacher", teacher)):
        if isinstance(logits, Tensor) and logits.dtype not in DTYPES:
            return f"{name} logits are {logits.dtype}, the kernels take bfloat16, float16 and float32"
    return _device_problem(student_NV.device)


def value_and_grad(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    grad_NV: Tensor | None,
) -> Divergence:
    """The sums, and the gradient of the loss written into `grad_NV` [N, V], which may be the logits themselves.

    Waits for the device nowhere; the same call gives the same bits. A label that is no class makes `hard` infinite, an
    id of the targets that is none makes `soft` NaN: to look for them beforehand would be to wait.
    """
    return op.divergence(student_NV, teacher, labels_N, weights_N, terms, grad_NV)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` times a number on its device, in place; a pass over memory only where that number is not 1."""
    with op.current(gradient.device):
        return scale.scale_(gradient, factor)


def _device_problem(device: torch.device) -> str:
    if op.is_interpreted:
        return (
            "" if device.type == "cpu" else f"Triton interprets (TRITON_INTERPRET=1), logits are on {device}"
        )
    if device.type != "cuda":
        return f"logits are on {device}, the kernels run on CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"{device} has compute capability {capability}, the kernels need {LEAST_CAPABILITY}"
    return ""
