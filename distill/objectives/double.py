"""Double distillation: the teacher weighs what is right and what is wrong.

Menon et al. (2005.10419; ICML 2021). Cross-entropy is log(1 + sum_{y' != y} exp(f_y' - f_y)): a label against all others.
Distillation smooths the label alone; here a class that the teacher holds for likely is no full negative either. The
optimum is not p_t: the ranking is sharpened, so this stands beside forward_kl and does not replace it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill.objectives.seen import (
    ABSENT,
    Buckets,
    Seen,
    logits_at,
    of_classes,
    over_chunks,
    over_rows,
    teacher_buckets,
)


def double(seen: Seen) -> Tensor:
    """sum_n sum_y p_t(y) log( 1 + sum_{y' != y} (1 - p_t(y')) exp(f_y' - f_y) ).

    One pass: the inner sum and 1 are exp(-f_y) ( p_t(y) e^f_y + sum_y' (1 - p_t(y')) e^f_y' ). A one-hot teacher
    makes it cross-entropy. The rest of stored targets is no y, and a y' of weight 1: it holds many classes, each of
    little probability. Source: the idea in 2005.10419; this equation is recalled and derived [R].
    """

    def of_rows(rows: Buckets) -> Tensor:
        return double_softmax(rows.student_CK, of_classes(rows.teacher_CK, rows.ids_CK))

    return over_rows(seen, of_rows).sum()


def double_softmax(student_CK: Tensor, teacher_CK: Tensor) -> Tensor:
    """[C]: the equation of `double` on log-probabilities or logits of the student and the teacher's log-probabilities."""
    weight_CK = _log_of_rest(teacher_CK)
    negatives_C1 = (weight_CK + student_CK).logsumexp(1, keepdim=True)
    total_CK = torch.logaddexp(teacher_CK + student_CK, negatives_C1)
    return (teacher_CK.exp() * (total_CK - student_CK)).sum(1)


def double_pairs(seen: Seen, *, classes: int = 32) -> Tensor:
    """sum_n sum_y sum_{y' != y} p_t(y) (1 - p_t(y')) softplus(f_y' - f_y), over the teacher's likeliest classes.

    classes^2 pairs a row. Source: pairwise form of 2005.10419, recalled [R].
    """

    def of_rows(rows: Buckets) -> Tensor:
        teacher_CK, which_CK = of_classes(rows.teacher_CK, rows.ids_CK).topk(
            min(classes, rows.teacher_CK.shape[1]), dim=1
        )
        student_CK = rows.student_CK.gather(1, which_CK)
        p_CK = teacher_CK.exp()
        pairs_CKK = softplus(student_CK[:, None, :] - student_CK[:, :, None])
        weight_CKK = p_CK[:, :, None] * (1 - p_CK[:, None, :])
        here_CK = teacher_CK > ABSENT / 2
        apart_KK = ~torch.eye(p_CK.shape[1], dtype=torch.bool, device=p_CK.device)
        use_CKK = here_CK[:, None, :] & apart_KK
        return (weight_CKK * pairs_CKK).where(use_CKK, 0.0).sum((1, 2))

    return over_rows(seen, of_rows).sum()


def double_sampled(seen: Seen, *, classes: int = 32, samples: int = 256) -> Tensor:
    """`double` with sum_y over the teacher's likeliest classes and the label, and the others' sum from samples.

    Negatives are the teacher's likeliest `classes`, weighed 1 - p_t, and `samples` draws from all classes, the same
    for all rows: sum_{c not kept} (1 - p_t) e^f_c is estimated without bias by V / m times the sum over the draws that
    are not kept, with 1 - p_t taken as 1. The student's head is multiplied with kept and drawn classes only; others
    get no gradient. The positives are renormalised. Source: 2005.10419 on negative mining [R]; importance
    correction as in sampled softmax (Jean et al., ACL 2015).
    """
    drawn_M = torch.randint(seen.vocab_size, (samples,)).to(seen.labels_N.device)

    def of_rows(hidden_CD: Tensor, rows_C: Tensor) -> Tensor:
        ids_CK, teacher_CK = _kept(seen, rows_C, classes)
        student_CK, drawn_CM = logits_at(hidden_CD, seen.student.head, ids_CK, drawn_M)
        return sampled_softmax(student_CK, teacher_CK, ids_CK, drawn_CM, drawn_M, seen.vocab_size)

    return over_chunks(seen, of_rows).sum()


def sampled_softmax(
    student_CK: Tensor, teacher_CK: Tensor, ids_CK: Tensor, drawn_CM: Tensor, drawn_M: Tensor, vocab_size: int
) -> Tensor:
    """[C]: the equation of `double_sampled`: logits and the teacher's log-probabilities of kept classes (ABSENT: none),
    logits of the drawn ones."""
    here_CK = teacher_CK > ABSENT / 2
    student_CK = student_CK.masked_fill(~here_CK, ABSENT)
    is_kept_CM = ((drawn_M[None, :, None] == ids_CK[:, None, :]) & here_CK[:, None, :]).any(2)
    correction = math.log(vocab_size / max(1, drawn_M.shape[0]))
    drawn_CM = (drawn_CM + correction).masked_fill(is_kept_CM, ABSENT)
    negatives_CK = torch.cat([_log_of_rest(teacher_CK) + student_CK, drawn_CM], 1)
    total_CK = torch.logaddexp(teacher_CK + student_CK, negatives_CK.logsumexp(1, keepdim=True))
    p_CK = teacher_CK.exp()
    return (p_CK / p_CK.sum(1, keepdim=True) * (total_CK - student_CK).where(here_CK, 0.0)).sum(1)


@torch.no_grad()
def _kept(seen: Seen, rows_C: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(ids_CK, the teacher's log-probabilities) of its likeliest classes, and of the label as one more."""
    rows = teacher_buckets(seen, rows_C)
    teacher_CK, which_CK = of_classes(rows.teacher_CK, rows.ids_CK).topk(
        min(classes, rows.teacher_CK.shape[1]), dim=1
    )
    has_gold_C1 = (which_CK == rows.gold_C[:, None]).any(1, keepdim=True)
    gold_C1 = rows.teacher_CK.gather(1, rows.gold_C[:, None]).masked_fill(has_gold_C1, ABSENT)
    which_CK = torch.cat([which_CK, rows.gold_C[:, None]], 1)
    ids_CK = which_CK if rows.ids_CK is None else rows.ids_CK.gather(1, which_CK).clamp(min=0)
    return ids_CK, torch.cat([teacher_CK, gold_C1], 1)


def _log_of_rest(log_p_CK: Tensor) -> Tensor:
    """log(1 - p), ABSENT where p is 1 to rounding."""
    rest_CK = -torch.expm1(log_p_CK)
    return torch.where(rest_CK > 0, rest_CK.clamp(min=torch.finfo(rest_CK.dtype).tiny).log(), ABSENT)
