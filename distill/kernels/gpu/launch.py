"""From tensors and terms to kernel launches. Nothing here waits for the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from distill.kernels.gpu.loop import loop_kernel
from distill.kernels.gpu.plan import Device, Plan, Shape, Target, plan
from distill.kernels.gpu.points import Points, points_kernel
from distill.kernels.gpu.rows import NUM_SUMS, How, Rows, Settings
from distill.kernels.gpu.split import NUM_PARTS, split_kernel
from distill.kernels.gpu.sums import sums_kernel
from distill.kernels.terms import Divergence, SparseTargets, Terms

LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class Call:
    """What is asked for, see `value_and_grad` of the package."""

    student_NV: Tensor
    teacher: Tensor | SparseTargets | None
    labels_N: Tensor | None
    weights_N: Tensor | None
    terms: Terms
    grad_NV: Tensor | None

    @property
    def target(self) -> Target:
        if self.teacher is None:
            return "labels"
        if isinstance(self.teacher, SparseTargets):
            return "sparse" if self.teacher.tail_N is None else "sparse with tail"
        return "dense" if self.terms.teacher_temperature else "argmax"

    @property
    def matrices(self) -> list[Tensor]:
        return [x for x in (self.student_NV, self.teacher, self.grad_NV) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; apart from `run`, so that a test can compile it without a GPU."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int = 4
    registers: int | None = None

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options())


def run(call: Call, device: Device) -> Divergence:
    """The sums of a call; the gradient, if wanted, is in `call.grad_NV`."""
    ready = _with_whole_columns(call)
    result = run_plan(ready, plan(shape_of(ready), device))
    if call.grad_NV is not None and ready.grad_NV is not None and ready.grad_NV is not call.grad_NV:
        call.grad_NV.copy_(ready.grad_NV)
    return result


def run_plan(call: Call, chosen: Plan) -> Divergence:
    """The same with a plan of one's own, for columns that are contiguous."""
    num_rows, device = call.student_NV.shape[0], call.student_NV.device
    floats = [torch.empty((), device=device) for _ in range(4)]
    result = Divergence(*floats, *(torch.empty((), dtype=torch.int64, device=device) for _ in range(2)))
    sums = torch.empty(num_rows, NUM_SUMS.value, device=device)
    if num_rows:
        for launch in row_launches(call, chosen, sums):
            launch.run()
    Launch(sums_kernel, len(result), {"sums": sums, "num_rows": num_rows, "result": result}).run()
    return result


def row_launches(call: Call, chosen: Plan, sums: Tensor) -> Iterator[Launch]:
    """What fills `sums` [N, NUM_SUMS] and the gradient, in order."""
    num_rows, device = call.student_NV.shape[0], call.student_NV.device
    align = _align(call.matrices)
    arguments = {
        "rows": _rows(call, sums, align),
        "settings": _settings(call.terms),
        "how": _how(call, chosen, align),
    }
    fitted = chosen.warps, chosen.registers
    one_tile = call.student_NV.shape[1] <= chosen.block
    if chosen.kernel == "points":
        points = _points(call)
        count = 1 if points.count is None else triton.next_power_of_2(points.count)
        arguments |= {
            "points": points,
            "TARGET": call.target.split()[0],
            "POINTS": count,
            "ONE_TILE": one_tile,
        }
        yield Launch(points_kernel, num_rows, arguments, *fitted)
    elif chosen.kernel == "loop":
        yield Launch(loop_kernel, num_rows, arguments | {"ONE_TILE": one_tile}, *fitted)
    else:
        parts = torch.empty(num_rows, chosen.splits, NUM_PARTS.value, device=device)
        flags = torch.zeros(num_rows, dtype=torch.int32, device=device)
        arguments |= {"parts": parts, "flags": flags, "SPLITS": chosen.splits}
        for phase in ("all",) if chosen.kernel == "split" else _phases(call.terms):
            yield Launch(split_kernel, num_rows * chosen.splits, arguments | {"PHASE": phase}, *fitted)


def _with_whole_columns(call: Call) -> Call:
    """The same with contiguous columns, which the kernels need; as a rule itself."""

    def whole(matrix: Any) -> Any:
        return matrix.contiguous() if isinstance(matrix, Tensor) and matrix.stride(1) != 1 else matrix

    student_NV, grad_NV = whole(call.student_NV), call.grad_NV
    if grad_NV is not None and grad_NV.stride(1) != 1:
        grad_NV = torch.empty_like(grad_NV, memory_format=torch.contiguous_format)
    return dataclasses.replace(call, student_NV=student_NV, teacher=whole(call.teacher), grad_NV=grad_NV)


def shape_of(call: Call) -> Shape:
    """What the plan depends on; for columns that are contiguous."""
    num_rows, columns = call.student_NV.shape
    itemsize = max(matrix.itemsize for matrix in call.matrices)
    align = _align(call.matrices)
    padded = call.terms.vocab_size != columns
    return Shape(
        call.target, call.terms.kind, itemsize, num_rows, columns, align, padded, _is_hard_apart(call)
    )


def _is_hard_apart(call: Call) -> bool:
    return call.terms.student_temperature != 1 and call.labels_N is not None


def _phases(terms: Terms) -> tuple[str, ...]:
    return ("stats", "mixed", "grad") if terms.kind in ("jsd", "tvd") else ("stats", "grad")


def _align(matrices: list[Tensor]) -> int:
    """The largest power of 2 up to 8 that divides all row strides and widths. 8 columns of 2 bytes load at once."""
    return math.gcd(8, *(n for matrix in matrices for n in (matrix.stride(0), matrix.shape[1])))


def _rows(call: Call, sums: Tensor, align: int) -> Rows:
    def row(matrix: Tensor | SparseTargets | None) -> tuple[Tensor | None, int | None]:
        return (matrix, matrix.stride(0) // align) if isinstance(matrix, Tensor) else (None, None)

    student_NV, labels_N, weights_N = call.student_NV, call.labels_N, call.weights_N
    return Rows(
        *row(student_NV),
        *row(call.teacher),
        *row(call.grad_NV),
        None if labels_N is None else labels_N.contiguous(),
        None if weights_N is None else weights_N.contiguous(),
        sums,
        call.terms.vocab_size,
        student_NV.shape[1] // align,
    )


def _settings(terms: Terms) -> Settings:
    return Settings(
        LOG2E / terms.student_temperature,
        LOG2E / terms.teacher_temperature if terms.teacher_temperature else 0.0,
        terms.soft_factor,
        terms.soft_factor / terms.student_temperature,
        terms.hard_weight,
        terms.beta,
    )


def _how(call: Call, chosen: Plan, align: int) -> How:
    terms, has_labels = call.terms, call.labels_N is not None
    return How(
        terms.kind,
        soft=terms.soft_factor != 0 and call.teacher is not None,
        hard=terms.hard_weight != 0 and has_labels,
        hard_apart=_is_hard_apart(call),
        align=align,
        whole=terms.vocab_size % align == 0,
        padded=terms.vocab_size != call.student_NV.shape[1],
        block=chosen.block,
        ptx=chosen.ptx,
    )


def _points(call: Call) -> Points:
    if not isinstance(call.teacher, SparseTargets):
        return Points(None, None, None, None)
    ids_NK, probs_NK, tail_N, _ = call.teacher
    tail_N = None if tail_N is None else tail_N.contiguous()
    return Points(ids_NK.contiguous(), probs_NK.contiguous(), tail_N, ids_NK.shape[1])
