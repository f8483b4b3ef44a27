"""The student's hidden states read by the teacher's head."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from distill.models import Rows
from distill.objectives.seen import Seen, kl, over_rows


def cross_head(seen: Seen) -> Tensor:
    """sum_n KL( p_t || softmax(W_t P h_s) ): W_t the teacher's final layer, frozen, P learned beside the student.

    Costs one more product with the teacher's vocabulary and its gradient. Only a live teacher has the head.
    Source: SRD (2205.06701, IJCV 2024), its cross-network logits, with KL in place of the squared error.
    """
    teacher = seen.live
    projected_ND = seen.learned["cross_head"](seen.student.hidden_ND).to(teacher.hidden_ND.dtype)
    crossed = replace(seen, student=Rows(projected_ND, teacher.head))
    return over_rows(crossed, lambda rows: kl(rows.teacher_CK, rows.student_CK)).sum()
