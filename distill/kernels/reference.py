"""The divergence in eager PyTorch: the definition of correct, on any device and for any floating dtype.

Float64 logits are computed in float64, all others in float32; sums over rows are always made in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.kernels.terms import IGNORED_LABEL, Divergence, Terms


def reference_divergence(
    student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor | None, terms: Terms
) -> Divergence:
    """Same arguments and result as `distill.kernels.divergence`, already checked."""
    counted_N = None if labels_N is None else labels_N != IGNORED_LABEL
    student = _real_columns(student_NV, counted_N, terms)
    kl_N, soft_ce_N = _soft_terms(student, teacher_NV, counted_N, terms)
    hard_N = _hard_term(student, labels_N, terms)
    kl, hard = _sum(kl_N, counted_N), _sum(hard_N, counted_N)
    parts = ((terms.kl_weight * terms.kl_scale, kl), (terms.hard_weight, hard))
    loss = sum((weight * part for weight, part in parts if weight), torch.zeros_like(kl))
    return Divergence(
        loss.to(student.dtype),
        kl.detach().to(student.dtype),
        _sum(soft_ce_N, counted_N).detach().to(student.dtype),
        hard.detach().to(student.dtype),
        *_counts(student, labels_N, counted_N),
    )


def _real_columns(logits_NV: Tensor, counted_N: Tensor | None, terms: Terms) -> Tensor:
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logits = logits_NV[:, : terms.vocab_size].to(dtype)
    # Rows that do not count may hold anything; a NaN there must not reach the gradient as 0 * NaN.
    return logits if counted_N is None else logits.masked_fill(~counted_N[:, None], 0.0)


def _soft_terms(
    student: Tensor, teacher_NV: Tensor | None, counted_N: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and soft cross-entropy of each row."""
    if teacher_NV is None:
        zero = student.new_zeros(student.shape[0])
        return zero, zero
    teacher = _real_columns(teacher_NV.detach(), counted_N, terms).to(student.dtype)
    logits = student if terms.kl_weight else student.detach()
    log_p = torch.log_softmax(logits / terms.student_temperature, dim=-1)
    if terms.teacher_temperature == 0:
        soft_ce_N = -log_p.gather(1, teacher.argmax(-1, keepdim=True)).squeeze(1)
        return soft_ce_N, soft_ce_N
    log_q = torch.log_softmax(teacher / terms.teacher_temperature, dim=-1)
    q = log_q.exp()
    # Where the teacher gives nothing, the term is 0 even if a logit is -inf. A NaN goes through.
    kl_N = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(-1)
    return kl_N, torch.where(q == 0, 0.0, -q * log_p.detach()).sum(-1)


def _hard_term(student: Tensor, labels_N: Tensor | None, terms: Terms) -> Tensor:
    if labels_N is None:
        return student.new_zeros(student.shape[0])
    logits = student if terms.hard_weight else student.detach()
    return -torch.log_softmax(logits, dim=-1).gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)


def _sum(rows_N: Tensor, counted_N: Tensor | None) -> Tensor:
    kept_N = rows_N if counted_N is None else torch.where(counted_N, rows_N, 0.0)
    return kept_N.sum(dtype=torch.float64)


def _counts(student: Tensor, labels_N: Tensor | None, counted_N: Tensor | None) -> tuple[Tensor, Tensor]:
    if labels_N is None or counted_N is None:
        num_rows = torch.tensor(student.shape[0], dtype=torch.int64, device=student.device)
        return torch.zeros_like(num_rows), num_rows
    # Rows that do not count can not match: their label is negative.
    return (student.argmax(-1) == labels_N).sum(), counted_N.sum()
