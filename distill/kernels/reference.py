"""The divergences in eager PyTorch: the definition of correct, on any device and for any floating dtype.

Float64 logits are computed in float64, all others in float32; sums over rows are always made in float64.
Gradients are autograd's, so that the formulas written out in the kernels are judged by something else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.kernels.terms import IGNORED_LABEL, Divergence, SparseTargets, Terms


def reference_divergence(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
) -> Divergence:
    """Same arguments and result as the public functions, already checked; differentiable by autograd."""
    counted_N = None if labels_N is None else labels_N != IGNORED_LABEL
    student = _real_columns(student_NV, counted_N, terms)
    if weights_N is not None:  # a row without weight has no gradient, whatever it holds
        student = torch.where(weights_N[:, None] == 0, student.detach(), student)
    soft_N, soft_ce_N = _soft_terms(student, teacher, counted_N, terms)
    hard_N = _hard_term(student, labels_N, terms)
    parts = [
        weight * term for weight, term in ((terms.soft_factor, soft_N), (terms.hard_weight, hard_N)) if weight
    ]
    loss_N = sum(parts, torch.zeros_like(soft_N))
    if weights_N is not None:
        loss_N = torch.where(weights_N == 0, 0.0, weights_N * loss_N)
    terms_N = (loss_N, soft_N.detach(), soft_ce_N.detach(), hard_N.detach())
    loss, soft, soft_ce, hard = (_sum(each, counted_N).to(student.dtype) for each in terms_N)
    return Divergence(loss, soft, soft_ce, hard, *_counts(student, labels_N, counted_N))


def reference_value_and_grad(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    grad_NV: Tensor | None,
) -> Divergence:
    """The sums, and the gradient of the loss written into `grad_NV` [N, V], which may be the logits themselves."""
    if grad_NV is None:
        with torch.no_grad():
            return reference_divergence(student_NV, teacher, labels_N, weights_N, terms)
    with torch.enable_grad():
        leaf = student_NV.detach().requires_grad_()
        sums = reference_divergence(leaf, teacher, labels_N, weights_N, terms)
        grad = torch.autograd.grad(sums.loss, leaf)[0] if sums.loss.requires_grad else torch.zeros_like(leaf)
    grad_NV.copy_(grad)
    return Divergence(*(each.detach() for each in sums))


def _real_columns(logits_NV: Tensor, counted_N: Tensor | None, terms: Terms) -> Tensor:
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logits = logits_NV[:, : terms.vocab_size].to(dtype)
    # Rows that do not count may hold anything; a NaN there must not reach the gradient as 0 * NaN.
    return logits if counted_N is None else logits.masked_fill(~counted_N[:, None], 0.0)


def _soft_terms(
    student: Tensor, teacher: Tensor | SparseTargets | None, counted_N: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Divergence from the teacher and soft cross-entropy of each row."""
    if teacher is None:
        zero = student.new_zeros(student.shape[0])
        return zero, zero
    logits = student if terms.soft_weight else student.detach()
    log_p = torch.log_softmax(logits / terms.student_temperature, dim=-1)
    if isinstance(teacher, SparseTargets):
        return _sparse_terms(log_p, teacher)
    log_q = _teacher_log_probs(_real_columns(teacher.detach(), counted_N, terms).to(student.dtype), terms)
    q = log_q.exp()
    soft_ce_N = -_expectation(q, log_p.detach())
    return _divergence_rows(log_p, log_q, q, terms), soft_ce_N


def _teacher_log_probs(teacher: Tensor, terms: Terms) -> Tensor:
    if terms.teacher_temperature:
        return torch.log_softmax(teacher / terms.teacher_temperature, dim=-1)
    best, index = teacher.max(-1, keepdim=True)
    log_q = torch.full_like(teacher, -math.inf).scatter(1, index, 0.0)
    return log_q.masked_fill(~best.isfinite(), math.nan)  # an arg-max would hide the NaN


def _divergence_rows(log_p: Tensor, log_q: Tensor, q: Tensor, terms: Terms) -> Tensor:
    if terms.kind == "forward_kl":
        return _expectation(q, log_q - log_p)
    p = log_p.exp()
    if terms.kind == "reverse_kl":
        return _expectation(p, log_p - log_q)
    if terms.kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    mixture = terms.beta * q + (1 - terms.beta) * p
    log_m = mixture.masked_fill(mixture == 0, 1.0).log()
    return terms.beta * _expectation(q, log_q - log_m) + (1 - terms.beta) * _expectation(p, log_p - log_m)


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Sum of probs * values over classes. Where the probability is 0 the term is 0, even if the value is infinite."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def _sparse_terms(log_p: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    probs = targets.probs_NK.to(log_p.dtype)
    is_entry = probs != 0  # a NaN is an entry, and goes through
    log_pk = log_p.gather(1, targets.ids_NK.masked_fill(~is_entry, 0))
    log_qk = probs.masked_fill(~is_entry, 1.0).log()
    soft_N, soft_ce_N = _expectation(probs, log_qk - log_pk), -_expectation(probs, log_pk.detach())
    if targets.tail_N is None:
        return soft_N, soft_ce_N
    tail_N = targets.tail_N.to(log_p.dtype)
    log_rest_N = _log_mass_of_others(log_p, targets.ids_NK, is_entry, tail_N != 0)
    log_tail_N = tail_N.masked_fill(tail_N == 0, 1.0).log()
    soft_N = soft_N + tail_N * (log_tail_N - log_rest_N)
    return soft_N, soft_ce_N - tail_N * log_rest_N.detach()


def _log_mass_of_others(log_p: Tensor, ids_NK: Tensor, is_entry: Tensor, has_tail_N: Tensor) -> Tensor:
    """Log of the student's mass outside the entries; 0 where the teacher has no tail."""
    num_rows, vocab_size = log_p.shape
    columns = ids_NK.masked_fill(~is_entry, vocab_size)  # one column more takes the padding
    among = torch.zeros(num_rows, vocab_size + 1, dtype=torch.bool, device=log_p.device)
    among = among.scatter(1, columns, True)[:, :vocab_size]
    others = log_p.masked_fill(among, -math.inf).masked_fill(~has_tail_N[:, None], -math.log(vocab_size))
    return torch.logsumexp(others, dim=-1).masked_fill(~has_tail_N, 0.0)


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
