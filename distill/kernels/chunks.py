"""The loop behind `linear_divergence`: a chunk's logits, their gradient, and on to what made them.

For C rows at a time, in memory that all chunks share: s = h W^T + b of the student, t likewise of the teacher,
g = d loss / d s written over s, then dH = g W, dW += g^T h and db += sum of g over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import hardware
from distill.head import Head, Mixture
from distill.kernels.picker import Impl, pick
from distill.kernels.terms import Divergence, SparseTargets, Terms
from distill.kernels.upstream import scale_


@dataclass(frozen=True)
class Job:
    """All that is not differentiated: settings, and what the student is compared with."""

    terms: Terms
    impl: Impl
    chunk_rows: int
    labels_N: Tensor | None
    weights_N: Tensor | None
    teacher_hidden_ND: Tensor | None = None
    teacher_head: Head | Mixture | None = None
    targets: SparseTargets | None = None  # with gold merged


@torch.compiler.disable  # reuses its memory, which a graph would plan itself
def chunked(hidden_ND: Tensor, head: Head, job: Job) -> Divergence:
    """Sums over all rows; `loss` is differentiable in hidden states, weight and bias."""
    inputs = (hidden_ND, head.weight_VD, head.bias_V)
    wanted = tuple(each is not None and each.requires_grad and torch.is_grad_enabled() for each in inputs)
    return Divergence(*_Chunked.apply(*inputs, head.softcap, wanted, job))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        wanted: tuple[bool, bool, bool],
        job: Job,
    ) -> tuple[Tensor, ...]:
        gradients = _Gradients(hidden_ND, weight_VD, wanted)
        sums = _run(hidden_ND, Head(weight_VD, bias_V, softcap), gradients, job)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, weight_VD.dtype)
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        """Scales in place and casts once, so it runs once; the scalar stays on its device."""
        scaled = (None if each is None else scale_(each, loss_grad) for each in ctx.saved_tensors)
        cast = (x if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True))
        return *cast, None, None, None


def _run(hidden_ND: Tensor, head: Head, gradients: _Gradients, job: Job) -> Divergence:
    student = _Layer(head, job)
    teacher = None if job.teacher_head is None else _teacher_layer(job.teacher_head, job)
    value_and_grad = pick(job.impl, student.room_CW, job.targets if teacher is None else teacher.room_CW)
    parts = []
    for start in range(0, max(hidden_ND.shape[0], 1), job.chunk_rows):
        rows = slice(start, start + job.chunk_rows)
        hidden_CD = hidden_ND[rows].to(student.dtype)
        logits_CW = student.logits(hidden_CD)
        grad_CW = student.room_for_gradient(logits_CW) if gradients.any else None
        labels, weights = _rows_of(job.labels_N, rows), _rows_of(job.weights_N, rows)
        against = _targets_at(job, teacher, rows)
        parts.append(value_and_grad(logits_CW, against, labels, weights, job.terms, grad_CW))
        if grad_CW is not None:
            grad_CV = student.before_the_cap(grad_CW, logits_CW)
            gradients.add(rows, grad_CV, hidden_CD, student.weight_VD)
    return _total(parts)


def _targets_at(
    job: Job, teacher: _Layer | _MixedLayers | None, rows: slice
) -> Tensor | SparseTargets | None:
    if teacher is not None and job.teacher_hidden_ND is not None:
        return teacher.logits(job.teacher_hidden_ND[rows].to(teacher.dtype))
    if job.targets is None:
        return None
    ids_NK, probs_NK, tail_N, _ = job.targets
    return SparseTargets(ids_NK[rows], probs_NK[rows], _rows_of(tail_N, rows))


def _rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _total(parts: list[Divergence]) -> Divergence:
    wide = {True: torch.float64, False: torch.int64}
    columns = (torch.stack(column) for column in zip(*parts, strict=True))
    return Divergence(*(c.sum(dtype=wide[c.is_floating_point()]).to(c.dtype) for c in columns))


class _Layer:
    """A head that makes the logits of one chunk after another in the same memory, of real classes only.

    Suffix W: V columns and then padding, that rows start and end at whole cache lines, as GPUs load them fastest.
    """

    def __init__(self, head: Head, job: Job) -> None:
        vocab_size = job.terms.vocab_size
        self.dtype = _dtype_of_products(head.weight_VD)
        self.weight_VD = head.weight_VD.detach()[:vocab_size].to(self.dtype)
        self.bias_V = None if head.bias_V is None else head.bias_V.detach()[:vocab_size].to(self.dtype)
        self.softcap = head.softcap
        self.room_CW = self._new_room(job.chunk_rows)
        self._gradient_room_CW: Tensor | None = None

    def _new_room(self, num_rows: int) -> Tensor:
        return self.weight_VD.new_empty(num_rows, (self.weight_VD.shape[0] + 63) // 64 * 64)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, W] in the shared memory, valid until the next chunk; anything in the padding."""
        logits_CW = self.room_CW[: hidden_CD.shape[0]]
        logits_CV = logits_CW[:, : self.weight_VD.shape[0]]
        if self.bias_V is None:
            torch.mm(hidden_CD, self.weight_VD.T, out=logits_CV)
        else:
            torch.addmm(self.bias_V, hidden_CD, self.weight_VD.T, out=logits_CV)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CW

    def room_for_gradient(self, logits_CW: Tensor) -> Tensor:
        """The logits' own memory, unless the slope of a softcap has yet to be made of them."""
        if self.softcap is None:
            return logits_CW
        if self._gradient_room_CW is None:
            self._gradient_room_CW = self._new_room(self.room_CW.shape[0])
        return self._gradient_room_CW[: logits_CW.shape[0]]

    def before_the_cap(self, grad_CW: Tensor, logits_CW: Tensor) -> Tensor:
        """[C, V] gradient of the linear layer's output, in the memory of that of capped logits; uses up the logits."""
        grad_CV, logits_CV = (x[:, : self.weight_VD.shape[0]] for x in (grad_CW, logits_CW))
        if self.softcap is None:
            return grad_CV
        slope_CV = logits_CV.div_(self.softcap).square_().neg_().add_(1.0)
        return grad_CV.mul_(slope_CV.nan_to_num_(0.0))  # NaN stays where it counts: the gradient has it too


class _MixedLayers:
    """The same of several heads, whose logits are the logarithms of mixed probabilities, in float32 or better."""

    def __init__(self, mixture: Mixture, job: Job) -> None:
        self.mixture, members = mixture, [_Layer(head, job) for head in mixture.heads]
        self.layers = [lambda h, m=m: m.logits(h.to(m.dtype)) for m in members]
        self.dtype = mixture.heads[0].weight_VD.dtype
        room_CW = members[0].room_CW
        self.room_CW = torch.empty_like(room_CW, dtype=torch.promote_types(room_CW.dtype, torch.float32))

    def logits(self, hidden_CE: Tensor) -> Tensor:
        logits_CW = self.room_CW[: hidden_CE.shape[0]]
        logits_CW[:, : self.mixture.vocab_size] = self.mixture.mixed(hidden_CE, self.layers)
        return logits_CW


def _teacher_layer(head: Head | Mixture, job: Job) -> _Layer | _MixedLayers:
    return _MixedLayers(head, job) if isinstance(head, Mixture) else _Layer(head, job)


class _Gradients:
    """d loss / d (hidden states, weight, bias) as it grows; None where nobody asks. Rows of padding stay 0."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, wanted: tuple[bool, bool, bool]) -> None:
        wide = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        of_hidden, of_weight, of_bias = wanted
        self.any = any(wanted)
        self.hidden_ND = torch.empty_like(hidden_ND) if of_hidden else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=wide) if of_weight else None
        self.bias_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=wide) if of_bias else None
        self._room_VD: Tensor | None = None

    def add(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        """What these rows add; all three of one dtype, weight_VD without rows of padding."""
        vocab_size = grad_CV.shape[1]
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = torch.mm(grad_CV, weight_VD)
        if self.weight_VD is not None:
            # A row that does not count has zero gradient and may hold anything: 0 * NaN must not reach the sum.
            # Where a row that counts is not finite, its gradient is NaN already.
            self._add_outer(self.weight_VD[:vocab_size], grad_CV, hidden_CD.nan_to_num(0.0, 0.0, 0.0))
        if self.bias_V is not None:
            self.bias_V[:vocab_size] += grad_CV.sum(0, dtype=self.bias_V.dtype)

    def _add_outer(self, total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if total_VD.dtype == grad_CV.dtype:
            total_VD.addmm_(grad_CV.T, hidden_CD)
        elif total_VD.is_cuda:
            torch.addmm(total_VD, grad_CV.T, hidden_CD, out_dtype=total_VD.dtype, out=total_VD)
        else:  # no product on CPU reads 16 bits and writes 32
            if self._room_VD is None:
                self._room_VD = torch.empty_like(total_VD, dtype=grad_CV.dtype)
            total_VD += torch.mm(grad_CV.T, hidden_CD, out=self._room_VD)


def _dtype_of_products(weight_VD: Tensor) -> torch.dtype:
    """That of the weight, but float32 on a CPU whose 16-bit matrix products are emulated."""
    if weight_VD.device.type == "cpu" and not hardware.cpu_multiplies(weight_VD.dtype):
        return torch.float32
    return weight_VD.dtype
