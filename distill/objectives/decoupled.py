"""The label and the other classes, matched apart: ATKD and RLD."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.kernels import SparseTargets
from distill.objectives.seen import (
    ABSENT,
    Buckets,
    Seen,
    binary_kl,
    is_gold,
    kl,
    of_classes,
    of_gold,
    over_rows,
    renormalised,
    tempered,
)

SURE = 1e-3  # mass beside the label below which the classes kept of it say nothing


def target_and_others(seen: Buckets) -> Tensor:
    """[C, 3]: TKD, DKD and UNC of each row, where KL(p_t || p_s) = TKD + UNC * DKD.

    TKD: KL of (label, rest). DKD: KL of the renormalised others. UNC = 1 - p_t(label).
    Source: Zhao et al., CVPR 2022; ATKD, ACL 2024 (2402.11890), section 2.
    """
    student_CK, teacher_CK = seen.without_gold()
    student_rest_C, teacher_rest_C = student_CK.logsumexp(1), teacher_CK.logsumexp(1)
    gold = (of_gold(seen.teacher_CK, seen.gold_C), of_gold(seen.student_CK, seen.gold_C))
    tkd_C = binary_kl(*gold, teacher_rest_C, student_rest_C)
    dkd_C = kl(renormalised(teacher_CK), renormalised(student_CK))
    return torch.stack([tkd_C, dkd_C, teacher_rest_C.exp()], 1)


def atkd(seen: Seen, *, easy_share: float = 0.2) -> Tensor:
    """sum_easy lambda * DKD_n + sum_hard (1 - lambda) * (TKD_n + DKD_n).

    Easy are the rows whose UNC lies below the median of the micro-batch; lambda = easy_share. The paper averages
    within both halves, which is twice this over N. Stored targets add no DKD where UNC < 0.001: their kept classes
    are then the noise of storage. Depends on the micro-batch through the median.
    Source: ATKD, ACL 2024 (2402.11890), and its code; lambda recalled.
    """
    parts_N3 = over_rows(seen, target_and_others)
    if seen.num_rows == 0:
        return parts_N3.sum()
    tkd_N, dkd_N, unc_N = parts_N3.unbind(1)
    unc_N = unc_N.detach()
    if isinstance(seen.teacher, SparseTargets):
        dkd_N = torch.where(unc_N < SURE, 0.0, dkd_N)
    is_easy_N = unc_N < unc_N.median()
    return torch.where(is_easy_N, easy_share * dkd_N, (1 - easy_share) * (tkd_N + dkd_N)).sum()


def rld(
    seen: Seen,
    *,
    confidence: float = 1.0,
    others: float = 0.5,
    temperature: float = 1.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    """sum_n alpha * Ta^2 * KL2( max p_t^Ta || p_s^Ta(label) ) + beta * T^2 * KL( p_t^T || p_s^T on what is masked ).

    KL2 compares (the teacher's largest probability, rest) with (the student's of the label, rest). The mask drops
    the label and every class that the teacher holds for at least as likely; both sides are renormalised.
    alpha = confidence, beta = others, Ta = confidence_temperature, T = temperature. The paper's defaults for images
    are 1, 8, 1 and 4. The rest of stored targets is no class: never the largest, never masked, as each class of it lies
    below those that were kept, and both temperatures must be 1. Where the label is none of these only the rest
    survives, and the second part is 0.
    Source: RLD, ICCV 2025 (2408.07703), and its code.
    """

    def of_rows(rows: Buckets) -> Tensor:
        sure_CK, own_CK = (tempered(x, confidence_temperature) for x in (rows.teacher_CK, rows.student_CK))
        top_C, which_C = of_classes(sure_CK, rows.ids_CK).max(1)
        is_top_CK = torch.zeros_like(sure_CK, dtype=torch.bool).scatter(1, which_C[:, None], True)
        rest_C = sure_CK.masked_fill(is_top_CK, ABSENT).logsumexp(1)
        own_rest_C = own_CK.masked_fill(is_gold(rows), ABSENT).logsumexp(1)
        part_C = binary_kl(top_C, of_gold(own_CK, rows.gold_C), rest_C, own_rest_C)
        of_gold_C1 = of_gold(rows.teacher_CK, rows.gold_C)[:, None]
        dropped_CK = of_classes(rows.teacher_CK, rows.ids_CK) >= of_gold_C1
        teacher_CK, student_CK = (
            tempered(x.masked_fill(dropped_CK, ABSENT), temperature)
            for x in (rows.teacher_CK, rows.student_CK)
        )
        others_C = kl(teacher_CK, student_CK)
        return confidence * confidence_temperature**2 * part_C + others * temperature**2 * others_C

    return over_rows(seen, of_rows).sum()
