"""Comparative distillation: differences between rows, of which n teacher answers give n^2, with no further call.

What is common to all rows is left open by differences: an anchor (forward_kl, hard, ...) must fix it, and the
config is refused without one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.objectives.seen import ABSENT, Buckets, Seen, kl, over_rows


def ckd(seen: Seen, *, group: int = 2, temperature: float = 4.0, labels: float = 0.0) -> Tensor:
    """sum over N tuples of KLt( D_t || D_s ) + labels * KLt( D_y || D_s ), KLt(a || b) = T^2 KL(softmax a/T || softmax b/T).

    A tuple is `group` rows: D = mean over the first ceil(group / 2) of log p minus the mean over the others, D_y the
    same of one-hot labels. Each row opens one tuple and stands in `group` of them, with partners drawn anew every
    time from the same micro-batch: the targets may be stored. Of stored targets D runs over all classes that
    any row of the tuple keeps, where a row that does not keep one says an even share of its rest. Fewer rows than
    `group` add nothing. Source: CKD (2311.02253, WACV 2025) and its code, on log-probabilities, as logits have a free
    constant each row; there T = 4, group 2 or 3, labels 1.
    """
    if seen.num_rows < group:
        return seen.student.hidden_ND.sum() * 0.0
    order_N = torch.randperm(seen.num_rows).to(seen.labels_N.device)
    signs = [1 / math.ceil(group / 2)] * math.ceil(group / 2) + [-1 / (group // 2)] * (group // 2)

    def of_rows(rows: Buckets) -> Tensor:
        number = rows.gold_C.shape[0] - (group - 1)
        student, teacher, here, gold = _aligned(rows, group, number, seen.vocab_size)
        difference_s, difference_t, difference_y = (
            torch.stack([sign * x for sign, x in zip(signs, each, strict=True)]).sum(0)
            for each in (student, teacher, gold)
        )
        total = _kl(difference_t, difference_s, here, temperature)
        return total + labels * _kl(difference_y, difference_s, here, temperature) if labels else total

    return over_rows(seen, of_rows, order_N, overlap=group - 1).sum()


def ckd_hidden(seen: Seen) -> Tensor:
    """sum_n |a_n - mean a|^2 / D_t, a = P h_s - h_t: 1 / (2 N D_t) times the squares of all N^2 pairs' differences.

    h: what both heads read; P is learned beside the student. sum_ij |a_i - a_j|^2 = 2 N sum_i |a_i - mean a|^2, so the
    squared form of comparing all pairs is centred matching, at the cost of N rows. Depends on the micro-batch
    through the mean. Source: CKD (2311.02253, WACV 2025), its extension to hidden states.
    """
    own_ND, other_ND = seen.both_hidden
    apart_ND = seen.learned["ckd_hidden"](own_ND) - other_ND
    if len(apart_ND) == 0:
        return apart_ND.sum()
    return (apart_ND - apart_ND.mean(0)).float().square().sum() / apart_ND.shape[1]


def _kl(target_CK: Tensor, student_CK: Tensor, here_CK: Tensor | None, temperature: float) -> Tensor:
    target_CK, student_CK = target_CK / temperature, student_CK / temperature
    if here_CK is not None:
        target_CK, student_CK = (x.masked_fill(~here_CK, ABSENT) for x in (target_CK, student_CK))
    return temperature**2 * kl(target_CK.log_softmax(1), student_CK.log_softmax(1))


def _aligned(
    rows: Buckets, group: int, number: int, vocab_size: int
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]]:
    """The `group` rows of each tuple over the same classes: lists of [number, K], for student, teacher and labels.

    The third is whether a class is there, None for all.
    """
    starts = [slice(i, i + number) for i in range(group)]
    labels = [rows.gold_C[s] for s in starts]
    if rows.ids_CK is None:
        one_hot = [torch.nn.functional.one_hot(y, vocab_size).to(rows.student_CK.dtype) for y in labels]
        return [rows.student_CK[s] for s in starts], [rows.teacher_CK[s] for s in starts], None, one_hot
    # The first of each row's ids, sorted, is that of the rest: no class, so nothing is lost to the roll.
    ids_CU = torch.cat([rows.ids_CK[s] for s in starts], 1).sort(1).values
    here_CU = (ids_CU >= 0) & (ids_CU != torch.roll(ids_CU, 1, 1))
    ids_CU = ids_CU.clamp(min=0)
    student = [rows.whole_CV[s].gather(1, ids_CU) for s in starts]
    teacher = [_said(rows, s, ids_CU, vocab_size) for s in starts]
    gold = [rows.ids_CK[s].gather(1, y[:, None]) for s, y in zip(starts, labels, strict=True)]
    return student, teacher, here_CU, [(ids_CU == g).to(rows.student_CK.dtype) for g in gold]


def _said(rows: Buckets, which: slice, ids_CU: Tensor, vocab_size: int) -> Tensor:
    """[C, U]: the stored log-probability of each class, or an even share of the rest."""
    assert rows.ids_CK is not None
    ids_CK, teacher_CK = rows.ids_CK[which], rows.teacher_CK[which]
    is_CUK = ids_CU[:, :, None] == ids_CK[:, None, :]
    others_C = (vocab_size - (ids_CK >= 0).sum(1)).clamp(min=1)
    share_C = teacher_CK.masked_fill(ids_CK != -1, ABSENT).logsumexp(1) - others_C.to(teacher_CK.dtype).log()
    stored_CU = teacher_CK[:, None, :].masked_fill(~is_CUK, ABSENT).amax(2)
    return torch.where(is_CUK.any(2), stored_CU, share_C[:, None])
